"""What a frame needs from one rank to another, measured between all ranks or, where they are many, along the ring.

Knows: which pairs are worth measuring, how two ranks play a frame back and forth, what to assume of other pairs.
Must not know: what is in a frame, or what is made of the figures.

A rank that has just computed finds its Python driven out of the cache by the weights, and one that waits has to be
woken up. So both work between frames, on memory, as they will in the ring, and the time of that is taken off.
"""

from __future__ import annotations

import statistics
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import combinations, permutations

import numpy as np

from mpgpt.errors import LinkError
from mpgpt.machines import Edge, Links
from mpgpt.transport.collective import on_all_ranks
from mpgpt.transport.link import Link, World

Pair = tuple[int, int]

HEADER = struct.Struct("<?d")
"""Whether it is the last frame, and the seconds that its sender worked before."""
SMALL = 4096
"""A frame of a decoding step, bytes."""
LEAST_LARGE = 256 << 10
"""A large frame at least: where less is sent, bandwidth is not what counts."""
WORK_S = 0.002
WORK_BYTES = 4 << 20
BUDGET_S = 0.03
"""How long frames of one size go back and forth, if ``LEAST`` times do not take longer."""
LEAST, MOST = 3, 12
TIMEOUT_S = 15.0
ALL_PAIRS = 6
"""The most ranks of which every pair is measured."""
FASTEST = 1e11
"""The bandwidth of an edge where a large frame takes no longer than a small one, bytes/s."""


def measure_links(world: World, large: int) -> Links:
    """An ``Edge`` for every ordered pair of ranks. ``large`` is the length of a prompt chunk's frame, bytes.

    All ranks must call it. Raises on every rank when two of them do not reach each other.
    """
    measured: dict[Pair, Edge] = {}
    for pairs in rounds(worth_measuring(world.hosts)):
        mine = next((pair for pair in pairs if world.rank in pair), None)
        answers = on_all_ranks(world, partial(_ping_pong, world, mine, max(large, LEAST_LARGE)))
        for a, b in pairs:
            edge = Edge(**answers[a])
            measured[a, b] = measured[b, a] = edge
    return complete(measured, world.hosts)


def worth_measuring(hosts: Sequence[str]) -> list[Pair]:
    """The pairs to measure: every pair of up to ``ALL_PAIRS`` ranks, else the ring's, and rank 0 with one rank a host.

    In an order that ``rounds`` packs into few rounds."""
    ranks = len(hosts)
    if ranks <= ALL_PAIRS:
        return sorted(combinations(range(ranks), 2), key=lambda pair: sum(pair) % ranks)
    ring = {(rank, rank + 1) for rank in range(ranks - 1)}
    return sorted(ring | {(0, hosts.index(host)) for host in set(hosts) - {hosts[0]}} | {(0, ranks - 1)})


def rounds(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """The pairs, as many at a time as have no rank in common."""
    left = list(pairs)
    while left:
        now: list[Pair] = []
        for pair in left:
            if not any(set(pair) & set(other) for other in now):
                now.append(pair)
        left = [pair for pair in left if pair not in now]
        yield now


def complete(measured: Links, hosts: Sequence[str]) -> Links:
    """An edge for every ordered pair: where none was measured, the slowest that was measured between the two hosts,
    or else from either of them to a third, or else of all."""
    links = dict(measured)
    for a, b in permutations(range(len(hosts)), 2):
        if (a, b) in measured:
            continue
        ends = {hosts[a], hosts[b]}
        between = [edge for (x, y), edge in measured.items() if {hosts[x], hosts[y]} == ends]
        near = [edge for (x, y), edge in measured.items() if len({hosts[x], hosts[y]} | ends) == 3]
        known = between or near or list(measured.values())
        links[a, b] = Edge(
            latency_s=max(edge.latency_s for edge in known), bytes_per_s=min(edge.bytes_per_s for edge in known)
        )
    return links


def _ping_pong(world: World, pair: Pair | None, large: int) -> dict[str, float] | None:
    """One pair's measurement. The lower rank sends first, and has the result."""
    if not pair:
        return None
    other = pair[1] if world.rank == pair[0] else pair[0]
    outbound, inbound = world.connect(world.rank, other, large), world.connect(other, world.rank, large)
    player = PingPong(outbound, inbound, world.hosts[other])
    try:
        if world.rank > other:
            player.follow()
            return None
        small_s = player.lead(SMALL, last=False)
        return edge_of(small_s, player.lead(large, last=True), large)
    finally:
        outbound.close()
        inbound.close()


def edge_of(small_s: float, large_s: float, large: int) -> dict[str, float]:
    """The values of an Edge on which frames of ``SMALL`` and ``large`` bytes take so long."""
    slope = max((large_s - small_s) / (large - SMALL), 1 / FASTEST)
    return {"latency_s": max(small_s - SMALL * slope, 0.0), "bytes_per_s": 1 / slope}


class PingPong:
    """One of the two ranks."""

    def __init__(
        self, outbound: Link, inbound: Link, host: str, *, work_s: float = WORK_S, timeout_s: float = TIMEOUT_S
    ) -> None:
        """Between two frames it works for ``work_s``, and waits for one for at most ``timeout_s``, in seconds."""
        self._outbound, self._inbound, self._host = outbound, inbound, host
        self._work_s, self._timeout_s = work_s, timeout_s
        self._memory = np.ones(WORK_BYTES // 8)

    def lead(self, size: int, *, last: bool) -> float:
        """Send and get back frames of ``size`` bytes; the median of what one way takes, in seconds."""
        begun, hops = time.perf_counter(), list[float]()
        enough = False
        while not enough:
            elapsed = time.perf_counter() - begun
            enough = len(hops) >= LEAST and (elapsed > BUDGET_S or len(hops) >= MOST)
            self._work()
            sent = time.perf_counter()
            self._send(size, last and enough, 0.0)
            _, worked = HEADER.unpack_from(self._receive())
            hops.append((time.perf_counter() - sent - worked) / 2)
        return max(0.0, statistics.median(hops[1:]))  # the first one waits for the other rank to begin

    def follow(self) -> None:
        """Send back every frame until the leader has enough."""
        last = False
        while not last:
            frame = self._receive()
            last, _ = HEADER.unpack_from(frame)
            self._send(len(frame), last, self._work())

    def _send(self, size: int, last: bool, worked: float) -> None:
        frame = bytearray(size)
        HEADER.pack_into(frame, 0, last, worked)
        self._outbound.send(frame)

    def _receive(self) -> memoryview:
        frame = self._inbound.recv(self._timeout_s)
        if frame is None:
            raise LinkError(f"no answer from {self._host} within {self._timeout_s:.0f} s while links were measured")
        return frame

    def _work(self) -> float:
        """Read memory for about so long, so that the caches are as cold as after a step; the seconds it took."""
        begun = time.perf_counter()
        while time.perf_counter() - begun < self._work_s:
            self._memory.sum()
        return time.perf_counter() - begun
