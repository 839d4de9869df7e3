"""How a linear layer is stored and multiplied on this machine.

Knows: the layouts that this torch build has for a weight, and which one to take.
Must not know: what the layer is for, or where its weights come from.

Decoding is bound by reading weights, so the layout decides the speed: oneDNN's packed layout, where there is one,
multiplies 2.2 to 4 times as fast as ``F.linear`` in float32, 1.1 to 2.1 in bfloat16 (``bench/LOG.md``). It has a
second virtue: the result of a row does not depend on how many rows stand beside it, bit for bit, as long as there
are at least two. A single row takes another code path for some shapes and rounds differently; where a trial at load
shows that, it is multiplied as two.

Legend: T tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_BYTES = 6 << 20
"""Weights are packed in blocks of output features of at least this size: while a block is packed it exists twice."""
ROWS_HINT = 32
"""The row count for which oneDNN chooses its blocking; measured best from 1 to 128 rows."""


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine has a packed layout for ``dtype`` that is faster than the plain one."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


class Linear:
    """``y_TO = x_TI @ weight_OI.T + bias_O``, the weight held once, in the layout that is fastest here.

    ``blocks`` are [o, I] pieces of the weight in order, any float dtype; they are read one at a time and
    let go, so that loading never holds more than the layer and one block of ``BLOCK_BYTES`` twice.
    """

    __slots__ = ("_biases", "_packed", "_pairs", "_parts", "in_features", "nbytes", "out_features")

    def __init__(self, blocks: Iterable[Tensor], bias_O: Tensor | None, dtype: torch.dtype) -> None:
        self._packed = can_pack(dtype)
        self._parts: list[Tensor] = []
        self.nbytes = self.in_features = self.out_features = 0
        widths: list[int] = []
        for block_OI in _regroup(blocks, dtype):
            # Packing copies; what is not packed may be a view into a file, and must not stay one.
            self._parts.append(
                _pack(block_OI) if self._packed else block_OI.clone(memory_format=torch.contiguous_format)
            )
            widths.append(block_OI.shape[0])
            self.in_features = block_OI.shape[1]
            self.nbytes += block_OI.nbytes
        self.out_features = sum(widths)
        self._biases = [None] * len(widths) if bias_O is None else list(torch.split(bias_O.to(dtype), widths))
        self._pairs = self._alone_differs(dtype)

    def __call__(self, x_TI: Tensor) -> Tensor:
        alone = self._pairs and x_TI.shape[0] == 1
        y_TO = self._multiply(torch.cat((x_TI, x_TI)) if alone else x_TI)
        return y_TO[:1] if alone else y_TO

    def _multiply(self, x_TI: Tensor) -> Tensor:
        multiply = _packed_linear if self._packed else F.linear
        outs = [multiply(x_TI, part, bias) for part, bias in zip(self._parts, self._biases, strict=True)]
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)

    def _alone_differs(self, dtype: torch.dtype) -> bool:
        """Whether one row by itself comes out otherwise than beside another; tried, because no rule foretells it."""
        x_TI = torch.linspace(-1, 1, 2 * self.in_features).cos().view(2, -1).to(dtype)
        return not torch.equal(self._multiply(x_TI[:1]), self._multiply(x_TI)[:1])


def _packed_linear(x_TI: Tensor, part: Tensor, bias_O: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, part, bias_O, "none", [], "")
    return y


def _pack(weight_OI: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OI, ROWS_HINT)
    return packed


def _regroup(blocks: Iterable[Tensor], dtype: torch.dtype) -> Iterable[Tensor]:
    """The same rows in blocks of ``BLOCK_BYTES`` or more, of ``dtype``."""
    held: list[Tensor] = []
    held_bytes = 0
    for block in blocks:
        held.append(block.to(dtype))
        held_bytes += held[-1].nbytes
        if held_bytes >= BLOCK_BYTES:
            yield held.pop() if len(held) == 1 else torch.cat(held)
            held, held_bytes = [], 0
    if held:
        yield held.pop() if len(held) == 1 else torch.cat(held)
