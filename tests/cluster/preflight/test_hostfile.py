"""What mpirun is told: its hostfile, and the options before the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpgpt.cluster.preflight import check
from mpgpt.cluster.preflight.hostfile import parse_mpirun, read_hostfile
from mpgpt.errors import UsageError


def test_a_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(
        "\ufeff# a comment\n\nmini1 slots=2 # another\n  joe@mini2.lan   slots = 1 max_slots=4\n10.0.0.3\nmini1\n"
        "// mini9\nmini-4_x slots=1\r\n"
    )
    lines = read_hostfile(path)
    assert [(line.target, line.short, line.line) for line in lines] == [
        ("mini1", "mini1", 3), ("joe@mini2.lan", "mini2", 4), ("10.0.0.3", "10.0.0.3", 5), ("mini-4_x", "mini-4_x", 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no host"),
        ("# mini1\n\n", "names no host"),
        ("mini1:2", "line 1: 'mini1:2' is no host's name; write: mini1 slots=2"),
        ("mini1 mini2", "line 1: 'mini2' stands behind mini1; write one host a line"),
        ("a\nmini1 slots=0", "line 2: slots is '0'"),
        ("mini1 slots=many", "line 1: slots is 'many'"),
        ("^mini1", "line 1: '^mini1' is no host's name"),
        ("-oProxyCommand=x", "line 1: '-oProxyCommand=x' is no host's name"),
        ("joe@-oX", "is no host's name"),
        ("mini1=2", "is no host's name"),
        ("joe@", "is no host's name"),
        ("mini2.lan\nmini2.wan", "line 2: mpirun takes mini2.lan (line 1) and mini2.wan for one host"),
        ("mini2\njoe@mini2", "line 2: mini2 stands in line 1 with another user"),
    ],
)
def test_a_hostfile_that_is_wrong(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(f"{path}: ") and sentence in str(caught.value)


def test_all_wrong_lines_are_told(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("mini1 slots=0\nmini2\nmini3 mini4\n")
    with pytest.raises(UsageError) as caught:
        read_hostfile(path)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["line 1", "line 3"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00m", b"mini1\n" * 100_000])
def test_what_is_no_hostfile(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="this is no hostfile"):
        read_hostfile(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_hostfile(tmp_path)


def test_options_as_mpirun_takes_them() -> None:
    text = (
        "--mca btl_tcp_if_include 10.0.0.0/8 -n 3 hosts --prtemca plm_ssh_agent ssh -x A=1 -x B --map-by node "
        "--omca=pml ob1 --oversubscribe --display map"
    )
    told = parse_mpirun(text.split())
    assert (told.hostfile, told.ranks, told.exported) == (Path("hosts"), 3, {"A": "1", "B": None})
    assert told.parameters == {
        "mca btl_tcp_if_include": "10.0.0.0/8", "prtemca plm_ssh_agent": "ssh", "mca pml": "ob1",
    }  # fmt: skip
    assert " ".join(told.words) == (
        "--mca btl_tcp_if_include 10.0.0.0/8 --prtemca plm_ssh_agent ssh -x A=1 -x B --map-by node --omca=pml ob1 "
        "--oversubscribe"
    )
    assert set(told.words) - set(told.elsewhere) == {"--map-by", "node"}


@pytest.mark.parametrize(
    "arguments",
    ["hosts -np 2", "-hostfile hosts -np 2", "--hostfile=hosts -n=2", "--np 2 -machinefile hosts", "-c 2 hosts"],
)
def test_a_hostfile_and_a_number(arguments: str) -> None:
    told = parse_mpirun(arguments.split())
    assert (told.hostfile, told.ranks, told.words) == (Path("hosts"), 2, ())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "there is none"),
        ("a b", "there are 2: a, b"),
        ("a -hostfile b", "there are 2: a, b"),
        ("a -n", "-n needs a value"),
        ("a -n 0", "-n is '0'"),
        ("a -n=-1", "-n is '-1'"),
        ("a --mca btl", "--mca needs a name and a value"),
    ],
)
def test_options_that_are_wrong(arguments: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_mpirun(arguments.split())
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("agent", "command"),
    [
        ("", ["ssh"]),
        ("/opt/mpgpt/.venv/bin/mpgpt-ssh", ["ssh"]),
        ("ssh -p 2222", ["ssh", "-p", "2222"]),
        ("ssh : rsh", ["ssh"]),
    ],
)
def test_ssh_is_called_as_mpirun_is_told(agent: str, command: list[str]) -> None:
    assert check.ssh_command({"prtemca plm_ssh_agent": agent}, {}) == command
    assert check.ssh_command({}, {"PRTE_MCA_plm_ssh_agent": agent}) == command


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("----\nThere are not enough slots available in the system to satisfy the 3\n", "not enough slots for -n 3"),
        ("----\nAn unrecognized option\n\n  Option: --nosuch\n", "no option --nosuch"),
        ("----\nPRTE detected a parse error\n\nIt occured on line number 4 on token 1.", "not understand line 4"),
        ("----\nSomething\nnew.\n\nMore.\n\nAnd more", "mpirun refuses it: Something new. More."),
        ("", "without a word"),
    ],
)
def test_what_mpirun_refuses(text: str, sentence: str) -> None:
    assert sentence in check.refusal(text, ["-n", "3"])
