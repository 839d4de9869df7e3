"""The exact search for the cheapest way to cut layers into consecutive pieces and give them to ranks in order.

Knows: arrays of costs and dynamic programming over them.
Must not know: what a cost stands for, nodes, models.

Legend: R ranks, L layers; r, s ranks; a, b places between layers (0 to L); k how many ranks have a piece.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Costs = NDArray[np.float64]
Mask = NDArray[np.bool_]
BLOCK = 1 << 17
"""Numbers that are joined in one go at most: few enough to stay in a processor's cache."""


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
    """With how few and how many pieces there is a way at all; None if there is none.

    ``allowed`` [R, a, b] says whether r may have the layers a to b, ``needed`` [R] that it cannot go without.
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
