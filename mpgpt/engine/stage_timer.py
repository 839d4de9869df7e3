"""Where a rank's time goes: a stopwatch that is always in exactly one state.

Knows: the states, clocks, and the memory of this process.
Must not know: steps, frames, links, or why somebody waits.
"""

from __future__ import annotations

import resource
import sys
from time import perf_counter

from mpgpt.core import StageStats

COMPUTE, WAIT, SEND, OTHER = range(4)


class StageTimer:
    """One rank's account of its time. Whatever passes between two calls of ``enter`` belongs to the first's state."""

    def __init__(self, rank: int) -> None:
        self._rank, self._state = rank, OTHER
        self._begin(perf_counter())

    def _begin(self, now: float) -> None:
        self._begun = self._since = now
        self._seconds = [0.0, 0.0, 0.0, 0.0]
        self._steps = self._tokens = 0

    def enter(self, state: int) -> None:
        """From now on it is ``state``."""
        now = perf_counter()
        self._seconds[self._state] += now - self._since
        self._state, self._since = state, now

    def count(self, tokens: int) -> None:
        """One more step is through, with so many tokens."""
        self._steps += 1
        self._tokens += tokens

    def snapshot(self) -> StageStats:
        """The account since the last turn; a new one begins now, in the state that it is."""
        self.enter(self._state)
        compute, wait, send, other = self._seconds
        account = StageStats(
            rank=self._rank, steps=self._steps, tokens=self._tokens, wall_s=self._since - self._begun,
            compute_s=compute, wait_s=wait, send_s=send, other_s=other, peak_rss=peak_rss(),
        )  # fmt: skip
        self._begin(self._since)
        return account


def peak_rss() -> int:
    """The most memory that this process ever had, bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
