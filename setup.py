"""The compiled kernels: a library for each kind of processor. What cannot be compiled is left out, down to none."""

from __future__ import annotations

import hashlib
import platform
from copy import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORE = Path("mpgpt/model/native/core")
COMMON = ["-std=c++17", "-O3", "-g0", "-fno-fast-math", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math",
          "-Wno-psabi", "-fvisibility=hidden", "-pthread"]  # fmt: skip
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
FLAGS = {
    "x86_64": {
        "avx512": [*AVX2, *(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq", "vnni"))],
        "avxvnni": [*AVX2, "-mavxvnni"],
        "avx2": AVX2,
    },
    "aarch64": {"dotprod": ["-march=armv8.2-a+dotprod"], "neon": ["-march=armv8-a"]},
}


def digest() -> str:
    """Of the sources, as ``mpgpt.model.native.library.sources_digest`` computes it."""
    whole = hashlib.sha256()
    for path in sorted(CORE.iterdir()):
        if path.suffix in (".h", ".cpp"):
            whole.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return whole.hexdigest()[:16]


def extensions() -> list[Extension]:
    machine = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())
    return [
        Extension(
            f"mpgpt.model.native._{kind}",
            sorted(str(path) for path in CORE.glob("*.cpp")),
            depends=sorted(str(path) for path in CORE.glob("*.h")),
            define_macros=[("MPGPT_SOURCES", f'"{digest()}"')],
            extra_compile_args=[*COMMON, *flags],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for kind, flags in FLAGS.get(machine, {}).items()
    ]


class BuildKinds(build_ext):
    """Several at a time, each with a folder for its objects: they are of the same sources, and would be of one name."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.parallel = self.parallel or True

    def build_extension(self, ext: Extension) -> None:
        own = copy(self)
        own.build_temp = str(Path(self.build_temp, ext.name))
        build_ext.build_extension(own, ext)


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildKinds})
