"""Golden models' prompts played by ``replay.cpp``: for processors that are emulated, and under sanitizers."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mpgpt.model.known_families import family_of
from mpgpt.model.native.golden import GoldenModel
from mpgpt.model.native.library import CORE
from mpgpt.model.native.pages import Pages
from mpgpt.model.native.weights import LANES
from mpgpt.model.program import Product
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


class Replayed(NamedTuple):
    """Digests of what was computed of a golden model."""

    logits: str
    columns: str
    """Of its weights, unpacked."""


def replayed(
    name: str, dtype: str, command: Sequence[str | Path], folder: Path, environment: Mapping[str, str] | None = None
) -> Replayed:
    """A golden model as ``command`` computes it."""
    recording, logits, columns = folder / "recording", folder / "logits", folder / "columns"
    recorder: Any = Recorder(slots=SLOTS, layer_bytes=LAYER_BYTES)
    GoldenModel(name, dtype, calls=recorder, kv_dtype="float32").whole()
    recording.write_bytes(recorder.write())
    done = subprocess.run(
        [*command, recording, logits, columns],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, done.stderr
    return Replayed(*(hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in (logits, columns)))


def unpacked(model: GoldenModel) -> str:
    """The digest of the model's weights, unpacked, as in ``Replayed``."""
    digest, config = hashlib.sha256(), model.config
    family, (player,) = family_of(config), model.players
    programs = [*family.programs(config, range(config.layers)), family.closing(config, "head.weight")]
    for number, op in enumerate(op for program in programs for op in program.operations):
        if isinstance(op, Product):
            panels = -(-op.outputs // LANES)
            for dtype in (torch.float32, torch.bfloat16):
                columns_IO = torch.empty(op.inputs, panels * LANES, dtype=dtype)
                player.unpack(number, 0, panels, dtype == torch.bfloat16, columns_IO.data_ptr())
                digest.update(columns_IO[:, : op.outputs].contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
