"""What a node computes with: the thread that does one job after another, and the package that is loaded.

Knows: when a package is loaded and proves itself, that there is never more than one.
Must not know: sockets, who asks, the wire; how a package is run (``executor.py``).
"""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpgpt_ios.bundle import Bundle
from mpgpt_ios.executor import Executor, run_selftest


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A package that is ready to run."""

    bundle: Bundle
    executor: Executor
    facts: Mapping[str, Any]


class ComputeThread:
    """Jobs, and what they compute with."""

    def __init__(self, open_: Callable[[Bundle], tuple[Executor, str]]) -> None:
        """``open_`` makes a bundle ready to run, and says by what."""
        self._open = open_
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loaded: Loaded | None = None

    def run(self) -> None:
        """Do what is asked, on the thread that calls it, until ``close``."""
        while (job := self._jobs.get()) is not None:
            job()

    # from any thread

    def ask(self, job: Callable[[], None]) -> None:
        """Do it after what was asked before."""
        self._jobs.put(job)

    def close(self) -> None:
        """Let ``run`` return. A signal's handler may call it too."""
        self._jobs.put(None)

    # for jobs

    def load(self, bundle: Bundle) -> Loaded:
        """Raises ``ModelError`` when the package cannot be run here, or fails its self-test."""
        if self._loaded is None or self._loaded.bundle.hash != bundle.hash:
            self._loaded = None  # two at once may be more than there is memory for
            begun, manifest = time.monotonic(), bundle.manifest
            executor, unit = self._open(bundle)
            largest = run_selftest(executor, bundle.selftest, manifest.tolerance)
            facts = {
                "load_s": round(time.monotonic() - begun, 3), "unit": unit, "selftest": largest,
                "layers": list(manifest.layers), "embed": manifest.embed, "slots": manifest.slots,
                "context": manifest.context, "chunk": manifest.chunk, "dtype": np.dtype(executor.dtype).name,
            }  # fmt: skip
            self._loaded = Loaded(bundle=bundle, executor=executor, facts=facts)
        self._loaded.executor.reset()
        return self._loaded

    @property
    def executor(self) -> Executor:
        assert self._loaded, "nothing is loaded"
        return self._loaded.executor
