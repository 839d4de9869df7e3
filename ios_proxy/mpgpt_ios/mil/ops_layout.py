"""The ops of an ML program that only move numbers: what ``ops_compute`` is for those that compute.

Knows: which numbers of its operands each op gives, in which order.
Must not know: programs, registers, states, files.

A result may be a view of an operand. ``slice_update`` alone writes, into the operand that it is handed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mpgpt_ios.mil.call import Bind, Call, Compute, same_type

Index = tuple[int | slice, ...]


def _reshape(call: Call) -> Compute:
    rank = len(call.take("x").shape)
    call.take("shape", "i")

    def compute(x: Tensor, shape: Tensor) -> Tensor:
        sizes = shape.tolist()
        if len(sizes) == rank:
            sizes = [size or old for size, old in zip(sizes, x.shape, strict=True)]
        return x.reshape(sizes)

    return compute


def _transpose(call: Call) -> Compute:
    call.take("x")
    perm = call.numbers("perm")
    return lambda x: x.permute(perm)


def _expand_dims(call: Call) -> Compute:
    rank = len(call.take("x").shape)
    axes = call.numbers("axes")
    rank += len(axes)
    inserted = sorted(axis % rank for axis in axes)

    def compute(x: Tensor) -> Tensor:
        for axis in inserted:
            x = x.unsqueeze(axis)
        return x

    return compute


def _squeeze(call: Call) -> Compute:
    shape = call.take("x").shape
    axes = call.numbers("axes", [axis for axis, size in enumerate(shape) if size == 1])
    if any(shape[axis] != 1 for axis in axes):
        raise call.refusal(f"takes the axes {axes} out of {shape}")
    return lambda x: x.squeeze(axes)


def _split(call: Call) -> Compute:
    shape = call.take("x").shape
    axis, count = call.number("axis"), len(call.outputs)
    sizes = call.numbers("split_sizes", [shape[axis] // count] * count)
    if sum(sizes) != shape[axis] or len(sizes) != count or call.number("num_splits", count) != count:
        raise call.refusal(f"splits {shape[axis]} into {sizes}")
    return lambda x: x.split(sizes, axis)


def _concat(call: Call) -> Compute:
    same_type(call, *call.take_all("values"))
    axis = call.number("axis")
    call.only("interleave", False)
    return lambda *values: torch.cat([value if value.dim() else value[None] for value in values], axis)


def _stack(call: Call) -> Compute:
    same_type(call, *call.take_all("values"))
    axis = call.number("axis")
    return lambda *values: torch.stack(values, axis)


def _tile(call: Call) -> Compute:
    call.take("x")
    reps = call.numbers("reps")
    return lambda x: x.repeat(reps)


def _gather(call: Call) -> Compute:
    axis = call.number("axis", 0) % len(call.take("x").shape)
    call.take("indices", "iu")
    call.only("batch_dims", 0)
    call.numbers("validate_indices")  # an index out of bounds is an error here in any case

    def compute(x: Tensor, indices: Tensor) -> Tensor:
        shape = (*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])
        return x.index_select(axis, indices.flatten().int()).reshape(shape)

    return compute


def _cast(call: Call) -> Compute:
    call.take("x")
    name, output = call.text("dtype", ""), call.outputs[0]
    if {"fp16": "float16", "fp32": "float32"}.get(name, name) != output.declared.name:
        raise call.refusal(f"casts to {name} and declares {output.declared}")
    return lambda x: x.to(output.dtype)


def _identity(call: Call) -> Compute:
    call.take("x")
    return lambda x: x


def _slice_by_size(call: Call) -> Compute:
    call.take("x")
    call.take("begin", "i")
    call.take("size", "i")

    def compute(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
        axes = zip(begin.tolist(), size.tolist(), x.shape, strict=True)
        return x[tuple(_within(b, n if z == -1 else b + z, 1, n) for b, z, n in axes)]

    return compute


def _window(call: Call, rank: int) -> Callable[[Sequence[int], Tensor, Tensor], Index]:
    """Takes ``begin`` and ``end``; from a shape and these, the index that they and the masks stand for."""
    call.take("begin", "i")
    call.take("end", "i")
    strides = call.numbers("stride", [1] * rank)
    if any(stride < 1 for stride in strides):
        raise call.refusal(f"has the stride {strides}; only forward is understood")
    open_begin, open_end, squeezed = (
        call.numbers(f"{name}_mask", [False] * rank) for name in ("begin", "end", "squeeze")
    )

    def index(shape: Sequence[int], begin: Tensor, end: Tensor) -> Index:
        axes = zip(
            begin.tolist(), end.tolist(), strides, shape, open_begin, open_end, squeezed, strict=True
        )  # fmt: skip
        return tuple(
            (0 if first else b) if one else _within(0 if first else b, n if last else e, stride, n)
            for b, e, stride, n, first, last, one in axes
        )

    return index


def _within(begin: int, end: int, stride: int, size: int) -> slice:
    begin, end = begin + size * (begin < 0), end + size * (end < 0)
    if not 0 <= begin <= end <= size:
        raise IndexError(f"{begin} to {end} of an axis of {size}")
    return slice(begin, end, stride)


def _slice_by_index(call: Call) -> Compute:
    index = _window(call, len(call.take("x").shape))
    return lambda x, begin, end: x[index(x.shape, begin, end)]


def _slice_update(call: Call) -> Compute:
    """In place; the compiler copies the operand first where the old value is still needed."""
    x = call.take("x")
    index = _window(call, len(x.shape))
    same_type(call, x, call.take("update"))

    def compute(x: Tensor, begin: Tensor, end: Tensor, update: Tensor) -> Tensor:
        part = x[index(x.shape, begin, end)]
        if part.shape != update.shape:
            raise IndexError(f"an update of {tuple(update.shape)} for {tuple(part.shape)}")
        part.copy_(update)
        return x

    return compute


MOVING: dict[str, Bind] = {
    "reshape": _reshape,
    "transpose": _transpose,
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "split": _split,
    "concat": _concat,
    "stack": _stack,
    "tile": _tile,
    "gather": _gather,
    "cast": _cast,
    "identity": _identity,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "slice_update": _slice_update,
}
