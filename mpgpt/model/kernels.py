"""How a linear layer is stored and multiplied on this machine.

Knows: the ways that this torch build has to hold a weight and multiply with it, and what each promises.
Must not know: what the layer is for, where its weights come from, or which way is fastest (``autotune.py`` measures).

Decoding is bound by reading weights, so how they are held decides the speed. Every kernel keeps two promises. Its
precision is that of its dtype: float32 is never less, ``int8`` is weights of 8 bits with a scale for each output and
activations of 8 bits with a scale for each row, ``int4`` is weights of 4 bits with a scale and a least value for each
group of 32. And a row's result does not depend on the rows beside it: products of integers are exact, and those of
floats are so, bit for bit, as long as there are two rows (oneDNN and MKL, x86-64). A single row may take another
code path and round differently; where a trial at load shows that, it is multiplied as two.

Not every product of integers is exact: FBGEMM and oneDNN add two products of bytes up in 16 bits where an x86-64
processor has no VNNI, and what does not fit is cut off. A trial shows that, and then such a kernel is none.

Legend: T tokens, I input features, O output features, N groups of input features.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpgpt.model.footprint import GROUP, bytes_per_weight

HELD_BYTES = 6 << 20
"""Weights are held in parts of at least this size: while a part is made it exists twice, or somewhat more."""
ROWS_HINT = 32
"""The row count for which oneDNN chooses its blocking; measured best from 1 to 128 rows."""
WIDENED_BYTES = 4 << 20
"""What ``Widened`` makes of a weight at a time."""
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
    """What the 8-bit kernels share: how they round, and what is done after the product of integers.

    Symmetric, by the largest magnitude: of each output's weights, and of each row of activations. A few features
    of a row are often 20 times as large as the rest, which would leave little of 8 bits for those. So weights and
    rows are first turned by an orthogonal matrix of plus and minus ones in blocks of up to 64 features, which
    spreads the large ones and leaves the product as it is (Ashkboos et al., "QuaRot", 2024). ``bench/LOG.md`` has
    what that is worth.
    """

    name: str = ""
    split: bool = False
    """Whether each row is multiplied as two, its positive and its negative part, so that sums of 16 bits hold them:
    as bytes without a sign neither is more than 128, and 2 * 128 * 127 is less than 2 ** 15. It costs a product of
    twice the rows, and no precision."""

    def here(self) -> bool:
        return True

    def reduce(self, weight_OI: Tensor) -> tuple[Tensor, ...]:
        weight_OI = _spread(weight_OI.float())
        scale_O = weight_OI.abs().amax(1).clamp_min_(TINY).div_(127)
        return (weight_OI / scale_O[:, None]).round_().to(torch.int8), scale_O.div_(127)

    @staticmethod
    def ready(x_TI: Tensor) -> tuple[Tensor, Tensor]:
        """The rows to be rounded, and the largest magnitude of each, [T, 1]."""
        x_TI = _spread(x_TI)
        return x_TI, x_TI.abs().amax(1, keepdim=True).clamp_min_(TINY)

    def apart(self, x_TI: Tensor, zero: int) -> Tensor:
        """The rows as they are multiplied: where split, what is below ``zero``, then what is above, negated."""
        # A byte without a sign that is negated wraps: 256 - 200 is as far below 128 as 200 is above.
        return torch.cat((x_TI.clamp_max(zero), x_TI.clamp_min(zero).neg_())) if self.split else x_TI

    def joined(self, outs: list[Tensor]) -> Tensor:
        """The products of the rows that ``apart`` made, [T, O]."""
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
        x_TI = self.apart(x_TI / scale_T1, 0)
        linear = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
        return self.finish(self.joined([linear(x_TI, 1 / 127, 128, part) for part in parts]), scale_T1, bias_O)


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
        x_TI = self.apart(torch.addcdiv(x_TI.new_tensor(128.5), x_TI, scale_T1, value=127).to(torch.uint8), 128)
        linear = torch.ops.onednn.qlinear_pointwise
        outs = [
            linear(x_TI, 1.0, 128, weight, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
            for weight, scale, zeros in parts
        ]
        return self.finish(self.joined(outs), scale_T1, bias_O)


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


def _spread(x_TI: Tensor) -> Tensor:
    """Each block of features times a Hadamard matrix, [T, I]; blocks are the largest power of two in I, at most 64."""
    turn = _hadamard(min(64, x_TI.shape[1] & -x_TI.shape[1]))
    return (x_TI.reshape(-1, len(turn)) @ turn).view(x_TI.shape)


@cache
def _hadamard(size: int) -> Tensor:
    """Sylvester's construction, scaled to be its own inverse: [size, size] float32."""
    turn = torch.ones(1, 1)
    while len(turn) < size:
        turn = torch.cat((torch.cat((turn, turn), 1), torch.cat((turn, -turn), 1)))
    return turn / math.sqrt(size)


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


def candidates(dtype: str) -> tuple[Kernel, ...]:
    """The kernels that this machine has for a dtype, the one that is most often the fastest first."""
    return _found(dtype)[0]


def inexact(dtype: str) -> tuple[Kernel, ...]:
    """The kernels that this machine has for a dtype and that do not multiply integers exactly: no candidates."""
    return _found(dtype)[1]


@cache
def _found(dtype: str) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """The candidates, and those that are inexact."""
    kinds: tuple[Kernel, ...]
    if dtype in FLOATS:
        kinds = Packed(FLOATS[dtype]), Plain(FLOATS[dtype]), Columns(FLOATS[dtype])
    else:
        kinds = (Fbgemm(), OneDNN(), Integers()) if dtype == "int8" else (Kleidi(), Int4())
    works = tuple(kernel for kernel in kinds if _works(kernel, FLOATS.get(dtype, torch.float32)))
    return exact_of(works) if dtype == "int8" else (works, ())


def exact_of(kernels: Sequence[Kernel]) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """The 8-bit kernels that are exact on this processor, and the others.

    Those that are not are split if that makes them exact; ``Widened`` is there where else there would be none.
    """
    wrong = tuple(kernel for kernel in kernels if not is_exact(kernel))
    right = [kernel for kernel in kernels if kernel not in wrong]
    halves = [replace(k, name=f"{k.name}-split", split=True) for k in wrong if isinstance(k, (Fbgemm, OneDNN))]
    right += [kernel for kernel in halves if is_exact(kernel)]
    return tuple(right) or (Widened(),), wrong


def is_exact(kernel: Kernel) -> bool:
    """Whether an 8-bit kernel's products are those of the integers, also of the largest, but for a last rounding.

    Some shapes and row counts take other code than the rest, so several are tried. A kernel that fails for one of them
    is not exact either.
    """
    random = np.random.default_rng(8)
    try:
        return all(_multiplies_exactly(kernel, random, *shape) for shape in ((64, 1), (64, 33), (320, 64), (1536, 192)))
    except RuntimeError:
        return False


def _multiplies_exactly(kernel: Kernel, random: np.random.Generator, inputs: int, outputs: int) -> bool:
    """Weights and rows are turned first: the kernel turns them back into these integers; their product is the same."""
    x_TI, weight_OI = _extremes(random, 96, inputs), _extremes(random, outputs, inputs)
    exact_TO = torch.from_numpy(x_TI @ weight_OI.T).double()
    held = [kernel.hold(*kernel.reduce(_spread(torch.from_numpy(weight_OI).float())))]
    turned_TI = _spread(torch.from_numpy(x_TI).float())
    for rows in (1, 2, 8, 96):
        off_TO = kernel.multiply(turned_TI[:rows].clone(), held, None).double() - exact_TO[:rows]
        if not bool((off_TO.abs() < 1e-6 * 127 * 127 * inputs).all()):
            return False
    return True


def _extremes(random: np.random.Generator, rows: int, inputs: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows of nothing but the largest, of nothing but the least, of both, and of all between, in turn; int64."""
    kinds_4I = np.stack([np.full(inputs, 127), np.full(inputs, -127), np.zeros(inputs), np.zeros(inputs)])
    numbers = np.tile(kinds_4I.astype(np.int64), (rows // 4 + 1, 1))
    numbers[2::4] = random.choice([-127, 127], numbers[2::4].shape)
    numbers[3::4] = random.integers(-127, 128, numbers[3::4].shape)
    numbers[3::4, 0] = 127  # a row's largest decides its scale
    return numbers[:rows]


def _works(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Tried, because torch has no word for it: some builds lack a kernel."""
    x_TI = torch.linspace(-1, 1, 2 * 2 * GROUP).view(2, -1).to(dtype)
    weight_OI = torch.linspace(1, -2, 16 * 2 * GROUP).sin().view(16, -1)
    try:
        if not kernel.here():
            return False
        y_TO = kernel.multiply(x_TI, [kernel.hold(*kernel.reduce(weight_OI))], None).float()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((y_TO - x_TI.float() @ weight_OI.t()).abs().max() < 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """A model's dtype, and the kernel that each shape of weight takes on this machine."""

    dtype: str
    chosen: Mapping[str, str] = field(default_factory=dict)
    """Kernels' names by "dtype IxO"; a shape that is not among them takes the first candidate."""

    @property
    def activations(self) -> torch.dtype:
        """Of hidden states and the cache. Beside integers float32, which every processor computes fast in."""
        return FLOATS.get(self.dtype, torch.float32)

    @property
    def weight_bytes(self) -> float:
        """What a weight of a layer takes, its share of scales included, about."""
        return bytes_per_weight(self.dtype)

    def dtype_of(self, inputs: int, *, head: bool = False) -> str:
        """What a weight is held in. Where all is int4 the head is int8: it decides, and a token reads it once."""
        return "int8" if self.dtype == "int4" and (head or inputs % GROUP) else self.dtype

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

    __slots__ = ("_bias", "_kernel", "_pairs", "_parts", "dtype", "in_features", "nbytes", "out_features")

    def __init__(self, blocks: Iterable[Tensor], bias_O: Tensor | None, kernel: Kernel, dtype: torch.dtype) -> None:
        """``dtype`` is that of the activations."""
        self._kernel, self._parts, self.dtype = kernel, [], dtype
        self.nbytes = self.in_features = self.out_features = 0
        widths = set()
        for reduced in _regroup(self._reduced(blocks)):
            self._parts.append(kernel.hold(*reduced))
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
            return self._kernel.multiply(torch.cat((x_TI, x_TI)), self._parts, self._bias)[:1]
        return self._kernel.multiply(x_TI, self._parts, self._bias)


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
    """What a part takes, bytes: two levels of int4 share one."""
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
