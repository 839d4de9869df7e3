"""Which library a processor takes, and why there is none."""

from __future__ import annotations

import shutil
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from mpgpt.model.native import library
from mpgpt.model.native.library import CORE, FEATURES, Absent, Library, search


def test_a_host_with_a_compiler_has_the_kernels() -> None:
    """Else every other test of them would be skipped, and nobody would notice."""
    kinds = FEATURES.get(library.machine(), {})
    if not (shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")):
        pytest.skip("there is no C++ compiler")
    if not any(needs <= library.processor_features() for needs in kinds.values()):
        pytest.skip("there are no kernels for this processor")
    found = library.find()
    assert isinstance(found, Library), found
    assert found.kind in kinds and found.compiler.startswith(("gcc", "clang"))


def why(folder: Path, architecture: str, has: frozenset[str]) -> str:
    found = search(folder, architecture, has)
    assert isinstance(found, Absent)
    return found.why


def test_why_there_is_none(tmp_path: Path) -> None:
    everything = frozenset().union(*FEATURES["x86_64"].values())
    assert why(tmp_path, "riscv64", everything) == "there are no compiled kernels for riscv64"
    assert why(tmp_path, "x86_64", everything).startswith("the kernels were not compiled when mpgpt was installed")
    suffix = EXTENSION_SUFFIXES[0]
    (tmp_path / f"_avx512{suffix}").write_bytes(b"no library")
    assert "do not load" in why(tmp_path, "x86_64", everything)
    assert "older than any" in why(tmp_path, "x86_64", FEATURES["x86_64"]["avx2"])


@pytest.mark.skipif(isinstance(library.find(), Absent), reason="there are no compiled kernels")
def test_the_fastest_that_the_processor_can_run(tmp_path: Path) -> None:
    """And none whose sources have changed since."""
    has = library.processor_features()
    kinds = [kind for kind, needs in FEATURES[library.machine()].items() if needs <= has]
    found = search(CORE.parent, library.machine(), FEATURES[library.machine()][kinds[-1]])
    assert isinstance(found, Library) and found.kind == kinds[-1]
    best = library.find()
    assert isinstance(best, Library) and best.kind == kinds[0]


def test_a_library_of_other_sources_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(library.find(), Absent):
        pytest.skip("there are no compiled kernels")
    monkeypatch.setattr(library, "sources_digest", lambda: "0" * 16)
    assert "built from other sources" in why(CORE.parent, library.machine(), library.processor_features())
