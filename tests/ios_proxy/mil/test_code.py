"""Results that are not what their instruction declares."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("coremltools")

from mpgpt.errors import ModelError
from mpgpt_ios.mil.program import Program
from tests.ios_proxy.packages import CHUNK, CONTEXT, Small, zeros
from tests.ios_proxy.protos import Writer, edited, first_op, value_type

FULL = (4, 6)


def test_a_result_of_another_shape_is_refused(small: dict[str, Small], tmp_path: Path) -> None:
    def edit(spec: Any) -> None:
        first_op(spec, "softmax").outputs[0].type.CopyFrom(value_type("float16", (1, 4, CHUNK, 1)))

    program = Program.read(edited(small["gpt2"].path, tmp_path / "edited.mlpackage", edit))
    with pytest.raises(ModelError, match=r"op softmax .* gives .* and declares \(1, 4, 8, 1\)"):
        program.run("prefill", zeros(program), program.state())


def test_a_result_of_another_kind_is_refused(tmp_path: Path) -> None:
    writer = Writer({"x": FULL}, {})
    name = writer.op("less", FULL, x="x", y="x")
    program = Program.read(writer.save(tmp_path / "less.mlpackage", {name: FULL}))
    with pytest.raises(ModelError, match=r"op less .* gives torch.bool and declares float16"):
        program.run("main", {"x": np.zeros(FULL, np.float16)}, program.state())


def test_an_update_outside_the_state_is_refused(small: dict[str, Small]) -> None:
    program = Program.read(small["gpt2"].path)
    inputs = zeros(program) | {"pos": np.array([CONTEXT - CHUNK + 1], np.int32)}
    with pytest.raises(ModelError, match=r"op slice_update .* fails: 57 to 65 of an axis of 64"):
        program.run("prefill", inputs, program.state())
