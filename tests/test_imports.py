"""What a process loads: import-linter proves what modules may import, and this what a run does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.support.launch import ENV, ROOT

RUN = """
import runpy, sys
sys.argv = ["mpgpt", *sys.argv[1:]]
try:
    runpy.run_module("mpgpt", run_name="__main__")
except SystemExit as end:
    assert not end.code, end.code
assert "torch" in sys.modules
loaded = [name for name in sys.modules if name.split(".")[0] == "mpi4py" or name == "mpgpt.transport.mpi"]
assert not loaded, loaded
"""


def test_one_process_alone_loads_no_mpi(models: dict[str, Path]) -> None:
    generate = ["generate", "--model", str(models["llama"]), "--prompt", "abc", "--raw", "--max-new-tokens", "2"]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *generate], env=ENV, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout, done.stderr
