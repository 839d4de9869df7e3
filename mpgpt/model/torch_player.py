"""The torch player of programs: the reference for the compiled one, and what computes where there is none.

Knows: each operation as a few lines of torch, over buffers that are tensors.
Must not know: families, kernels, where weights come from (a ``Loader`` has them).

Legend: T tokens of a step, E embed, X heads of all kinds, D head dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpgpt.core import Row
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.attention import Attention, Batch, Query, Rotary
from mpgpt.model.loader import Loader, activation
from mpgpt.model.program import (
    Activate,
    Add,
    Attend,
    Buffer,
    Norm,
    Operation,
    Product,
    Program,
    Rotate,
    Select,
    Write,
)


class Playing:
    """One step under way: its buffers, and the queries that are still computed for."""

    __slots__ = ("batch", "buffers", "queries")

    def __init__(self, batch: Batch, x_TE: Tensor) -> None:
        self.batch = batch
        self.buffers: dict[Buffer, Tensor] = {Buffer.HIDDEN: x_TE}
        self.queries: Sequence[Query] = batch.queries


Play = Callable[[Playing], None]


class TorchPlayer:
    """Layers, and what follows the last where ``closing`` is given, over a cache of their own.

    ``programs`` are the layers', in order; their weights are loaded one after another.
    """

    def __init__(
        self, programs: Sequence[Program], closing: Program | None, loader: Loader, *, slots: int, context: int
    ) -> None:
        self._config, self._loader = loader.config, loader
        self._dtype = loader.kernels.activations
        self._rotary = Rotary(self._config, context, self._dtype) if self._config.inv_freq else None
        self._attentions: dict[int, Attention] = {}
        self._slots, self._context = slots, context
        self.nbytes = self.head_nbytes = 0
        self._layers = [[self._operation(op) for op in program.operations] for program in programs]
        self._closing = [self._operation(op) for op in closing.operations] if closing else []

    @property
    def kv_nbytes(self) -> int:
        return sum(attention.kv.nbytes for attention in self._attentions.values())

    def play(self, rows: Sequence[Row], x_TE: Tensor, between: Callable[[], None]) -> Tensor:
        """See ``slice.Player``. Hidden states are converted to the dtype of activations here, and back."""
        batch = Batch(rows, self._dtype, self._rotary)
        playing = Playing(batch, x_TE.to(self._dtype))
        for layer in self._layers:
            for operation in layer:
                operation(playing)
                if not playing.queries:  # selected, and nothing is left to compute
                    break
            between()
        if not self._closing:
            return playing.buffers[Buffer.HIDDEN].float()
        if not playing.queries:
            return torch.empty((0, self._config.vocab))
        for operation in self._closing:
            operation(playing)
        return playing.buffers[Buffer.LOGITS].float()

    def fill_cache(self, value: float) -> None:
        """Every key and value becomes ``value``."""
        for attention in self._attentions.values():
            attention.kv.fill_(value)

    def _operation(self, op: Operation) -> Play:
        match op:
            case Norm():
                return self._norm(op)
            case Product():
                return self._product(op)
            case Rotate():
                return rotate(op, self._config)
            case Write():
                self._attentions[op.layer] = Attention(
                    self._config, op.layer, self._slots, self._context, self._dtype
                )  # fmt: skip
                return write(op, self._config, self._attentions[op.layer])
            case Attend():
                return attend(op, self._config, self._attentions[op.layer])
            case Activate():
                return activate(op)
            case Add():
                return add(op)
            case Select():
                return select(op)

    def _norm(self, op: Norm) -> Play:
        norm = self._loader.layer_norm(op.name) if op.centred else self._loader.rms_norm(op.name)
        source, target, dim = op.source, op.target, self._config.head_dim
        if op.heads is None:

            def whole(playing: Playing) -> None:
                playing.buffers[target] = norm(playing.buffers[source])

            return whole
        assert source is target, "heads are normed in place"
        first, last = op.heads

        def heads(playing: Playing) -> None:
            x_TXD = playing.buffers[source].view(len(playing.buffers[source]), -1, dim)
            x_TXD[:, first:last] = norm(x_TXD[:, first:last])

        return heads

    def _product(self, op: Product) -> Play:
        linear = self._loader.product(op)
        self.nbytes += linear.nbytes
        self.head_nbytes += linear.nbytes if op.head else 0
        source, target = op.source, op.target

        def product(playing: Playing) -> None:
            playing.buffers[target] = linear(playing.buffers[source])

        return product


def rotate(op: Rotate, config: ModelConfig) -> Play:
    dim, heads, buffer = config.head_dim, op.heads, op.buffer

    def play(playing: Playing) -> None:
        playing.batch.apply_rotary_(
            playing.buffers[buffer].view(-1, config.heads + 2 * config.kv_heads, dim)[:, :heads]
        )

    return play


def write(op: Write, config: ModelConfig, attention: Attention) -> Play:
    heads, kv_heads, dim, source = config.heads, config.kv_heads, config.head_dim, op.source

    def play(playing: Playing) -> None:
        kv_T2KD = playing.buffers[source][:, heads * dim :].view(-1, 2, kv_heads, dim)
        attention.write(kv_T2KD, playing.batch)

    return play


def attend(op: Attend, config: ModelConfig, attention: Attention) -> Play:
    heads, dim, source, target = config.heads, config.head_dim, op.source, op.target

    def play(playing: Playing) -> None:
        q_THD = playing.buffers[source][:, : heads * dim].view(-1, heads, dim)
        playing.buffers[target] = attention.read(q_THD, playing.queries, playing.batch)

    return play


def activate(op: Activate) -> Play:
    function, source, target = activation(op.function), op.source, op.target

    def gated(playing: Playing) -> None:
        gate_TF, up_TF = playing.buffers[source].chunk(2, dim=-1)
        playing.buffers[target] = function(gate_TF).mul_(up_TF)

    def plain(playing: Playing) -> None:
        playing.buffers[target] = function(playing.buffers[source])

    return gated if op.gated else plain


def add(op: Add) -> Play:
    source, target = op.source, op.target

    def play(playing: Playing) -> None:
        playing.buffers[target] = playing.buffers[target] + playing.buffers[source]

    return play


def select(op: Select) -> Play:
    def play(playing: Playing) -> None:
        batch = playing.batch
        for buffer in op.buffers:
            playing.buffers[buffer] = playing.buffers[buffer][batch.output_positions]
        playing.queries = batch.output_queries

    return play
