"""A slice of a model: the layers of a span, with the embedding before the first and the head behind the last.

Knows: a model's layers in order, and which tensors are the embedding and the head.
Must not know: what a layer computes, which layers other ranks hold, where weights come from (a ``Source`` has them), or
what a frame, link or request is.

Legend: T tokens of a step, E embed, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpgpt.core import Row, Span
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.attention import Attention, Batch, Rotary
from mpgpt.model.family import Block
from mpgpt.model.known_families import family_of
from mpgpt.model.linear import Kernels, Weight
from mpgpt.model.loader import Loader, Source

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
    c, queries, keys = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    up = 2 * c.inner if c.gated else c.inner
    shapes = [(c.embed, queries + 2 * keys), (queries, c.embed), (c.embed, up), (c.inner, c.embed)]
    layers = [Weight(inputs=inputs, outputs=outputs) for inputs, outputs in shapes]
    return [*layers, Weight(inputs=c.embed, outputs=c.vocab, head=True)]


class Slice:
    """The layers of ``span``, with the embedding if they are the first and the head if they are the last.

    Nothing else of the model is ever read. The embedding stays in its file and is looked up there through the
    page cache, so that a tied embedding is not held twice even where first and last are one.
    """

    def __init__(
        self, config: ModelConfig, span: Span, source: Source, *, slots: int, context: int, kernels: Kernels
    ) -> None:
        self.config, self.span = config, span
        self.dtype = dtype = kernels.activations
        self.first, self.last = span.start == 0, span.stop == config.layers
        family, loader = family_of(config), Loader(config=config, source=source, kernels=kernels)
        self._rotary = None if family.positions else Rotary(config, context, dtype)
        self.blocks: list[Block] = []
        self.attentions = []
        for layer in range(span.start, span.stop):
            attention = Attention(config, layer, slots, context, dtype)
            self.attentions.append(attention)
            self.blocks.append(family.block(config, layer, loader, attention))
        embedding, head = tables(config, source)
        if self.first:
            self._embedding = loader.table(embedding)
            self._positions = source.vector(family.positions) if family.positions else None
        if self.last:
            self._norm = family.final_norm(loader)
            self._head = loader.head(head)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that this slice multiplies with."""
        return sum(block.nbytes for block in self.blocks) + (self._head.nbytes if self.last else 0)

    @property
    def kv_nbytes(self) -> int:
        return sum(attention.kv.nbytes for attention in self.attentions)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """A step's rows as the layers need them."""
        return Batch(rows, self.dtype, self._rotary)

    def embed(self, batch: Batch) -> Tensor:
        """Token (and learned position) embeddings, [T, E]."""
        x_TE = self._embedding[batch.ids].to(self.dtype)
        if self._positions is not None:
            x_TE = x_TE + self._positions[batch.positions].to(self.dtype)
        return x_TE

    def run(self, x_TE: Tensor, batch: Batch, between: Callable[[], None]) -> Tensor:
        """The layers, with ``between`` called after each; the last slice returns the output positions only."""
        for i, block in enumerate(self.blocks):
            x_TE = block(x_TE, batch, outputs_only=self.last and i == len(self.blocks) - 1)
            between()
        return x_TE

    def logits(self, x_TE: Tensor) -> Tensor:
        """[T, V] float32."""
        return self._head(self._norm(x_TE)).float()
