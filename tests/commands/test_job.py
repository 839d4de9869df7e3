"""How a job runs on its rank and ends, without mpirun; with it, tests/mpi/test_failures.py and tests/hosts."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

import pytest

from mpgpt.commands import job
from mpgpt.commands.launcher import Launch
from mpgpt.errors import LinkError, MpgptError, RequestError, UsageError
from mpgpt.transport.guard import Guard
from mpgpt.transport.link import Loss, SoloWorld

ALONE = Launch(environment={}, launcher=None)


class Ended(BaseException):
    """The process has ended, with a status."""


@dataclass
class FakeWorld:
    """A world that notes what is done with it."""

    rank: int = 0
    size: int = 2
    loss: Loss | None = None
    done: list[str] = field(default_factory=list)
    hosts: tuple[str, ...] = ("a", "b")

    def told_to_end(self) -> None:
        self.done.append("told")

    def lost_soon(self) -> bool:
        return self.loss is not None and not self.loss.said

    def part(self, sentence: str) -> None:
        self.done.append(f"part {sentence}".strip())

    def abort(self, status: int) -> None:
        self.done.append(f"abort {status}")

    def close(self) -> None:
        self.done.append("close")


@dataclass
class FakeGuard:
    """A guard that notes what it is told; ``prints`` says whether it can print."""

    prints: bool = True
    done: list[str] = field(default_factory=list)

    def say(self, sentence: str) -> bool:
        self.done.append(sentence)
        return self.prints

    def end(self) -> None:
        self.done.append("end")


class FakeJob:
    """A job of two parts, each of which may fail; it is its own ring."""

    def __init__(
        self, *, start: BaseException | None = None, run: BaseException | None = None, status: int = 0
    ) -> None:
        self.start_error, self.run_error, self.status = start, run, status
        self.served = False

    def start(self, world: Any) -> FakeJob:
        if self.start_error:
            raise self.start_error
        return self

    def run_rank0(self, ring: FakeJob) -> int:
        assert ring is self
        self._run()
        return self.status

    def serve(self) -> None:
        self.served = True
        self._run()

    def _run(self) -> None:
        if self.run_error:
            raise self.run_error


class Signalled(FakeJob):
    """A job in the middle of which SIGTERM comes."""

    def run_rank0(self, ring: FakeJob) -> int:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("the signal ends it")


@pytest.fixture(autouse=True)
def naps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """Seconds slept; the process ends by ``Ended``, and its signals are as before."""
    slept: list[float] = []

    def end(status: int) -> NoReturn:
        raise Ended(status)

    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.delenv("MPGPT_TRACEBACK", raising=False)
    before = signal.getsignal(signal.SIGTERM)
    yield slept
    signal.signal(signal.SIGTERM, before)


def work(one: FakeJob, world: FakeWorld, guard: FakeGuard | None = None) -> int:
    return job.run_in_world(one, cast(Any, world), cast(Guard | None, guard))


def ended(call: Callable[[], Any]) -> int:
    with pytest.raises(Ended) as caught:
        call()
    return int(caught.value.args[0])


def loss(*, said: bool = False, by_signal: bool = False) -> Loss:
    return Loss(sentence="rank 1 on b was lost", said=said, by_signal=by_signal)


@pytest.mark.parametrize("status", [0, 1])
def test_an_end_in_order(status: int) -> None:
    world = FakeWorld()
    assert work(FakeJob(status=status), world) == status
    assert world.done == ["close"]


def test_another_rank_serves() -> None:
    one, world = FakeJob(), FakeWorld(rank=1)
    assert work(one, world) == 0 and one.served and world.done == ["close"]


@pytest.mark.parametrize("error", [UsageError("no model"), MpgptError("rank 1 on b: no memory")])
def test_a_start_that_fails_alike_on_every_rank(error: MpgptError) -> None:
    """It is main that prints it, once."""
    world = FakeWorld()
    with pytest.raises(MpgptError) as caught:
        work(FakeJob(start=error), world)
    assert caught.value is error and world.done == ["close"]


@pytest.mark.parametrize("error", [UsageError("no port"), RequestError("an empty prompt")])
def test_a_run_that_is_refused(error: MpgptError) -> None:
    world = FakeWorld()
    with pytest.raises(MpgptError) as caught:
        work(FakeJob(run=error), world)
    assert caught.value is error and world.done == ["close"]


@pytest.mark.parametrize(
    ("rank", "size", "error", "sentence"),
    [
        (0, 2, KeyError("bug"), "rank 0 on a: KeyError: 'bug'"),
        (0, 1, KeyError("bug"), "KeyError: 'bug'"),
        (1, 2, MpgptError("no memory"), "rank 1 on b: no memory"),
        (0, 2, LinkError("rank 1 on b was lost"), "rank 1 on b was lost"),
    ],
)
def test_a_failure_names_its_rank(
    rank: int, size: int, error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    world = FakeWorld(rank=rank, size=size)
    assert ended(lambda: work(FakeJob(run=error), world)) == 1
    assert capsys.readouterr().err == f"mpgpt: {sentence}\n"
    assert world.done == [f"part {sentence}", *(["abort 1"] if rank == 0 else [])]


def test_a_rank_waits_to_be_ended_by_rank_0(naps: list[float]) -> None:
    assert ended(lambda: work(FakeJob(run=KeyError("bug")), FakeWorld(rank=1))) == 1
    assert naps[-1] == job.GRACE_S


def test_an_interrupt_is_a_word_where_the_ring_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert ended(lambda: work(FakeJob(run=KeyboardInterrupt()), FakeWorld())) == 130
    assert capsys.readouterr().err == "mpgpt: interrupted\n"
    assert ended(lambda: work(FakeJob(start=KeyboardInterrupt()), FakeWorld())) == 130
    assert capsys.readouterr().err == ""


def test_a_loss_that_is_printed_already_is_not_printed_again(
    naps: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    error = LinkError("rank 1 on b was lost")
    assert ended(lambda: work(FakeJob(run=error), FakeWorld(loss=loss(said=True)))) == 1
    assert capsys.readouterr().err == "" and naps[-1] == job.FORWARD_S
    assert ended(lambda: work(FakeJob(run=error), FakeWorld(loss=loss()))) == 1
    assert capsys.readouterr().err == "mpgpt: rank 1 on b was lost\n"
    assert ended(lambda: work(FakeJob(run=error), FakeWorld(rank=1, loss=loss()))) == 1
    assert capsys.readouterr().err == "", "rank 0 prints it"


def test_a_loss_by_a_signal_waits_for_our_own(naps: list[float]) -> None:
    error = LinkError("rank 1 on b ended by a signal")
    assert ended(lambda: work(FakeJob(run=error), FakeWorld(loss=loss(said=True, by_signal=True)))) == 1
    assert naps[0] == job.SIGNAL_S


def test_a_guard_prints_and_ends_mpirun(naps: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    world, guard = FakeWorld(), FakeGuard()
    assert ended(lambda: work(FakeJob(run=MpgptError("no memory")), world, guard)) == 1
    assert guard.done == ["mpgpt: rank 0 on a: no memory", "end"] and world.done[-1] == "abort 1"
    assert capsys.readouterr().err == "" and job.FORWARD_S not in naps


def test_words_that_a_guard_cannot_print_go_through_mpirun(
    naps: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(lambda: work(FakeJob(run=MpgptError("no memory")), FakeWorld(), FakeGuard(prints=False))) == 1
    assert capsys.readouterr().err == "mpgpt: rank 0 on a: no memory\n" and job.FORWARD_S in naps


def test_a_traceback_is_for_those_who_want_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MPGPT_TRACEBACK", "1")
    guard = FakeGuard(prints=False)
    assert ended(lambda: work(FakeJob(run=KeyError("bug")), FakeWorld(), guard)) == 1
    assert "Traceback" in capsys.readouterr().err
    assert "end" not in guard.done, "mpirun must still forward it"


def test_a_signal_ends_rank_0(capsys: pytest.CaptureFixture[str]) -> None:
    world = FakeWorld()
    assert ended(lambda: work(Signalled(), world)) == 128 + signal.SIGTERM
    assert world.done == ["told"] and capsys.readouterr().err == ""


def test_a_signal_because_of_a_rank_that_died(capsys: pytest.CaptureFixture[str]) -> None:
    world = FakeWorld(loss=loss())
    assert ended(lambda: work(Signalled(), world)) == 1
    assert capsys.readouterr().err == "mpgpt: rank 1 on b was lost\n"


def test_alone_it_is_a_world_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Alone(FakeJob):
        def start(self, world: Any) -> FakeJob:
            assert isinstance(world, SoloWorld)
            return self

    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert job.run_job(Alone(status=3), ALONE) == 3
