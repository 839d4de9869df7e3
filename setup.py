"""The compiled kernels: a library for each kind of processor. What cannot be compiled is left out, down to none."""

from __future__ import annotations

import sys
from copy import copy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, str(Path(__file__).parent))
from mpgpt.model.native.library import COMMON_FLAGS, FEATURES, FLAGS, machine, sources_digest

CORE = Path("mpgpt/model/native/core")


def extensions() -> list[Extension]:
    return [
        Extension(
            f"mpgpt.model.native._{kind}",
            sorted(str(path) for path in CORE.glob("*.cpp")),
            depends=sorted(str(path) for path in CORE.glob("*.h")),
            define_macros=[("MPGPT_SOURCES", f'"{sources_digest()}"')],
            extra_compile_args=["-O3", "-g0", *COMMON_FLAGS, *FLAGS[kind]],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for kind in FEATURES.get(machine(), {})
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
