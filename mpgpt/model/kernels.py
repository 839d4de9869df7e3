"""How a linear layer is stored and multiplied on this machine.

Knows: the ways that this torch build has to hold a weight and multiply with it, and what each promises.
Must not know: what the layer is for, where its weights come from, which ways work here (``candidates.py`` tries them),
or which is fastest (``autotune.py`` measures).

Decoding is bound by reading weights, so how they are held decides the speed. Every kernel keeps two promises. Its
precision is that of its dtype: float32 is never less, ``int8`` is weights of 8 bits with a scale for each output and
activations of 8 bits with a scale for each row, ``int4`` is weights of 4 bits with a scale and a least value for each
group of 32. And a row's result does not depend on the rows beside it: products of integers are exact, and those of
floats are so, bit for bit, as long as there are two rows (oneDNN and MKL, x86-64), but for bfloat16 on a processor with
a matrix unit (AMX), where many rows take another path than few. A single row may take another code path and round
differently; where a trial at load shows that, it is multiplied as two.

Legend: T tokens, I input features, O output features, N groups of input features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mpgpt.model.footprint import GROUP

ROWS_HINT = 32
"""The row count for which oneDNN chooses its blocking; measured best from 1 to 128 rows."""
WIDENED_BYTES = 4 << 20
"""The part of a weight that ``Widened`` converts at a time."""
TINY = 1e-30
"""The scale of a row of zeros."""
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES = (*FLOATS, "int8", "int4")

Parts = Sequence[Any]


class Kernel(Protocol):
    """One way to hold a weight. ``reduce`` and ``hold`` are called block by block, ``multiply`` ever after."""

    @property
    def name(self) -> str: ...

    def __hash__(self) -> int: ...

    def here(self) -> bool:
        """Whether this processor has more than a slow stand-in for it, as far as torch says."""

    def reduce(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        """A block of the checkpoint in the kernel's precision: tensors whose first dimension is O."""

    def hold(self, *reduced: Tensor) -> Any:
        """Such blocks, joined, in the kernel's own layout."""

    def multiply(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        """x @ weight.T + bias, [T, O], in the dtype of x."""


@dataclass(frozen=True, slots=True)
class Plain:
    """As in the checkpoint, [O, I]."""

    dtype: torch.dtype
    name: str = "plain"

    def here(self) -> bool:
        return True

    def reduce(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        # What is not copied may be a view into a file, and must not stay one.
        return (weight_OI.to(self.dtype, memory_format=torch.contiguous_format, copy=True),)

    def hold(self, *reduced: Tensor) -> Any:
        return reduced[0]

    def multiply(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        return _each(F.linear, x_TI, parts, bias_O)


@dataclass(frozen=True, slots=True)
class Columns(Plain):
    """Transposed, [I, O]."""

    name: str = "columns"

    def here(self) -> bool:
        return self.dtype == torch.float32  # a good deal slower than plain in 16 bit, wherever it was tried

    def hold(self, *reduced: Tensor) -> Any:
        return reduced[0].t().contiguous()

    def multiply(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        if bias_O is None:
            return _join([x_TI @ part for part in parts])
        biases = torch.split(bias_O, [part.shape[1] for part in parts])
        return _join([torch.addmm(bias, x_TI, part) for part, bias in zip(parts, biases, strict=True)])


@dataclass(frozen=True, slots=True)
class Packed(Plain):
    """oneDNN's own blocks: 2.2 to 4 times as fast as plain in float32, 1.1 to 2.1 in bfloat16 (``bench/LOG.md``)."""

    name: str = "packed"

    def here(self) -> bool:
        return self.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())

    def hold(self, *reduced: Tensor) -> Any:
        return torch.ops.mkldnn._reorder_linear_weight(reduced[0], ROWS_HINT)

    def multiply(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        return _each(_packed_linear, x_TI, parts, bias_O)


@dataclass(frozen=True, slots=True)
class Int8:
    """The rounding before a product of 8-bit integers, and the scaling after it, which all 8-bit kernels share.

    Symmetric, by the largest magnitude: of each output's weights, and of each row of activations. A few features
    of a row are often 20 times as large as the rest, which would leave little of 8 bits for those. So weights and
    rows are first multiplied by an orthogonal matrix of plus and minus ones in blocks of up to 64 features, which
    spreads the large ones and leaves the product as it is (Ashkboos et al., "QuaRot", 2024). ``bench/LOG.md`` has
    the measurements.
    """

    name: str = ""
    split: bool = False
    """Whether each row is multiplied as two, its positive and its negative part, so that sums of 16 bits hold them:
    as bytes without a sign neither is more than 128, and 2 * 128 * 127 is less than 2 ** 15. It costs a product of
    twice the rows, and no precision."""

    def here(self) -> bool:
        return True

    def reduce(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        weight_OI = spread(weight_OI.float())
        scale_O = weight_OI.abs().amax(1).clamp_min_(TINY).div_(127)
        return (weight_OI / scale_O[:, None]).round_().to(torch.int8), scale_O.div_(127)

    @staticmethod
    def ready(x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """The rows to be rounded, and the largest magnitude of each, [T, 1]."""
        x_TI = spread(x_TI)
        return x_TI, x_TI.abs().amax(1, keepdim=True).clamp_min_(TINY)

    def split_rows(self, x_TI: Tensor, zero: int) -> Tensor:
        """The rows as they are multiplied: where split, what is below ``zero``, then what is above, negated."""
        # A byte without a sign that is negated wraps: 256 - 200 is as far below 128 as 200 is above.
        return torch.cat((x_TI.clamp_max(zero), x_TI.clamp_min(zero).neg_())) if self.split else x_TI

    def join_rows(self, outs: list[Tensor]) -> Tensor:
        """The products of the rows that ``split_rows`` made, [T, O]."""
        y_TO = _join(outs)
        if not self.split:
            return y_TO
        below_TO, above_TO = y_TO.chunk(2)
        return below_TO - above_TO

    @staticmethod
    def finish(y_TO: Tensor, x_scale_T1: Tensor, bias_O: Tensor | None) -> Tensor:
        return y_TO.mul_(x_scale_T1) if bias_O is None else torch.addcmul(bias_O, y_TO, x_scale_T1)


@dataclass(frozen=True, slots=True)
class Fbgemm(Int8):
    """FBGEMM's blocks; it rounds activations itself, with a scale that we make the same for all rows."""

    name: str = "fbgemm"

    def hold(self, *reduced: Tensor) -> Any:
        weight_OI, scale_O = reduced
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch means to move this elsewhere one day; then it is no candidate
            zeros_O = torch.zeros(len(scale_O), dtype=torch.int64)
            # FBGEMM multiplies by the activations' scale, 1 / 127, itself.
            made = torch._make_per_channel_quantized_tensor(weight_OI, scale_O * 127, zeros_O, 0)
        return torch.ops.quantized.linear_prepack(made, None)

    def multiply(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        x_TI, scale_T1 = self.ready(x_TI)
        x_TI = self.split_rows(x_TI / scale_T1, 0)
        linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return self.finish(self.join_rows([linear(x_TI, 1 / 127, 128, part) for part in parts]), scale_T1, bias_O)


@dataclass(frozen=True, slots=True)
class OneDNN(Int8):
    """oneDNN's blocks for products of unsigned activations and signed weights."""

    name: str = "onednn"

    def hold(self, *reduced: Tensor) -> Any:
        weight_OI, scale_O = reduced
        zeros_O = torch.zeros(len(scale_O), dtype=torch.int64)
        return torch.ops.onednn.qlinear_prepack(weight_OI, None), scale_O, zeros_O

    def multiply(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        x_TI, scale_T1 = self.ready(x_TI)
        x_TI = self.split_rows(torch.addcdiv(x_TI.new_tensor(128.5), x_TI, scale_T1, value=127).to(torch.uint8), 128)
        linear = torch.ops.onednn.qlinear_pointwise
        outs = [
            linear(x_TI, 1.0, 128, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
            for weight, scale, zeros in parts
        ]
        return self.finish(self.join_rows(outs), scale_T1, bias_O)


@dataclass(frozen=True, slots=True)
class Integers(Int8):
    """Plain [O, I] integers, and torch's own product of them, which every build has.

    There is no ``split`` of it: for some shapes oneDNN makes the weights the bytes without a sign.
    """

    name: str = "integers"

    def hold(self, *reduced: Tensor) -> Any:
        return reduced

    def multiply(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        x_TI, scale_T1 = self.ready(x_TI)
        x_TI = (x_TI * (127 / scale_T1)).round_().to(torch.int8)
        outs = [torch._int_mm(x_TI, weight.t()).float().mul_(scale) for weight, scale in parts]
        return self.finish(_join(outs), scale_T1, bias_O)


@dataclass(frozen=True, slots=True)
class Widened(Int8):
    """Integers held in 8 bits and multiplied in float64, where every sum of them is exact: slow, and right anywhere."""

    name: str = "widened"

    def hold(self, *reduced: Tensor) -> Any:
        return reduced

    def multiply(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        x_TI, scale_T1 = self.ready(x_TI)
        x_TI = (x_TI * (127 / scale_T1)).round_().double()
        outs = []
        for weight_OI, scale_O in parts:
            few = max(1, WIDENED_BYTES // (8 * weight_OI.shape[1]))
            for block_OI, scale in zip(weight_OI.split(few), scale_O.split(few), strict=True):
                outs.append((x_TI @ block_OI.double().t()).float().mul_(scale))
        return self.finish(_join(outs), scale_T1, bias_O)


@dataclass(frozen=True, slots=True)
class Int4:
    """Weights in groups of 32 input features, 16 even levels from the least to the greatest of each group."""

    name: str = "int4pack"

    def here(self) -> bool:
        return True

    def reduce(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        w_ONG = weight_OI.float().view(len(weight_OI), -1, GROUP)
        least_ON, most_ON = w_ONG.amin(2), w_ONG.amax(2)
        # What the kernel computes with is rounded to bfloat16; levels are chosen for what it will be.
        scale_ON = ((most_ON - least_ON) / 15).clamp_min_(TINY).bfloat16()
        middle_ON = (least_ON + 8 * scale_ON.float()).bfloat16()
        levels_ONG = (w_ONG - middle_ON.float()[..., None]).div_(scale_ON.float()[..., None]).round_().add_(8)
        return levels_ONG.clamp_(0, 15).to(torch.uint8).flatten(1), torch.stack((scale_ON, middle_ON), -1)

    def hold(self, *reduced: Tensor) -> Any:
        levels_OI, scales_ON2 = reduced
        outputs = len(levels_OI)
        short = -outputs % 16  # the layout wants sixteens of outputs
        levels_OI, scales_ON2 = F.pad(levels_OI, (0, 0, 0, short)), F.pad(scales_ON2, (0, 0, 0, 0, 0, short))
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels_OI.int(), 1)
        return packed, scales_ON2.transpose(0, 1).contiguous(), outputs

    def multiply(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        half_TI = x_TI.bfloat16()
        linear = torch.ops.aten._weight_int4pack_mm_for_cpu
        outs = [linear(half_TI, packed, GROUP, scales)[:, :outputs] for packed, scales, outputs in parts]
        y_TO = _join(outs).to(x_TI.dtype)
        return y_TO if bias_O is None else y_TO.add_(bias_O)


@dataclass(frozen=True, slots=True)
class Kleidi:
    """Arm's KleidiAI: 4-bit weights with a scale for each group of 32, activations of 8 bits with one for each row."""

    name: str = "kleidi"

    def here(self) -> bool:
        return bool(torch.backends.kleidiai.is_available())  # type: ignore[no-untyped-call]

    def reduce(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        w_ONG = weight_OI.float().view(len(weight_OI), -1, GROUP)
        scale_ON = w_ONG.abs().amax(2).clamp_min_(TINY).div_(7).bfloat16()
        levels_ONG = (w_ONG / scale_ON.float()[..., None]).round_().add_(8).clamp_(0, 15).to(torch.uint8)
        return levels_ONG.flatten(1), scale_ON

    def hold(self, *reduced: Tensor) -> Any:
        levels_OI, scale_ON = reduced
        outputs, inputs = levels_OI.shape
        pairs = levels_OI[:, 1::2] << 4 | levels_OI[:, ::2]
        packed = torch.ops.aten._dyn_quant_pack_4bit_weight(pairs, scale_ON, None, GROUP, inputs, outputs)
        return packed, inputs, outputs

    def multiply(self, x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
        linear = torch.ops.aten._dyn_quant_matmul_4bit
        y_TO = _join([linear(x_TI, packed, GROUP, inputs, outputs) for packed, inputs, outputs in parts])
        return y_TO if bias_O is None else y_TO.add_(bias_O)


def spread(x_TI: Tensor, block: int = 0) -> Tensor:
    """Each block of features times a Hadamard matrix, [T, I]; blocks are the largest power of two in I, at most 64,
    where ``block`` gives no other."""
    hadamard = _hadamard(block or math.gcd(64, x_TI.shape[1]))
    blocks = x_TI.reshape(-1, len(hadamard))
    if len(blocks) == 1:  # one block by itself may be rounded otherwise than beside others
        return (torch.cat((blocks, blocks)) @ hadamard)[:1].view(x_TI.shape)
    return (blocks @ hadamard).view(x_TI.shape)


@cache
def _hadamard(size: int) -> Tensor:
    """Sylvester's construction, scaled to be its own inverse: [size, size] float32."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def _each(linear: Callable[..., Tensor], x_TI: Tensor, parts: Parts, bias_O: Tensor | None) -> Tensor:
    if len(parts) == 1:
        return linear(x_TI, parts[0], bias_O)
    biases = [None] * len(parts) if bias_O is None else torch.split(bias_O, [part.shape[0] for part in parts])
    return _join([linear(x_TI, part, bias) for part, bias in zip(parts, biases, strict=True)])


def _join(outs: list[Tensor]) -> Tensor:
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=-1)


def _packed_linear(x_TI: Tensor, part: Tensor, bias_O: Tensor | None) -> Tensor:
    y_TO: Tensor = torch.ops.mkldnn._linear_pointwise(x_TI, part, bias_O, "none", [], "")
    return y_TO
