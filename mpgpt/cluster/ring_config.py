"""What every rank must know before it can load its slice, and what a command wants of a ring before that is settled.

Knows: spans, sizes, kernels' names; that an option goes before a setting.
Must not know: who decides them, or how it comes to every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mpgpt.config import CacheDtype, DtypeName, RunConfig, native_wanted
from mpgpt.core import Span
from mpgpt.machines import Workload
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.linear import Kernels
from mpgpt.placement.plan import Objective

Spans = list[tuple[int, int] | None]
"""Every rank's layers, for JSON; None for a rank without layers."""


def plain(spans: Sequence[Span | None]) -> Spans:
    return [(span.start, span.stop) if span else None for span in spans]


class CommandOptions(Protocol):
    """The options that the commands with a ring have in common. None leaves a value to the settings."""

    @property
    def model(self) -> str | None: ...
    @property
    def dtype(self) -> DtypeName | None: ...
    @property
    def kv_dtype(self) -> CacheDtype | None: ...
    @property
    def kernel(self) -> str | None: ...
    @property
    def fast(self) -> bool | None: ...
    @property
    def max_sequences(self) -> int | None: ...
    @property
    def context(self) -> int | None: ...
    @property
    def threads(self) -> int | None: ...


def over_settings(options: CommandOptions, config: RunConfig) -> dict[str, Any]:
    """The options over the settings, for JSON: what every rank must know before it has a model."""
    return {
        "model": options.model or config.hf_model_name or "",
        "dtype": options.dtype or config.dtype,
        "kv_dtype": options.kv_dtype or config.kv_dtype,
        "kernel": options.kernel or config.kernel,
        "fast": config.fast if options.fast is None else options.fast,
        "slots": options.max_sequences or config.max_sequences,
        "context": options.context or config.ctx_length,
        "threads": options.threads or config.threads,
        "ipad": config.device.model_dump() if config.device else None,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class RingOptions:
    """What a command and its settings want of a ring. ``spans`` and ``objective`` are read on rank 0 alone."""

    dtype: DtypeName
    slots: int
    kv_dtype: CacheDtype = "auto"
    context: int | None = None
    """Positions of a slot; None for as many as the model has, up to ``MAX_CONTEXT``."""
    threads: int | None = None
    """Of a rank; None for its share of the host's cores."""
    kernel: str = "auto"
    fast: bool = False
    """Whether kernels may be taken that are faster and give a row other bits in other company."""
    native: bool = field(default_factory=native_wanted)
    """Whether this host may take the compiled kernels."""
    memory: Path | None = None
    """The file in which each host keeps what it found out about kernels."""
    spans: Callable[[ModelConfig], tuple[Span | None, ...] | None] = lambda config: None
    """Every rank's layers, or None for those that suit ``objective`` and ``workload`` best; then ranks are measured."""
    objective: Objective = "throughput"
    workload: Workload = field(default_factory=Workload)
    everyone: bool = False
    """Whether no rank may be left without layers, although the ring would be faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingConfig:
    """What every rank must know before it can load. Made on rank 0 and broadcast as JSON."""

    config: dict[str, Any]
    """The model's config.json."""
    spans: Spans
    dtype: str
    kv_dtype: str
    slots: int
    context: int
    threads: int | None
    chosen: list[dict[str, str]]
    """For each rank the kernels that its host chose (``Kernels.chosen``)."""

    def kernels(self, rank: int) -> Kernels:
        return Kernels(dtype=self.dtype, chosen=self.chosen[rank], kv_dtype=self.kv_dtype)

    def span(self, rank: int) -> Span | None:
        pair = self.spans[rank]
        return pair and Span(start=pair[0], stop=pair[1])

    @property
    def members(self) -> list[int]:
        """The ranks of the ring, in its order: rank 0, and all others that have layers."""
        return [rank for rank, pair in enumerate(self.spans) if pair or not rank]

    @property
    def stages(self) -> int:
        return sum(1 for pair in self.spans if pair)
