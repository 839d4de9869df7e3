"""The defaults that `make install` gives mpirun: written once, whatever else stands in the files."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from scripts.mpi_defaults import BEGIN, END, agent, write
from tests.launch import ENV, mpirun

PARAMETERS = {"a": "1", "b": "x y"}
BLOCK = f"{BEGIN}a = 1\nb = x y\n{END}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (None, BLOCK),
        ("", BLOCK),
        ("# theirs\nc = 3\n", f"# theirs\nc = 3\n{BLOCK}"),
        ("c = 3", f"c = 3\n{BLOCK}"),
        (f"c = 3\n{BEGIN}a = 0\nold = 1\n{END}d = 4\n", f"c = 3\n{BLOCK}d = 4\n"),
        (f"{BEGIN}{END}", BLOCK),
        (f"{BEGIN}a = 0\n# theirs\nd = 4\n", f"{BLOCK}# theirs\nd = 4\n"),
        ("c = 3\r\n", f"c = 3\r\n{BLOCK}"),
    ],
)
def test_our_block_is_replaced_and_every_other_line_stays(tmp_path: Path, before: str | None, after: str) -> None:
    file = tmp_path / "etc" / "p.conf"
    if before is not None:
        file.parent.mkdir()
        file.write_bytes(before.encode())
    for _ in range(2):
        write(file, PARAMETERS)
        assert file.read_bytes().decode() == after


def test_lines_in_another_encoding_stay(tmp_path: Path) -> None:
    file = tmp_path / "p.conf"
    file.write_bytes(b"# f\xfcr uns\n")
    write(file, PARAMETERS)
    assert file.read_bytes() == b"# f\xfcr uns\n" + BLOCK.encode()


@pytest.mark.parametrize("name", ["plain", "with space", "with:colon", "none"])
def test_the_program_that_reaches_hosts(tmp_path: Path, name: str) -> None:
    """The runtime would split a path at spaces and colons."""
    folder = tmp_path / name
    folder.mkdir()
    program = folder / "mpgpt-ssh"
    if name != "none":
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    said = {"plain": str(program), "none": "ssh"}.get(name, "mpgpt-ssh : ssh")
    assert agent(folder) == said


def test_mpirun_takes_them() -> None:
    """It calls our program to reach a host, and ours names the host that there is not, in one sentence."""
    run = subprocess.run(
        [*mpirun(1, "-c", "")[:1], "-host", "no-such-host.invalid:1", "-n", "1", "true"],
        capture_output=True, text=True, timeout=120, env=ENV, check=False,
    )  # fmt: skip
    assert run.returncode != 0
    (ours,) = [line for line in run.stderr.splitlines() if line.startswith("mpgpt: ")]
    assert "no-such-host.invalid cannot be reached by ssh" in ours
