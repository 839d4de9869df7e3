"""Pages of the cache: which of them a slot has, in the order of its positions.

Knows: tables, and the pages that nobody has. Must not know: what lies in a page, layers, steps in flight.
"""

from __future__ import annotations

import numpy as np

from mpgpt.core import Row

PAGE = 64
"""Positions of a page, as in ``core/cache.h``."""


class Pages:
    """The pages of ``slots`` sequences of ``context`` positions; a slot takes them as its sequence grows."""

    def __init__(self, slots: int, context: int) -> None:
        each = -(-context // PAGE)
        self.count = slots * each
        self.tables = np.zeros((slots, each), dtype=np.int32)
        self._held = [0] * slots
        self._free = list(range(self.count - 1, -1, -1))

    def reserve(self, row: Row) -> None:
        """The pages that ``row`` needs. One that begins at 0 is a new sequence: the slot's old pages are free again."""
        if row.start == 0:
            self.release(row.slot)
        table = self.tables[row.slot]
        while self._held[row.slot] * PAGE < row.stop:
            table[self._held[row.slot]] = self._free.pop()
            self._held[row.slot] += 1

    def release(self, slot: int) -> None:
        """Give a slot's pages back, the last first, so that the same sequence gets the same again."""
        while self._held[slot]:
            self._held[slot] -= 1
            self._free.append(int(self.tables[slot, self._held[slot]]))
