"""The compiled player as Python calls it: which library this processor takes, and its structures.

Knows: where the libraries lie, what each needs of a processor and of a compiler, the structures of ``core/player.h``.
Must not know: programs, models, tensors, or anything that is not there when mpgpt is built (``setup.py`` asks it).

One library is built for each kind of processor, from the same sources; they give the same bits. A library that was
built from other sources than lie beside it is not taken.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import suppress
from ctypes import POINTER, Structure, c_char_p, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from mpgpt.errors import ModelError

CORE = Path(__file__).parent / "core"
FEATURES: Mapping[str, Mapping[str, frozenset[str]]] = {
    "x86_64": {
        "avx512": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx2", "fma", "f16c"}),
        "avxvnni": frozenset({"avx_vnni", "avx2", "fma", "f16c"}),
        "avx2": frozenset({"avx2", "fma", "f16c"}),
    },
    "aarch64": {"dotprod": frozenset({"asimddp"}), "neon": frozenset({"asimd"})},
}
"""By machine, the kinds of processor, the fastest first, and what each needs as /proc/cpuinfo spells it."""
AVX2 = ("-mavx2", "-mfma", "-mf16c")
FLAGS: Mapping[str, tuple[str, ...]] = {
    "avx512": (*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))),
    "avxvnni": (*AVX2, "-mavxvnni"),
    "avx2": AVX2,
    "dotprod": ("-march=armv8.2-a+dotprod",),
    "neon": ("-march=armv8-a",),
}
"""What a compiler needs for each kind."""
COMMON_FLAGS = (
    "-std=c++17", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi",
    "-fvisibility=hidden", "-pthread",
)  # fmt: skip
"""For all kinds: whatever else a compiler is asked for, the bits are these."""
BUFFERS = 8


class WeightArgs(Structure):
    """A weight: see ``core/weight.h``."""

    _fields_ = (
        ("format", c_int32), ("inputs", c_int32), ("outputs", c_int32), ("leaves", c_int32),
        ("stops", c_void_p), ("panels", c_void_p), ("bias", c_void_p),
    )  # fmt: skip


class OperationArgs(Structure):
    """One operation: see ``core/player.h``."""

    _fields_ = (
        ("kind", c_int32), ("source", c_int32), ("target", c_int32), ("a", c_int32), ("b", c_int32), ("c", c_int32),
        ("x", c_float), ("data", c_void_p), ("more", c_void_p),
    )  # fmt: skip


class PlayerArgs(Structure):
    """Operations over buffers, with a cache for each layer: see ``core/player.h``."""

    _fields_ = (
        ("operations", c_int32), ("operation", POINTER(OperationArgs)), ("widths", c_int32 * BUFFERS),
        ("heads", c_int32), ("kv_heads", c_int32), ("dim", c_int32), ("stored", c_int32), ("positions", c_int32),
        ("layers", c_int32), ("threads", c_int32), ("pages", c_void_p),
    )  # fmt: skip


class StepArgs(Structure):
    """A step's rows: see ``core/player.h``."""

    _fields_ = (
        ("rows", c_int32), ("outputs", c_int32), ("positions", c_void_p), ("slots", c_void_p),
        ("output_rows", c_void_p), ("tables", c_void_p), ("table", c_int32),
        ("hidden_in", c_void_p), ("hidden_out", c_void_p), ("logits", c_void_p),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Library:
    """A library that this processor can run."""

    kind: str
    """Of processor, as in ``FEATURES``."""
    compiler: str
    calls: ctypes.CDLL


@dataclass(frozen=True, slots=True)
class Absent:
    """Why there is no library here."""

    why: str


def load(path: Path) -> ctypes.CDLL:
    """The library in this file, with the types of its functions. Raises ``OSError``."""
    calls = ctypes.CDLL(str(path))
    for name, result, arguments in (
        ("sources", c_char_p, []),
        ("compiler", c_char_p, []),
        ("weight_bytes", c_int64, [POINTER(WeightArgs)]),
        ("pack", None, [POINTER(WeightArgs), c_void_p, c_int32, c_int32]),
        ("rotary", None, [c_void_p, c_int32, c_int32, c_float, c_void_p, c_void_p]),
        ("player", c_void_p, [POINTER(PlayerArgs)]),
        ("play", c_int32, [c_void_p, POINTER(StepArgs), c_int32, c_int32]),
        ("unpack", None, [c_void_p, c_int32, c_int32, c_int32, c_int32, c_void_p]),
        ("buffer", c_void_p, [c_void_p, c_int32, POINTER(c_int64)]),
        ("free", None, [c_void_p]),
    ):
        function = getattr(calls, f"mpgpt_{name}")
        function.restype, function.argtypes = result, arguments
    return calls


def sources_digest() -> str:
    """Of the sources that lie here: what a library that fits them was built with."""
    digest = hashlib.sha256()
    for path in sorted(CORE.iterdir()):
        if path.suffix in (".h", ".cpp"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


@cache
def find() -> Library | Absent:
    """The fastest library that this processor can run, or why there is none."""
    return search(Path(__file__).parent, machine(), processor_features())


def search(folder: Path, architecture: str, has: frozenset[str]) -> Library | Absent:
    """The fastest of the libraries in ``folder`` for a processor with these features, or why there is none."""
    kinds = FEATURES.get(architecture)
    if not kinds:
        return Absent(f"there are no compiled kernels for {architecture}")
    built = dict(_built(folder, kinds))
    if not built:
        return Absent("the kernels were not compiled when mpgpt was installed: no C++ compiler was found, or it failed")
    kind = next((kind for kind in built if kinds[kind] <= has), None)
    if kind is None:
        return Absent("this processor is older than any that there are compiled kernels for")
    try:
        calls = load(built[kind])
    except (OSError, AttributeError) as error:
        return Absent(f"the compiled kernels do not load ({error}); install mpgpt again")
    if calls.mpgpt_sources().decode() != sources_digest():
        return Absent("the compiled kernels were built from other sources; install mpgpt again")
    return Library(kind, calls.mpgpt_compiler().decode(), calls)


def needed() -> ctypes.CDLL:
    """The functions of the library; ``ModelError`` where there is none."""
    found = find()
    if isinstance(found, Absent):
        raise ModelError(found.why)
    return found.calls


def _built(folder: Path, kinds: Mapping[str, frozenset[str]]) -> Iterator[tuple[str, Path]]:
    """The libraries that were built, by kind, the fastest first."""
    for kind in kinds:
        for suffix in EXTENSION_SUFFIXES:
            path = folder / f"_{kind}{suffix}"
            if path.exists():
                yield kind, path
                break


def machine() -> str:
    """The processor's architecture, as in ``FEATURES``."""
    return {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_features() -> frozenset[str]:
    """As /proc/cpuinfo spells them; Apple's processors all have dot products."""
    if platform.system() == "Darwin":
        return frozenset({"asimd", "asimddp"}) if platform.machine() == "arm64" else frozenset(_sysctl_features())
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith(("flags", "Features")):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _sysctl_features() -> Iterator[str]:
    """Of a Mac with a processor of Intel's."""
    library = ctypes.CDLL(None)
    for name, ours in (("avx2_0", "avx2"), ("fma", "fma"), ("f16c", "f16c"), ("avx512f", "avx512f")):
        value, size = c_int32(0), ctypes.c_size_t(4)
        library.sysctlbyname(f"hw.optional.{name}".encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
        if value.value:
            yield ours
