"""A function's memory: constants, states, updates in place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("coremltools")

from mpgpt_ios.mil.program import Precision, Program
from tests.ios_proxy.packages import Array, Small
from tests.ios_proxy.protos import Writer

PRECISIONS: tuple[Precision, ...] = ("declared", "float32")
FULL, PART = (4, 6), (2, 6)


class Copying:
    """Runs what is drawn as it is written: every value a copy of its own."""

    def __init__(self, states: dict[str, Array], inputs: dict[str, Array]) -> None:
        self.states, self.values = states, dict(inputs)

    def do(self, kind: str, name: str, operands: tuple[str, ...], row: int, state: str) -> None:
        values = [self.values[operand].copy() for operand in operands]
        if kind == "read_state":
            self.values[name] = self.states[state].copy()
        elif kind == "write_state":
            self.states[state] = values[0]
        elif kind == "slice_update":
            values[0][row : row + 2] = values[1]
            self.values[name] = values[0]
        elif kind == "slice_by_index":
            self.values[name] = values[0][row : row + 2]
        elif kind == "add":
            self.values[name] = values[0] + values[1]
        else:
            self.values[name] = values[0]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_order_of_reads_updates_and_writes(tmp_path: Path, data: st.DataObject) -> None:
    """Whatever is updated in place, values and states are those of a machine that copies everything."""
    inputs = {"x": np.arange(24, dtype=np.float16).reshape(FULL), "u": -np.arange(12, dtype=np.float16).reshape(PART)}
    writer = Writer({name: array.shape for name, array in inputs.items()}, {"s": FULL, "t": FULL})
    fixed = {writer.constant(np.full(FULL, 3, np.float16)): np.full(FULL, 3, np.float16)}
    full, part, script = ["x", *fixed], ["u"], []
    for _ in range(data.draw(st.integers(1, 14))):
        kind = data.draw(st.sampled_from(
            ["read_state", "write_state", "slice_update", "slice_by_index", "add", "identity", "reshape"]
        ))  # fmt: skip
        which, row = data.draw(st.sampled_from("st")), data.draw(st.integers(0, 2))
        operands: tuple[str, ...] = (data.draw(st.sampled_from(full)),)
        rows = {"begin": np.array([row, 0], np.int32), "end": np.array([row + 2, 6], np.int32)}
        if kind == "read_state":
            operands, name = (), writer.op(kind, FULL, input=which)
        elif kind == "write_state":
            name = writer.op(kind, None, input=which, data=operands[0])
        elif kind == "slice_update":
            operands += (data.draw(st.sampled_from(part)),)
            name = writer.op(kind, FULL, x=operands[0], update=operands[1], **rows)
        elif kind == "slice_by_index":
            name = writer.op(kind, PART, x=operands[0], **rows)
        elif kind == "add":
            operands += (data.draw(st.sampled_from(full)),)
            name = writer.op(kind, FULL, x=operands[0], y=operands[1])
        elif kind == "reshape":
            name = writer.op(kind, FULL, x=operands[0], shape=np.array(FULL, np.int32))
        else:
            name = writer.op(kind, FULL, x=operands[0])
        script.append((kind, name, operands, row, which))
        (part if kind == "slice_by_index" else full if name else []).append(name)
    outputs = data.draw(st.lists(st.sampled_from([*full[2:], *part[1:], "x"]), min_size=1, max_size=4, unique=True))
    path = writer.save(tmp_path / "drawn.mlpackage", {name: PART if name in part else FULL for name in outputs})

    program = Program.read(path)
    state = program.state()
    states = {name: np.zeros(FULL, np.float16) for name in "st"}
    for _ in range(3):
        machine = Copying(states, inputs | fixed)
        for step in script:
            machine.do(*step)
        got = program.run("main", inputs, state)
        for name in outputs:
            np.testing.assert_array_equal(got[name], machine.values[name])
        for name, expected in states.items():
            np.testing.assert_array_equal(state.array(name), expected)


def test_a_constant_that_is_updated_stays_what_it_is(tmp_path: Path) -> None:
    writer = Writer({"x": FULL}, {})
    fixed = writer.constant(np.full(FULL, 3, np.float16))
    rows = {"begin": np.array([1, 0], np.int32), "end": np.array([3, 6], np.int32)}
    known = writer.op("slice_update", FULL, x=fixed, update=np.zeros(PART, np.float16), **rows)
    both = writer.op("add", FULL, x=known, y=fixed)
    got = Program.read(writer.save(tmp_path / "p.mlpackage", {both: FULL}))
    expected = np.repeat(np.array([6, 3, 3, 6], np.float16), 6).reshape(FULL)
    np.testing.assert_array_equal(got.run("main", {"x": expected}, got.state())[both], expected)


@pytest.mark.parametrize("what", ["a constant", "an input", "the other state's value"])
def test_a_state_has_memory_of_its_own(tmp_path: Path, what: str) -> None:
    """In the next call it may be updated where it lies, and nothing else may change then."""
    writer, three = Writer({"x": FULL, "u": PART}, {"s": FULL, "t": FULL}), np.full(FULL, 3, np.float16)
    fixed = writer.constant(three)
    rows = {"begin": np.array([1, 0], np.int32), "end": np.array([3, 6], np.int32)}
    updated = writer.op("slice_update", FULL, x=writer.op("read_state", FULL, input="s"), update="u", **rows)
    first = writer.op("identity", FULL, x=updated)
    other = writer.op("read_state", FULL, input="t")
    kept = {"a constant": fixed, "an input": "x", "the other state's value": writer.op("add", FULL, x="x", y=fixed)}
    both = what == "the other state's value"
    for name in "st" if both else "s":
        writer.op("write_state", None, input=name, data=kept[what])
    program = Program.read(writer.save(tmp_path / "p.mlpackage", {first: FULL, other: FULL, fixed: FULL, "x": FULL}))
    assert program.functions["main"].copies == 0
    inputs = {"x": np.ones(FULL, np.float16), "u": np.full(PART, 5, np.float16)}
    value = {"a constant": three, "an input": inputs["x"], "the other state's value": inputs["x"] + three}[what]
    state, before = program.state(), np.zeros(FULL, np.float16)
    for _ in range(3):
        got = program.run("main", inputs, state)
        np.testing.assert_array_equal(got[other], before if both else 0)
        np.testing.assert_array_equal(got[fixed], three)
        np.testing.assert_array_equal(got["x"], 1)
        assert (got[first][1:3] == 5).all() and (got[first][3] == before[3]).all()
        np.testing.assert_array_equal(state.array("s"), value)
        np.testing.assert_array_equal(state.array("t"), value if both else 0)
        before = value


@pytest.mark.parametrize("name", ["gpt2", "llama", "int8"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cache_is_updated_where_it_lies(small: dict[str, Small], name: str, precision: Precision) -> None:
    program = Program.read(small[name].path, precision=precision)
    state = program.state()
    address = state.tensors["kv"].data_ptr()
    for function, declared in program.functions.items():
        assert declared.copies == 0
        program.run(function, {n: np.zeros(shape, dtype) for n, (shape, dtype) in declared.inputs.items()}, state)
        assert state.tensors["kv"].data_ptr() == address
