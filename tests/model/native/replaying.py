"""Golden models' prompts played by ``replay.cpp``: for processors that are emulated, and under sanitizers."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpgpt.model.native.golden import GoldenModel
from mpgpt.model.native.library import CORE
from mpgpt.model.native.pages import Pages
from tests.model.native.conftest import STRICT
from tests.model.native.recording import Recorder

SLOTS, CONTEXT = 70, 256
LAYER_BYTES = Pages(SLOTS, CONTEXT).count * 2 * 64 * 6 * 48 * 4
"""Of a layer's cache, as the largest golden model takes it."""


def compile_replay(compiler: str, flags: Sequence[str], folder: Path) -> Path:
    """``replay.cpp`` with the core, as a program; any warning is an error."""
    program = folder / "replay"
    common = [flag for flag in STRICT if flag not in ("-fPIC", "-shared")]
    sources = [str(Path(__file__).parent / "replay.cpp"), str(CORE / "player.cpp")]
    command = [compiler, *common, *flags, f"-I{CORE}", *sources, "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return program


def replayed(
    name: str, dtype: str, command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None
) -> str:
    """The digest of a golden model's logits as ``command`` computes them."""
    recording, logits = folder / "recording", folder / "logits"
    recorder: Any = Recorder(slots=SLOTS, layer_bytes=LAYER_BYTES)
    GoldenModel(name, dtype, calls=recorder, kv_dtype="float32").whole()
    recording.write_bytes(recorder.write())
    done = subprocess.run(
        [*command, recording, logits], env=environment, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return hashlib.sha256(logits.read_bytes()).hexdigest()[:16]
