"""The scripts around the program."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.launch import ENV, ROOT


def check_hosts(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in ENV.items() if key != "PRTE_MCA_rmaps_default_mapping_policy"}
    return subprocess.run(
        [sys.executable, "scripts/check_hosts.py", *map(str, arguments)], cwd=ROOT, env=env, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


def test_check_hosts_on_this_machine(models: dict[str, Path]) -> None:
    run = check_hosts(ROOT / "hostfiles" / "local", "--model", models["llama"])
    assert run.returncode == 0, run.stderr
    assert "1 host is ready" in run.stdout and "localhost" in run.stdout


def test_check_hosts_names_what_is_wrong(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("localhost\nno-such-host.invalid\n")
    run = check_hosts(hostfile)
    assert run.returncode == 1
    assert "no-such-host.invalid: its name is not known here" in run.stderr and "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("arguments", "settings", "sentence"),
    [
        ([], "", "one hostfile is needed, and there is none"),
        (["hosts", "other"], "", "one hostfile is needed, and there are 2: hosts, other"),
        (["absent"], "", "absent: this hostfile cannot be read"),
        (["hosts", "--model"], "", "--model needs a value"),
        (["hosts", "-n", "two"], "", "-n is 'two'; it should be the number of ranks"),
        (["hosts", "-n", "3"], "", "there are not enough slots for -n 3"),
        (["hosts", "--no-such-option"], "", "mpirun has no option --no-such-option"),
        (["hosts"], "num_node: 3", "num_node is not a known key; did you mean num_nodes?"),
        (["hosts", "-n", "1"], "num_nodes: 2", "num_nodes is 2 in the settings, and -n is 1"),
    ],
)
def test_check_hosts_misused(arguments: list[str], settings: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    (tmp_path / "hosts.yaml").write_text(settings)
    run = check_hosts("-x", "HOME", *(tmp_path / word if word in ("hosts", "absent") else word for word in arguments))
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert sentence in run.stderr.replace(f"{tmp_path}/", "")
