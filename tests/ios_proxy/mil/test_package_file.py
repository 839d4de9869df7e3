"""Packages that cannot be read: absent, cut, or with weights that are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

pytest.importorskip("coremltools")

from mpgpt.errors import ModelError
from mpgpt_ios.mil.program import Program
from tests.ios_proxy.packages import Small


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
