"""The guard of a run: it ends mpirun whatever rank 0 does."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import pytest

from mpgpt.transport import guard
from mpgpt.transport.guard import GUARD_VARIABLE, DistantGuard, Guard, GuardPost, dial_guard
from mpgpt.transport.mpirun import Launcher
from tests.support.launch import ROOT
from tests.transport.mpiruns import fake, wait_for

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
from mpgpt.transport.guard import Guard
from mpgpt.transport.mpirun import Launcher
guard = Guard(Launcher(pid=os.getppid(), argv=(), cwd=Path("/")), "rank 0 on here")
signal.signal(signal.SIGTERM, lambda number, frame: None)
signal.set_wakeup_fd(guard.wakeup, warn_on_full_buffer=False)
print(guard.process.pid, file=sys.stderr, flush=True)
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
        wait_for(lambda: "mpgpt.transport.guard" in guard.cmdline())
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
            guard.guard(Launcher(pid=process.pid, argv=(), cwd=ROOT), "x", read)
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
        guard.process.kill()
        guard.process.wait()
        guard.stopping()
        guard.done()
        guard.end()
        assert process.poll() is None
        assert guard.process.stdin
        guard.process.stdin.close()


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
    with guard.connection:
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
        (lambda guard: guard.connection.close(), "mpgpt: rank 0 on far ended without a word: it was killed\n"),
        (lambda guard: guard.beat(0.3), "mpgpt: rank 0 on far has been silent for 0 s: it is stopped, its host"),
        (lambda guard: (guard.stopping(), guard.connection.close()), ""),
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
        guard.connection.close()
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
