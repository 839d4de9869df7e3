"""Records what the library is called with, for ``replay.cpp`` to play on an emulated processor."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, addressof, cast
from typing import Any, Final

import numpy as np

from mpgpt.model.native.library import OperationArgs, PlayerArgs, StepArgs, WeightArgs
from mpgpt.model.native.player import LAYER_NORM, PRODUCT, RMS_NORM, ROTATE

LANES: Final = 16


class Recorder:
    """Stands in for a library (``library.load``): keeps weights and steps, and computes nothing."""

    def __init__(self, slots: int, layer_bytes: int) -> None:
        """``layer_bytes`` is the cache of a layer; ``slots`` the sequences of a step's tables."""
        self._slots, self._layer_bytes = slots, layer_bytes
        self._weights: dict[int, list[np.ndarray]] = {}
        self._rotary: list[np.ndarray] = []
        self._head: list[np.ndarray] = []
        self._steps: list[np.ndarray] = []
        self._count = self._hidden = 0

    def write(self) -> bytes:
        """The recording so far."""
        return b"".join(part.tobytes() for part in (*self._head, ints(self._count), *self._steps))

    def mpgpt_weight_bytes(self, args: WeightArgs) -> int:
        self._weights[addressof(args)] = []
        panels: int = -(-args.outputs // LANES)
        return LANES * panels

    def mpgpt_pack(self, args: WeightArgs, rows: int, first: int, count: int) -> None:
        assert first == sum(len(part) for part in self._weights[addressof(args)])
        self._weights[addressof(args)].append(floats(rows, count * args.inputs).reshape(count, -1))

    def mpgpt_rotary(self, frequencies: int, half: int, positions: int, gain: float, cosine: int, sine: int) -> None:
        self._rotary = [ints(half), floats(frequencies, half), np.array([gain], np.float32)]

    def mpgpt_player(self, args: PlayerArgs) -> int:
        self._hidden = args.widths[0]
        self._head = [
            ints(args.operations, *args.widths, args.heads, args.kv_heads, args.dim, args.stored, args.positions),
            ints(args.layers, self._layer_bytes),
        ]
        for op in args.operation[: args.operations]:
            self._head += self._operation(op)
        return 1

    def _operation(self, op: OperationArgs) -> list[np.ndarray]:
        parts = [ints(op.kind, op.source, op.target, op.a, op.b, op.c), np.array([op.x], np.float32)]
        if op.kind == PRODUCT:
            weight = cast(op.data, POINTER(WeightArgs)).contents
            parts += [ints(weight.format, weight.inputs, weight.outputs, weight.leaves)]
            parts += [as_ints(weight.stops, weight.leaves)]
            bias = -(-weight.outputs // LANES) * LANES if weight.bias else 0
            parts += [ints(bias), floats(weight.bias, bias), *self._weights[op.data]]
        if op.kind in (RMS_NORM, LAYER_NORM):
            parts += [ints(op.c), floats(op.data, op.c)]
            parts += [ints(op.c if op.more else 0), floats(op.more, op.c if op.more else 0)]
        return parts + (self._rotary if op.kind == ROTATE else [])

    def mpgpt_play(self, player: int, step: StepArgs, first: int, last: int) -> int:
        if step.hidden_in:
            self._count += 1
            self._steps += [
                ints(step.rows, step.outputs, step.table, self._slots),
                as_ints(step.positions, step.rows), as_ints(step.slots, step.rows),
                as_ints(step.output_rows, step.outputs), as_ints(step.tables, self._slots * step.table),
                floats(step.hidden_in, step.rows * self._hidden),
            ]  # fmt: skip
        return 0

    def mpgpt_free(self, player: int) -> None: ...


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int32)


def floats(at: int | None, count: int) -> np.ndarray:
    return _copied(at, count, ctypes.c_float)


def as_ints(at: int, count: int) -> np.ndarray:
    return _copied(at, count, ctypes.c_int32)


def _copied(at: int | None, count: int, kind: Any) -> np.ndarray:
    return np.array((kind * count).from_address(at) if at and count else [], np.dtype(kind))
