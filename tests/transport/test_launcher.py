"""The mpirun above a run: found, its settings read and packed, and ended by the guard whatever it does."""

from __future__ import annotations

import math
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from mpgpt.config import load
from mpgpt.errors import UsageError
from mpgpt.transport import launcher
from mpgpt.transport.launcher import (
    GUARD_VARIABLE,
    MOST_PACKED,
    SETTINGS_VARIABLE,
    DistantGuard,
    Guard,
    GuardPost,
    Launcher,
    beside,
    dial_guard,
    find,
    hostfile_of,
    pack,
)
from tests.support.launch import ENV, ROOT

PROGRAM = ["-n", "3", "/x/.venv/bin/mpgpt", "generate", "--prompt", "-hostfile"]


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/x/.venv/bin/prterun", "-hostfile", "hostfiles/local", *PROGRAM], "hostfiles/local"),
        (["prterun", "-n", "3", "--hostfile", "/abs/hybrid", "/x/mpgpt", "serve"], "/abs/hybrid"),
        (["/usr/bin/mpirun", "--hostfile=a b=c", *PROGRAM], "a b=c"),
        (["mpirun", "-machinefile", "m", *PROGRAM], "m"),
        (["mpiexec", "--machinefile", "m", *PROGRAM], "m"),
        (["orterun", "-default-hostfile", "d", *PROGRAM], "d"),
        (["mpirun", "--default-hostfile=d", *PROGRAM], "d"),
        (["mpirun", "-n", "3", "mpgpt", "generate"], None),
        (["mpirun", "-n", "3", "mpgpt", "-hostfile"], None),
        (["mpirun", "-n", "3", "-host", "a,b", "mpgpt"], None),
        (["bash", "-c", "mpirun -hostfile x", "-hostfile", "y"], None),
        (["/x/.venv/bin/mpgpt", "-hostfile", "y"], None),
        (["mpirun"], None),
        ([], None),
    ],
)
def test_the_hostfile_is_found(argv: list[str], expected: str | None) -> None:
    assert hostfile_of(argv) == expected


def test_settings_are_found_beside_the_hostfile(tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text("")
    assert beside("h", tmp_path) == tmp_path / "h.yaml"
    assert beside(str(tmp_path / "h"), Path("/nowhere")) == tmp_path / "h.yaml"
    assert beside("other", tmp_path) is None


# -- finding it


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@contextmanager
def fake(name: str, code: str, *arguments: str, cwd: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    """A process that calls itself ``name`` and runs ``code``; it is ready when it has written a line."""
    process = subprocess.Popen(
        [name, "-c", code, *arguments], executable=sys.executable, cwd=cwd, env=ENV | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


RANK = """
import os, sys
from mpgpt.transport.launcher import find
found = find(os.environ)
print(found and (found.pid, found.argv, str(found.cwd), str(found.settings)))
"""
LAUNCH = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', {RANK!r}], check=True)"


def test_the_launcher_is_a_parent_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "h.yaml").write_text("seed: 1\n")
    with fake("/x/bin/prterun", LAUNCH, "-hostfile", "h", cwd=tmp_path) as process:
        said, errors = process.communicate(timeout=60)
        assert not errors
        pid, argv, cwd, settings = eval(said)
    assert (pid, argv[0], argv[-2:]) == (process.pid, "/x/bin/prterun", ("-hostfile", "h"))
    assert (cwd, settings) == (str(tmp_path), str(tmp_path / "h.yaml"))
    with fake("/x/bin/bash", LAUNCH, "-hostfile", "h", cwd=tmp_path) as process:
        assert process.communicate(timeout=60)[0] == "None\n"


@pytest.mark.parametrize("named", ["host", "domain", "another host", "another program", "gone"])
def test_the_launcher_of_a_rank_that_came_by_ssh(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    """It is nobody's parent then; the run's name tells its host and process. macOS's hosts are called x.local."""
    monkeypatch.setattr(socket, "gethostname", lambda: "pi-5.local")
    host = {"domain": "pi-5.local", "another host": "pi-6"}.get(named, "pi-5")
    name = "bash" if named == "another program" else "mpirun"
    with fake(name, "print(flush=True); input()") as process:
        assert process.stdout
        process.stdout.readline()
        pid = process.pid
        if named == "gone":
            process.communicate("\n", timeout=60)
        found = find({"PMIX_NAMESPACE": f"prterun-{host}-{pid}@1"})
        if named in ("host", "domain"):
            assert found and (found.pid, found.argv[0]) == (pid, "mpirun")
        else:
            assert found is None


def test_without_a_launcher() -> None:
    assert find({}) is None and find({"PMIX_NAMESPACE": "nonsense"}) is None
    assert launcher.settings(None, {}) is None


# -- its settings


@pytest.mark.parametrize("name", ["h.yaml", "mit Leerzeichen.yaml", "Füße 足.yaml", "a'b\"$c.yaml"])
def test_settings_survive_the_way_to_another_host(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("system: Füße\nseed: 7\n", encoding="utf-8")
    value = pack(path)
    assert value.isprintable()
    file = launcher.settings(None, {SETTINGS_VARIABLE: value})
    assert file and file.path == path and file.text == path.read_text(encoding="utf-8")
    assert load(file.path, file.text) == load(path)


def test_large_settings(tmp_path: Path) -> None:
    """200 KB that are alike are little; what is too much for the way is a sentence, and only where it is wanted."""
    path = tmp_path / "h.yaml"
    path.write_text("# nothing\n" * 20_000 + "seed: 3\n")
    file = launcher.settings(None, {SETTINGS_VARIABLE: pack(path)})
    assert file and load(file.path, file.text).seed == 3
    path.write_text("# " + "".join(random.Random(1).choices("0123456789abcdef" * 3 + "xyzuvw", k=200_000)))
    value = pack(path)
    assert len(value) < MOST_PACKED
    with pytest.raises(UsageError, match=r"h\.yaml is too long to be taken to another host"):
        launcher.settings(None, {SETTINGS_VARIABLE: value})


@pytest.mark.parametrize(
    ("content", "said"), [(b"system: F\xfc\xdfe\n", "not UTF-8"), (b"seed: 1\n", ""), (b"\xef\xbb\xbfseed: 1\n", "")]
)
def test_settings_from_elsewhere_read_as_here(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "h.yaml"
    path.write_bytes(content)
    if not said:
        file = launcher.settings(None, {SETTINGS_VARIABLE: pack(path)})
        assert file and load(file.path, file.text).seed == 1
        return
    with pytest.raises(UsageError, match=said):
        launcher.settings(None, {SETTINGS_VARIABLE: pack(path)})


@pytest.mark.parametrize("value", ["/x/h.yaml rubbish", "/x/h.yaml AAAA", "/x/h.yaml é"])
def test_a_variable_that_somebody_else_wrote(value: str) -> None:
    with pytest.raises(UsageError, match=SETTINGS_VARIABLE):
        launcher.settings(None, {SETTINGS_VARIABLE: value})


# -- its standard error


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_what_is_said_to_its_standard_error(tmp_path: Path) -> None:
    with fake("mpirun", "input()") as process:
        assert Launcher(pid=process.pid, argv=(), cwd=ROOT).say("the reason: Füße, a\udce9b")
        assert process.communicate("\n", timeout=60)[1] == "the reason: Füße, a\\udce9b\n"
    path = tmp_path / "errors"
    with path.open("w") as errors, subprocess.Popen(["sleep", "60"], stderr=errors) as sleeping:
        assert Launcher(pid=sleeping.pid, argv=(), cwd=ROOT).say("one")
        assert Launcher(pid=sleeping.pid, argv=(), cwd=ROOT).say("two")
        sleeping.kill()
    assert path.read_text() == "one\ntwo\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
@pytest.mark.parametrize("how", ["nobody reads", "it is full", "it is gone"])
def test_last_words_wait_for_nobody(how: str) -> None:
    reading, writing = os.pipe()
    with subprocess.Popen(["sleep", "60"], stderr=writing) as sleeping:
        if how == "it is full":
            os.set_blocking(writing, False)
            with pytest.raises(BlockingIOError):
                while True:
                    os.write(writing, b"x" * 4096)
        os.close(writing)
        if how == "nobody reads":
            os.close(reading)
        if how == "it is gone":
            sleeping.kill()
            sleeping.wait()
        begun = time.monotonic()
        assert not Launcher(pid=sleeping.pid, argv=(), cwd=ROOT).say("the reason")
        assert time.monotonic() - begun < 20
        sleeping.kill()
    if how != "nobody reads":
        os.close(reading)


# -- the guard

MPIRUN = """
import os, signal, subprocess, sys, time
seen = []
def count(number, frame):
    seen.append(number)
    if len(set(seen)) == 3:
        os._exit(9)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, count)
connection = subprocess.Popen(["mpgpt-ssh", "-c", "import time; time.sleep(600)"], executable=sys.argv[2])
rank = subprocess.Popen([sys.argv[2], "-c", sys.argv[1]], stdin=subprocess.PIPE)
print(connection.pid, rank.pid, flush=True)
while True:
    time.sleep(0.05)
    if "obeys" in sys.argv and rank.poll() is not None:
        connection.kill()
        sys.exit(0)
"""
"""Waits for ever, as mpirun does for a lost host, and ends at the third kind of signal."""

RANK_0 = """
import os, signal, sys, time
from pathlib import Path
from mpgpt.transport.launcher import Guard, Launcher
guard = Guard(Launcher(pid=os.getppid(), argv=(), cwd=Path("/")), "rank 0 on here")
signal.signal(signal.SIGTERM, lambda number, frame: None)
signal.set_wakeup_fd(guard.wakeup, warn_on_full_buffer=False)
print(guard._process.pid, file=sys.stderr, flush=True)
{then}
"""


@contextmanager
def guarded(then: str, *words: str) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """An mpirun whose rank 0 does ``then``; and mpirun's connection, rank 0, and the guard. All must end."""
    with fake("mpirun", MPIRUN, RANK_0.format(then=then), sys.executable, *words) as process:
        assert process.stdout and process.stderr
        connection, rank = map(int, process.stdout.readline().split())
        family = [psutil.Process(connection), psutil.Process(rank), psutil.Process(int(process.stderr.readline()))]
        yield process, family
        assert process.wait(60) is not None
        _, alive = psutil.wait_procs([family[0], family[2]], timeout=30)
        assert not alive, "left behind"
        with psutil_gone(family[1]):
            family[1].kill()


@contextmanager
def psutil_gone(process: psutil.Process) -> Iterator[None]:
    try:
        yield
    except psutil.NoSuchProcess:
        assert not process.is_running()


def test_a_killed_rank_0_takes_mpirun_along() -> None:
    with guarded("time.sleep(600)") as (process, (_, rank, _)):
        rank.kill()
        assert process.wait(60) == 9, "by three signals, not by force"
        if sys.platform == "linux":
            assert process.stderr
            assert "mpgpt: rank 0 on here ended without a word: it was killed\n" in process.stderr.read()


@pytest.mark.parametrize("then", ["guard.end()", "guard.stopping()", "guard.stopping(); os._exit(1)"])
def test_mpirun_that_does_not_end_is_ended(then: str) -> None:
    with guarded(then) as (process, _):
        assert process.wait(60) == 9
        assert process.stderr and "ended without a word" not in process.stderr.read()


def test_a_signal_is_a_word_even_while_rank_0_computes() -> None:
    """mpirun ends rank 0 by a signal that Python does not see in time, and kills it: nobody is to say that it died."""
    with guarded("time.sleep(1); print('computing', file=sys.stderr, flush=True); sum(range(10**11))") as (
        process,
        family,
    ):
        assert process.stderr and process.stderr.readline() == "computing\n"
        family[1].send_signal(signal.SIGTERM)
        time.sleep(0.3)
        family[1].kill()
        assert process.wait(60) == 9
        assert "ended without a word" not in process.stderr.read()


def test_mpirun_that_ends_by_itself_is_let() -> None:
    with guarded("guard.done()", "obeys") as (process, _):
        assert process.wait(60) == 0


def test_the_guard_survives_the_signals_that_end_a_run() -> None:
    with guarded("time.sleep(600)") as (process, (_, rank, guard)):
        wait_for(lambda: "mpgpt.transport.launcher" in guard.cmdline())
        time.sleep(1.0)  # until it has begun
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            guard.send_signal(number)
        assert os.getsid(guard.pid) == guard.pid, "Ctrl-C is for the run's group"
        time.sleep(0.3)
        assert guard.is_running() and guard.status() != psutil.STATUS_ZOMBIE
        rank.kill()
        assert process.wait(60) == 9


def test_a_process_that_took_mpiruns_number_is_left_alone() -> None:
    """mpirun is gone before its guard has a word."""
    said = threading.Event()
    with fake("mpirun", "input()") as process:
        done: list[int] = []

        def read() -> bytes:
            said.wait(60)
            return b"e"

        def work() -> None:
            launcher.guard(Launcher(pid=process.pid, argv=(), cwd=ROOT), "x", read)
            done.append(1)

        thread = threading.Thread(target=work)
        thread.start()
        time.sleep(0.3)
        process.communicate("\n", timeout=60)
        said.set()
        thread.join(60)
        assert done and process.returncode == 0


def test_a_guard_that_is_gone_is_no_trouble() -> None:
    with fake("mpirun", "input()") as process:
        guard = Guard(Launcher(pid=process.pid, argv=(), cwd=ROOT), "x")
        guard._process.kill()
        guard._process.wait()
        guard.stopping()
        guard.done()
        guard.end()
        assert process.poll() is None
        assert guard._process.stdin
        guard._process.stdin.close()


# -- a guard on another host than rank 0's


@contextmanager
def posted() -> Iterator[tuple[subprocess.Popen[str], GuardPost, str]]:
    """An mpirun that waits for ever, beside it a guard to be dialled, and the variable that says how."""
    with fake("mpirun", MPIRUN, "pass", sys.executable) as process:
        assert process.stdout
        family = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
        post = GuardPost(Launcher(pid=process.pid, argv=(), cwd=ROOT))
        post.begin()
        secret, port, *_ = post.variable.split()
        try:
            yield process, post, f"{secret} {port} 127.0.0.1"
        finally:
            process.kill()
            for one in family:
                with psutil_gone(one):
                    one.kill()


@contextmanager
def dialled(variable: str) -> Iterator[DistantGuard]:
    guard = dial_guard({GUARD_VARIABLE: variable}, "rank 0 on far")
    assert guard
    with guard._connection:
        yield guard


def test_a_distant_rank_0_has_mpirun_ended_and_says_why() -> None:
    with posted() as (process, post, variable), dialled(variable) as guard:
        assert guard.say("mpgpt: a\nreason, Füße")
        guard.end()
        assert process.wait(60) == 9, "by three signals, not by force"
        post.join()
        if sys.platform == "linux":
            assert process.stderr and process.stderr.read() == "mpgpt: a\nreason, Füße\n"


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (lambda guard: guard._connection.close(), "mpgpt: rank 0 on far ended without a word: it was killed\n"),
        (lambda guard: guard.beat(0.3), "mpgpt: rank 0 on far has been silent for 0 s: it is stopped, its host"),
        (lambda guard: (guard.stopping(), guard._connection.close()), ""),
    ],
)
def test_a_distant_rank_0_that_is_lost_takes_mpirun_along(then: Callable[[DistantGuard], object], said: str) -> None:
    with posted() as (process, _, variable), dialled(variable) as guard:
        then(guard)
        assert process.wait(60) == 9
        if sys.platform == "linux":
            assert process.stderr
            heard = process.stderr.read()
            assert heard.startswith(said) and bool(heard) == bool(said)


def test_a_distant_rank_0_may_be_silent_at_its_end() -> None:
    with posted() as (process, _, variable), dialled(variable) as guard:
        guard.beat(0.3)
        guard.beat(math.inf)
        time.sleep(1.0)
        assert process.poll() is None
        guard.done()
        guard._connection.close()
        time.sleep(0.5)
        assert process.poll() is None, "it has time to end by itself"


def test_a_stranger_is_no_rank_0() -> None:
    with posted() as (process, _, variable):
        secret, port, address = variable.split()
        with dialled(f"{'0' * len(secret)} {port} {address}") as stranger:
            stranger.end()
        assert process.poll() is None
        with dialled(variable) as guard:
            guard.end()
            assert process.wait(60) == 9


@pytest.mark.parametrize("variable", ["", "secret", "secret 1", "secret 1 127.0.0.1"])
def test_without_a_distant_guard(variable: str) -> None:
    assert dial_guard({GUARD_VARIABLE: variable}, "rank 0") is None
