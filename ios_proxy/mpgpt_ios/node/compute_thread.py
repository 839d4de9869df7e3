"""The compute thread of a node: one job after another, and the package that is loaded.

Knows: when a package is loaded and self-tested, that there is never more than one, which ones cannot be run.
Must not know: sockets, connections, the wire; how a package is run (``executor.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpgpt.errors import ModelError, MpgptError
from mpgpt_ios.bundle import Bundle
from mpgpt_ios.executor import Executor, run_selftest
from mpgpt_ios.node.jobs import Jobs


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A package that is ready to run."""

    bundle: Bundle
    executor: Executor
    facts: Mapping[str, Any]


class ComputeThread(Jobs):
    """The jobs that compute, and the package that they compute with."""

    def __init__(self, open_: Callable[[Bundle], tuple[Executor, str]]) -> None:
        """``open_`` makes a bundle ready to run, and names its compute unit."""
        super().__init__()
        self._open = open_
        self._loaded: Loaded | None = None
        self._failed: dict[bytes, str] = {}
        """Why packages cannot be run here, by their hash: trying takes minutes, and proxies ask again for ever."""

    # for jobs

    def load(self, bundle: Bundle) -> Loaded:
        """Raises ``ModelError`` when the package cannot be run here, or fails its self-test; and from then on at once,
        until the node is started anew."""
        if bundle.hash in self._failed:
            raise ModelError(f"{self._failed[bundle.hash]} (it is not tried again until the node is started anew)")
        if self._loaded is None or self._loaded.bundle.hash != bundle.hash:
            self._loaded = None  # two at once may be more than there is memory for
            try:
                self._loaded = self._load(bundle)
            except (MpgptError, RuntimeError, ValueError, OSError) as error:
                self._failed[bundle.hash] = str(error)
                raise ModelError(str(error)) from error
        self._loaded.executor.reset()
        return self._loaded

    def _load(self, bundle: Bundle) -> Loaded:
        begun, manifest = time.monotonic(), bundle.manifest
        executor, unit = self._open(bundle)
        largest = run_selftest(executor, bundle.selftest, manifest.tolerance)
        facts = {
            "load_s": round(time.monotonic() - begun, 3), "unit": unit, "selftest": largest,
            "layers": list(manifest.layers), "embed": manifest.embed, "slots": manifest.slots,
            "context": manifest.context, "chunk": manifest.chunk, "dtype": np.dtype(executor.dtype).name,
        }  # fmt: skip
        return Loaded(bundle=bundle, executor=executor, facts=facts)

    @property
    def executor(self) -> Executor:
        assert self._loaded, "nothing is loaded"
        return self._loaded.executor
