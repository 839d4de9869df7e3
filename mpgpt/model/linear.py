"""Linear layers: a weight held by the kernel that this machine is fastest with, read in blocks.

Knows: which kernel each shape of weight takes, how blocks are joined into parts, when one row is multiplied as two.
Must not know: what the layer is for, where its weights come from, or how kernels work.

Legend: T tokens, I input features, O output features; o output features of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpgpt.model.candidates import candidates
from mpgpt.model.footprint import GROUP, bytes_per_weight, head_dtype
from mpgpt.model.kernels import FLOATS, Kernel

HELD_BYTES = 6 << 20
"""Weights are held in parts of at least this size: while a part is made it exists twice, or somewhat more."""


NATIVE = "native"
"""The name of the compiled kernels, which are chosen for all of a model's weights or for none."""
MANY_ROWS: Mapping[str, torch.dtype] = {"native-float32": torch.float32, "native-bfloat16": torch.bfloat16}
"""Names of the compiled kernels where torch multiplies many rows, and what in: with other bits."""


def compiled(dtype: str) -> tuple[str, ...]:
    """The names of the compiled kernels for a dtype: alone, and with torch's products of many rows where torch has a
    fast one."""
    packed = any(kernel.name == "packed" for kernel in candidates("bfloat16"))
    brain = ("native-bfloat16",) if packed and dtype != "float32" else ()
    return NATIVE, "native-float32", *brain


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """A model's dtype, and the kernel that each shape of weight takes on this machine."""

    dtype: str
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Kernels' names by "dtype IxO"; a shape that is not among them takes the first candidate."""
    kv_dtype: str = "auto"
    """Of the compiled kernels' cache: float32, float16, bfloat16, or as ``activations``."""

    @property
    def native(self) -> bool:
        """Whether the compiled kernels compute, and not torch's."""
        return any(name == NATIVE or name in MANY_ROWS for name in self.chosen.values())

    @property
    def stored(self) -> torch.dtype:
        """Of the compiled kernels' cache."""
        return FLOATS.get(self.kv_dtype, self.activations)

    @property
    def activations(self) -> torch.dtype:
        """Of torch's hidden states and cache. Beside integers float32, which every processor computes fast in."""
        return FLOATS.get(self.dtype, torch.float32)

    @property
    def weight_bytes(self) -> float:
        """What a weight of a layer takes, its share of scales included, about."""
        return bytes_per_weight(self.dtype)

    def dtype_of(self, inputs: int, *, head: bool = False) -> str:
        """The dtype of a held weight. Where all is int4 the head is int8: it decides, and a token reads it once. The
        compiled kernels hold it in groups."""
        if head and self.native:
            return head_dtype(self.dtype)
        return "int8" if self.dtype == "int4" and (head or inputs % GROUP) else self.dtype

    def many_rows(self, inputs: int, outputs: int) -> torch.dtype | None:
        """What torch multiplies many rows of a layer's product in, where it does beside the compiled kernels."""
        return MANY_ROWS.get(self.chosen.get(key(self.dtype_of(inputs), inputs, outputs), ""))

    def pick(self, inputs: int, outputs: int, *, head: bool = False) -> Kernel:
        dtype = self.dtype_of(inputs, head=head)
        found = {kernel.name: kernel for kernel in candidates(dtype)}
        assert found, f"this build of torch has no kernel for {dtype}"
        return found.get(self.chosen.get(key(dtype, inputs, outputs), ""), next(iter(found.values())))

    def linear(
        self, blocks: Iterable[Tensor], bias_O: Tensor | None, inputs: int, outputs: int, *, head: bool = False
    ) -> Linear:
        return Linear(blocks, bias_O, self.pick(inputs, outputs, head=head), self.activations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Weight:
    """A weight of a model that is to be held: its shape, and whether it is the head."""

    inputs: int
    outputs: int
    head: bool = False


def key(dtype: str, inputs: int, outputs: int) -> str:
    return f"{dtype} {inputs}x{outputs}"


class Linear:
    """``y_TO = x_TI @ weight_OI.T + bias_O``, the weight held once.

    ``blocks`` are [o, I] pieces of the weight in order, any float dtype; they are read one at a time, reduced to
    the kernel's precision and let go, so that loading never holds more than the layer and one part twice.
    """

    __slots__ = ("_bias", "_kernel", "_pairs", "dtype", "in_features", "nbytes", "out_features", "parts")

    def __init__(self, blocks: Iterable[Tensor], bias_O: Tensor | None, kernel: Kernel, dtype: torch.dtype) -> None:
        """``dtype`` is that of the activations."""
        self._kernel, self.dtype = kernel, dtype
        self.parts: list[Any] = []
        """The weight as the kernel holds it, in one part or several."""
        self.nbytes = self.in_features = self.out_features = 0
        widths = set()
        for reduced in _regroup(self._reduced(blocks)):
            self.parts.append(kernel.hold(*reduced))
            widths.add(len(reduced[0]))
            self.out_features += len(reduced[0])
            self.nbytes += _nbytes(reduced)
        self._bias = None if bias_O is None else bias_O.to(dtype)
        self._pairs = any(_alone_differs(kernel, self.in_features, outputs, dtype) for outputs in widths)

    def _reduced(self, blocks: Iterable[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        for block_OI in blocks:
            self.in_features = block_OI.shape[1]
            yield self._kernel.reduce(block_OI)

    def __call__(self, x_TI: Tensor) -> Tensor:
        if self._pairs and x_TI.shape[0] == 1:
            return self._kernel.multiply(torch.cat((x_TI, x_TI)), self.parts, self._bias)[:1]
        return self._kernel.multiply(x_TI, self.parts, self._bias)


@cache
def _alone_differs(kernel: Kernel, inputs: int, outputs: int, dtype: torch.dtype) -> bool:
    """Whether one row by itself comes out otherwise than beside another; tried, because no rule foretells it.

    Everything but rounding cancels in the trial (a weight twice, times a row and its negative), so that two ways
    of adding up differ in nearly every output, and not just in one of a thousand, as they would in 16 bit.
    """
    half = inputs // 2
    weight_OI = torch.linspace(1, 7 * outputs, outputs * half).sin().view(outputs, half)
    x_TI = torch.linspace(-1, 1, 2 * half).cos().view(2, half).to(dtype)
    odd = (0, inputs % 2)
    held = kernel.hold(*kernel.reduce(F.pad(torch.cat((weight_OI, weight_OI), 1), odd)))
    x_TI = F.pad(torch.cat((x_TI, -x_TI), 1), odd)
    return not torch.equal(kernel.multiply(x_TI[:1], [held], None), kernel.multiply(x_TI, [held], None)[:1])


def _nbytes(reduced: tuple[Tensor, ...]) -> int:
    """The bytes of a part: two levels of int4 share one."""
    small = reduced[0].dtype == torch.uint8
    return sum(tensor.nbytes for tensor in reduced) - (reduced[0].nbytes // 2 if small else 0)


def _regroup(blocks: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """The same rows in parts of ``HELD_BYTES`` or more."""
    waiting: list[tuple[Tensor, ...]] = []
    for block in blocks:
        waiting.append(block)
        if sum(map(_nbytes, waiting)) >= HELD_BYTES:
            yield _joined(waiting)
            waiting = []
    if waiting:
        yield _joined(waiting)


def _joined(blocks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return blocks[0] if len(blocks) == 1 else tuple(torch.cat(tensors) for tensors in zip(*blocks, strict=True))
