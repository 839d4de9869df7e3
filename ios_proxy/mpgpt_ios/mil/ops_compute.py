"""The ops of an ML program (opset CoreML8, which is iOS 18) that compute, as functions on tensors.

Knows: what each op computes, and which of its inputs it needs.
Must not know: programs, registers, states, files.

Every entry of the table takes a ``Call``, gets the op's inputs from it, and gives the function that is called at every
run with the tensors that were taken, in that order. Inside an op floats are float32; whoever runs the function rounds
its result to the declared dtype, once. Only sum, difference, product, quotient, maximum and minimum are left to torch's
float16, which does the very same in one pass. Semantics: coremltools' MIL op reference; defaults are its defaults.

A result lies in memory of its own, never in an operand's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mpgpt_ios.mil.call import Bind, Call, Compute, same_type


def _unary(compute: Callable[[Tensor], Tensor], kinds: str = "f") -> Bind:
    def bind(call: Call) -> Compute:
        call.take("x", kinds, wide=True)
        return compute

    return bind


def _shifted(compute: Callable[[Tensor], Tensor], epsilon: float) -> Bind:
    """Of ``x + epsilon``."""

    def bind(call: Call) -> Compute:
        call.take("x", "f", wide=True)
        shift = call.number("epsilon", epsilon)
        return lambda x: compute(x + shift)

    return bind


def _binary(compute: Compute, kinds: str = "fi", *, wide: bool = True) -> Bind:
    def bind(call: Call) -> Compute:
        same_type(call, call.take("x", kinds, wide=wide), call.take("y", kinds, wide=wide))
        return compute

    return bind


def _reduce(compute: Callable[[Tensor, list[int], bool], Tensor], kinds: str = "f") -> Bind:
    def bind(call: Call) -> Compute:
        rank = len(call.take("x", kinds, wide=True).shape)
        axes, keep = call.numbers("axes", range(rank)), bool(call.number("keep_dims", False))
        if not axes:
            raise call.refusal("reduces no axis at all")
        return lambda x: compute(x, axes, keep)

    return bind


def _gelu(call: Call) -> Compute:
    call.take("x", "f", wide=True)
    mode = call.text("mode", "EXACT")
    if mode == "EXACT":
        return lambda x: F.gelu(x)
    if mode == "TANH_APPROXIMATION":
        return lambda x: F.gelu(x, approximate="tanh")
    if mode == "SIGMOID_APPROXIMATION":
        return lambda x: x * torch.sigmoid(1.702 * x)
    raise call.refusal(f"has the mode {mode}, which is not understood")


def _clip(call: Call) -> Compute:
    call.take("x", "f", wide=True)
    low, high = call.number("alpha"), call.number("beta")
    return lambda x: x.clamp(low, high)


def _softmax(call: Call) -> Compute:
    call.take("x", "f", wide=True)
    axis = call.number("axis", -1)
    return lambda x: torch.softmax(x, axis)


def _select(call: Call) -> Compute:
    call.take("cond", "b")
    same_type(call, call.take("a"), call.take("b"))
    return torch.where


def _layer_norm(call: Call) -> Compute:
    shape = call.take("x", "f", wide=True).shape
    axes = sorted(axis % len(shape) for axis in call.numbers("axes", range(len(shape))))
    epsilon = call.number("epsilon", 1e-5)
    wide = [size if axis in axes else 1 for axis, size in enumerate(shape)]
    gamma, beta = (call.weight(name).reshape(wide) if call.has(name) else None for name in ("gamma", "beta"))

    def compute(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        y = (x - mean) * torch.rsqrt(variance + epsilon)
        y = y if gamma is None else y * gamma
        return y if beta is None else y + beta

    return compute


def _matmul(call: Call) -> Compute:
    same_type(call, call.take("x", "f", wide=True), call.take("y", "f", wide=True))
    turn_x, turn_y = (bool(call.number(name, False)) for name in ("transpose_x", "transpose_y"))

    return lambda x, y: (x.mT if turn_x else x) @ (y.mT if turn_y else y)


def _linear(call: Call) -> Compute:
    call.take("x", "f", wide=True)
    weight, bias = call.weight("weight"), call.weight("bias") if call.has("bias") else None
    return lambda x: F.linear(x, weight, bias)


def _conv(call: Call) -> Compute:
    """The 1x1 convolution: a product over channels at every place, (B, I, ...) to (B, O, ...)."""
    shape = call.take("x", "f", wide=True).shape
    weight, bias = call.weight("weight"), call.weight("bias") if call.has("bias") else None
    for name, wanted in (("strides", 1), ("dilations", 1), ("groups", 1), ("pad", 0)):
        call.only(name, wanted)
    padding = call.text("pad_type", "valid")
    if any(size != 1 for size in weight.shape[2:]) or padding not in ("valid", "same", "same_lower", "custom"):
        raise call.refusal(f"has a kernel of {tuple(weight.shape[2:])} with {padding} padding; 1x1 is understood")
    weight_OI, window = weight.flatten(1), shape[2:]
    if all(size == 1 for size in window):
        return lambda x: F.linear(x.flatten(1), weight_OI, bias).reshape(-1, len(weight_OI), *window)

    def compute(x: Tensor) -> Tensor:
        y = F.linear(x.flatten(2).mT, weight_OI, bias)
        return y.mT.reshape(len(x), len(weight_OI), *x.shape[2:])

    return compute


def _einsum(call: Call) -> Compute:
    same_type(call, *call.take_all("values", "f", wide=True))
    equation = call.text("equation", "")
    return lambda *values: torch.einsum(equation, *values).clone()


def _attention(call: Call) -> Compute:
    same_type(call, *(call.take(name, "f", wide=True) for name in ("query", "key", "value")))
    if call.has("attn_mask"):
        call.take("attn_mask", "fb", wide=True)
    return F.scaled_dot_product_attention


def _fill(call: Call) -> Compute:
    call.take("shape", "i")
    value, dtype = call.number("value", 0.0), call.outputs[0].dtype
    return lambda shape: torch.full(shape.tolist(), value, dtype=dtype)


def _shape(call: Call) -> Compute:
    call.take("x")
    return lambda x: torch.tensor(x.shape, dtype=torch.int32)


def _shift_scale(call: Call) -> Compute:
    """``scale * (data - offset)``, where each number of ``scale`` serves a block of ``data``."""
    data, scale = call.take("data", "iu").shape, call.take("scale", "f").shape
    if call.has("offset") and call.take("offset").shape != scale:
        raise call.refusal("has scale and offset of two shapes")
    if len(data) != len(scale) or any(not n or d % n for d, n in zip(data, scale, strict=True)):
        raise call.refusal(f"has {scale} scales for {data} numbers")
    blocks = list(itertools.chain.from_iterable((n, d // n) for d, n in zip(data, scale, strict=True)))
    spread = list(itertools.chain.from_iterable((n, 1) for n in scale))

    def compute(data: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        numbers = data.float().reshape(blocks)
        if offset is not None:
            numbers -= offset.float().reshape(spread)
        return (numbers * scale.float().reshape(spread)).reshape(data.shape)

    return compute


def _largest(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.amax(x, axes, keep)


def _smallest(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.amin(x, axes, keep)


# those that also take the memory for their result, as ``out``
REUSING: dict[str, Bind] = {
    "add": _binary(torch.add, wide=False),
    "sub": _binary(torch.sub, wide=False),
    "mul": _binary(torch.mul, wide=False),
    "real_div": _binary(torch.div, "f", wide=False),
    "maximum": _binary(torch.maximum, wide=False),
    "minimum": _binary(torch.minimum, wide=False),
}

ARITHMETIC: dict[str, Bind] = {
    **REUSING,
    "pow": _binary(torch.pow, "f"),
    "floor_div": _binary(lambda x, y: torch.div(x, y, rounding_mode="floor")),
    "mod": _binary(torch.remainder),
    "equal": _binary(torch.eq, "fib"),
    "not_equal": _binary(torch.ne, "fib"),
    "greater": _binary(torch.gt),
    "greater_equal": _binary(torch.ge),
    "less": _binary(torch.lt),
    "less_equal": _binary(torch.le),
    "logical_and": _binary(torch.logical_and, "b"),
    "logical_or": _binary(torch.logical_or, "b"),
    "logical_not": _unary(torch.logical_not, "b"),
    "abs": _unary(torch.abs, "fi"),
    "square": _unary(torch.square, "fi"),
    "sqrt": _unary(torch.sqrt),
    "exp": _unary(torch.exp),
    "erf": _unary(torch.erf),
    "tanh": _unary(torch.tanh),
    "sigmoid": _unary(torch.sigmoid),
    "silu": _unary(F.silu),
    "relu": _unary(torch.relu),
    "sin": _unary(torch.sin),
    "cos": _unary(torch.cos),
    "log": _shifted(torch.log, 1e-45),
    "rsqrt": _shifted(torch.rsqrt, 1e-12),
    "inverse": _shifted(torch.reciprocal, 1e-4),
    "gelu": _gelu,
    "clip": _clip,
    "softmax": _softmax,
    "select": _select,
    "layer_norm": _layer_norm,
    "reduce_sum": _reduce(torch.sum, "fi"),
    "reduce_mean": _reduce(torch.mean),
    "reduce_max": _reduce(_largest, "fi"),
    "reduce_min": _reduce(_smallest, "fi"),
    "reduce_sum_square": _reduce(lambda x, axes, keep: x.square().sum(axes, keep)),
    "reduce_l2_norm": _reduce(lambda x, axes, keep: x.square().sum(axes, keep).sqrt()),
    "matmul": _matmul,
    "linear": _linear,
    "conv": _conv,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    "fill": _fill,
    "shape": _shape,
    "constexpr_blockwise_shift_scale": _shift_scale,
}
