"""What the figures mean, on a clock that ticks once a step; and the memory's speed."""

from __future__ import annotations

import time
from collections import deque
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mpgpt.bench.measure import measure, read_bandwidth
from mpgpt.cluster.ring import RankReport, Ring
from mpgpt.core import NO_TOKEN, Result, Span, StageStats, Step
from mpgpt.engine.engine import Engine
from mpgpt.engine.scheduler import Scheduler
from mpgpt.errors import MpgptError
from mpgpt.machines import Node, Workload

ENDLESS = 10**9


class Ticking:
    """A ring of one in which every step takes a second."""

    def __init__(self) -> None:
        self.now, self.tallied = 0.0, list[float]()
        self._results: deque[Result] = deque()
        self.prompts: list[tuple[int, ...]] = []
        self.broken = ENDLESS
        """The position from which on there are no tokens."""

    def push(self, step: Step) -> None:
        self.prompts += [row.ids for row in step.rows if row.start == 0]
        ids = tuple(NO_TOKEN if row.stop >= self.broken else 1 for row in step.rows for _ in range(row.outputs))
        self._results.append(Result(epoch=0, number=step.number, ids=ids))

    def pop(self, timeout: float | None = None) -> Result | None:
        if timeout == 0:
            return None
        self.now += 1.0
        return self._results.popleft()

    def stop(self, epoch: int) -> None: ...

    def request_stats(self, epoch: int, *, redial: bool = False) -> None: ...

    def stats_round(self, epoch: int) -> tuple[StageStats, ...]:
        wall = self.now - sum(self.tallied)
        self.tallied.append(wall)
        part = wall / 4
        return (
            StageStats(rank=0, steps=3, tokens=5, wall_s=wall, compute_s=part, wait_s=part, send_s=part, other_s=part,
                    peak_rss=7_000_000),
        )  # fmt: skip


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Ticking:
    ring = Ticking()
    monkeypatch.setattr(time, "perf_counter", lambda: ring.now)
    return ring


def measured(ticking: Ticking, work: Workload, repeats: int = 2) -> dict[str, Any]:
    scheduler = Scheduler(slots=8, context=256, stages=1, chunk=96)
    engine = Engine(ticking, scheduler, vocab=30, depth=1, wake=lambda: None, sleep=lambda: None)
    node = Node(rank=0, host="here", kind="cpu", memory=1, local_rank=0, threads=1)
    place = RankReport(node=node, span=Span(start=0, stop=4), slice_bytes=3_000_000, kv_bytes=500_000)
    ring = SimpleNamespace(reports=[place], config=SimpleNamespace(vocab=30))
    return measure(engine, cast(Ring, ring), work, repeats)


def test_one_sequence(ticking: Ticking) -> None:
    """A prompt of one chunk takes a step, as does each token: 20 prompt tokens in a second, then one a second."""
    found = measured(ticking, Workload(sequences=1, prompt_tokens=20, new_tokens=6))
    assert found["decode_tokens_per_s"] == pytest.approx(1.0)
    assert found["prompt_tokens_per_s"] == pytest.approx(20.0)
    assert found["ttft_ms"] == found["tpot_ms"] == {"p50": pytest.approx(1000.0), "p95": pytest.approx(1000.0)}


def test_four_sequences_that_share_their_steps(ticking: Ticking) -> None:
    found = measured(ticking, Workload(sequences=4, prompt_tokens=20, new_tokens=6))
    assert found["decode_tokens_per_s"] == pytest.approx(4.0)
    assert found["prompt_tokens_per_s"] == pytest.approx(80.0)


def test_sequences_that_have_to_wait_for_one_another(ticking: Ticking) -> None:
    """A step takes 96 tokens of prompts, so two of 40 go first: first tokens after 1, 1 and 2 s."""
    found = measured(ticking, Workload(sequences=3, prompt_tokens=40, new_tokens=20), repeats=1)
    assert found["ttft_ms"] == {"p50": pytest.approx(1000.0), "p95": pytest.approx(1900.0)}
    assert found["prompt_tokens_per_s"] == pytest.approx(120 / 2)
    assert found["decode_tokens_per_s"] == pytest.approx(3.0)


def test_when_prompts_take_longer_than_the_text(ticking: Ticking) -> None:
    """The first is done before the last begins: there is no speed of all of them."""
    found = measured(ticking, Workload(sequences=8, prompt_tokens=96, new_tokens=2))
    assert found["decode_tokens_per_s"] is None and found["prompt_tokens_per_s"] > 0


def test_stages_are_those_of_the_measured_part(ticking: Ticking) -> None:
    found = measured(ticking, Workload(sequences=1, prompt_tokens=20, new_tokens=6), repeats=3)
    assert ticking.tallied[1] == pytest.approx(18.0), "three repeats of six steps, without the warming up"
    (stage,) = found["stages"]
    assert stage["wall_s"] == pytest.approx(18.0)
    assert (stage["rank"], stage["host"], stage["layers"]) == (0, "here", [0, 4])
    assert (stage["slice_mb"], stage["kv_mb"], stage["peak_rss_mb"]) == (3.0, 0.5, 7.0)


def test_prompts_differ_and_are_the_same_every_time(ticking: Ticking) -> None:
    measured(ticking, Workload(sequences=2, prompt_tokens=20, new_tokens=2))
    first = list(ticking.prompts)
    assert len(set(first)) == len(first) == 6, "the warm-up's and two repeats'"
    measured(ticking, Workload(sequences=2, prompt_tokens=20, new_tokens=2))
    assert ticking.prompts == first + first


@pytest.mark.parametrize("broken", [1, 20, 22, 25])
def test_a_sequence_that_fails_has_no_figures(ticking: Ticking, broken: int) -> None:
    """Before its first token as well, for which nobody must wait in vain."""
    ticking.broken = broken
    with pytest.raises(MpgptError, match="NaN or infinite"):
        measured(ticking, Workload(sequences=3, prompt_tokens=20, new_tokens=6))


def test_memory_has_a_speed() -> None:
    speed, way = read_bandwidth(32 << 20)
    assert 0.1 < speed < 10_000 and way
