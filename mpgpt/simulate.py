"""The ring on a virtual clock: the real scheduler, and stages, links and hosts that take as long as is predicted.

Knows: rank 0's loop (``engine.py``), queues in order of arrival, hosts whose ranks share cores.
Must not know: torch, MPI, time of day, how anything is shown.

What is not in it: rows that end early by a stop token, drafts, ranks that slow each other down through the memory that
they share, waiting ranks that spin.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpgpt.core import Node, Request, Result, Shape, Span, Step, Workload
from mpgpt.core import Sequence as Running
from mpgpt.costs import Links, chunk_of, interpolate, result_bytes, route, step_bytes
from mpgpt.scheduler import Scheduler

Seconds = NDArray[np.float64]


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
    """New tokens while all requests decode; None if there is no such time, as with more requests than slots."""
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


class Ring(Protocol):
    """What the virtual rank 0 needs: its clock, and a place to push to and pop from (``pipeline.Pipeline``)."""

    now: float

    def push(self, step: Step) -> None:
        """Compute the first stage; ``now`` is the end of it."""

    def pop(self, *, wait: bool) -> bool:
        """Whether the next result is there, waiting for it if told so."""

    def busy(self) -> tuple[list[float], list[float]]:
        """Seconds that each stage was at work, and seconds that steps waited for it."""


class Servers:
    """What a step costs every stage and hop of a ring, in the order of its way: stage, hop, stage, ..., hop."""

    def __init__(self, spans: Sequence[Span | None], shape: Shape, nodes: Sequence[Node], links: Links) -> None:
        self.stages = route(spans)
        self.nodes = [nodes[rank] for rank, _ in self.stages]
        self._token_bytes = shape.token_bytes
        last = self.stages[-1][0]
        hops = [links[a, b] for (a, _), (b, _) in pairwise(self.stages)] + ([links[last, 0]] if last else [])
        size = len(self.stages) + len(hops)
        self.delay, self._attend, self._per_byte = np.zeros(size), np.zeros(size), np.zeros(size)
        self.delay[1::2] = [hop.latency_s for hop in hops]
        self._per_byte[1::2] = [1 / hop.bytes_per_s for hop in hops]
        for at, (rank, layers) in enumerate(self.stages):
            speed = nodes[rank].speed
            assert speed is not None, "nobody measured this rank"
            self._attend[2 * at] = layers * speed.attend_s
        self._base: dict[int, Seconds] = {}
        self._hop = np.arange(size) % 2 == 1
        # The first hop carries ids alone if rank 0 has no layers; the last always.
        self._thin = bool(self.stages[0][1] == 0)

    def occupied(self, step: Step) -> Seconds:
        """Seconds for which the step keeps each of them; a hop for as long as it sends, without its latency."""
        tokens, outputs = step.tokens, step.outputs
        base = self._base.get(tokens)
        if base is None:
            base = self._base[tokens] = self._base_of(tokens)
        seen = sum(len(row.ids) * row.start + len(row.ids) * (len(row.ids) - 1) // 2 for row in step.rows)
        cost = base + self._attend * seen
        nbytes = step_bytes(tokens, len(step.rows), self._token_bytes)
        cost += self._per_byte * nbytes
        last = 2 * len(self.stages) - 2
        speed = self.nodes[-1].speed
        assert speed is not None
        cost[last] += interpolate(speed.head_s, outputs)
        if len(cost) > last + 1:
            cost[last + 1] = result_bytes(outputs) * self._per_byte[last + 1]
        if self._thin:
            cost[1] = step_bytes(tokens, len(step.rows), 0) * self._per_byte[1]
        return cost

    def _base_of(self, tokens: int) -> Seconds:
        base = np.zeros(len(self.delay))
        for at, (_, layers) in enumerate(self.stages):
            speed = self.nodes[at].speed
            assert speed is not None
            base[2 * at] = speed.step_s + layers * interpolate(speed.layer_s, tokens)
        return base

    @property
    def crowded(self) -> bool:
        """Whether some host has fewer cores than its ranks have threads together."""
        hosts: dict[str, list[Node]] = {}
        for node in self.nodes:
            hosts.setdefault(node.host, []).append(node)
        return any(len(n) > 1 and sum(_threads(m) for m in n) > n[0].cores for n in hosts.values())


def _threads(node: Node) -> int:
    return min(node.threads, node.cores)


class Tandem:
    """A ring in which every stage has cores of its own. Then a step's whole way is known when it goes in.

    Everything is a queue in order of arrival, so server i begins at the latest of: when the step comes to it straight
    from server m with no waiting in between, m having become free, for every m <= i. One running maximum gives all.
    """

    def __init__(self, servers: Servers) -> None:
        self.now = 0.0
        self._servers, size = servers, len(servers.delay)
        self._free, self._worked, self._waited = np.zeros(size), np.zeros(size), np.zeros(size)
        self._results: deque[float] = deque()

    def push(self, step: Step) -> None:
        cost, delay = self._servers.occupied(step), self._servers.delay
        self._free[0] = max(self._free[0], self.now)
        straight = np.cumsum(cost + delay)
        before = np.concatenate(([0.0], straight[:-1]))
        begin = np.maximum.accumulate(self._free - before) + before
        arrive = np.concatenate((begin[:1], (begin + cost + delay)[:-1]))
        self._worked += cost
        self._waited += begin - arrive
        self._free = begin + cost
        self.now = float(self._free[0])
        self._results.append(float(self._free[-1] + delay[-1]))

    def pop(self, *, wait: bool) -> bool:
        if not wait and self._results[0] > self.now:
            return False
        self.now = max(self.now, self._results.popleft())
        return True

    def busy(self) -> tuple[list[float], list[float]]:
        return self._worked[::2].tolist(), self._waited[::2].tolist()


@dataclass(slots=True)
class _Host:
    """Cores that several stages share: all that compute at once slow down alike when there are too few."""

    cores: int
    left: dict[int, float] = field(default_factory=dict)
    """Seconds of work alone that each stage has left."""
    since: float = 0.0
    version: int = 0
    """Which of the announced ends counts: the last."""

    def rate(self, threads: Sequence[int]) -> float:
        wanted = sum(threads[at] for at in self.left)
        return min(1.0, self.cores / wanted) if wanted else 1.0


class Crowd:
    """Any ring, event by event; for those in which ranks share cores."""

    def __init__(self, servers: Servers) -> None:
        self.now = 0.0
        self._servers, count = servers, len(servers.stages)
        self._threads = [_threads(node) for node in servers.nodes]
        hosts: dict[str, _Host] = {}
        self._hosts = [hosts.setdefault(node.host, _Host(cores=node.cores)) for node in servers.nodes]
        # Per stage: steps that wait, as (arrival, costs); the costs of the one in hand; when its hop is free.
        self._queues: list[deque[tuple[float, Seconds]]] = [deque() for _ in range(count)]
        self._hand: list[Seconds | None] = [None] * count
        self._sent = [0.0] * count
        self._begun, self._worked, self._waited = [0.0] * count, [0.0] * count, [0.0] * count
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count, self._pushed, self._done, self._popped = 0, 0, 0, 0

    def push(self, step: Step) -> None:
        self._arrive(0, self._servers.occupied(step), self.now)
        while self._hand[0] is not None:
            self._next()

    def pop(self, *, wait: bool) -> bool:
        while self._events and self._events[0][0] <= self.now:
            self._next()
        while wait and self._done == self._popped:
            self._next()
        if self._done == self._popped:
            return False
        self._popped += 1
        return True

    def busy(self) -> tuple[list[float], list[float]]:
        return self._worked, self._waited

    def _at(self, when: float, what: Callable[[float], None]) -> None:
        self._count += 1  # of events at one time, the first announced comes first
        heapq.heappush(self._events, (when, self._count, what))

    def _next(self) -> None:
        when, _, what = heapq.heappop(self._events)
        self.now = max(self.now, when)
        what(when)

    def _arrive(self, at: int, costs: Seconds, when: float) -> None:
        self._queues[at].append((when, costs))
        self._begin(at, when)

    def _begin(self, at: int, when: float) -> None:
        if self._hand[at] is not None or not self._queues[at]:
            return
        arrived, costs = self._queues[at].popleft()
        self._waited[at] += when - arrived
        self._hand[at], self._begun[at] = costs, when
        host = self._advance(at, when)
        host.left[at] = float(costs[2 * at])
        self._announce(host, when)

    def _advance(self, at: int, when: float) -> _Host:
        """Bring a host's work up to now."""
        host = self._hosts[at]
        worked = (when - host.since) * host.rate(self._threads)
        for stage in host.left:
            host.left[stage] -= worked
        host.since = when
        return host

    def _announce(self, host: _Host, when: float) -> None:
        """The next end on a host, unless something begins or ends there before."""
        host.version += 1
        if not host.left:
            return
        version, first = host.version, min(host.left, key=lambda at: (host.left[at], at))

        def ended(now: float) -> None:
            if host.version == version:
                self._end(first, now)

        self._at(when + max(host.left[first], 0.0) / host.rate(self._threads), ended)

    def _end(self, at: int, when: float) -> None:
        host, costs = self._advance(at, when), self._hand[at]
        assert costs is not None
        del host.left[at]
        self._hand[at] = None
        self._worked[at] += when - self._begun[at]
        if 2 * at + 1 < len(costs):
            self._sent[at] = max(self._sent[at], when) + float(costs[2 * at + 1])
            after = self._sent[at] + float(self._servers.delay[2 * at + 1])
        else:
            after = when
        if at + 1 < len(self._hand):
            self._at(after, lambda now: self._arrive(at + 1, costs, now))
        else:
            self._at(after, self._finish)
        self._announce(host, when)
        self._begin(at, when)

    def _finish(self, when: float) -> None:
        self._done += 1


def run(
    spans: Sequence[Span | None], shape: Shape, nodes: Sequence[Node], links: Links, workload: Workload, *,
    slots: int, context: int, arrival: float | None = None, seed: int = 0,
    progress: Callable[[int], None] = lambda tokens: None, ring: Callable[[Servers], Ring] | None = None,
) -> Report:  # fmt: skip
    """Serve ``workload.sequences`` requests in ``slots`` slots.

    They come all at once, or ``arrival`` of them a second on average, as a Poisson process of this ``seed``.
    ``progress`` hears how many new tokens there are. ``ring`` says how time is kept, if not as is fastest.
    """
    servers = Servers(spans, shape, nodes, links)
    make = ring or (Crowd if servers.crowded else Tandem)
    stages = sum(span is not None for span in spans)
    scheduler = Scheduler(slots=slots, context=context, stages=stages, chunk=chunk_of(nodes))
    times = _arrivals(workload.sequences, arrival, seed)
    return _Run(make(servers), servers, scheduler, times, workload, 1 if stages == 1 else stages + 1, progress).report()


def _arrivals(count: int, rate: float | None, seed: int) -> list[float]:
    if rate is None:
        return [0.0] * count
    chance, now, times = random.Random(seed), 0.0, []
    for _ in range(count):
        now += chance.expovariate(rate)
        times.append(now)
    return times


class _Run:
    """Rank 0: what ``engine.Engine.step`` does, with the clock in hand."""

    def __init__(
        self, ring: Ring, servers: Servers, scheduler: Scheduler, arrivals: list[float], workload: Workload, depth: int,
        progress: Callable[[int], None],
    ) -> None:  # fmt: skip
        self._ring, self._servers, self._scheduler, self._depth = ring, servers, scheduler, depth
        self._workload, self._progress = workload, progress
        self._request = Request(ids=(0,) * workload.prompt_tokens, max_new_tokens=workload.new_tokens)
        self._arrivals = deque(arrivals)
        self._out: deque[Step] = deque()
        self._sequences: list[Running] = []
        # By id(sequence): when it came, went in, got its first and its latest token.
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
        for sequence, _ in news:
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
