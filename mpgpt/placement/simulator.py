"""A discrete-event simulation of a run: the real scheduler in front of a ring on a virtual clock.

Knows: rank 0's loop (``engine.py``), when requests come, what is reported.
Must not know: torch, MPI, time of day, how anything is shown.

It leaves out rows that end early by a stop token, drafts, ranks that slow each other down through the memory that they
share, and waiting ranks that spin.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mpgpt.core import Request, Result, Span, Step
from mpgpt.core import Sequence as Running
from mpgpt.engine.scheduler import Scheduler
from mpgpt.machines import ClusterProfile, Workload
from mpgpt.placement.costs import chunk_of
from mpgpt.placement.virtual_ring import ServiceTimes, SharedCoreRing, Tandem, VirtualPipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Requests as they come: all of the workload's at once, or as a Poisson process."""

    workload: Workload
    arrival: float | None = None
    """Requests a second on average; None if all come at once."""
    seed: int = 0
    """Of the process."""

    def arrivals(self) -> list[float]:
        """The time at which each request comes, seconds."""
        if self.arrival is None:
            return [0.0] * self.workload.sequences
        dice, now, times = random.Random(self.seed), 0.0, []
        for _ in range(self.workload.sequences):
            now += dice.expovariate(self.arrival)
            times.append(now)
        return times


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    rank: int
    layers: int
    utilisation: float
    """The share of the time for which it had a step in hand."""
    queue: float
    """Steps that waited for it, on average; at rank 0 they wait in the scheduler and do not count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Times in seconds, rates in tokens a second."""

    seconds: float
    requests: int
    new_tokens: int
    steps: int
    decode_tokens_per_s: float | None
    """New tokens while all requests decode; None if they never all do, as with more requests than slots."""
    new_tokens_per_s: float
    """From the first request to the last token."""
    tokens_per_s: float
    """The same with the prompts' tokens."""
    waited_s: tuple[float, float]
    """From the request to its first step, p50 and p95."""
    ttft_s: tuple[float, float]
    """From a request's first step to its first token, p50 and p95."""
    tpot_s: tuple[float, float] | None
    """Between its tokens, p50 and p95; None with one token each."""
    stages: tuple[StageReport, ...]


def run(
    spans: Sequence[Span | None],
    profile: ClusterProfile,
    traffic: Traffic,
    *,
    slots: int,
    context: int,
    progress: Callable[[int], None] = lambda tokens: None,
    ring: Callable[[ServiceTimes], VirtualPipeline] | None = None,
) -> Report:
    """Serve all requests of ``traffic`` in ``slots`` slots of ``context`` positions.

    ``progress`` is called with the number of new tokens so far. ``ring`` is the virtual ring to use, if not the
    fastest that is right for the profile.
    """
    servers = ServiceTimes(spans, profile)
    make = ring or (SharedCoreRing if servers.crowded else Tandem)
    stages = sum(span is not None for span in spans)
    scheduler = Scheduler(slots=slots, context=context, stages=stages, chunk=chunk_of(profile.nodes))
    return _Run(make(servers), servers, scheduler, traffic, 1 if stages == 1 else stages + 1, progress).report()


class _Run:
    """Rank 0's loop, as in ``engine.Engine.step``, on a virtual clock."""

    def __init__(
        self,
        ring: VirtualPipeline,
        servers: ServiceTimes,
        scheduler: Scheduler,
        traffic: Traffic,
        depth: int,
        progress: Callable[[int], None],
    ) -> None:
        self._ring, self._servers, self._scheduler, self._depth = ring, servers, scheduler, depth
        self._workload = workload = traffic.workload
        self._progress = progress
        self._request = Request(ids=(0,) * workload.prompt_tokens, max_new_tokens=workload.new_tokens)
        self._arrivals = deque(traffic.arrivals())
        self._out: deque[Step] = deque()
        self._sequences: list[Running] = []
        # By id(sequence): the times of its arrival, its first step, its first and its latest token.
        self._came: dict[int, float] = {}
        self._began: dict[int, float] = {}
        self._first: dict[int, float] = {}
        self._latest: dict[int, float] = {}
        self._tokens: list[tuple[float, int]] = []
        self._steps = self._total = 0

    def report(self) -> Report:
        while self._arrivals or self._scheduler.busy:
            if not self._scheduler.busy:
                self._ring.now = max(self._ring.now, self._arrivals[0])
            self._take_in()
            self._step()
        return self._sum_up()

    def _take_in(self) -> None:
        while self._arrivals and self._arrivals[0] <= self._ring.now:
            sequence = self._scheduler.add(self._request)
            self._sequences.append(sequence)
            self._came[id(sequence)] = self._arrivals.popleft()

    def _step(self) -> None:
        scheduler, ring = self._scheduler, self._ring
        flight = scheduler.next() if scheduler.in_flight < self._depth else None
        if flight:
            self._steps += 1
            for sequence in flight.sequences:
                self._began.setdefault(id(sequence), ring.now)
            self._out.append(flight.step)
            ring.push(flight.step)
        if scheduler.in_flight and ring.pop(wait=not flight):
            self._commit()

    def _commit(self) -> None:
        step = self._out.popleft()
        news = self._scheduler.commit(Result(epoch=step.epoch, number=step.number, ids=(0,) * step.outputs))
        now = self._ring.now
        for sequence, *_ in news:
            self._first.setdefault(id(sequence), now)
            self._latest[id(sequence)] = now
        if news:
            self._total += len(news)
            self._tokens.append((now, len(news)))
            self._progress(self._total)

    def _sum_up(self) -> Report:
        end, begin = self._ring.now, min(self._came.values())
        span, w = end - begin, self._workload
        keys = [id(sequence) for sequence in self._sequences]
        between = [(self._latest[k] - self._first[k]) / (w.new_tokens - 1) for k in keys] if w.new_tokens > 1 else []
        worked, waited = self._ring.busy()
        return Report(
            seconds=span, requests=len(keys), new_tokens=self._total, steps=self._steps,
            decode_tokens_per_s=self._decoding(), new_tokens_per_s=self._total / span,
            tokens_per_s=(self._total + len(keys) * w.prompt_tokens) / span,
            waited_s=_middle([self._began[k] - self._came[k] for k in keys]),
            ttft_s=_middle([self._first[k] - self._began[k] for k in keys]),
            tpot_s=_middle(between) if between else None,
            stages=tuple(
                StageReport(rank=rank, layers=layers, utilisation=work / span, queue=wait / span)
                for (rank, layers), work, wait in zip(self._servers.stages, worked, waited, strict=True)
            ),
        )  # fmt: skip

    def _decoding(self) -> float | None:
        """Tokens a second from when the last request got its first token until one got its last."""
        begin, end = max(self._first.values()), min(self._latest.values())
        if len(self._first) < len(self._sequences) or end <= begin:
            return None
        return sum(count for when, count in self._tokens if begin < when <= end) / (end - begin)


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """(p50, p95)."""
    p50, p95 = np.percentile(values, (50, 95))
    return float(p50), float(p95)
