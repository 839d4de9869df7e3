"""mpgpt-ssh, between a program that calls itself mpirun and one that calls itself ssh."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpgpt.commands import ssh_agent
from mpgpt.commands.ssh_agent import FAILED, OPTIONS, explain, host_index
from mpgpt.transport import mpirun
from tests.support.launch import ENV, ROOT

BOURNE = "PRTE_PREFIX=/opt/x; export PRTE_PREFIX; /opt/x/bin/prted --leader"
SSH = f"""#!{sys.executable}
import json, os, sys, time
from pathlib import Path
here = Path(os.environ["FAKE"])
(here / "called.json").write_text(json.dumps(sys.argv[1:]))
(here / "pid").write_text(str(os.getpid()))
sys.stderr.write((here / "says").read_text() if (here / "says").exists() else "")
sys.stderr.flush()
print("from the host", flush=True)
time.sleep(float(os.environ.get("FAKE_S", "0")))
sys.exit(int(os.environ.get("FAKE_STATUS", "0")))
"""
MPIRUN = """
import subprocess, sys, time
agent = subprocess.Popen([sys.argv[1], "-m", "mpgpt.commands.ssh_agent", *sys.argv[3:]])
print(agent.pid, flush=True)
if sys.argv[2] == "waits":
    while True:  # as for a host that never comes
        time.sleep(0.05)
sys.exit(agent.wait())
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cables:
    """The folder in which the fake ssh tells how it was called; the hostfile's settings lie there too."""

    folder: Path

    def start(self, *arguments: str, waits: bool = False, **environment: str) -> subprocess.Popen[str]:
        """A launcher that calls mpgpt-ssh with these arguments, and ends with it, or not at all."""
        command = ["mpirun", "-c", MPIRUN, sys.executable, "waits" if waits else "ends", *arguments]
        return subprocess.Popen(
            command, executable=sys.executable, cwd=self.folder, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=ENV | {"PATH": f"{self.folder}:{ENV['PATH']}", "PYTHONPATH": str(ROOT), "FAKE": str(self.folder)}
            | environment,
        )  # fmt: skip

    def run(self, *arguments: str, waits: bool = False, **environment: str) -> tuple[int, str, str]:
        """Its status, and what came to its standard output (without the agent's number) and error."""
        with self.start(*arguments, waits=waits, **environment) as process:
            output, errors = process.communicate(timeout=120)
        assert "Traceback" not in errors, errors
        return process.returncode, output.partition("\n")[2], errors

    @property
    def called(self) -> list[str]:
        """The arguments that ssh was given."""
        arguments: list[str] = json.loads((self.folder / "called.json").read_text())
        return arguments


@pytest.fixture
def cables(tmp_path: Path) -> Cables:
    (tmp_path / "ssh").write_text(SSH)
    (tmp_path / "ssh").chmod(0o755)
    return Cables(folder=tmp_path)


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


# -- options


@pytest.mark.parametrize(
    ("arguments", "at"),
    [
        (["pi5", "true"], 0),
        (["-x", "pi5", "true"], 1),
        (["-p", "22", "pi5", "true"], 2),
        (["-p22", "pi5", "true"], 1),
        (["-xp", "22", "pi5"], 2),
        (["-xp22", "pi5"], 1),
        (["-o", "Port=22", "-l", "me", "-i", "/k", "pi5"], 6),
        (["-oPort=22", "-4", "-J", "jump", "-P", "tag", "pi5", "-x"], 6),
        (["--", "pi5"], 1),
        (["-x", "--", "pi5"], 2),
    ],
)
def test_the_host_is_found_behind_the_options(arguments: list[str], at: int) -> None:
    assert host_index(arguments) == at


@pytest.mark.parametrize("arguments", [[], ["-x"], ["-p", "22"], ["-p"], ["--"]])
def test_without_a_host(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        host_index(arguments)
    assert caught.value.code == 2 and "usage" in capsys.readouterr().err


def test_ssh_is_given_our_options_behind_its_own(cables: Cables) -> None:
    """Of two, ssh takes the first: what a person says goes before."""
    status, output, errors = cables.run("-p", "22", "-o", "ConnectTimeout=60", "pi5", "true", "&&", "false")
    assert (status, output, errors) == (0, "from the host\n", "")
    options = [word for option in OPTIONS for word in ("-o", option)]
    assert cables.called == ["-p", "22", "-o", "ConnectTimeout=60", *options, "pi5", "true && false"]
    assert "BatchMode=yes" in OPTIONS


# -- settings


@pytest.mark.parametrize(
    ("command", "taken"),
    [
        (BOURNE, True),
        ("PREFIX=/x;export PREFIX;prted", True),
        ("setenv PRTE_PREFIX /opt/x; /opt/x/bin/prted", False),
        ("/opt/x/bin/prted PREFIX", False),
        ("true; PREFIX=/x prted", False),
    ],
)
def test_settings_go_along_for_shells_of_bournes_kind(tmp_path: Path, command: str, taken: bool) -> None:
    (tmp_path / "my hosts.yaml").write_text('system: don\'t "$HOME"\n')
    above = mpirun.Launcher(pid=1, argv=("mpirun", "-hostfile", "my hosts"), cwd=tmp_path)
    carried = ssh_agent.with_settings(command, above)
    assert carried.endswith(command) and (carried != command) == taken
    if taken:
        code = f"{carried.removesuffix(command)}exec printenv {mpirun.SETTINGS_VARIABLE}"
        value = subprocess.run(["sh", "-c", code], capture_output=True, text=True, check=True).stdout.rstrip("\n")
        file = mpirun.settings(None, {mpirun.SETTINGS_VARIABLE: value})
        assert file and file.path == tmp_path / "my hosts.yaml" and file.text == 'system: don\'t "$HOME"\n'


def test_settings_that_are_not_there_or_unreadable_are_left(tmp_path: Path) -> None:
    above = mpirun.Launcher(pid=1, argv=("mpirun", "-hostfile", "h"), cwd=tmp_path)
    assert ssh_agent.with_settings(BOURNE, above) == ssh_agent.with_settings(BOURNE, None) == BOURNE
    (tmp_path / "h.yaml").mkdir()
    assert ssh_agent.with_settings(BOURNE, above) == BOURNE


def test_settings_too_long_for_the_way_do_not_stop_the_run(cables: Cables) -> None:
    """Linux takes no argument of more than 128 KiB; and a first rank that is here does not need them."""
    above = mpirun.Launcher(pid=1, argv=("mpirun", "-hostfile", "h"), cwd=cables.folder)
    (cables.folder / "h.yaml").write_bytes(b"# " + os.urandom(100_000).hex().encode())
    command = ssh_agent.with_settings(BOURNE, above)
    assert len(command) < 128 << 10
    assert cables.run("pi5", command)[0] == 0


# -- statuses


@pytest.mark.parametrize(
    ("status", "words", "said"),
    [
        (FAILED, ["connect to host pi5 port 22: No route to host"], ["pi5", "No route to host", "check_hosts.py"]),
        (FAILED, [], ["pi5", "the connection broke"]),
        (127, [], ["pi5 has no /opt/x/bin/prted", "make install"]),
        (126, [], ["pi5 has no /opt/x/bin/prted"]),
        (0, [], []),
        (1, ["Permission denied"], []),
        (137, [], []),
    ],
)
def test_only_what_ssh_says_is_explained(status: int, words: list[str], said: list[str]) -> None:
    sentence = explain("pi5", BOURNE, status, words)
    assert bool(sentence) == bool(said)
    for part in said:
        assert part in sentence


@pytest.mark.parametrize(
    ("status", "says", "said"),
    [
        (255, "ssh: connect to host pi5 port 22: No route\n", "(connect to host pi5 port 22: No route)"),
        (255, "me@pi5: Permission denied (publickey).\n", "(me@pi5: Permission denied (publickey).)"),
        (255, "kex_exchange_identification: read\nConnection reset by 10.0.0.3 port 22\n", "(Connection reset by"),
        (127, "sh: 1: /opt/x/bin/prted: not found\n", "pi5 has no /opt/x/bin/prted"),
    ],
)  # fmt: skip
def test_a_host_that_cannot_be_had_ends_the_run_with_one_sentence(
    cables: Cables, status: int, says: str, said: str
) -> None:
    (cables.folder / "says").write_text(says)
    ended, _, errors = cables.run("pi5", BOURNE, waits=True, FAKE_STATUS=str(status))
    assert ended != 0, "mpirun would wait for ever"
    (ours,) = [line for line in errors.splitlines() if line.startswith("mpgpt: ")]
    assert said in ours
    theirs = [line for line in errors.splitlines() if not line.startswith("mpgpt: ")]
    assert theirs == ([says.strip()] if status == 127 else [])


def test_what_the_host_says_passes(cables: Cables) -> None:
    """And its status too; ssh's own words are not lost where nothing is made of them."""
    (cables.folder / "says").write_text(
        "Traceback of somebody\nConnection pool is full\nwarning: Füße\n".replace("Traceback", "Trace")
    )
    status, output, errors = cables.run("pi5", BOURNE, FAKE_STATUS="3")
    assert (status, output) == (3, "from the host\n")
    assert sorted(errors.splitlines()) == ["Connection pool is full", "Trace of somebody", "warning: Füße"]


def test_without_ssh(cables: Cables) -> None:
    (cables.folder / "ssh").unlink()
    status, _, errors = cables.run("pi5", BOURNE, waits=True, PATH=str(cables.folder))
    assert status != 0 and errors.count("\n") == 1
    assert errors.startswith("mpgpt: pi5 cannot be reached by ssh (ssh does not start: No such file")


def test_by_hand_it_is_ssh(cables: Cables) -> None:
    """Without mpirun above it there is no run to end, and ssh's own words are shown."""
    (cables.folder / "says").write_text("ssh: connect to host pi5 port 22: Connection refused\n")
    run = subprocess.run(
        [sys.executable, "-m", "mpgpt.commands.ssh_agent", "pi5", "true"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=ENV | {"PATH": f"{cables.folder}:{ENV['PATH']}", "FAKE": str(cables.folder), "FAKE_STATUS": "255"},
    )  # fmt: skip
    assert (run.returncode, run.stdout) == (255, "from the host\n")
    assert "Connection refused" in run.stderr and "mpgpt:" not in run.stderr


# -- its end


@pytest.mark.parametrize("how", ["its parent dies", "it is told to end"])
def test_it_takes_ssh_along(cables: Cables, how: str) -> None:
    with cables.start("pi5", BOURNE, waits=True, FAKE_S="600") as process:
        assert process.stdout
        agent = psutil.Process(int(process.stdout.readline()))
        wait_for((cables.folder / "pid").exists)
        wait_for((cables.folder / "pid").read_text)
        ssh = psutil.Process(int((cables.folder / "pid").read_text()))
        assert process.stdout.readline() == "from the host\n"
        if how == "its parent dies":
            process.kill()
        else:
            agent.terminate()
        wait_for(lambda: not ssh.is_running() or ssh.status() == psutil.STATUS_ZOMBIE)
        wait_for(lambda: not agent.is_running() or agent.status() == psutil.STATUS_ZOMBIE)
        process.kill()
        assert process.communicate()[1] == "", "nobody is told of a connection that was ended on purpose"
