"""Rings on a virtual clock: steps go in, and results come out when stages, hops and hosts would be done with them.

Knows: a step's cost on every stage and hop; queues in order of arrival; hosts whose ranks share cores.
Must not know: torch, MPI, time of day, the scheduler, requests.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from mpgpt.core import Span, Step
from mpgpt.machines import ClusterProfile
from mpgpt.placement.costs import Route, interpolate, is_crowded, result_bytes, step_bytes, threads_used

Seconds = NDArray[np.float64]


class VirtualPipeline(Protocol):
    """The simulated rank 0's pipeline, with its clock; ``engine/pipeline.py`` has the real one."""

    now: float

    def push(self, step: Step) -> None:
        """Compute the first stage; ``now`` is the end of it."""

    def pop(self, *, wait: bool) -> bool:
        """Whether the next result is there; with ``wait``, the clock goes on until it is."""

    def busy(self) -> tuple[list[float], list[float]]:
        """Seconds that each stage was at work, and seconds that steps waited for it."""


class ServiceTimes:
    """The cost of a step on every stage and hop of a ring, in the order of its route: stage, hop, stage, ..., hop."""

    def __init__(self, spans: Sequence[Span | None], profile: ClusterProfile) -> None:
        route = Route(spans, profile)
        self.stages = route.stages
        self.nodes = [profile.nodes[rank] for rank, _ in self.stages]
        self._token_bytes = profile.shape.token_bytes
        hops = [*route.hops, *([route.back] if route.back else [])]
        size = len(self.stages) + len(hops)
        self.delay, self._attend, self._per_byte = np.zeros(size), np.zeros(size), np.zeros(size)
        self._attend_chunk, self._cold = np.zeros(size), np.ones(size)
        self.delay[1::2] = [hop.latency_s for hop in hops]
        self._per_byte[1::2] = [1 / hop.bytes_per_s for hop in hops]
        for at, (_, layers) in enumerate(self.stages):
            speed = self.nodes[at].speed
            assert speed is not None, "nobody measured this rank"
            self._attend[2 * at] = layers * speed.attend_s
            chunk_s = speed.attend_s if speed.attend_chunk_s is None else speed.attend_chunk_s
            self._attend_chunk[2 * at] = layers * chunk_s
            self._cold[2 * at] = speed.cold if len(self.stages) > 1 else 1.0
        self._base: dict[int, Seconds] = {}
        self._hop = np.arange(size) % 2 == 1
        # The first hop carries ids alone if rank 0 has no layers; the last always.
        self._thin = bool(self.stages[0][1] == 0)

    def occupied(self, step: Step, *, alone: bool = False) -> Seconds:
        """Seconds for which the step occupies each of them; a hop for as long as it sends, without its latency.

        ``alone`` says that nothing else is in the ring: then every stage has slept.
        """
        tokens, outputs = step.tokens, step.outputs
        base = self._base.get(tokens)
        if base is None:
            base = self._base[tokens] = self._base_of(tokens)
        single = sum(row.start for row in step.rows if len(row.ids) == 1)
        chunk = sum(len(row.ids) * (2 * row.start + len(row.ids) - 1) // 2 for row in step.rows if len(row.ids) > 1)
        cost = base + self._attend * single + self._attend_chunk * chunk
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
        return cost * self._cold if alone and tokens == 1 else cost

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
        return is_crowded(self.nodes)


class Tandem:
    """A ring in which every stage has cores of its own. Then a step's whole way is known when it goes in.

    Everything is a queue in order of arrival, so server i begins at the latest of: when the step comes to it straight
    from server m with no waiting in between, m having become free, for every m <= i. One running maximum gives all.
    """

    def __init__(self, servers: ServiceTimes) -> None:
        self.now = 0.0
        self._servers, size = servers, len(servers.delay)
        self._free, self._worked, self._waited = np.zeros(size), np.zeros(size), np.zeros(size)
        self._results: deque[float] = deque()

    def push(self, step: Step) -> None:
        cost, delay = self._servers.occupied(step, alone=not self._results), self._servers.delay
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


class SharedCoreRing:
    """Any ring, event by event; for those in which ranks share cores."""

    def __init__(self, servers: ServiceTimes) -> None:
        self.now = 0.0
        self._servers, count = servers, len(servers.stages)
        self._threads = [threads_used(node) for node in servers.nodes]
        hosts: dict[str, _Host] = {}
        self._hosts = [hosts.setdefault(node.host, _Host(cores=node.cores)) for node in servers.nodes]
        # Per stage: steps that wait, as (arrival, costs); the costs of the one in hand; when its hop is free.
        self._queues: list[deque[tuple[float, Seconds]]] = [deque() for _ in range(count)]
        self._hand: list[Seconds | None] = [None] * count
        self._sent = [0.0] * count
        self._begun, self._worked, self._waited = [0.0] * count, [0.0] * count, [0.0] * count
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._count, self._pushed, self._done, self._popped = 0, 0, 0, 0  # pushed: steps; count: events

    def push(self, step: Step) -> None:
        self._arrive(0, self._servers.occupied(step, alone=self._pushed == self._popped), self.now)
        self._pushed += 1
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
