"""Products of many rows by torch: the compiled player's weights are unpacked a part at a time, and torch multiplies.

Knows: how columns and the player's buffers become tensors. Must not know: which products are worth it (``autotune.py``
tries), what a product is for, where weights come from.

Where a processor has a unit for matrices that only its maker's library reaches (Apple's), this is many times as fast.
The sums have another order than the compiled kernels', and one that may depend on the rows: see ``--fast``.

Legend: T tokens of a step, I input features, O output features; o output features of a part.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from mpgpt.model.kernels import spread
from mpgpt.model.native.weights import LANES, PackedWeight

LEAST_ROWS = 64
"""Of a step that torch multiplies: fewer are decoded together, where unpacking would cost more than it saves."""
PART_BYTES = 4 << 20
"""Of the columns that are unpacked at a time: they are read again at once, and should still be in a cache then."""


class ManyRows:
    """Torch's way of one product of a player, for steps of ``LEAST_ROWS`` or more."""

    def __init__(self, weight: PackedWeight, dtype: torch.dtype) -> None:
        """Multiplies in ``dtype``, float32 or bfloat16."""
        self._weight, self._dtype = weight, dtype
        column_bytes = weight.inputs * LANES * dtype.itemsize
        self._each = min(weight.panels, max(1, PART_BYTES // column_bytes))
        self.part_bytes = self._each * column_bytes

    def multiply(
        self, x_TI: Tensor, y_TO: Tensor, space: Tensor, unpack: Callable[[int, int, bool, int], None]
    ) -> None:
        """``y_TO = x_TI @ weight.T + bias``. ``space`` is ``part_bytes`` bytes or more to work in. ``unpack`` gets
        panels of the weight, from the first to before the last, whether as bfloat16, and where to."""
        weight = self._weight
        if weight.block > 1:
            x_TI = spread(x_TI, weight.block)
        x_TI = x_TI.to(self._dtype)
        for first in range(0, weight.panels, self._each):
            last = min(first + self._each, weight.panels)
            shape = weight.inputs, (last - first) * LANES
            columns_Io = space.view(self._dtype)[: math.prod(shape)].view(shape)
            unpack(first, last, self._dtype == torch.bfloat16, columns_Io.data_ptr())
            part_To = y_TO[:, first * LANES : last * LANES]
            part_To.copy_((x_TI @ columns_Io)[:, : part_To.shape[1]])
        if weight.bias_O is not None:
            y_TO += weight.bias_O
