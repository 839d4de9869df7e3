"""A slice of a model: the layers of a span, with the embedding before the first and the head behind the last.

Knows: a model's layers in order, and which tensors are the embedding and the head.
Must not know: what a layer computes and how (a player does), which layers other ranks hold, where weights come from
(a ``Source`` has them), or what a frame, link or request is.

Legend: T tokens of a step, E embed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from mpgpt.core import Row, Span
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.known_families import family_of
from mpgpt.model.linear import Kernels, Weight
from mpgpt.model.loader import Loader, Source
from mpgpt.model.native.player import NativePlayer, team_size
from mpgpt.model.torch_player import TorchPlayer

HEAD = "lm_head.weight"


def tables(config: ModelConfig, source: Source) -> tuple[str, str]:
    """The names of the tensors that are the embedding and the head.

    Where the configuration says that both are one, the checkpoint still has the last word, as in transformers: a head
    of its own is used, and a head alone is the embedding too.
    """
    embedding = family_of(config).embedding
    if not config.tied:
        return embedding, HEAD
    held = [name for name in (embedding, HEAD) if source.holds(name)] or [embedding]
    return held[0], held[-1]


def has_another_head(config: ModelConfig, source: Source) -> bool:
    """Whether the configuration says that head and embedding are one, and the checkpoint has two that differ."""
    embedding, head = tables(config, source)
    if not config.tied or embedding == head:
        return False
    both = zip(source.blocks(embedding), source.blocks(head), strict=False)
    return not all(torch.equal(a.float(), b.float()) for a, b in both)


def weights_of(config: ModelConfig) -> list[Weight]:
    """The shapes of all weights that a model multiplies with, each once."""
    family = family_of(config)
    programs = family.program(config, 0), family.closing(config, HEAD)
    return [
        Weight(inputs=op.inputs, outputs=op.outputs, head=op.head) for program in programs for op in program.products
    ]


def silent() -> None:
    """Nothing between layers."""


class Player(Protocol):
    """What computes a slice's programs, over a cache of its own."""

    nbytes: int
    """Of the weights that it multiplies with."""
    head_nbytes: int
    """Of these the head's."""

    @property
    def kv_nbytes(self) -> int: ...

    def play(self, rows: Sequence[Row], x_TE: Tensor, between: Callable[[], None]) -> Tensor:
        """A step's float32 hidden states behind the layers, [T, E]; or its outputs' logits, [outputs, V] float32,
        where the slice is the last. ``between`` is called after each layer."""

    def fill_cache(self, value: float) -> None:
        """Every key and value becomes ``value``: as if there had been long sequences."""


class Slice:
    """The layers of ``span``, with the embedding if they are the first and the head if they are the last.

    Nothing else of the model is ever read. The embedding stays in its file and is looked up there through the
    page cache, so that a tied embedding is not held twice even where first and last are one.
    """

    def __init__(
        self, config: ModelConfig, span: Span, source: Source, *, slots: int, context: int, kernels: Kernels
    ) -> None:
        self.config, self.span = config, span
        self.first, self.last = span.start == 0, span.stop == config.layers
        family, loader = family_of(config), Loader(config=config, source=source, kernels=kernels)
        embedding, head = tables(config, source)
        programs = family.programs(config, range(span.start, span.stop))
        closing = family.closing(config, head) if self.last else None
        self._player: Player
        if kernels.native:
            self._player = NativePlayer(programs, closing, loader, slots=slots, context=context, threads=team_size())
        else:
            self._player = TorchPlayer(programs, closing, loader, slots=slots, context=context)
        if self.first:
            self._dtype = torch.float32 if kernels.native else kernels.activations
            self._embedding = loader.table(embedding)
            self._positions = source.vector(family.positions) if family.positions else None

    @property
    def nbytes(self) -> int:
        """Bytes of weights that this slice multiplies with."""
        return self._player.nbytes

    @property
    def head_nbytes(self) -> int:
        return self._player.head_nbytes

    @property
    def kv_nbytes(self) -> int:
        return self._player.kv_nbytes

    def embed(self, rows: Sequence[Row]) -> Tensor:
        """Token (and learned position) embeddings, [T, E] float32; for torch's kernels rounded to their dtype."""
        x_TE = self._embedding[torch.tensor([i for row in rows for i in row.ids])].to(self._dtype)
        if self._positions is not None:
            positions = torch.tensor([p for row in rows for p in range(row.start, row.stop)])
            x_TE = x_TE + self._positions[positions].to(self._dtype)
        return x_TE.float()

    def forward(self, rows: Sequence[Row], x_TE: Tensor, between: Callable[[], None] = silent) -> Tensor:
        """The layers for float32 hidden states, with ``between`` called after each: hidden states again, or of the
        last slice the outputs' logits, [outputs, V] float32."""
        return self._player.play(rows, x_TE, between)

    def fill_cache(self, value: float) -> None:
        self._player.fill_cache(value)
