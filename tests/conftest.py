"""What several test modules share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpgpt.model.pull import model_home, pull
from tests.support.models import RANDOM, save_random


def pytest_runtest_setup() -> None:
    """One thread for torch, also after a test that set another number: a second gains nothing for models this small,
    and where others compute too the two wait for each other (14 s of processor time for what one does in 0.5)."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, pulled once a machine and kept outside the tree (93 MB to fetch, 540 MB to keep)."""
    return pull("smollm2-135m", home=model_home(), progress=False)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models of several architectures, by name, each with a byte tokenizer."""
    root = tmp_path_factory.mktemp("models")
    return {name: save_random(name, root / name) for name in RANDOM}
