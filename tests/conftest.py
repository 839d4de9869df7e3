"""What several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpgpt.pull import model_home, pull
from tests.models import RANDOM, save_random


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, pulled once a machine and kept outside the tree (93 MB to fetch, 540 MB to keep)."""
    return pull("smollm2-135m", home=model_home(), progress=False)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of several architectures, by name, each with a byte tokenizer."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_random(name, root / name) for name in RANDOM}
