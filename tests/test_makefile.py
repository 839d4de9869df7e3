"""What `make` would do in a fresh checkout, where nothing is installed yet."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.launch import ROOT

SKIPPED = shutil.ignore_patterns(".venv", ".git", "build", "node_modules", "__pycache__", ".*_cache", "*.egg-info")


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shutil.copytree(ROOT, tmp_path_factory.mktemp("fresh") / "mpgpt", ignore=SKIPPED)


def would_run(folder: Path, target: str) -> list[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PRTE", "OMPI"))}
    run = subprocess.run(["make", "-n", target], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def positions(lines: list[str], *words: str) -> list[int]:
    return [next(n for n, line in enumerate(lines) if word in line) for word in words]


def test_install(fresh: Path) -> None:
    """An environment, the package in it, and its mpirun's defaults, in this order."""
    at = positions(would_run(fresh, "install"), "-m venv .venv", "pip install", "mpgpt setup")
    assert at == sorted(at)
    assert not (fresh / ".venv").exists()


def test_demo_installs_first(fresh: Path) -> None:
    lines = would_run(fresh, "demo")
    at = positions(lines, "-m venv .venv", "mpgpt setup", "mpgpt pull smollm2-135m", "mpirun -hostfile hostfiles/local")
    assert at == sorted(at)
    assert "npm" not in "".join(lines), "the page is committed"


def test_what_is_installed_is_not_installed_again(fresh: Path) -> None:
    (fresh / ".venv").mkdir()
    (fresh / ".venv/installed").touch()
    assert not [line for line in would_run(fresh, "install") if "pip" in line or "setup" in line]
    later = (fresh / ".venv/installed").stat().st_mtime + 2
    os.utime(fresh / "pyproject.toml", (later, later))
    assert positions(would_run(fresh, "install"), "pip install")
