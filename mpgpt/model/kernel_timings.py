"""What kernels took on this machine, and the file in which that is kept from run to run.

Knows: what a timing holds, what a choice depends on besides dtype and shape, the file's form.
Must not know: how kernels are timed, or which of them is chosen.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mpgpt import __version__
from mpgpt.errors import OutputError
from mpgpt.files import write_atomically

ROWS = (1, 8, 96)
"""The rows of a step in decoding, in decoding together, and of a prompt's chunk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelTiming:
    """One kernel's times for one shape: microseconds for each of ``ROWS``, or none where it is not exact."""

    shape: str
    kernel: str
    microseconds: tuple[float, ...]
    batch_invariant: bool
    """Whether a row had the same bits in every company that was tried."""
    exact: bool
    """Whether its products of integers are exact; those of floats are as exact as floats are."""
    chosen: bool


def timing_from(raw: dict[str, Any]) -> KernelTiming:
    """A timing out of its JSON."""
    return KernelTiming(**{**raw, "microseconds": tuple(raw["microseconds"])})


def processor_name() -> str:
    """This host's processor by its maker's name."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return platform.processor() or platform.machine()


def machine() -> str:
    """What a choice depends on besides dtype and shape."""
    able = " ".join(sorted(feature for feature, has in torch.cpu.get_capabilities().items() if has is True))
    return (
        f"{processor_name()}, {platform.machine()} ({able}; torch uses {torch.backends.cpu.get_cpu_capability()}), "
        f"mpgpt {__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )


class TimingFile:
    """The timings that this machine remembers by name; nothing is remembered where there is no ``path``."""

    def __init__(self, path: Path | None) -> None:
        """A file that is absent or garbled is as an empty one."""
        self._path = path
        self._known = _read(path) if path else {}

    def known(self, name: str, exact: Iterable[str], inexact: Iterable[str]) -> list[KernelTiming]:
        """The timings of this name; none when they are not of the kernels that there are now, or one is exact now
        that was not, or the other way."""
        try:
            timings = [timing_from(one) for one in self._known.get(name) or ()]
        except (TypeError, KeyError):
            return []
        now = [(kernel, True) for kernel in exact] + [(kernel, False) for kernel in inexact]
        whole = sorted((timing.kernel, timing.exact) for timing in timings) == sorted(now)
        return timings if whole and [timing.exact for timing in timings if timing.chosen] == [True] else []

    def remember(self, timings: Mapping[str, Sequence[KernelTiming]]) -> None:
        """Keep these by their names, besides all others; where that fails, the next run tries again."""
        if self._path is None:
            return
        self._known |= {name: [asdict(timing) for timing in some] for name, some in timings.items()}
        with suppress(OSError, ValueError, OutputError):
            try:
                everything = json.loads(self._path.read_bytes())
            except FileNotFoundError:
                everything = {}
            everything = (everything if isinstance(everything, dict) else {}) | {machine(): self._known}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path, json.dumps(everything, indent=1).encode())


def _read(path: Path) -> dict[str, Any]:
    try:
        known = json.loads(path.read_bytes()).get(machine(), {})
    except (OSError, ValueError, AttributeError):
        return {}
    return known if isinstance(known, dict) else {}
