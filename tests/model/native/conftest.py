"""Libraries of compiled kernels in several builds: other processors, compilers and optimisations, the same sources."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest

from mpgpt.model.native import library
from mpgpt.model.native.library import COMMON_FLAGS, CORE, FLAGS

STRICT = (*COMMON_FLAGS, "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared")
BUILDS: Mapping[str, tuple[str, str | None, tuple[str, ...]]] = {
    "avx512": ("", "avx512", ()),
    "avxvnni": ("", "avxvnni", ()),
    "avx2": ("", "avx2", ()),
    "dotprod": ("", "dotprod", ()),
    "neon": ("", "neon", ()),
    "gcc -O1 avx2": ("g++", "avx2", ("-O1", *FLAGS["avx2"])),
    "clang -O3 avx2": ("clang++", "avx2", ("-O3", *FLAGS["avx2"])),
    "clang -O2 avx512": ("clang++", "avx512", ("-O2", *FLAGS["avx512"])),
    "plain": ("g++", None, ("-O1", "-DMPGPT_PLAIN")),
}
"""By name: the compiler, or none for what was built at install; the kind of processor it needs, if any; flags."""


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], ctypes.CDLL]:
    """One of ``BUILDS``, made when it is first asked for; the test is skipped where it cannot be."""

    @cache
    def make(name: str) -> ctypes.CDLL:
        compiler, kind, flags = BUILDS[name]
        kinds = library.FEATURES.get(library.machine(), {})
        if kind and not kinds.get(kind, frozenset({"none"})) <= library.processor_features():
            pytest.skip(f"this processor has no {kind}")
        if not compiler:
            path = next((p for s in EXTENSION_SUFFIXES if (p := CORE.parent / f"_{kind}{s}").exists()), None)
            if path is None:
                pytest.skip(f"the kernels for {kind} were not built at install")
            return library.load(path)
        if not shutil.which(compiler):
            pytest.skip(f"there is no {compiler}")
        out = tmp_path_factory.mktemp("build") / "kernels.so"
        compile_core([compiler, *STRICT, *flags], out)
        return library.load(out)

    return make


def compile_core(command: list[str], out: Path) -> None:
    sources = [str(CORE / name) for name in ("player.cpp", "api.cpp")]
    done = subprocess.run([*command, *sources, "-o", str(out)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
