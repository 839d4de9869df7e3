"""The player under sanitizers: no byte outside its buffers, nothing undefined, no race between its threads."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from mpgpt.model.native import library
from mpgpt.model.native.golden import DTYPES
from tests.model.native.replaying import compile_replay, replayed
from tests.model.native.test_bits import GOLDEN

SANITIZERS = {
    "addresses": "-fsanitize=address,undefined",
    "races": "-fsanitize=thread",
}


@pytest.mark.parametrize("what", SANITIZERS)
def test_golden_models(what: str, tmp_path: Path) -> None:
    flags = ["-O1", "-g", SANITIZERS[what], "-fno-sanitize-recover=all"]
    if library.machine() == "x86_64":
        if not library.FEATURES["x86_64"]["avx2"] <= library.processor_features():
            pytest.skip("this processor has no AVX2")
        flags += library.FLAGS["avx2"]
    if not shutil.which("g++") or not sanitizes(flags, tmp_path):
        pytest.skip("there is no compiler with sanitizers")
    command: list[str | Path] = [compile_replay("g++", flags, tmp_path)]
    if what == "races" and shutil.which("setarch"):  # of gcc 12 it does not start at addresses that are too random
        command = ["setarch", "-R", *command]
    models = ("gpt2", "qwen3") if what == "addresses" else ("qwen3",)
    for name in models:
        for dtype in DTYPES:
            got = replayed(name, dtype, command, tmp_path, {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"})
            assert got.logits == GOLDEN["float32 cache"][name][dtype]


def sanitizes(flags: list[str], folder: Path) -> bool:
    """Whether a program with these flags can be built and run here."""
    (folder / "nothing.cpp").write_text("int main() { return 0; }\n")
    built = subprocess.run(
        ["g++", *flags, str(folder / "nothing.cpp"), "-o", str(folder / "nothing")], capture_output=True, check=False
    )
    command = ["setarch", "-R"] if shutil.which("setarch") else []
    return built.returncode == 0 and subprocess.run([*command, folder / "nothing"], check=False).returncode == 0
