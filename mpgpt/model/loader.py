"""The parts of a layer out of a checkpoint's tensors: norms, linear layers, activations.

Knows: a ``Source`` of tensors by name, how weights are checked against the configuration and handed to a kernel.
Must not know: what a family calls its tensors, which layers there are, files, ranks.

Legend: I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mpgpt.errors import ModelError
from mpgpt.model.architecture import ACTIVATIONS, ModelConfig
from mpgpt.model.attention import Norm, layer_norm, rms_norm
from mpgpt.model.linear import Kernels, Linear
from mpgpt.model.program import Product


class Source(Protocol):
    """Where a layer gets its tensors from; names are the checkpoint's own."""

    def blocks(self, name: str, *, transpose: bool = False) -> Iterator[Tensor]:
        """The [O, I] weight ``name`` in blocks of output features; ``transpose`` if it is stored [I, O]."""

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has it."""

    def vector(self, name: str) -> Tensor:
        """A small tensor, whole."""

    def mapped(self, name: str) -> Tensor:
        """A large table of which only some rows will be read: a view into the file."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """An activation by its name in config.json."""
    function, options = ACTIVATIONS[name]
    return partial(getattr(F, function), **options)


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """The norms and products of one model."""

    config: ModelConfig
    source: Source
    kernels: Kernels

    def layer_norm(self, name: str) -> Norm:
        weight, bias = (self._vector(f"{name}.{part}") for part in ("weight", "bias"))
        return layer_norm(weight, bias, self.config.eps)

    def rms_norm(self, name: str) -> Norm:
        return rms_norm(self._vector(f"{name}.weight"), self.config.eps)

    def _vector(self, name: str) -> Tensor:
        return self.source.vector(name).to(self.kernels.activations)

    def product(self, op: Product) -> Linear:
        """The weights of ``op``, one after another, as one layer."""
        source = self.source
        bias = [source.vector(f"{name}.bias") for name in op.names] if op.biased else []
        blocks = product_blocks(source, op)
        return self.kernels.linear(blocks, torch.cat(bias) if bias else None, op.inputs, op.outputs, head=op.head)

    def table(self, name: str) -> Tensor:
        """The embedding ``name``, [V, E], in its file; ``ModelError`` when its shape is another."""
        shape, table = (self.config.vocab, self.config.embed), self.source.mapped(name)
        if table.shape != shape:
            raise ModelError(_misfit(name, self.config.embed, self.config.vocab, *reversed(table.shape)))
        return table


def product_blocks(source: Source, op: Product) -> Iterator[Tensor]:
    """The weights of ``op`` in [o, I] blocks, one after another; ``ModelError`` when they are of another model."""
    blocks = (b for name in op.names for b in source.blocks(f"{name}.weight", transpose=op.transposed))
    return fitting_blocks(blocks, f"{op.label}.weight" if op.head else op.label, op.inputs, op.outputs)


def fitting_blocks(blocks: Iterable[Tensor], name: str, inputs: int, outputs: int) -> Iterator[Tensor]:
    """The same blocks; ``ModelError`` when they are of another model than config.json describes."""
    seen = 0
    for block_OI in blocks:
        seen += block_OI.shape[0]
        if block_OI.shape[1] != inputs:
            raise ModelError(_misfit(name, inputs, outputs, block_OI.shape[1], seen))
        if seen > outputs:
            seen += sum(len(rest) for rest in blocks)
            break
        yield block_OI
    if seen != outputs:
        raise ModelError(_misfit(name, inputs, outputs, inputs, seen))


def _misfit(name: str, *sizes: int) -> str:
    expected, found = sizes[:2], sizes[2:]
    return f"{name} has {found} features in and out where config.json asks for {expected}: they are of two models"
