"""A stage: the layers that one rank runs, as a function from step to step.

Knows: how a step's bytes become tensors and tensors become a step again, and when to sample.
Must not know: links, other ranks, or where requests come from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mpgpt.core import Buffer, DeviceAccount, Result, Span, Step
from mpgpt.machines import Speed
from mpgpt.model.sampler import Sampler
from mpgpt.model.slice import Slice


class Stage(Protocol):
    """What runs a span: here in torch, elsewhere on a machine behind the rank."""

    @property
    def span(self) -> Span | None:
        """None where steps only pass."""

    def forward(self, step: Step) -> Step | Result | None:
        """Ids in, hidden states out (first); hidden states in, a result out (last). None where the answer comes later:
        then ``finish`` gives it, and the next step may come before that."""

    def done(self) -> bool:
        """Whether the first of the answers that come later is there, so that ``finish`` need not wait."""

    def finish(self) -> Step | Result:
        """The first of the answers that come later; waits for it."""

    def account(self) -> DeviceAccount | None:
        """What the machine behind this stage did since the last call; None where there is none."""

    def redial(self) -> None:
        """Where there is a machine behind this stage and it is away: try to reach it now, not later."""

    def close(self) -> None: ...


class Device(Protocol):
    """A machine behind this rank that holds one span in a form of its own, such as an iPad."""

    span: Span
    slots: int
    """Sequences at once."""
    context: int
    """Positions of a sequence."""
    fallback: bool
    """Whether this rank computes the span itself while the machine is away."""

    def check(self, folder: Path) -> None:
        """Raises ``ModelError`` when it holds layers of another model than the one in ``folder``."""

    def speed(self) -> Speed | None:
        """What it does, measured now, the way to it included; None while it is away."""

    def stage(self, own: TorchStage | None, *, slots: int, context: int) -> Stage:
        """A stage that runs the span on the machine, or in ``own`` while it is away."""


class AtOnce:
    """The part of ``Stage`` about later answers, for stages that have none."""

    def done(self) -> bool:
        return False

    def finish(self) -> Step | Result:
        raise AssertionError("every answer was given at once")

    def account(self) -> DeviceAccount | None:
        return None

    def redial(self) -> None:
        """Nobody is away."""

    def close(self) -> None:
        """Nothing to let go: what there is goes with the process."""


class TorchStage(AtOnce):
    """A span computed in this process. ``between`` is called after every layer, for whoever has to be let in."""

    def __init__(self, model: Slice, sampler: Sampler, between: Callable[[], None]) -> None:
        """``sampler`` is used by the last stage only."""
        self.span: Span | None = model.span
        self._model, self._sampler, self._between = model, sampler, between

    @torch.inference_mode()
    def forward(self, step: Step) -> Step | Result:
        model = self._model
        x_TE = model.embed(step.rows) if model.first else hidden_states(step.hidden, model.config.embed)
        out = model.forward(step.rows, x_TE, self._between)
        if not model.last:
            return Step(epoch=step.epoch, number=step.number, rows=step.rows, hidden=hidden_bytes(out))
        self._sampler.observe(step.rows)
        sampled = [row for row in step.rows if row.outputs]
        if not sampled:
            return Result(epoch=step.epoch, number=step.number, ids=())
        ids = self._sampler.sample(sampled, out)
        logprobs = self._sampler.logprobs(sampled, out, ids) if any(row.logprobs for row in sampled) else ()
        return Result(epoch=step.epoch, number=step.number, ids=tuple(ids), logprobs=tuple(logprobs))


class PassStage(AtOnce):
    """Rank 0's stage where it has no layers: steps pass unchanged, and the next rank embeds their ids."""

    span: Span | None = None

    def forward(self, step: Step) -> Step | Result:
        return step


def hidden_states(hidden: Buffer, embed: int) -> Tensor:
    """A [T, E] view of a frame's hidden states, without a copy."""
    return torch.frombuffer(hidden, dtype=torch.float32).view(-1, embed)


def hidden_bytes(x_TE: Tensor) -> memoryview:
    return x_TE.contiguous().view(torch.uint8).reshape(-1).numpy().data
