"""The scripts around the program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from scripts.check_hosts import disagreements
from tests.launch import ENV, ROOT


def check_hosts(hostfile: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/check_hosts.py", str(hostfile)], cwd=ROOT, env=ENV, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_check_hosts_on_this_machine() -> None:
    run = check_hosts(ROOT / "hostfiles" / "local")
    assert run.returncode == 0, run.stderr
    assert "1 hosts are ready" in run.stdout


def test_check_hosts_names_what_is_wrong(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost\nno-such-host.invalid\n")
    run = check_hosts(hostfile)
    assert run.returncode == 1
    assert "no-such-host.invalid" in run.stderr + run.stdout and "Traceback" not in run.stderr


def test_versions_must_agree() -> None:
    node = {"host": "a", "mpgpt": "1", "openmpi": "5.0.11", "mpi4py": "4", "torch": "2.13.0+cpu", "byteorder": "little"}
    assert disagreements([node, node | {"host": "b", "torch": "2.13.0"}]) == []
    (said,) = disagreements([node, node | {"host": "b", "openmpi": "5.0.8"}])
    assert "openmpi" in said and "a has 5.0.11" in said and "b has 5.0.8" in said
