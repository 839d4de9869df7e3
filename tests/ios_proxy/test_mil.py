from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("coremltools")

from mpgpt.errors import ModelError
from mpgpt_ios.mil.ops_compute import ARITHMETIC
from mpgpt_ios.mil.ops_layout import MOVING
from mpgpt_ios.mil.program import Precision, Program, State
from tests.ios_proxy import ops
from tests.ios_proxy.packages import CHUNK, CONTEXT, EMBED, LAYERS, SLOTS, Small
from tests.ios_proxy.protos import Writer, edited, value_type

Array = np.ndarray[Any, Any]
PRECISIONS: tuple[Precision, ...] = ("declared", "float32")


# ---- ops


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
    code, seen = Program.read(all_ops)._codes["main"], set()
    registers = list(code.constants)
    for name, (register, type) in code.inputs.items():
        registers[register] = torch.tensor(ops.INPUTS[name]).to(type.dtype)
    for step in code.steps:
        operands = [registers[source] for source in step.sources]
        positions = {operand.untyped_storage().data_ptr() for operand in operands if operand is not None}
        for target, result in zip(step.targets, step.results(operands), strict=True):
            registers[target] = result
            kind = step.what.partition(": op ")[2].split(" ")[0]
            if kind in ARITHMETIC:
                seen.add(kind)
                assert result.untyped_storage().data_ptr() not in positions, step.what
    assert seen == ARITHMETIC.keys() - {"constexpr_blockwise_shift_scale"}  # which is computed when it is read


# ---- states and memory


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


# ---- packages


class Slots:
    """The two functions of a package, driven by hand: masks are written here once more, position by position."""

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
    assert program.count("prefill", "write_state") == program.count("decode", "write_state") == 2 * LAYERS


def test_a_weight_is_held_once_for_both_functions(small: dict[str, Small]) -> None:
    program = Program.read(small["gpt2"].path)
    held: list[set[int]] = []
    for code in program._codes.values():
        cells = [cell.cell_contents for step in code.steps for cell in getattr(step.compute, "__closure__", None) or ()]
        large = [cell for cell in cells if isinstance(cell, torch.Tensor) and cell.numel() >= EMBED * EMBED]
        held.append({tensor.data_ptr() for tensor in large})
    assert held[0] == held[1] and len(held[0]) == 6 * LAYERS


# ---- refusals


def _first(spec: Any, kind: str) -> Any:
    function = spec.mlProgram.functions["prefill"]
    return next(op for op in function.block_specializations["CoreML8"].operations if op.type == kind)


def _renamed_op(spec: Any) -> None:
    _first(spec, "softmax").type = "cumsum"


def _unknown_input(spec: Any) -> None:
    op = _first(spec, "softmax")
    op.inputs["temperature"].CopyFrom(op.inputs["axis"])


def _unknown_attribute(spec: Any) -> None:
    op = _first(spec, "softmax")
    op.attributes["fast"].CopyFrom(op.attributes["name"])


def _computed_axis(spec: Any) -> None:
    _first(spec, "softmax").inputs["axis"].arguments[0].name = "row"


def _missing_input(spec: Any) -> None:
    del _first(spec, "softmax").inputs["x"]


def _undefined_value(spec: Any) -> None:
    _first(spec, "softmax").inputs["x"].arguments[0].name = "nowhere"


def _block(spec: Any) -> None:
    _first(spec, "softmax").blocks.add()


def _double(spec: Any) -> None:
    _first(spec, "softmax").outputs[0].type.tensorType.dataType = 12


def _kernel(spec: Any) -> None:
    _first(spec, "conv").inputs["strides"].arguments[0].value.CopyFrom(_ints(2, 2))


def _padding(spec: Any) -> None:
    _first(spec, "conv").inputs["pad"].arguments[0].value.CopyFrom(_ints(1, 0, 0, 0))


def _backwards(spec: Any) -> None:
    _first(spec, "slice_update").inputs["stride"].arguments[0].value.CopyFrom(_ints(1, 1, 1, -1))


def _older(spec: Any) -> None:
    function = spec.mlProgram.functions["prefill"]
    function.block_specializations["CoreML7"].CopyFrom(function.block_specializations["CoreML8"])
    del function.block_specializations["CoreML8"]
    function.opset = "CoreML7"


def _open_shape(spec: Any) -> None:
    spec.mlProgram.functions["prefill"].inputs[0].type.tensorType.dimensions[3].unknown.variadic = False


def _other_description(spec: Any) -> None:
    spec.description.functions[0].input[0].type.multiArrayType.shape[0] += 1


def _other_name(spec: Any) -> None:
    spec.description.functions[0].name = "main"


def _two_states(spec: Any) -> None:
    _first(spec, "write_state").inputs["input"].arguments[0].name = "x"


def _defined_twice(spec: Any) -> None:
    _first(spec, "softmax").outputs[0].name = "x"


def _blob_offset(spec: Any) -> None:
    _weight(spec).blobFileValue.offset += 8


def _blob_far_away(spec: Any) -> None:
    _weight(spec).blobFileValue.offset = 1 << 40


def _blob_shape(spec: Any) -> None:
    _weight(spec).type.tensorType.dimensions[0].constant.size += 1


def _blob_outside(spec: Any) -> None:
    _weight(spec).blobFileValue.fileName = "@model_path/../../../../../etc/passwd"


def _not_a_program(spec: Any) -> None:
    spec.identity.SetInParent()


def _weight(spec: Any) -> Any:
    operations = spec.mlProgram.functions["prefill"].block_specializations["CoreML8"].operations
    values = (op.attributes["val"] for op in operations if op.type == "const")
    return next(value for value in values if value.WhichOneof("value") == "blobFileValue")


def _ints(*numbers: int) -> Any:
    from tests.ios_proxy.protos import constant

    return constant(np.array(numbers, np.int32))


REFUSED: dict[str, tuple[Callable[[Any], None], str]] = {
    "op": (_renamed_op, "op cumsum .* is not understood"),
    "input": (_unknown_input, "op softmax .* inputs that are not understood: temperature"),
    "attribute": (_unknown_attribute, "op softmax .*attributes that are not understood"),
    "computed": (_computed_axis, "op softmax .* input 'axis' that is computed"),
    "missing": (_missing_input, "op softmax .* 0 values for its input 'x'"),
    "undefined": (_undefined_value, "uses 'nowhere'"),
    "block": (_block, "op softmax .* blocks"),
    "double": (_double, "op softmax .* of type 12"),
    "stride": (_kernel, r"op conv .* strides = \[2, 2\]; only 1"),
    "padding": (_padding, r"op conv .* pad = \[1, 0, 0, 0\]; only 0"),
    "backwards": (_backwards, "op slice_update .* only forward"),
    "opset": (_older, "'prefill' is of opset CoreML7"),
    "open": (_open_shape, "input 'x' has a shape that is not fixed"),
    "description": (_other_description, "the inputs that function .* is described with"),
    "function": (_other_name, "describes main, .* and holds decode, prefill"),
    "state": (_two_states, "op write_state .* is not of one state"),
    "twice": (_defined_twice, "defines 'x' twice"),
    "offset": (_blob_offset, "damaged header"),
    "end": (_blob_far_away, "behind the end"),
    "shape": (_blob_shape, r"stored as .* and declared as"),
    "outside": (_blob_outside, "outside the package"),
    "identity": (_not_a_program, "holds a identity, not an ML program"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_when_it_is_read(small: dict[str, Small], tmp_path: Path, name: str) -> None:
    edit, sentence = REFUSED[name]
    with pytest.raises(ModelError, match=sentence):
        Program.read(edited(small["gpt2"].path, tmp_path / "edited.mlpackage", edit))


def test_refuses_what_is_not_a_package(small: dict[str, Small], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not a Core ML package"):
        Program.read(tmp_path / "nothing.mlpackage")
    shutil.copytree(small["gpt2"].path, tmp_path / "cut.mlpackage")
    spec = tmp_path / "cut.mlpackage/Data/com.apple.CoreML/model.mlmodel"
    spec.write_bytes(spec.read_bytes()[:-7])
    with pytest.raises(ModelError, match="damaged"):
        Program.read(tmp_path / "cut.mlpackage")


@pytest.mark.parametrize("bytes_left", [None, 0, 100, 50_000])
def test_refuses_weights_that_are_cut(small: dict[str, Small], tmp_path: Path, bytes_left: int | None) -> None:
    shutil.copytree(small["gpt2"].path, tmp_path / "cut.mlpackage")
    weights = tmp_path / "cut.mlpackage/Data/com.apple.CoreML/weights/weight.bin"
    content = weights.read_bytes()
    weights.unlink()
    if bytes_left is not None:
        weights.write_bytes(content[:bytes_left])
    with pytest.raises(ModelError, match=r"cannot be read|behind the end|damaged header"):
        Program.read(tmp_path / "cut.mlpackage")


def test_a_result_of_another_shape_is_refused(small: dict[str, Small], tmp_path: Path) -> None:
    def edit(spec: Any) -> None:
        _first(spec, "softmax").outputs[0].type.CopyFrom(value_type("float16", (1, 4, CHUNK, 1)))

    program = Program.read(edited(small["gpt2"].path, tmp_path / "edited.mlpackage", edit))
    with pytest.raises(ModelError, match=r"op softmax .* gives .* and declares \(1, 4, 8, 1\)"):
        program.run("prefill", _zeros(program), program.state())


def test_a_result_of_another_kind_is_refused(tmp_path: Path) -> None:
    writer = Writer({"x": FULL}, {})
    name = writer.op("less", FULL, x="x", y="x")
    program = Program.read(writer.save(tmp_path / "less.mlpackage", {name: FULL}))
    with pytest.raises(ModelError, match=r"op less .* gives torch.bool and declares float16"):
        program.run("main", {"x": np.zeros(FULL, np.float16)}, program.state())


def test_an_update_outside_the_state_is_refused(small: dict[str, Small]) -> None:
    program = Program.read(small["gpt2"].path)
    inputs = _zeros(program) | {"pos": np.array([CONTEXT - CHUNK + 1], np.int32)}
    with pytest.raises(ModelError, match=r"op slice_update .* fails: 57 to 65 of an axis of 64"):
        program.run("prefill", inputs, program.state())


def _zeros(program: Program) -> dict[str, Array]:
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in program.functions["prefill"].inputs.items()}


def test_refuses_inputs_that_do_not_fit(small: dict[str, Small]) -> None:
    program = Program.read(small["gpt2"].path)
    state, zeros = program.state(), _zeros(program)
    with pytest.raises(ModelError, match="no function 'main', but decode, prefill"):
        program.run("main", zeros, state)
    with pytest.raises(ModelError, match="prefill takes x, mask, pos, row; given: x"):
        program.run("prefill", {"x": zeros["x"]}, state)
    with pytest.raises(ModelError, match=r"'x' is \(1, 64, 1, 8\); given: \(64, 8\)"):
        program.run("prefill", zeros | {"x": zeros["x"][0, :, 0]}, state)
    with pytest.raises(ModelError, match="'pos' is of int32; given: float32"):
        program.run("prefill", zeros | {"pos": np.zeros(1, np.float32)}, state)


def test_a_state_begins_as_zeros(small: dict[str, Small]) -> None:
    program = Program.read(small["gpt2"].path)
    state: State = program.state()
    assert not state.array("kv").any()
    inputs = _zeros(program) | {"x": np.ones((1, EMBED, 1, CHUNK), np.float16)}
    inputs["x"][:, ::2] = -1
    program.run("prefill", inputs, state)
    assert state.array("kv").any() and not program.state().array("kv").any()
