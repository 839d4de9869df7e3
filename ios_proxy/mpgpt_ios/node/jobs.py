"""Jobs that are done one after another, on a thread of their own.

Knows: the order of jobs. Must not know: what any of them does.
"""

from __future__ import annotations

import queue
from collections.abc import Callable


class Jobs:
    """A queue of jobs. ``submit`` and ``close`` may be called from any thread, and by a signal's handler."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def run(self) -> None:
        """Do jobs on the calling thread until ``close``."""
        while (job := self._jobs.get()) is not None:
            job()

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.put(job)

    def close(self) -> None:
        """Let ``run`` return."""
        self._jobs.put(None)
