"""The same bytes on Arm: whole small models, compiled for it and played under qemu."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mpgpt.model.native.golden import DTYPES, MODELS, GoldenModel
from mpgpt.model.native.library import CORE
from mpgpt.model.native.pages import Pages
from tests.model.native.conftest import STRICT
from tests.model.native.recording import Recorder
from tests.model.native.test_bits import GOLDEN

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
KINDS = {"dotprod": ("-march=armv8.2-a+dotprod", "cortex-a76"), "neon": ("-march=armv8-a", "cortex-a72")}

pytestmark = pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"there is no {COMPILER} or no {EMULATOR}"
)


@pytest.mark.parametrize("kind", KINDS)
def test_arm_gives_the_golden_bytes(kind: str, tmp_path: Path) -> None:
    march, processor = KINDS[kind]
    program = tmp_path / "replay"
    flags = [flag for flag in STRICT if flag not in ("-fPIC", "-shared")]
    sources = [str(Path(__file__).parent / "replay.cpp"), str(CORE / "player.cpp")]
    subprocess.run(
        [COMPILER, *flags, "-O2", march, "-static", f"-I{CORE}", *sources, "-o", str(program)], check=True, timeout=300
    )  # fmt: skip
    got: dict[str, dict[str, str]] = {}
    for name in MODELS:
        for dtype in DTYPES:
            recording, logits = tmp_path / "recording", tmp_path / "logits"
            recording.write_bytes(recorded(name, dtype))
            subprocess.run([EMULATOR, "-cpu", processor, program, recording, logits], check=True, timeout=300)
            got.setdefault(name, {})[dtype] = hashlib.sha256(logits.read_bytes()).hexdigest()[:16]
    assert got == GOLDEN["float32 cache"]


def recorded(name: str, dtype: str) -> bytes:
    """What the library is called with for a golden model's prompt."""
    recorder: Any = Recorder(slots=70, layer_bytes=Pages(70, 256).count * 2 * 64 * 6 * 48 * 4)
    GoldenModel(name, dtype, calls=recorder, kv_dtype="float32").whole()
    recording: bytes = recorder.write()
    return recording
