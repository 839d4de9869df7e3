"""How a process was started, as its environment tells it; the mpirun above is tests/transport/test_mpirun.py's."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mpgpt.commands.launcher import MPI_DEFAULTS, Launch, detect, rank_of, set_mpi_defaults
from mpgpt.transport import mpirun
from mpgpt.transport.mpirun import Launcher, SettingsFile

RANK_1 = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "3"}


def above(tmp_path: Path, *argv: str) -> Launcher:
    return Launcher(pid=1, argv=("mpirun", *argv), cwd=tmp_path)


def test_alone() -> None:
    launch = Launch(environment={}, launcher=None)
    assert rank_of({}) is None and not launch.by_mpirun and launch.settings(None) is None


def test_a_rank() -> None:
    assert rank_of(RANK_1) == 1
    assert Launch(environment=RANK_1, launcher=None).by_mpirun


@pytest.mark.parametrize(("here", "elsewhere"), [("3", False), ("2", True)])
def test_ranks_on_other_hosts(here: str, elsewhere: bool) -> None:
    launch = Launch(environment=RANK_1 | {"OMPI_COMM_WORLD_LOCAL_SIZE": here}, launcher=None)
    assert launch.several_hosts is elsewhere


def test_parameters_that_are_set_already_stay() -> None:
    environment = {"OMPI_MCA_pml": "ucx"}
    set_mpi_defaults(environment)
    assert environment == MPI_DEFAULTS | {"OMPI_MCA_pml": "ucx"}


def test_settings_that_are_named_go_before_those_beside_the_hostfile(tmp_path: Path) -> None:
    beside, named = tmp_path / "hosts.yaml", tmp_path / "other.yaml"
    beside.touch()
    launch = Launch(environment={}, launcher=above(tmp_path, "--hostfile", "hosts"))
    assert launch.settings(None) == SettingsFile(path=beside)
    assert launch.settings(named) == SettingsFile(path=named)


@pytest.mark.parametrize("terminal", [True, False])
def test_standard_input_is_mpiruns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    """Ours under mpirun is a pipe, whatever the person has."""
    monkeypatch.setattr(Launcher, "terminal", terminal)
    assert Launch(environment=RANK_1, launcher=above(tmp_path)).interactive is terminal


def test_a_closed_standard_input_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert not Launch(environment={}, launcher=None).interactive


def test_the_launcher_is_looked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = above(tmp_path)
    monkeypatch.setattr(mpirun, "find", lambda environment: found if environment is RANK_1 else None)
    assert detect(RANK_1) == Launch(environment=RANK_1, launcher=found)
