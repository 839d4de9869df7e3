"""The exact search for the cheapest way to cut layers into consecutive pieces and give them to ranks in order.

Knows: costs of stages and hops as arrays, dynamic programming over them, in which order what is least.
Must not know: torch, MPI, what is predicted of a plan, or what is shown to a person.

Legend: R ranks, L layers; r, s ranks; a, b places between layers (0 to L); k how many ranks have a piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from mpgpt.core import Span
from mpgpt.machines import ClusterProfile, Node, Shape, Workload
from mpgpt.placement.costs import (
    Work,
    chunk_of,
    decode_work,
    held_bytes,
    is_crowded,
    request_work,
    threads_used,
    work_seconds,
)

Costs = NDArray[np.float64]
Mask = NDArray[np.bool_]
BLOCK = 1 << 17
"""Numbers that are joined in one go at most: few enough to stay in a processor's cache."""
EVENLY = 1e-9
"""The weight of a piece's share of the dearest piece, added to its cost where costs are summed: of ways with the same
sum it makes the more even one cheaper. It is tiny, so that no dearer way becomes cheaper by it."""


class Partitioner:
    """The least total of all ways with exactly 1, 2, ... ``most`` pieces, where ``join`` makes totals of costs.

    ``np.add`` gives the least sum, ``np.maximum`` the least greatest. A dynamic programme over (k, r, b): the best of
    the ways in which rank r has the k-th piece, which ends at b. Time ``most`` x (R^2 x L + R x L^2).
    """

    def __init__(self, start: Costs, piece: Costs, hop: Costs, join: Callable[[Costs, Costs], Costs], most: int):
        """Seconds, infinite where something cannot be: ``start`` [R] of coming to the first rank that has a piece,
        ``piece`` [R, a, b] of layers a to b on r, the end of the way included where b is L, ``hop`` [s, r]."""
        ranks, places = piece.shape[0], piece.shape[1]
        self._piece, self._hop, self._join = piece, hop, join
        begin = np.full((ranks, places), np.inf)
        begin[:, 0] = start
        # before[k][r, a]: the ways so far come to r with layers below a done; after[k][r, b]: r has had its piece too.
        self._before, self._after = [begin], [self._run(begin)]
        for _ in range(1, most):
            self._before.append(self._move(self._after[-1]))
            self._after.append(self._run(self._before[-1]))

    def value(self, k: int) -> float:
        """The least total with exactly ``k`` pieces; infinite if there is no way."""
        return float(self._after[k - 1][:, -1].min())

    def pieces(self, k: int) -> list[tuple[int, int, int]]:
        """(r, a, b) of the way that has it, in order. Of equals, the one with the lowest ranks and places, from the
        end on."""
        assert self.value(k) < math.inf, "there is no such way"
        rank, stop, found = int(self._after[k - 1][:, -1].argmin()), self._piece.shape[1] - 1, []
        for step in reversed(range(k)):
            start = int(self._join(self._before[step][rank], self._piece[rank, :, stop]).argmin())
            found.append((rank, start, stop))
            if step:
                rank = int(self._join(self._after[step - 1][:, start], self._hop[:, rank]).argmin())
            stop = start
        return found[::-1]

    def _run(self, before: Costs) -> Costs:
        after = np.empty_like(before)
        for some in _blocks(len(before), before.shape[1] ** 2):
            after[some] = self._join(before[some, :, None], self._piece[some]).min(axis=1)
        return after

    def _move(self, after: Costs) -> Costs:
        before = np.empty_like(after)
        for some in _blocks(len(after), after.size):
            before[some] = self._join(after[:, None, :], self._hop[:, some, None]).min(axis=0)
        return before


def _blocks(count: int, each: int) -> list[slice]:
    step = max(1, BLOCK // each)
    return [slice(first, first + step) for first in range(0, count, step)]


def piece_counts(allowed: Mask, needed: Mask) -> tuple[int, int] | None:
    """The fewest and the most pieces with which there is a way; None if there is none.

    ``allowed`` [R, a, b] says whether r may have the layers a to b, ``needed`` [R] whether it must have some.
    """
    places = allowed.shape[1]
    least, most = np.full(places, np.inf), np.full(places, -np.inf)
    least[0] = most[0] = 0
    for may, must in zip(allowed, needed, strict=True):
        with_piece = np.where(may, least[:, None], np.inf).min(axis=0) + 1
        with_most = np.where(may, most[:, None], -np.inf).max(axis=0) + 1
        least = with_piece if must else np.minimum(least, with_piece)
        most = with_most if must else np.maximum(most, with_most)
    return (int(least[-1]), int(most[-1])) if least[-1] < math.inf else None


def allowed_pieces(shape: Shape, nodes: Sequence[Node]) -> Mask:
    """[R, a, b]: whether a rank may have the layers from a to b."""
    layers = shape.layers
    a, b = np.meshgrid(np.arange(layers + 1), np.arange(layers + 1), indexing="ij")
    held = [[held_bytes(shape, n, last=last) for n in range(layers + 1)] for last in (False, True)]
    memory = np.array(held)[(b == layers).astype(int), np.maximum(b - a, 0)]
    allowed = np.empty((len(nodes), layers + 1, layers + 1), dtype=bool)
    for node, may in zip(nodes, allowed, strict=True):
        may[:] = b > a
        if node.free:
            may &= memory <= node.free
        if not node.can_be_first_or_last:
            may &= (a > 0) & (b < layers)
        if node.allowed_span:
            may &= (a >= node.allowed_span.start) & (b <= node.allowed_span.stop)
        if node.pinned_span:
            may &= (a == node.pinned_span.start) & (b == node.pinned_span.stop)
    return allowed


class CostTables:
    """The costs of all ways to cut the layers, as arrays for the search."""

    def __init__(self, profile: ClusterProfile, allowed: Mask) -> None:
        self._nodes, self._shape, self._allowed = profile.nodes, profile.shape, allowed
        count = len(self._nodes)
        self._latency, self._per_byte = np.zeros((count, count)), np.zeros((count, count))
        for (s, r), edge in profile.links.items():
            self._latency[s, r], self._per_byte[s, r] = edge.latency_s, 1 / edge.bytes_per_s
        pinned = np.array([node.pinned_span is not None for node in self._nodes])
        upto = np.concatenate(([0], np.cumsum(pinned)))  # pinned ranks below
        ranks = np.arange(count)
        self._no_hop = (ranks[:, None] >= ranks) | (upto[:-1] - upto[1:][:, None] > 0)
        self._no_start, self._no_end = upto[:-1] > 0, upto[-1] - upto[1:] > 0

    def min_latency(self, works: Sequence[Work], tried: Sequence[int]) -> list[tuple[Span | None, ...]]:
        """The least sum of costs for each number of ranks."""
        piece = self._pieces(works, np.ones(len(self._nodes)))
        start, hop, back = self._hops(works, latency=True)
        search = self._search(start, piece, hop, back, "sum", max(tried))
        return [self._spans(search, k) for k in tried if search.value(k) < np.inf]

    def min_bottleneck(
        self, workload: Workload, tried: Sequence[int], near: Sequence[Span | None] = ()
    ) -> list[tuple[Span | None, ...]]:
        """The least greatest cost for each number of ranks, and of those ways the one with the least sum.

        On hosts with too few cores ranks are slowed down by those of ``near`` that have layers there, or, without it,
        by as many as can be among that number of ranks.
        """
        found, chunk = [], chunk_of(self._nodes)
        searched: dict[tuple[object, ...], Partitioner] = {}
        for k in tried:
            works, stretch = request_work(workload, k, chunk), self._stretch(k, near)
            piece = self._pieces(works, stretch)
            hops = self._hops(works, latency=False)
            # Numbers of ranks that share the sequences out alike have the same costs, and one search serves them all.
            key = (decode_work(workload, k)[0].rows, tuple(stretch))
            if key not in searched:
                alike = [n for n in tried if (decode_work(workload, n)[0].rows, tuple(self._stretch(n, near))) == key]
                searched[key] = self._search(*hops[:1], piece, *hops[1:], "greatest", max(alike))
            if (bound := searched[key].value(k)) < np.inf:
                found.append(self._spans(self._within(bound, works, piece, hops, k), k))
        return found

    def _within(
        self, bound: float, works: Sequence[Work], piece: Costs, hops: tuple[Costs, Costs, Costs], k: int
    ) -> Partitioner:
        """The search for the least sum where no cost is greater than ``bound``."""
        bound *= 1 + 1e-9  # sums of floats in another order
        start, hop, back = self._hops(works, latency=True)
        limits = [
            np.where(busy <= bound, seconds, np.inf) for busy, seconds in zip(hops, (start, hop, back), strict=True)
        ]
        return self._search(limits[0], np.where(piece <= bound, piece, np.inf), limits[1], limits[2], "sum", k)

    def _search(self, start: Costs, piece: Costs, hop: Costs, back: Costs, least: str, most: int) -> Partitioner:
        start, back = np.where(self._no_start, np.inf, start), np.where(self._no_end, np.inf, back)
        hop, piece = np.where(self._no_hop, np.inf, hop), piece.copy()
        if least == "sum":
            finite = piece[np.isfinite(piece)]
            piece *= 1 + EVENLY * piece / (finite.max() if finite.size and finite.max() > 0 else 1.0)
            piece[:, :, -1] += back[:, None]
            return Partitioner(start, piece, hop, np.add, most)
        piece[:, :, -1] = np.maximum(piece[:, :, -1], back[:, None])
        return Partitioner(start, piece, hop, np.maximum, most)

    @property
    def crowded(self) -> bool:
        """Whether some host has fewer cores than its ranks have threads together."""
        return is_crowded(self._nodes)

    def _stretch(self, k: int, near: Sequence[Span | None]) -> Costs:
        """[R]: the factor by which the others on its host slow each rank down."""
        stretch = np.ones(len(self._nodes))
        for at, node in enumerate(self._nodes):
            others = [r for r, n in enumerate(self._nodes) if n.host == node.host and r != at and (not near or near[r])]
            threads = sorted((min(self._nodes[r].threads, node.cores) for r in others), reverse=True)[: k - 1]
            if threads:
                stretch[at] = max(1.0, (threads_used(node) + sum(threads)) / node.cores)
        return stretch

    def _pieces(self, works: Sequence[Work], stretch: Costs) -> Costs:
        """[R, a, b]: a rank's seconds for the layers from a to b."""
        layers = self._shape.layers
        size = np.arange(layers + 1) - np.arange(layers + 1)[:, None]
        costs = np.full(self._allowed.shape, np.inf)
        for node, cost, may, slower in zip(self._nodes, costs, self._allowed, stretch, strict=True):
            none, one = (work_seconds(works, node, n, head=False) for n in (0, 1))
            np.copyto(cost, none + size * (one - none), where=may)
            cost[:, -1] += work_seconds(works, node, 1, head=True) - one
            cost *= slower
        return costs

    def _hops(self, works: Sequence[Work], *, latency: bool) -> tuple[Costs, Costs, Costs]:
        """(start [R], hop [s, r], back [R]): the links' seconds, with or without their latency; ``start`` holds rank
        0's own where it has no layers."""
        steps = sum(work.count for work in works) if latency else 0.0

        def over(nbytes: float) -> Costs:
            seconds: Costs = steps * self._latency + nbytes * self._per_byte
            return seconds

        start = over(sum(work.bytes(0) for work in works))[0]
        own = work_seconds(works, self._nodes[0], 0, head=False)
        start[1:] = start[1:] + own if latency else np.maximum(start[1:], own)
        start[0] = 0.0
        back = over(sum(work.result_bytes for work in works))[:, 0]
        back[0] = 0.0
        return start, over(sum(work.bytes(self._shape.token_bytes) for work in works)), back

    def _spans(self, search: Partitioner, k: int) -> tuple[Span | None, ...]:
        spans: list[Span | None] = [None] * len(self._nodes)
        for rank, start, stop in search.pieces(k):
            spans[rank] = Span(start=start, stop=stop)
        return tuple(spans)
