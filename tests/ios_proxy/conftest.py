"""What tests of the iPad's side share."""

from __future__ import annotations

import pytest

from tests.ios_proxy.packages import Small, build_all


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Small]:
    """Small packages by name: gpt2, llama (grouped heads), int8 (the same in eight bits)."""
    pytest.importorskip("coremltools")
    return build_all(tmp_path_factory.mktemp("packages"))
