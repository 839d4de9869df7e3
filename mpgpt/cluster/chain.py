"""One step through a model that all ranks hold together, each a part of the layers.

Knows: which rank holds what part, and how a step passes from each to the next.
Must not know: schedulers, samplers, what the outcome is held against.

Legend: T tokens, E embed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mpgpt.core import Row, Span, Step, Stop
from mpgpt.engine.stage import hidden_bytes, hidden_states
from mpgpt.errors import LinkError
from mpgpt.model.footprint import HIDDEN_BYTES
from mpgpt.model.linear import Kernels
from mpgpt.model.slice import Slice
from mpgpt.model.weights import Checkpoint, lean_heap, model_config
from mpgpt.transport.link import World
from mpgpt.transport.wire import Codec


def part_of(layers: int, rank: int, ranks: int) -> Span | None:
    """The layers of a rank where all have as many, or one more or less; None where there are too few."""
    start, stop = layers * rank // ranks, layers * (rank + 1) // ranks
    return Span(start=start, stop=stop) if start < stop else None


@torch.inference_mode()
def pass_through(world: World, folder: Path, kernels: Kernels, ids: Sequence[int]) -> Tensor | None:
    """What this rank's part makes of a sequence: [T, E] float32 behind its last layer, or the logits [T, V] behind
    the model's; None of a rank without layers. All ranks must call it.

    Raises ``LinkError`` where a rank before this one had to give up; its own error is raised there.
    """
    config, rank, ranks = model_config(folder), world.rank, world.size
    codec = Codec(
        rows=1, tokens=len(ids), token_bytes=config.embed * HIDDEN_BYTES, slots=1, context=len(ids), ranks=1
    )  # fmt: skip
    # In this order no rank waits for one that waits for it.
    onward = world.connect(rank, rank + 1, codec.max_frame) if rank + 1 < ranks else None
    inward = world.connect(rank - 1, rank, codec.max_frame) if rank else None
    span = part_of(config.layers, rank, ranks)
    message: Step | Stop = Stop(epoch=0)
    try:
        model = None
        if span:
            with lean_heap():
                model = Slice(config, span, Checkpoint(folder), slots=1, context=len(ids), kernels=kernels)
        step = Step(epoch=0, number=0, rows=(Row(slot=0, start=0, ids=tuple(ids), outputs=len(ids)),))
        if inward:
            frame = inward.recv()
            received = None if frame is None else codec.decode(frame)
            if not isinstance(received, Step):
                raise LinkError("a rank before this one had to give up")
            step = received
        if not model:
            message = step
            return None
        x_TE = model.embed(step.rows) if model.first else hidden_states(step.hidden, config.embed)
        out = model.forward(step.rows, x_TE)
        if not model.last:
            message = replace(step, hidden=hidden_bytes(out))
        return out
    finally:
        if onward:  # the next rank waits for one or the other
            onward.send(codec.encode(message))
