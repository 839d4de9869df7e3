"""Packages in the evaluator: sequences in slots against torch, declarations, inputs, states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("coremltools")

from mpgpt.errors import ModelError
from mpgpt_ios.mil.program import Precision, Program, State
from tests.ios_proxy.packages import CHUNK, CONTEXT, EMBED, LAYERS, SLOTS, Array, Small, zeros


class Slots:
    """Two functions of a package, driven by hand: masks are written here once more, position by position."""

    def __init__(self, small: Small, precision: Precision) -> None:
        self.sizes, self.model = small.sizes, small.model
        self.program = Program.read(small.path, precision=precision)
        self.state = self.program.state()
        self.x: dict[int, list[Array]] = {}
        self.y: dict[int, list[Array]] = {}
        self._random = np.random.default_rng(5)

    def prefill(self, slot: int, tokens: int) -> None:
        self.x[slot], self.y[slot] = [], []
        for start in range(0, tokens, CHUNK):
            count = min(CHUNK, tokens - start)
            x, mask = np.zeros((1, EMBED, 1, CHUNK), np.float16), np.full((1, 1, CHUNK, CONTEXT), -1e4, np.float16)
            for t in range(CHUNK):
                mask[0, 0, t, : start + t + 1] = 0
            for t in range(count):
                x[0, :, 0, t] = self._token(slot)
            row = np.array([slot * self.sizes.kv_heads], np.int32)
            inputs: dict[str, Array] = {"x": x, "mask": mask, "pos": np.array([start], np.int32), "row": row}
            inputs |= self._turns(torch.arange(start, start + CHUNK))
            y = self.program.run("prefill", inputs, self.state)["y"]
            self.y[slot] += [y[0, :, 0, t] for t in range(count)]

    def decode(self, *slots: int) -> None:
        x, wmask = np.zeros((SLOTS, EMBED, 1, 1), np.float16), np.zeros((SLOTS, 1, CONTEXT, 1), np.float16)
        mask, positions = np.full((SLOTS, 1, 1, CONTEXT), -1e4, np.float16), torch.zeros(SLOTS)
        for slot in slots:
            positions[slot] = position = len(self.x[slot])
            x[slot, :, 0, 0] = self._token(slot)
            mask[slot, 0, 0, : position + 1] = 0
            wmask[slot, 0, position] = 1
        turns = {name: table.transpose(2, 1, 0, 3) for name, table in self._turns(positions).items()}
        y = self.program.run("decode", {"x": x, "mask": mask, "wmask": wmask} | turns, self.state)["y"]
        for slot in slots:
            self.y[slot].append(y[slot, :, 0, 0])

    def difference(self, slot: int) -> float:
        """To the whole sequence at once in float32."""
        got = np.stack(self.y[slot]).astype(np.float32)
        return float(np.abs(got - self.model.whole(np.stack(self.x[slot]))).max())

    def _token(self, slot: int) -> Array:
        self.x[slot].append(self._random.normal(size=EMBED).astype(np.float16))
        return self.x[slot][-1]

    def _turns(self, positions: torch.Tensor) -> dict[str, Array]:
        turns = self.model.turns(positions.float())
        return {name: table.numpy() for name, table in zip(("cos", "sin"), turns, strict=False)}


@pytest.mark.parametrize("name", ["gpt2", "llama", "int8"])
@pytest.mark.parametrize(("precision", "tolerance"), [("declared", 0.03), ("float32", 1e-4)])
def test_sequences_in_slots(small: dict[str, Small], name: str, precision: Precision, tolerance: float) -> None:
    slots = Slots(small[name], precision)
    slots.prefill(0, CHUNK + 3)
    slots.prefill(2, 5)
    for _ in range(3):
        slots.decode(0, 2)
    slots.prefill(1, 3)
    slots.decode(2)
    for _ in range(2):
        slots.decode(1, 0, 2)
    assert slots.difference(0) <= tolerance
    slots.prefill(0, 2)  # again, with what was there before behind it
    for _ in range(3):
        slots.decode(0, 1, 2)
    assert max(slots.difference(slot) for slot in (0, 1, 2)) <= tolerance


def test_eight_bits_are_read_exactly(small: dict[str, Small]) -> None:
    """The weights are whole numbers times a scale: from eight bits come the same sixteen."""
    programs = [Program.read(small[name].path) for name in ("llama", "int8")]
    assert [program.count("decode", "constexpr_blockwise_shift_scale") > 0 for program in programs] == [False, True]
    random = np.random.default_rng(1)
    shapes = programs[0].functions["decode"].inputs
    inputs = {name: random.normal(size=shape).astype(dtype) for name, (shape, dtype) in shapes.items()}
    first, second = (program.run("decode", inputs, program.state())["y"] for program in programs)
    np.testing.assert_array_equal(first, second)


def test_what_a_package_declares(small: dict[str, Small]) -> None:
    program = Program.read(small["llama"].path)
    half, integer = np.dtype(np.float16), np.dtype(np.int32)
    assert dict(program.functions["prefill"].inputs) == {
        "x": ((1, EMBED, 1, CHUNK), half), "mask": ((1, 1, CHUNK, CONTEXT), half), "pos": ((1,), integer),
        "row": ((1,), integer), "cos": ((1, 1, CHUNK, 16), half), "sin": ((1, 1, CHUNK, 16), half),
    }  # fmt: skip
    assert dict(program.functions["decode"].outputs) == {"y": ((SLOTS, EMBED, 1, 1), half)}
    for function in program.functions.values():
        assert dict(function.states) == {"kv": ((2 * LAYERS, SLOTS * 2, CONTEXT, 16), half)}
    assert {name: program.count(name, "write_state") for name in program.functions} == {
        "decode": 2 * LAYERS, "prefill": 2 * LAYERS, "step": 2 * LAYERS
    }  # fmt: skip


def test_a_weight_is_held_once_for_all_functions(small: dict[str, Small]) -> None:
    program = Program.read(small["gpt2"].path)
    held: list[set[int]] = []
    for code in program.codes.values():
        closures = [getattr(instruction.compute, "__closure__", None) or () for instruction in code.instructions]
        cells = [cell.cell_contents for closure in closures for cell in closure]
        large = [cell for cell in cells if isinstance(cell, torch.Tensor) and cell.numel() >= EMBED * EMBED]
        held.append({tensor.data_ptr() for tensor in large})
    assert held[0] == held[1] == held[2] and len(held[0]) == 6 * LAYERS


def _first(spec: Any, kind: str) -> Any:
    function = spec.mlProgram.functions["prefill"]
    return next(op for op in function.block_specializations["CoreML8"].operations if op.type == kind)


def test_refuses_inputs_that_do_not_fit(small: dict[str, Small]) -> None:
    program = Program.read(small["gpt2"].path)
    state, fitting = program.state(), zeros(program)
    with pytest.raises(ModelError, match="no function 'main', but decode, prefill, step"):
        program.run("main", fitting, state)
    with pytest.raises(ModelError, match="prefill takes x, mask, pos, row; given: x"):
        program.run("prefill", {"x": fitting["x"]}, state)
    with pytest.raises(ModelError, match=r"'x' is \(1, 64, 1, 8\); given: \(64, 8\)"):
        program.run("prefill", fitting | {"x": fitting["x"][0, :, 0]}, state)
    with pytest.raises(ModelError, match="'pos' is of int32; given: float32"):
        program.run("prefill", fitting | {"pos": np.zeros(1, np.float32)}, state)


def test_a_state_begins_as_zeros(small: dict[str, Small]) -> None:
    program = Program.read(small["gpt2"].path)
    state: State = program.state()
    assert not state.array("kv").any()
    inputs = zeros(program) | {"x": np.ones((1, EMBED, 1, CHUNK), np.float16)}
    inputs["x"][:, ::2] = -1
    program.run("prefill", inputs, state)
    assert state.array("kv").any() and not program.state().array("kv").any()
