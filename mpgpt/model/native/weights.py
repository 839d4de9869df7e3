"""Weights as the compiled player holds them: packed into panels block by block, as they come out of a checkpoint.

Knows: the formats of ``core/weight.h`` by dtype, and how vectors are laid out for it.
Must not know: what a weight is for, where its blocks come from.

Legend: I input features, O output features; o output features of a block.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from mpgpt.errors import ModelError
from mpgpt.model.native.library import WeightArgs

FORMATS: Mapping[str, int] = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int8-group": 4, "int4": 5}
LANES = 16


class PackedWeight:
    """A weight [O, I] in panels of sixteen outputs; ``args`` describes it to the library."""

    def __init__(
        self, calls: ctypes.CDLL, dtype: str, inputs: int, outputs: int, leaves: Sequence[int], bias_O: Tensor | None
    ) -> None:
        """``leaves`` are where those of the inputs end, the last at ``inputs``."""
        self._calls, self._filled = calls, 0
        self._stops = (ctypes.c_int32 * len(leaves))(*leaves)
        self.inputs, self.outputs, self.panels = inputs, outputs, -(-outputs // LANES)
        self.block = math.gcd(64, *leaves) if dtype == "int8" else 1
        """The inputs that are turned together (``core/turn.h``); 1 where none are."""
        self.bias_O = bias_O
        self._bias = None if bias_O is None else padded(bias_O)
        self.args = WeightArgs(
            format=FORMATS[dtype], inputs=inputs, outputs=outputs, leaves=len(leaves),
            stops=ctypes.addressof(self._stops), panels=None,
            bias=None if self._bias is None else self._bias.data_ptr(),
        )  # fmt: skip
        self.nbytes: int = calls.mpgpt_weight_bytes(self.args)
        self._panels = torch.empty(self.nbytes, dtype=torch.uint8)
        self.args.panels = self._panels.data_ptr()
        spare = -outputs % LANES
        if spare:  # lanes that no output has: they are computed with, and must be numbers
            self._panels[-self.nbytes // self.panels :].zero_()

    def fill(self, blocks: Iterable[Tensor], label: str) -> None:
        """Take all of the weight, in [o, I] blocks of any float dtype; ``ModelError`` where a number is not finite."""
        for block_OI in blocks:
            rows = block_OI.to(torch.float32).contiguous()
            # The extremes are NaN where one element is; they are found in one pass, with nothing written.
            if not torch.stack(rows.aminmax()).isfinite().all():
                raise ModelError(f"{label} has weights that are no finite numbers: the checkpoint is damaged")
            self._calls.mpgpt_pack(self.args, rows.data_ptr(), self._filled, len(rows))
            self._filled += len(rows)
        assert self._filled == self.args.outputs


def padded(vector: Tensor) -> Tensor:
    """As float32, with zeros up to whole sixteens."""
    flat = vector.to(torch.float32).reshape(-1)
    return torch.nn.functional.pad(flat, (0, -len(flat) % LANES)).contiguous()
