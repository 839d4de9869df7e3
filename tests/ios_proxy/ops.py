"""Every op that the evaluator understands, once or more: as coremltools' Builder writes it, and as numpy does it.

All of them stand in one program, each with an output of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.ios_proxy.packages import quiet

Array = np.ndarray[Any, Any]
random = np.random.default_rng(3)


def floats(*shape: int) -> Array:
    return random.normal(size=shape).astype(np.float16)


INPUTS: dict[str, Array] = {
    "a": floats(2, 3, 4),
    "b": floats(2, 3, 4),
    "row": floats(4),
    "positive": np.abs(floats(2, 3, 4)) + np.float16(0.1),
    "image": floats(2, 3, 1, 4),
    "column": floats(2, 3, 1, 1),
    "heads": floats(2, 3, 5, 4),
    "others": floats(2, 3, 6, 4),
    "mask": floats(5, 6),
    "i": random.integers(-9, 10, (2, 3)).astype(np.int32),
    "j": random.integers(1, 10, (2, 3)).astype(np.int32),
    "one": np.array([1], np.int32),
    "four": np.array([0, 1, 1, 0], np.int32),
    "part": floats(1, 2, 4),
}
W_OI, W_OI11, BIAS = floats(5, 4), floats(5, 3, 1, 1), floats(5)
GAMMA, BETA, TABLE = floats(3), floats(3), floats(6, 4)
BYTES = random.integers(-128, 128, (4, 6)).astype(np.int8)
NIBBLES = random.integers(-8, 8, (4, 6)).astype(np.int8)
SCALES, BLOCKS = np.abs(floats(4, 1)) / 64, np.abs(floats(2, 3)) / 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """``write`` gets the Builder and the inputs; ``expect`` the same inputs, floats in float32."""

    op: str
    write: Callable[[Any, Any], Any]
    expect: Callable[[Any], Any]
    exact: bool


class Of:
    """Inputs by attribute."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)


def case(op: str, write: Callable[[Any, Any], Any], expect: Callable[[Any], Any], *, exact: bool = False) -> Case:
    return Case(op=op, write=write, expect=expect, exact=exact)


def binary(op: str, expect: Callable[..., Any], x: str = "a", y: str = "b", *, exact: bool = True) -> Case:
    return case(
        op,
        lambda mb, v: getattr(mb, op)(x=getattr(v, x), y=getattr(v, y)),
        lambda v: expect(getattr(v, x), getattr(v, y)),
        exact=exact,
    )


def unary(op: str, expect: Callable[[Any], Any], x: str = "a", **more: Any) -> Case:
    return case(op, lambda mb, v: getattr(mb, op)(x=getattr(v, x), **more), lambda v: expect(getattr(v, x)))


def reduced(op: str, expect: Callable[..., Any], axes: list[int] | None, keep: bool, x: str = "a") -> Case:
    given: dict[str, Any] = {"keep_dims": keep} | ({} if axes is None else {"axes": axes})
    return case(
        op,
        lambda mb, v: getattr(mb, op)(x=getattr(v, x), **given),
        lambda v: expect(getattr(v, x), axis=None if axes is None else tuple(axes), keepdims=keep),
    )


def erf(x: Array) -> Array:
    return np.vectorize(math.erf)(x)  # type: ignore[no-any-return]


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softmax(x: Array, axis: int = -1) -> Array:
    powers = np.exp(x - x.max(axis, keepdims=True))
    return powers / powers.sum(axis, keepdims=True)  # type: ignore[no-any-return]


def tanh_gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))  # type: ignore[no-any-return]


def normed(x: Array, axis: int, epsilon: float) -> Array:
    return (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + epsilon)  # type: ignore[no-any-return]


def attention(q: Array, k: Array, v: Array, mask: Array | float = 0.0) -> Array:
    return softmax(q @ k.swapaxes(2, 3) / 2 + mask) @ v


def updated(x: Array, at: tuple[Any, ...], part: Array) -> Array:
    y = x.copy()
    y[at] = part
    return y


def shifted(data: Array, scale: Array, offset: Array | int = 0) -> Array:
    for axis in range(data.ndim):
        scale = np.repeat(scale, data.shape[axis] // scale.shape[axis], axis)
        if isinstance(offset, np.ndarray):
            offset = np.repeat(offset, data.shape[axis] // offset.shape[axis], axis)
    return (data.astype(np.float32) - offset) * scale


def int4(mb: Any, scale: Array) -> Any:
    from coremltools.converters.mil.mil import types

    return mb.constexpr_blockwise_shift_scale(data=NIBBLES.astype(types.np_int4_dtype), scale=scale)


def uint4(mb: Any, scale: Array) -> Any:
    from coremltools.converters.mil.mil import types

    data, offset = (NIBBLES + 8).astype(types.np_uint4_dtype), np.full(scale.shape, 8).astype(types.np_uint4_dtype)
    return mb.constexpr_blockwise_shift_scale(data=data, scale=scale, offset=offset)


def sized(mb: Any, x: Any, size: int) -> Any:
    """An output must have a shape that is known; these have it at run time only."""
    return mb.reshape(x=x, shape=[size])


ALL = slice(None)
CASES: tuple[Case, ...] = (
    binary("add", np.add), binary("add", np.add, "a", "row"), binary("add", np.add, "i", "j"),
    binary("sub", np.subtract), binary("mul", np.multiply), binary("mul", np.multiply, "row", "a"),
    binary("mul", np.multiply, "i", "j"), binary("real_div", np.divide, "a", "positive"),
    binary("maximum", np.maximum), binary("minimum", np.minimum), binary("minimum", np.minimum, "i", "j"),
    binary("pow", np.power, "positive", "b", exact=False),
    binary("floor_div", np.floor_divide, "i", "j"), binary("floor_div", np.floor_divide, "a", "positive"),
    binary("mod", np.mod, "i", "j"),
    binary("equal", np.equal, "i", "j"), binary("not_equal", np.not_equal, "i", "j"),
    binary("greater", np.greater), binary("greater_equal", np.greater_equal, "i", "j"),
    binary("less", np.less), binary("less_equal", np.less_equal),
    case("logical_and", lambda mb, v: mb.logical_and(x=mb.less(x=v.a, y=v.b), y=mb.less(x=v.b, y=v.row)),
         lambda v: (v.a < v.b) & (v.b < v.row), exact=True),
    case("logical_or", lambda mb, v: mb.logical_or(x=mb.less(x=v.a, y=v.b), y=mb.less(x=v.b, y=v.row)),
         lambda v: (v.a < v.b) | (v.b < v.row), exact=True),
    case("logical_not", lambda mb, v: mb.logical_not(x=mb.less(x=v.a, y=v.b)), lambda v: v.a >= v.b, exact=True),
    unary("abs", np.abs), unary("abs", np.abs, "i"), unary("square", np.square), unary("sqrt", np.sqrt, "positive"),
    unary("exp", np.exp), unary("erf", erf), unary("tanh", np.tanh), unary("sigmoid", sigmoid),
    unary("silu", lambda x: x * sigmoid(x)), unary("relu", lambda x: np.maximum(x, 0)),
    unary("sin", np.sin), unary("cos", np.cos),
    unary("log", lambda x: np.log(x + 0.25), "positive", epsilon=np.float16(0.25)), unary("log", np.log, "positive"),
    unary("rsqrt", lambda x: 1 / np.sqrt(x + 0.25), "positive", epsilon=np.float16(0.25)),
    unary("inverse", lambda x: 1 / (x + 0.25), "positive", epsilon=np.float16(0.25)),
    unary("gelu", lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2)))), unary("gelu", tanh_gelu, mode="TANH_APPROXIMATION"),
    unary("gelu", lambda x: x * sigmoid(1.702 * x), mode="SIGMOID_APPROXIMATION"),
    unary("clip", lambda x: np.clip(x, -0.5, 0.75), alpha=np.float16(-0.5), beta=np.float16(0.75)),
    unary("softmax", softmax), unary("softmax", lambda x: softmax(x, 1), axis=1),
    case("select", lambda mb, v: mb.select(cond=mb.less(x=v.a, y=v.b), a=v.a, b=v.b),
         lambda v: np.where(v.a < v.b, v.a, v.b), exact=True),
    unary("layer_norm", lambda x: normed(x, 2, 2**-10), axes=[-1], epsilon=np.float16(2**-10)),
    case("layer_norm", lambda mb, v: mb.layer_norm(x=v.image, axes=[1], gamma=GAMMA, beta=BETA,
                                                   epsilon=np.float16(2**-10)),
         lambda v: normed(v.image, 1, 2**-10) * GAMMA[:, None, None] + BETA[:, None, None]),
    reduced("reduce_sum", np.sum, [0, 2], True), reduced("reduce_sum", np.sum, [1], False, "i"),
    reduced("reduce_mean", np.mean, [-1], True), reduced("reduce_mean", np.mean, None, True),
    reduced("reduce_max", np.max, [1], False), reduced("reduce_min", np.min, [2], True),
    reduced("reduce_sum_square", lambda x, **k: np.square(x).sum(**k), [1], True),
    reduced("reduce_l2_norm", lambda x, **k: np.sqrt(np.square(x).sum(**k)), [1, 2], True),
    case("matmul", lambda mb, v: mb.matmul(x=v.heads, y=v.others, transpose_y=True),
         lambda v: v.heads @ v.others.swapaxes(2, 3)),
    case("matmul", lambda mb, v: mb.matmul(x=v.heads, y=W_OI, transpose_x=True),
         lambda v: v.heads.swapaxes(2, 3) @ W_OI),
    case("linear", lambda mb, v: mb.linear(x=v.a, weight=W_OI, bias=BIAS), lambda v: v.a @ W_OI.T + BIAS),
    case("conv", lambda mb, v: mb.conv(x=v.image, weight=W_OI11, bias=BIAS, pad_type="valid"),
         lambda v: np.einsum("oi,biht->boht", W_OI11[:, :, 0, 0], v.image) + BIAS[:, None, None]),
    case("conv", lambda mb, v: mb.conv(x=v.column, weight=W_OI11, pad_type="custom", pad=[0, 0, 0, 0]),
         lambda v: np.einsum("oi,biht->boht", W_OI11[:, :, 0, 0], v.column)),
    case("einsum", lambda mb, v: mb.einsum(values=(v.heads, mb.transpose(x=v.heads, perm=[0, 3, 2, 1])),
                                           equation="nchw,nwhu->nchu"),
         lambda v: np.einsum("nchw,nuhw->nchu", v.heads, v.heads)),
    case("scaled_dot_product_attention", lambda mb, v: mb.scaled_dot_product_attention(
             query=v.heads, key=v.others, value=v.others), lambda v: attention(v.heads, v.others, v.others)),
    case("scaled_dot_product_attention", lambda mb, v: mb.scaled_dot_product_attention(
             query=v.heads, key=v.others, value=v.others, attn_mask=v.mask),
         lambda v: attention(v.heads, v.others, v.others, v.mask)),
    case("scaled_dot_product_attention", lambda mb, v: mb.scaled_dot_product_attention(
             query=v.heads, key=v.others, value=v.others, attn_mask=mb.less(x=v.mask, y=np.float16(0.8))),
         lambda v: attention(v.heads, v.others, v.others, np.where(v.mask < np.float16(0.8), 0, -np.inf))),
    case("fill", lambda mb, v: sized(mb, mb.fill(shape=mb.add(x=v.one, y=[2]), value=np.float16(0.5)), 3),
         lambda v: np.full(3, 0.5, np.float32), exact=True),
    case("shape", lambda mb, v: mb.shape(x=v.heads), lambda v: np.array([2, 3, 5, 4], np.int32), exact=True),
    case("constexpr_blockwise_shift_scale",
         lambda mb, v: mb.mul(x=mb.constexpr_blockwise_shift_scale(data=BYTES, scale=SCALES), y=v.one_float),
         lambda v: shifted(BYTES, SCALES)),
    case("constexpr_blockwise_shift_scale",
         lambda mb, v: mb.mul(x=mb.constexpr_blockwise_shift_scale(
             data=BYTES.view(np.uint8), scale=BLOCKS, offset=np.full((2, 3), 7, np.uint8)), y=v.one_float),
         lambda v: shifted(BYTES.view(np.uint8), BLOCKS, np.full((2, 3), 7))),
    case("constexpr_blockwise_shift_scale", lambda mb, v: mb.mul(x=int4(mb, SCALES), y=v.one_float),
         lambda v: shifted(NIBBLES, SCALES)),
    case("constexpr_blockwise_shift_scale", lambda mb, v: mb.mul(x=uint4(mb, BLOCKS), y=v.one_float),
         lambda v: shifted(NIBBLES, BLOCKS)),
    case("reshape", lambda mb, v: mb.reshape(x=v.a, shape=[-1, 6]), lambda v: v.a.reshape(4, 6), exact=True),
    case("reshape", lambda mb, v: mb.reshape(x=mb.reshape(x=v.a, shape=[6, 4]), shape=[0, 4]),
         lambda v: v.a.reshape(6, 4), exact=True),
    case("transpose", lambda mb, v: mb.transpose(x=v.a, perm=[2, 0, -2]), lambda v: v.a.transpose(2, 0, 1), exact=True),
    case("expand_dims", lambda mb, v: mb.expand_dims(x=v.a, axes=[-1, 1]),
         lambda v: v.a[:, None, :, :, None], exact=True),
    case("squeeze", lambda mb, v: mb.squeeze(x=v.image, axes=[-2]), lambda v: v.image[:, :, 0], exact=True),
    case("squeeze", lambda mb, v: mb.squeeze(x=v.column), lambda v: v.column[:, :, 0, 0], exact=True),
    case("split", lambda mb, v: mb.split(x=v.a, num_splits=2, axis=2)[1], lambda v: v.a[:, :, 2:], exact=True),
    case("split", lambda mb, v: mb.split(x=v.a, split_sizes=[1, 3], axis=-1)[0], lambda v: v.a[:, :, :1], exact=True),
    case("concat", lambda mb, v: mb.concat(values=[v.a, v.b], axis=1),
         lambda v: np.concatenate([v.a, v.b], 1), exact=True),
    case("concat", lambda mb, v: mb.concat(values=[mb.squeeze(x=v.one)] * 2, axis=0),
         lambda v: np.array([1, 1], np.int32), exact=True),
    case("stack", lambda mb, v: mb.stack(values=[v.a, v.b], axis=1), lambda v: np.stack([v.a, v.b], 1), exact=True),
    case("tile", lambda mb, v: mb.tile(x=v.a, reps=[2, 1, 3]), lambda v: np.tile(v.a, (2, 1, 3)), exact=True),
    case("gather", lambda mb, v: mb.gather(x=TABLE, indices=v.four, axis=0), lambda v: TABLE[[0, 1, 1, 0]], exact=True),
    case("gather", lambda mb, v: mb.gather(x=v.a, indices=v.one, axis=-2), lambda v: v.a[:, [1]], exact=True),
    case("cast", lambda mb, v: mb.cast(x=v.a, dtype="int32"), lambda v: np.trunc(v.a).astype(np.int32), exact=True),
    case("cast", lambda mb, v: mb.cast(x=v.i, dtype="fp16"), lambda v: v.i.astype(np.float32), exact=True),
    case("cast", lambda mb, v: mb.cast(x=v.four, dtype="bool"), lambda v: v.four != 0, exact=True),
    case("identity", lambda mb, v: mb.identity(x=v.a), lambda v: v.a, exact=True),
    case("slice_by_index", lambda mb, v: mb.slice_by_index(x=v.a, begin=[0, -2, 1], end=[1, 3, 4], stride=[1, 1, 2]),
         lambda v: v.a[:1, 1:, 1::2], exact=True),
    case("slice_by_index", lambda mb, v: mb.slice_by_index(
             x=v.a, begin=[1, 0, 2], end=[0, 2, 0], begin_mask=[False, True, False], end_mask=[False, False, True],
             squeeze_mask=[True, False, False]), lambda v: v.a[1, :2, 2:], exact=True),
    case("slice_by_index", lambda mb, v: sized(mb, mb.slice_by_index(
             x=v.row, begin=v.one, end=mb.add(x=v.one, y=[2])), 2), lambda v: v.row[1:3], exact=True),
    case("slice_by_size", lambda mb, v: mb.slice_by_size(x=v.a, begin=[1, 0, 1], size=[1, -1, 2]),
         lambda v: v.a[1:, :, 1:3], exact=True),
    case("slice_by_size", lambda mb, v: sized(mb, mb.slice_by_size(x=v.row, begin=v.one, size=[2]), 2),
         lambda v: v.row[1:3], exact=True),
    case("slice_update", lambda mb, v: mb.slice_update(x=v.a, update=v.part, begin=[1, 1, 0], end=[2, 3, 4]),
         lambda v: updated(v.a, (slice(1, 2), slice(1, 3)), v.part), exact=True),
    case("slice_update", lambda mb, v: mb.slice_update(
             x=v.heads, update=v.a, begin=[0, 0, 2, 0], end=[0, 0, 0, 0], squeeze_mask=[False, False, True, False],
             begin_mask=[True] * 4, end_mask=[True] * 4), lambda v: updated(v.heads, (ALL, ALL, 0), v.a), exact=True),
)  # fmt: skip


def save(path: Path) -> None:
    """The program with all cases; its outputs are y0, y1, ..."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb
    from coremltools.converters.mil.mil import types

    specs = [mb.TensorSpec(a.shape, types.fp16 if a.dtype == np.float16 else types.int32) for a in INPUTS.values()]

    def program(a, b, row, positive, image, column, heads, others, mask, i, j, one, four, part):  # type: ignore[no-untyped-def]
        return _write(mb, locals())

    with quiet():
        model = ct.convert(
            mb.program(input_specs=specs, opset_version=ct.target.iOS18)(program),
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,  # as it stands
            pass_pipeline=ct.PassPipeline.EMPTY,
            skip_model_load=True,
        )
        model.save(str(path))
        del model


def _write(mb: Any, values: dict[str, Any]) -> tuple[Any, ...]:
    values["one_float"] = mb.cast(x=values["one"], dtype="fp16")
    results = [case.write(mb, Of(values)) for case in CASES]
    return tuple(mb.identity(x=result, name=f"y{i}") for i, result in enumerate(results))
