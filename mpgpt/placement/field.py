"""What every way of cutting layers would cost, as arrays, and the least of it.

Knows: costs of stages and hops as arrays; in which order what is least.
Must not know: torch, MPI, what is predicted of a plan, or what a person is told.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpgpt.core import Span
from mpgpt.machines import Node, Shape, Workload
from mpgpt.placement.costs import Links, Work, chunk_of, decode_work, held_bytes, life_work, work_seconds
from mpgpt.placement.cuts import Costs, Mask, Partitioner

EVENLY = 1e-9
"""By how much a piece that stands alone weighs more than the same in two: makes the more even of equal ways cheaper,
and is too little to make a cheaper way dearer."""


def allowed_pieces(shape: Shape, nodes: Sequence[Node], headroom: float) -> Mask:
    """[R, a, b]: whether a rank may have the layers from a to b."""
    layers = shape.layers
    a, b = np.meshgrid(np.arange(layers + 1), np.arange(layers + 1), indexing="ij")
    can_be_first_or_last = [[held_bytes(shape, n, first=f, last=z, headroom=headroom) for n in range(layers + 1)]
            for f in (False, True) for z in (False, True)]  # fmt: skip
    memory = np.array(can_be_first_or_last)[2 * (a == 0) + (b == layers), np.maximum(b - a, 0)]
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
    """All costs of all ways, as arrays for the search."""

    def __init__(self, nodes: Sequence[Node], links: Links, shape: Shape, allowed: Mask) -> None:
        self._nodes, self._shape, self._allowed = nodes, shape, allowed
        count = len(nodes)
        self._latency, self._per_byte = np.zeros((count, count)), np.zeros((count, count))
        for (s, r), edge in links.items():
            self._latency[s, r], self._per_byte[s, r] = edge.latency_s, 1 / edge.bytes_per_s
        pinned_span = np.array([node.pinned_span is not None for node in nodes])
        upto = np.concatenate(([0], np.cumsum(pinned_span)))  # fixed ranks below
        ranks = np.arange(count)
        self._no_hop = (ranks[:, None] >= ranks) | (upto[:-1] - upto[1:][:, None] > 0)
        self._no_start, self._no_end = upto[:-1] > 0, upto[-1] - upto[1:] > 0

    def min_latency(self, works: Sequence[Work], tried: Sequence[int]) -> list[tuple[Span | None, ...]]:
        """The least sum for each number of ranks."""
        piece = self._pieces(works, np.ones(len(self._nodes)))
        start, hop, back = self._hops(works, latency=True)
        search = self._search(start, piece, hop, back, "sum", max(tried))
        return [self._spans(search, k) for k in tried if search.value(k) < np.inf]

    def min_bottleneck(
        self, workload: Workload, tried: Sequence[int], near: Sequence[Span | None] = ()
    ) -> list[tuple[Span | None, ...]]:
        """The least greatest for each number of ranks, and of those ways the one with the least sum.

        On hosts with too few cores ranks are slower by what those of ``near`` that have layers want there, or, without
        it, by what as many as can be among that number want.
        """
        found, chunk = [], chunk_of(self._nodes)
        searched: dict[tuple[object, ...], Partitioner] = {}
        for k in tried:
            works, stretch = life_work(workload, k, chunk), self._stretch(k, near)
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
        """The least sum where nothing is greater than ``bound``."""
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
        return bool(self._stretch(len(self._nodes), ()).max() > 1)

    def _stretch(self, k: int, near: Sequence[Span | None]) -> Costs:
        """[R]: by how much each rank is slower because of the others on its host."""
        stretch = np.ones(len(self._nodes))
        for at, node in enumerate(self._nodes):
            others = [r for r, n in enumerate(self._nodes) if n.host == node.host and r != at and (not near or near[r])]
            threads = sorted((min(self._nodes[r].threads, node.cores) for r in others), reverse=True)[: k - 1]
            if threads:
                stretch[at] = max(1.0, (min(node.threads, node.cores) + sum(threads)) / node.cores)
        return stretch

    def _pieces(self, works: Sequence[Work], stretch: Costs) -> Costs:
        """[R, a, b]: what the layers from a to b cost a rank."""
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
        """(start [R], hop [s, r], back [R]): the links' seconds, with their latency or without; with rank 0's own in
        ``start`` where it has no layers."""
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
