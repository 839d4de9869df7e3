"""A layer as a short list of operations over named buffers, which a player runs for the rows of a step.

Knows: the kinds of operation, the buffers between them, and in which leaves a shared product is summed.
Must not know: how an operation is computed, tensors' contents, any family.

A family declares one ``Program`` a layer and one for what follows the last. Programs hold no code that computes:
``torch_player.py`` is the reference, ``native/`` runs the same in C++, and the iPad's converter reads them too.

Legend: T tokens of a step, E embed, H query heads, K key/value heads, D head dimension, F inner features of the MLP,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

LEAF_UNIT = 64
"""Leaves of the MLP's down product are whole multiples of so many inputs, but for the last one's rest."""
MOST_LEAVES = 16


class Buffer(Enum):
    """What operations read and write, [T, ...]."""

    HIDDEN = "hidden"
    """The hidden states, [T, E]: what comes in and goes out."""
    NORMED = "normed"
    """[T, E]"""
    QKV = "qkv"
    """Queries, keys and values of all heads, one after another: [T, (H + 2K) x D]."""
    MIXED = "mixed"
    """What attention gives, [T, H x D]."""
    INNER = "inner"
    """[T, F], or the gate and then what it gates, [T, 2F]."""
    ACTIVE = "active"
    """[T, F]"""
    CHANGE = "change"
    """What is added to the hidden states, [T, E]."""
    LOGITS = "logits"
    """[T, V]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A layer norm where it is ``centred``, with a weight and a bias, else an RMS norm with a weight."""

    source: Buffer
    target: Buffer
    name: str
    """Of the tensors, without ``.weight`` and ``.bias``."""
    centred: bool
    heads: tuple[int, int] | None = None
    """Of a buffer of heads: the norm is of each head from the first of these to before the second."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Rows times a weight, ``target = source @ weight.T + bias``."""

    source: Buffer
    target: Buffer
    names: tuple[str, ...]
    """Of the weights that lie one after another, without ``.weight`` and ``.bias``."""
    inputs: int
    outputs: int
    biased: bool
    transposed: bool = False
    """Whether the checkpoint holds the weights as [inputs, outputs]."""
    leaves: tuple[int, ...] = ()
    """Where the leaves of the sum end, the last at ``inputs``; one leaf where there are none. Each leaf is summed in
    the order of its inputs, and the leaves in a tree of two and two: ranks that share the inputs get the same bits."""
    head: bool = False
    """Whether it gives the logits."""

    @property
    def label(self) -> str:
        """The names in one, for a sentence: ``layers.3.self_attn.q/k/v_proj``."""
        if len(self.names) == 1:
            return self.names[0]
        before, after = _common_prefix(self.names), _common_prefix([name[::-1] for name in self.names])[::-1]
        middle = [name[len(before) : len(name) - len(after)] for name in self.names]
        return f"{before}{'/'.join(middle)}{after}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rotate:
    """Rotary positions on the first ``heads`` heads of a buffer, in place: element i with element i + D / 2."""

    buffer: Buffer
    heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Write:
    """Keys and values, the last heads of the source, into the cache of the layer."""

    source: Buffer
    layer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Attend:
    """Each query over its slot's keys up to its own position: softmax(scale q k) v."""

    source: Buffer
    target: Buffer
    layer: int
    scale: float
    window: int
    """How many positions back it looks, itself included; 0 for all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate:
    """An activation, by its name in config.json; where ``gated``, of the source's first half, times its second."""

    source: Buffer
    target: Buffer
    function: str
    gated: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """``target += source``."""

    source: Buffer
    target: Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Select:
    """From here on only the positions that have an output: behind the last layer's cache no other is needed."""

    buffers: tuple[Buffer, ...]


Operation = Norm | Product | Rotate | Write | Attend | Activate | Add | Select


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A layer, or what follows the last one, as operations in order."""

    operations: tuple[Operation, ...]

    @property
    def products(self) -> Iterator[Product]:
        return (operation for operation in self.operations if isinstance(operation, Product))

    def outputs_only(self) -> Program:
        """The same for the model's last layer: what comes behind the cache is computed for outputs alone."""
        at = next(i for i, operation in enumerate(self.operations) if isinstance(operation, Attend))
        attend = self.operations[at]
        assert isinstance(attend, Attend)
        select = Select(buffers=(Buffer.HIDDEN, attend.source))
        return Program(operations=(*self.operations[:at], select, *self.operations[at:]))


def head_leaves(heads: int, dim: int) -> tuple[int, ...]:
    """The leaves of attention's output product: one for each query head."""
    return tuple(dim * (head + 1) for head in range(heads))


def inner_leaves(inner: int) -> tuple[int, ...]:
    """The leaves of the MLP's down product: at most ``MOST_LEAVES``, as alike as whole units allow."""
    units = inner // LEAF_UNIT
    leaves = max(1, min(MOST_LEAVES, units))
    return (*(units * leaf // leaves * LEAF_UNIT for leaf in range(1, leaves)), inner)


def _common_prefix(names: list[str] | tuple[str, ...]) -> str:
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]
