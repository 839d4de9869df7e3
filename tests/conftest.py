"""What several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpgpt.pull import model_home, pull


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, pulled once a machine and kept outside the tree (93 MB to fetch, 540 MB to keep)."""
    return pull("smollm2-135m", home=model_home(), progress=False)
