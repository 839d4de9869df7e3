"""The programs of the Swift package, where somebody has built them: `make swift-build`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.launch import ROOT


def built(name: str) -> Path:
    """The newest build of one; skips the test where there is none. MPGPT_NODE names another mpgpt-node."""
    if name == "mpgpt-node" and (named := os.environ.get("MPGPT_NODE")):
        return Path(named)
    folder = ROOT / "ios_proxy" / "GPT2Node" / ".build"
    found = [path for kind in ("debug", "release") if (path := folder / kind / name).exists()]
    if not found:
        pytest.skip(f"the Swift package is not built: there is no {name}")
    return max(found, key=lambda path: path.stat().st_mtime)
