"""A stage: the layers that one rank runs, as a function from step to step.

Knows: how a step's bytes become tensors and tensors become a step again, and when to sample.
Must not know: links, other ranks, or where requests come from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from mpgpt.core import Buffer, Result, Span, Step
from mpgpt.model import Slice
from mpgpt.sampler import Sampler


class Stage(Protocol):
    """What runs a span: here in torch, elsewhere on a machine behind the rank."""

    @property
    def span(self) -> Span | None:
        """None where steps only pass."""

    def forward(self, step: Step) -> Step | Result:
        """Ids in, hidden states out (first); hidden states in, a result out (last)."""

    def close(self) -> None: ...


class TorchStage:
    """A span computed in this process. ``between`` is called after every layer, for whoever has to be let in."""

    def __init__(self, model: Slice, sampler: Sampler, between: Callable[[], None]) -> None:
        """``sampler`` is used by the last stage only."""
        self.span: Span | None = model.span
        self._model, self._sampler, self._between = model, sampler, between

    @torch.inference_mode()
    def forward(self, step: Step) -> Step | Result:
        model = self._model
        batch = model.batch(step.rows)
        x_TE = model.embed(batch) if model.first else _from_bytes(step.hidden, model.dtype, model.config.embed)
        x_TE = model.run(x_TE, batch, self._between)
        if not model.last:
            return Step(epoch=step.epoch, number=step.number, rows=step.rows, hidden=_to_bytes(x_TE))
        self._sampler.observe(step.rows)
        wanted = [row for row in step.rows if row.outputs]
        ids = self._sampler.sample(wanted, model.logits(x_TE)) if wanted else []
        return Result(epoch=step.epoch, number=step.number, ids=tuple(ids))

    def close(self) -> None:
        """Nothing to let go: the tensors go with the process."""


class PassStage:
    """Rank 0's where it has no layers: the next rank is the first that has, and embeds the ids itself."""

    span: Span | None = None

    def forward(self, step: Step) -> Step | Result:
        return step

    def close(self) -> None:
        """There is nothing to let go."""


def _from_bytes(hidden: Buffer, dtype: torch.dtype, embed: int) -> Tensor:
    """A [T, E] view of a frame's hidden states, without a copy."""
    return torch.frombuffer(hidden, dtype=dtype).view(-1, embed)


def _to_bytes(x_TE: Tensor) -> memoryview:
    return x_TE.contiguous().view(torch.uint8).reshape(-1).numpy().data
