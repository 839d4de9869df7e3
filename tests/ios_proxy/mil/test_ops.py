"""Every op of the evaluator against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("coremltools")

from mpgpt_ios.mil.ops_compute import ARITHMETIC
from mpgpt_ios.mil.ops_layout import MOVING
from mpgpt_ios.mil.program import Precision, Program
from tests.ios_proxy import ops
from tests.ios_proxy.packages import Array

PRECISIONS: tuple[Precision, ...] = ("declared", "float32")


@pytest.fixture(scope="module")
def all_ops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ops") / "ops.mlpackage"
    ops.save(path)
    return path


@pytest.fixture(scope="module")
def results(all_ops: Path) -> dict[str, dict[str, Array]]:
    """What every case gives, by precision and output."""
    programs = {precision: Program.read(all_ops, precision=precision) for precision in PRECISIONS}
    return {name: program.run("main", ops.INPUTS, program.state()) for name, program in programs.items()}


@pytest.mark.parametrize("index", range(len(ops.CASES)), ids=[f"{i}-{case.op}" for i, case in enumerate(ops.CASES)])
def test_op(results: dict[str, dict[str, Array]], index: int) -> None:
    case = ops.CASES[index]
    wide = {n: a.astype(np.float32) if a.dtype == np.float16 else a for n, a in ops.INPUTS.items()}
    expected = np.asarray(case.expect(ops.Of(wide)))
    single, half = results["float32"][f"y{index}"], results["declared"][f"y{index}"]
    assert single.shape == half.shape == expected.shape
    np.testing.assert_allclose(single, expected, rtol=2e-6, atol=2e-6)
    if expected.dtype.kind == "f":
        assert half.dtype == np.float16
        expected = expected.astype(np.float16)
    if case.exact:
        np.testing.assert_array_equal(half, expected)
    else:  # half a unit of the last place in rounding, and what float32 differs by
        np.testing.assert_allclose(half.astype(np.float32), expected.astype(np.float32), rtol=2**-10, atol=2**-16)


def test_every_op_has_a_case(all_ops: Path) -> None:
    program = Program.read(all_ops)
    assert {case.op for case in ops.CASES} == ARITHMETIC.keys() | MOVING.keys()
    assert all(program.count("main", op) for op in ARITHMETIC.keys() | MOVING.keys())


def test_arithmetic_lies_in_memory_of_its_own(all_ops: Path) -> None:
    """What updating in place rests on."""
    code, seen = Program.read(all_ops).codes["main"], set()
    registers = list(code.constants)
    for name, (register, type) in code.inputs.items():
        registers[register] = torch.tensor(ops.INPUTS[name]).to(type.dtype)
    for instruction in code.instructions:
        operands = [registers[source] for source in instruction.sources]
        used = {operand.untyped_storage().data_ptr() for operand in operands if operand is not None}
        for target, result in zip(instruction.targets, instruction.results(operands), strict=True):
            registers[target] = result
            kind = instruction.what.partition(": op ")[2].split(" ")[0]
            if kind in ARITHMETIC:
                seen.add(kind)
                assert result.untyped_storage().data_ptr() not in used, instruction.what
    assert seen == ARITHMETIC.keys() - {"constexpr_blockwise_shift_scale"}  # which is computed when it is read
