"""Servers that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.rig import Server, save_model, serving


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a chat template."""
    return save_model("llama", tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="package")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, max_sequences=4) as running:
        yield running
