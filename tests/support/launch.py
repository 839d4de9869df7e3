"""Starting the program as a person would: alone, or under mpirun."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.support import preloaded

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ENV = os.environ | {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "HF_HUB_OFFLINE": "0",
    "COLUMNS": "100",
}


def mpirun(ranks: int, *arguments: str | Path, hostfile: Path | None = None) -> list[str]:
    """The command line of ``ranks`` ranks of python with ``arguments``; 0 is one process without mpirun."""
    return _on_ranks(ranks, [sys.executable, *map(str, arguments)], hostfile)


def _on_ranks(ranks: int, program: list[str], hostfile: Path | None) -> list[str]:
    if ranks == 0:
        return program
    where = ["-hostfile", str(hostfile)] if hostfile else []
    launcher = shutil.which("mpirun", path=str(BIN)) or shutil.which("mpirun") or "mpirun"
    return [launcher, *where, "-n", str(ranks), *program]


def mpgpt(
    ranks: int, *arguments: str | Path, stdin: str | None = None, timeout: float = 120, cwd: Path | None = None,
    env: dict[str, str] | None = None, hostfile: Path | None = None, cold: bool = False,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run ``mpgpt`` to its end on that many ranks. ``cold`` begins with a new interpreter (see ``preloaded``): for what
    is about that, and for variables in ``env`` that libraries read as they are imported."""
    program = (sys.executable, "-m", "mpgpt") if cold else preloaded.command(tuple(sorted(ENV.items())))
    return subprocess.run(
        _on_ranks(ranks, [*program, *map(str, arguments)], hostfile),
        input=stdin if stdin is not None else "", capture_output=True, text=True, timeout=timeout,
        env=ENV | (env or {}), cwd=cwd or ROOT, check=False,
    )  # fmt: skip


def records(path: Path) -> dict[Any, dict[str, Any]]:
    """The records of an --out file by id."""
    lines = path.read_text(encoding="utf-8").splitlines()
    loaded = [json.loads(line) for line in lines]
    assert len({record["id"] for record in loaded}) == len(loaded), "an id twice"
    return {record["id"]: record for record in loaded}
