"""The iPad behind a rank, as a ``mpgpt.engine.stage.Device``.

Knows: its settings, its package, how fast it is, what its stage needs.
Must not know: how it is reached (``client.py``), how a step becomes calls (``stage.py``).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpgpt.engine.stage import Stage, TorchStage
from mpgpt.errors import LinkError, ModelError
from mpgpt.machines import Speed
from mpgpt.model.weights import Checkpoint, model_config
from mpgpt.transport.doorbell import Doorbell, wait
from mpgpt_ios.bundle import Bundle, slice_hash
from mpgpt_ios.protocol.auth import read_token
from mpgpt_ios.proxy.client import Client
from mpgpt_ios.proxy.stage import Call, IPadStage, StageSizes

TRIES = 3


class IPadDevice:
    """One iPad, or its stand-in."""

    def __init__(self, settings: Mapping[str, Any], bell: Doorbell, report: Callable[[str], None]) -> None:
        """Dial, and wait until the iPad is ready or the attempt has failed. ``settings`` are ``mpgpt.config.IPad``.

        Raises ``ModelError`` or ``UsageError`` for its package and its token, and ``LinkError`` when it is away and
        there is no fallback.
        """
        token, self._bundle = read_token(Path(settings["token_file"])), Bundle.at(Path(settings["package"]))
        manifest = self._bundle.manifest
        self.span, self.slots, self.context = manifest.span, manifest.slots, manifest.context
        self.fallback: bool = settings["fallback"] == "torch"
        self._bell = bell
        host, _, port = settings["address"].rpartition(":")
        self._client = Client(
            (host.strip("[]"), int(port)), token, self._bundle, bell, timeout_s=settings["timeout_s"], report=report
        )
        if not self._client.wait_until_ready() and not self.fallback:
            self._client.close()
            raise LinkError(f"{self._client.trouble}; `fallback: none` lets nobody compute its layers")

    def check(self, folder: Path) -> None:
        """Raise ``ModelError`` when the package holds layers of another model than the one in ``folder``."""
        found = slice_hash(model_config(folder), Checkpoint(folder), self.span)
        if found != self._bundle.manifest.model_hash:
            raise ModelError(
                f"{self._bundle.package} holds layers {self.span} of {self._bundle.manifest.model} with other weights "
                f"than {folder} has: convert it again from there"
            )

    def speed(self) -> Speed | None:
        """Seconds a layer, the network included: one token, one token of each slot, a chunk; None if it is away."""
        epoch, manifest = self._client.epoch, self._bundle.manifest
        if epoch is None:
            return None
        points: list[tuple[int, float]] = []
        for slots, tokens in ((1, 1), (manifest.slots, 1), (1, manifest.chunk)):
            rows = slots * tokens
            x = np.full((rows, manifest.embed), 0.5, np.float32)
            call = Call(slots=tuple(range(slots)), positions=(0,) * slots, x=x)
            times = [self._seconds(epoch, call) for _ in range(TRIES)]
            if None in times:
                return None
            if rows > max((known for known, _ in points), default=0):
                points.append((rows, statistics.median(time for time in times if time is not None) / len(self.span)))
        return Speed(layer_s=tuple(points), head_s=((1, 0.0),))

    def _seconds(self, epoch: int, call: Call) -> float | None:
        """The time of a call; None when the iPad is lost."""
        begun, results = time.perf_counter(), list[object]()

        def over() -> bool:
            if (y := self._client.take(epoch)) is not None:
                results.append(y)
            return bool(results) or self._client.epoch != epoch

        self._client.submit(epoch, call)
        wait(over, self._bell)
        return time.perf_counter() - begun if results else None

    def stage(self, own: TorchStage | None, *, slots: int, context: int) -> Stage:
        manifest = self._bundle.manifest
        sizes = StageSizes(slots=slots, context=context, embed=manifest.embed, chunk=manifest.chunk)
        return IPadStage(self.span, self._client, own, self._bell, sizes)
