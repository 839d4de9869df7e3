"""Programs that are refused when they are read, with the sentence that names the reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from mpgpt.errors import ModelError
from mpgpt_ios.mil.program import Program
from tests.ios_proxy.packages import Small
from tests.ios_proxy.protos import constant, edited, first_op


def _renamed_op(spec: Any) -> None:
    first_op(spec, "softmax").type = "cumsum"


def _unknown_input(spec: Any) -> None:
    op = first_op(spec, "softmax")
    op.inputs["temperature"].CopyFrom(op.inputs["axis"])


def _unknown_attribute(spec: Any) -> None:
    op = first_op(spec, "softmax")
    op.attributes["fast"].CopyFrom(op.attributes["name"])


def _computed_axis(spec: Any) -> None:
    first_op(spec, "softmax").inputs["axis"].arguments[0].name = "row"


def _missing_input(spec: Any) -> None:
    del first_op(spec, "softmax").inputs["x"]


def _undefined_value(spec: Any) -> None:
    first_op(spec, "softmax").inputs["x"].arguments[0].name = "nowhere"


def _block(spec: Any) -> None:
    first_op(spec, "softmax").blocks.add()


def _double(spec: Any) -> None:
    first_op(spec, "softmax").outputs[0].type.tensorType.dataType = 12


def _kernel(spec: Any) -> None:
    first_op(spec, "conv").inputs["strides"].arguments[0].value.CopyFrom(_ints(2, 2))


def _padding(spec: Any) -> None:
    first_op(spec, "conv").inputs["pad"].arguments[0].value.CopyFrom(_ints(1, 0, 0, 0))


def _backwards(spec: Any) -> None:
    first_op(spec, "slice_update").inputs["stride"].arguments[0].value.CopyFrom(_ints(1, 1, 1, -1))


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
    first_op(spec, "write_state").inputs["input"].arguments[0].name = "x"


def _defined_twice(spec: Any) -> None:
    first_op(spec, "softmax").outputs[0].name = "x"


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
