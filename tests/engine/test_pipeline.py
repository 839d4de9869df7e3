"""The ring without MPI: rank 0 and a relay on a thread each, and stages that do next to nothing."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator

import pytest

from mpgpt.core import DeviceAccount, Result, Row, Span, StatsRound, Step
from mpgpt.engine.pipeline import Pipeline, relay
from mpgpt.engine.stage import AtOnce
from mpgpt.engine.stage_timer import StageTimer
from mpgpt.transport.doorbell import Doorbell
from mpgpt.transport.link import QueueLink
from mpgpt.transport.wire import Codec

CODEC = Codec(rows=2, tokens=8, token_bytes=4, slots=2, context=64, ranks=3)
NAP_S = 0.02


class Naps(AtOnce):
    """A stage that sleeps, and makes ``hidden`` or, being the last, results."""

    span = Span(start=0, stop=1)

    def __init__(self, last: bool) -> None:
        self._last, self.closed, self.redialled = last, False, 0

    def forward(self, step: Step) -> Step | Result | None:
        time.sleep(NAP_S)
        if self._last:
            return Result(epoch=step.epoch, number=step.number, ids=(step.number,))
        return Step(epoch=step.epoch, number=step.number, rows=step.rows, hidden=bytes(4 * step.tokens))

    def redial(self) -> None:
        self.redialled += 1

    def close(self) -> None:
        self.closed = True


def a_step(number: int) -> Step:
    return Step(epoch=1, number=number, rows=(Row(slot=0, start=number, ids=(5, 6), outputs=1),))


class Lasting(QueueLink):
    """One end may close while the other has yet to take what is in it, as over MPI."""

    def close(self) -> None: ...


class Later(Naps):
    """A stage whose machine answers ``NAP_S`` after the last answer, and rings; two steps and more may be there."""

    def __init__(self, bell: Doorbell) -> None:
        super().__init__(last=False)
        self._bell, self._steps, self._answers = bell, queue.Queue[Step](), queue.Queue[Step | Result]()
        self.most = self.owed = 0
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            answer = Naps.forward(self, self._steps.get())
            assert answer is not None
            self._answers.put(answer)
            self._bell.ring()

    def forward(self, step: Step) -> None:
        self.owed += 1
        self.most = max(self.most, self.owed)
        self._steps.put(step)

    def done(self) -> bool:
        return not self._answers.empty()

    def finish(self) -> Step | Result:
        self.owed -= 1
        return self._answers.get(timeout=5.0)

    def account(self) -> DeviceAccount:
        return DeviceAccount(requests=1, compute_s=0, network_s=0, sent=0, received=0, falls=0, away_s=0)


class Ring:
    """Three ranks, two of them threads; ``later`` puts a machine behind the middle one."""

    def __init__(self, later: bool = False) -> None:
        self.bells = [Doorbell() for _ in range(3)]
        self.stages: list[Naps] = [Naps(last=rank == 2) for rank in range(3)]
        if later:
            self.stages[1] = Later(self.bells[1])
        links = [Lasting(self.bells[rank]) for rank in range(3)]  # links[r] leads to rank r
        self.pipeline = Pipeline(self.stages[0], CODEC, links[1], links[0], StageTimer(0))
        self.threads = [
            threading.Thread(
                target=relay, daemon=True,
                args=(self.stages[rank], CODEC, links[rank], links[(rank + 1) % 3], StageTimer(rank)),
            )
            for rank in (1, 2)
        ]  # fmt: skip
        for thread in self.threads:
            thread.start()

    def go(self, steps: int) -> None:
        for number in range(steps):
            self.pipeline.push(a_step(number))
        for number in range(steps):
            assert self.pipeline.pop(5.0) == Result(epoch=1, number=number, ids=(number,))

    def stop(self) -> None:
        self.pipeline.stop(1)
        for thread in self.threads:
            thread.join(5.0)
            assert not thread.is_alive()
        for bell in self.bells:
            bell.close()


@pytest.fixture
def bell() -> Iterator[Doorbell]:
    bell = Doorbell()
    yield bell
    bell.close()


def test_a_tally_has_every_stage_and_all_its_time() -> None:
    ring = Ring()
    ring.go(3)
    assert [account.rank for account in ring.pipeline.stats_round(1)] == [0, 1, 2]
    begun = time.perf_counter()
    ring.go(10)
    time.sleep(0.1)
    accounts = ring.pipeline.stats_round(1)
    took = time.perf_counter() - begun
    ring.stop()
    assert [(account.rank, account.steps, account.tokens) for account in accounts] == [(r, 10, 20) for r in range(3)]
    for account in accounts:
        parts = (account.compute_s, account.wait_s, account.send_s, account.other_s)
        assert min(parts) >= 0 and sum(parts) == pytest.approx(account.wall_s, rel=0.02)
        assert account.compute_s >= 10 * NAP_S
        assert account.wall_s == pytest.approx(took, rel=0.1)
        assert account.peak_rss > 1 << 20
    assert accounts[0].other_s >= 0.1, "what rank 0 does outside the pipeline"
    assert accounts[2].wait_s >= 0.1, "meanwhile the others wait"


def test_a_new_period_begins_everywhere() -> None:
    ring = Ring()
    ring.go(4)
    ring.pipeline.stats_round(1)
    assert [(a.steps, a.tokens, a.compute_s) for a in ring.pipeline.stats_round(1)] == [(0, 0, 0.0)] * 3
    ring.stop()
    assert all(stage.closed for stage in ring.stages)


def test_answers_that_come_later_keep_their_order_and_let_the_next_steps_in() -> None:
    ring = Ring(later=True)
    ring.go(10)
    accounts = ring.pipeline.stats_round(1)
    assert [a.device is not None for a in accounts] == [False, True, False]
    assert accounts[1].compute_s >= 8 * NAP_S, "as long as an answer is owed, the rank counts as computing"
    middle = ring.stages[1]
    assert isinstance(middle, Later) and middle.most >= 2
    for number in range(4):  # in flight when the stop comes: answered before it is passed on
        ring.pipeline.push(a_step(number))
    ring.stop()
    assert not middle.owed and all(stage.closed for stage in ring.stages)


def test_one_rank_is_a_ring_too(bell: Doorbell) -> None:
    link = QueueLink(bell)
    pipeline = Pipeline(Naps(last=True), CODEC, link, link, StageTimer(0))
    pipeline.push(a_step(0))
    assert pipeline.pop(1.0) is not None
    (account,) = pipeline.stats_round(1)
    assert (account.rank, account.steps) == (0, 1) and account.compute_s >= NAP_S
    pipeline.stop(1)


def test_a_tally_that_waits_in_an_empty_ring_notices_a_result(bell: Doorbell) -> None:
    link = QueueLink(bell)
    pipeline = Pipeline(Naps(last=True), CODEC, link, link, StageTimer(0))
    pipeline.push(a_step(0))
    with pytest.raises(AssertionError, match="nobody waits"):
        pipeline.stats_round(1)


def test_a_tally_travels_behind_the_steps_that_are_out() -> None:
    """All that was computed before it is in it, and nothing that comes later; a question to dial again is passed on."""
    ring = Ring(later=True)
    for number in range(3):
        ring.pipeline.push(a_step(number))
    ring.pipeline.request_stats(1)
    ring.pipeline.push(a_step(3))
    messages = [ring.pipeline.pop() for _ in range(5)]
    assert [getattr(message, "number", None) for message in messages] == [0, 1, 2, None, 3]
    stats_round = messages[3]
    assert isinstance(stats_round, StatsRound) and [stage.redialled for stage in ring.stages] == [0, 0, 0]
    assert [(account.rank, account.steps) for account in stats_round.accounts] == [(0, 3), (1, 3), (2, 3)]
    assert [account.steps for account in ring.pipeline.stats_round(1)] == [1, 1, 1]
    ring.pipeline.request_stats(1, redial=True)
    assert isinstance(ring.pipeline.pop(5.0), StatsRound)
    assert [stage.redialled for stage in ring.stages] == [0, 1, 1], "rank 0 has no machine behind it"
    ring.stop()
