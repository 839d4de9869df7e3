"""What the page's test modules share."""

from __future__ import annotations

import contextlib
import subprocess

import pytest

from scripts.build_page import npm, run_npm
from tests.page.rig import AXE, need


@pytest.fixture(scope="session")
def npm_modules() -> None:
    """What npm brings to api/web, as the lock file has it."""
    if npm() is None:
        need("there is no npm: install Node 20.19 or later")
    with contextlib.suppress(subprocess.CalledProcessError):
        run_npm("ci", "--fetch-retries=0")
    if not AXE.is_file():  # npm may fail with status 0
        need("npm ci failed: the registry cannot be reached")
