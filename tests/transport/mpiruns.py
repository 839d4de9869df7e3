"""Programs of mpirun's name, and waiting for what they do."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.launch import ENV, ROOT


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@contextmanager
def fake(name: str, code: str, *arguments: str, cwd: Path = ROOT) -> Iterator[subprocess.Popen[str]]:
    """A process that calls itself ``name`` and runs ``code``; it is ready when it has written a line."""
    process = subprocess.Popen(
        [name, "-c", code, *arguments], executable=sys.executable, cwd=cwd, env=ENV | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


RANK = """
import os, sys
from mpgpt.transport.mpirun import find
found = find(os.environ)
print(found and (found.pid, found.argv, str(found.cwd), str(found.settings)))
"""
LAUNCH = f"import subprocess, sys; subprocess.run([{sys.executable!r}, '-c', {RANK!r}], check=True)"
