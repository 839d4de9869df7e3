"""Ranks of different code refuse one another, in one sentence that says which host has what."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mpgpt.transport import code_version
from tests.mpi.test_failures import assert_one_message
from tests.support.launch import ENV, ROOT, mpirun


@pytest.fixture
def checkouts(tmp_path: Path) -> list[Path]:
    """Two copies of the packages."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        for package in code_version.PACKAGES:
            shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "page"))
    return folders


def run_of(checkouts: Sequence[Path], *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A run of which each rank has another checkout."""
    command = mpirun(1)[:-3]
    for folder in checkouts:
        path = ":".join(str(folder / place) for place in ("", "ios_proxy", "api"))
        program = ["env", f"PYTHONPATH={path}", sys.executable, "-m", "mpgpt", *map(str, arguments)]
        command += [":"] * (folder != checkouts[0]) + ["-n", "1", *program]
    return subprocess.run(
        command, cwd=checkouts[0].parent, env=ENV, capture_output=True, text=True, timeout=120, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip


def test_the_same_code_in_two_places_is_one_code(checkouts: list[Path], models: dict[str, Path]) -> None:
    run = run_of(checkouts, "generate", "--model", models["gpt2"], "--prompt", "x", "--raw", "--max-new-tokens", "2")
    assert run.returncode == 0, run.stderr


def test_different_code_is_refused(checkouts: list[Path], models: dict[str, Path]) -> None:
    path = checkouts[1] / "mpgpt" / "transport" / "wire.py"
    path.write_text(path.read_text() + "# another\n")
    run = run_of(checkouts, "generate", "--model", models["gpt2"], "--prompt", "x")
    assert_one_message(run, "the hosts run different code", "update all checkouts to the same commit")
    (sentence,) = [line for line in run.stderr.splitlines() if line.startswith("mpgpt: ")]
    assert sentence.count(f"{socket.gethostname()} has ") == 2
    assert len(set(word for word in sentence.replace(")", " ").split() if len(word) == 12 and word.isalnum())) == 2


@pytest.mark.parametrize("other", [0, 1])
def test_a_version_that_introduces_itself_otherwise_is_refused(
    checkouts: list[Path], models: dict[str, Path], other: int
) -> None:
    """One that says more of a rank, or less, than this one knows; on rank 0 or on another."""
    path = checkouts[other] / "mpgpt" / "transport" / "mpi.py"
    path.write_text(
        path.read_text().replace('"heartbeat": self', '"pulse": self').replace("heartbeat: int", "pulse: int")
    )
    run = run_of(checkouts, "generate", "--model", models["gpt2"], "--prompt", "x")
    host = socket.gethostname()
    assert_one_message(run, f"{host} runs another version of mpgpt than {host}", "update all checkouts")
