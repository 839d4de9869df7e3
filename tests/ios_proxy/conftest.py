"""What tests of the iPad's side share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpgpt_ios.bundle import Bundle
from mpgpt_ios.executor import EvaluatorBackend, Executor
from mpgpt_ios.mil.program import Precision
from tests.ios_proxy.packages import NAMES, Small, build_all
from tests.ios_proxy.rig import ByHand, Proxy, Wire, make_bundle


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Small]:
    """Small packages by name: gpt2, llama (grouped heads), int8 (the same in eight bits)."""
    pytest.importorskip("coremltools")
    return build_all(tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="module")
def executors(small: dict[str, Small]) -> dict[tuple[str, Precision], Executor]:
    precisions: tuple[Precision, ...] = ("declared", "float32")
    return {
        (name, precision): Executor(EvaluatorBackend(small[name].path, precision), small[name].sizes)
        for name in NAMES
        for precision in precisions
    }


@pytest.fixture(scope="module")
def folder(models: dict[str, Path]) -> Path:
    return models["llama"]


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(folder, tmp_path_factory.mktemp("bundle"), padding=3 << 20)


@pytest.fixture
def proxies(folder: Path, bundle: Bundle) -> Iterator[Callable[..., Proxy]]:
    made: list[Proxy] = []

    def make(port: int, **more: object) -> Proxy:
        made.append(Proxy(folder, bundle, port, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture
def by_hand(bundle: Bundle) -> Iterator[Callable[..., ByHand]]:
    made: list[ByHand] = []

    def make(port: int, **more: object) -> ByHand:
        made.append(ByHand(port, bundle, **more))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture
def wires() -> Iterator[Callable[[int], Wire]]:
    made: list[Wire] = []

    def make(port: int) -> Wire:
        made.append(Wire(port))
        return made[-1]

    yield make
    for wire in made:
        wire.close()
