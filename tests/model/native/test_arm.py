"""The same bytes on Arm: whole small models, compiled for it and played under qemu."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mpgpt.model.native.golden import DTYPES, MODELS, GoldenModel
from mpgpt.model.native.library import FLAGS
from tests.model.native.replaying import Replayed, compile_replay, replayed, unpacked
from tests.model.native.test_bits import GOLDEN

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PROCESSORS = {"dotprod": "cortex-a76", "neon": "cortex-a72"}

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"there is no {COMPILER} or no {EMULATOR}"
)


@pytest.mark.parametrize("kind", PROCESSORS)
def test_arm_gives_the_golden_bytes(kind: str, tmp_path: Path) -> None:
    program = compile_replay(COMPILER, ["-O2", "-static", *FLAGS[kind]], tmp_path)
    command: list[str | Path] = [EMULATOR, "-cpu", PROCESSORS[kind], program]
    # An emulator is slow: the second kind differs in its products of bytes alone.
    models = MODELS if kind == "dotprod" else ("qwen3",)
    got = {name: {dtype: replayed(name, dtype, command, tmp_path) for dtype in DTYPES} for name in models}
    assert got == {
        name: {
            dtype: Replayed(GOLDEN["float32 cache"][name][dtype], unpacked(GoldenModel(name, dtype)))
            for dtype in DTYPES
        }
        for name in models
    }
