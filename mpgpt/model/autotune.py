"""Which kernel is fastest here: every candidate is tried on the shapes of the model at hand, and the choice is kept.

Knows: how a product is timed fairly, and the file in which choices are remembered.
Must not know: ranks, layers, or what the shapes are for.

A kernel for which a row's bits depend on the rows beside it is taken only where there is no other; one that does not
multiply integers exactly is not taken at all, however fast. And as a choice may change the last bits of a result, it
must not change from run to run: it is kept by machine and what its processor can do, versions, threads, dtype and
shape, and another candidate must be a good deal faster than the usual one to be taken.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpgpt import __version__
from mpgpt.errors import OutputError, UsageError
from mpgpt.files import write_atomically
from mpgpt.model.candidates import candidates, inexact
from mpgpt.model.kernels import DTYPES, Kernel
from mpgpt.model.linear import NATIVE, Kernels, Linear, Weight, key
from mpgpt.model.native import library

ROWS = (1, 8, 96)
"""The rows of a step in decoding, in decoding together, and of a prompt's chunk."""
MARGIN = 1.1
"""How many times as fast another kernel must be than the first candidate."""
LARGEST_BYTES = 8 << 20
"""A larger weight is tried by a part of its outputs."""
PASSES = 6
TORCH = "torch"
"""Stands for whichever of torch's kernels is fastest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The limits of trying kernels."""

    seconds: float = 1.5
    """For all shapes of a model; making the weights takes some of it, too."""
    cold_bytes: int = 40 << 20
    """Weights in turn at least: more than caches keep, so that each product reads its weight from memory."""


BUDGET = Budget()


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


def tune(
    dtype: str,
    weights: Iterable[Weight],
    *,
    pinned: str = "auto",
    native: bool = True,
    memory: Path | None = None,
    budget: Budget = BUDGET,
) -> tuple[Kernels, list[KernelTiming]]:
    """The kernels for a model of these ``weights``: ``pinned`` by name, remembered in ``memory``, or tried now.

    The compiled kernels, where there are some and ``native`` allows them, are taken untried for all weights: no others
    give the same bits on every processor. ``pinned`` may be ``native`` or ``torch``, too: one of torch's, as tried.
    Trying takes the ``budget`` at most, or little more. Raises ``UsageError`` for a name that is no candidate here.
    """
    usual, kinds = Kernels(dtype=dtype), {}
    for weight in weights:
        held = usual.dtype_of(weight.inputs, head=weight.head)
        kinds[key(held, weight.inputs, weight.outputs)] = (held, weight)
    found = library.find()
    if pinned == NATIVE and isinstance(found, library.Absent):
        raise UsageError(f"the kernels {NATIVE} are not to be had: {found.why}")
    if pinned == NATIVE or (pinned == "auto" and native and isinstance(found, library.Library)):
        return Kernels(dtype=dtype, chosen=dict.fromkeys(kinds, NATIVE)), []
    if pinned == TORCH:
        pinned = "auto"
    for held, _ in kinds.values():
        if not candidates(held):
            raise UsageError(f"this machine's torch has no product for {held}; take another --dtype")
    _check(pinned, {held for held, _ in kinds.values()})
    if pinned != "auto":
        names = {k: pinned for k, (held, _) in kinds.items() if pinned in _names(held)}
        return Kernels(dtype=dtype, chosen=names), []
    remembered = _read(memory)
    timings: list[KernelTiming] = []
    anew = False
    deadline = time.perf_counter() + budget.seconds
    for number, (shape, (held, weight)) in enumerate(kinds.items()):
        kept = _known(remembered.get(shape), held)
        share = replace(budget, seconds=(deadline - time.perf_counter()) / (len(kinds) - number))
        timings += kept or _try(shape, held, weight, share)
        anew = anew or not kept
    if memory and anew:
        _write(memory, remembered | _as_json(timings))
    chosen = {timing.shape: timing.kernel for timing in timings if timing.chosen}
    return Kernels(dtype=dtype, chosen=chosen), timings


def computing(kernels: Kernels, pinned: str, native: bool) -> str:
    """What computes on this host after ``tune``, and why, in words."""
    found = library.find()
    if kernels.native and isinstance(found, library.Library):
        return f"compiled kernels for {found.kind} ({found.compiler})"
    if pinned != "auto":
        return f"torch's kernels, because the kernel {pinned} was asked for"
    if not native:
        return "torch's kernels, because MPGPT_NATIVE is 0"
    return f"torch's kernels, because {missing()}"


def missing() -> str:
    """Why this host has no compiled kernels; empty where it has."""
    found = library.find()
    return found.why if isinstance(found, library.Absent) else ""


def _names(dtype: str) -> list[str]:
    return [kernel.name for kernel in candidates(dtype)]


def _check(pinned: str, dtypes: set[str]) -> None:
    known = [NATIVE, TORCH, *sorted({name for dtype in dtypes for name in _names(dtype)})]
    if pinned != "auto" and pinned not in known:
        every = {kernel.name for dtype in DTYPES for kernel in (*candidates(dtype), *inexact(dtype))}
        why = "holds another dtype" if pinned in every else "is not to be had on this machine"
        if pinned in {kernel.name for dtype in dtypes for kernel in inexact(dtype)}:
            why = "multiplies inexactly on this processor: its 16-bit sums overflow"
        raise UsageError(f"the kernel {pinned} {why}; for {'/'.join(sorted(dtypes))} there are {', '.join(known)}")


def _try(shape: str, dtype: str, weight: Weight, budget: Budget) -> list[KernelTiming]:
    """Every candidate for one shape; the best by the product of its times, so that each row count weighs alike."""
    kernels, until = candidates(dtype), time.perf_counter() + budget.seconds
    activations = Kernels(dtype=dtype).activations
    outputs = max(64, min(weight.outputs, LARGEST_BYTES // (4 * weight.inputs) // 64 * 64))
    with torch.inference_mode():
        held = [products(k, weight.inputs, outputs, activations, budget.cold_bytes) for k in kernels]
        batch_invariant = [_is_batch_invariant(linears[0]) for linears in held]
        best = _times(held, until)
    scores = [math.prod(times) ** (1 / len(times)) for times in best]
    eligible = [i for i in range(len(kernels)) if batch_invariant[i] or not any(batch_invariant)]
    winner = min(eligible, key=lambda i: scores[i])
    winner = winner if scores[winner] * MARGIN < scores[eligible[0]] else eligible[0]
    scale = weight.outputs / outputs
    return [
        KernelTiming(
            shape=shape, kernel=kernels[i].name, microseconds=tuple(scale * t for t in best[i]),
            batch_invariant=batch_invariant[i], exact=True, chosen=i == winner,
        )
        for i in range(len(kernels))
    ] + [
        KernelTiming(shape=shape, kernel=kernel.name, microseconds=(), batch_invariant=False, exact=False, chosen=False)
        for kernel in inexact(dtype)
    ]  # fmt: skip


def _is_batch_invariant(linear: Linear) -> bool:
    x_TI = torch.randn(max(ROWS), linear.in_features).to(linear.dtype)
    whole_TO = linear(x_TI)
    return all(torch.equal(linear(x_TI[:rows].clone()), whole_TO[:rows]) for rows in (1, 2, 3, 8, 17, 48))


def _times(held: Sequence[Sequence[Linear]], until: float) -> list[list[float]]:
    """The least microseconds of each kernel for each of ``ROWS``, in ``PASSES`` passes or until the time is over."""
    inputs, dtype = held[0][0].in_features, held[0][0].dtype
    steps = [torch.randn(rows, inputs).to(dtype) for rows in ROWS]
    for linears in held:
        for x_TI in steps:
            linears[-1](x_TI)  # the first call with a new number of rows may compile something
    best = [[float("inf")] * len(ROWS) for _ in held]
    for _ in range(PASSES):
        for linears, least in zip(held, best, strict=True):
            for i, x_TI in enumerate(steps):
                # Many rows are bound by arithmetic, where the cache matters little.
                some = linears if len(x_TI) < 32 else linears[:4]
                least[i] = min(least[i], microseconds(some, x_TI, passes=1))
        if time.perf_counter() > until:
            break
    return best


def products(kernel: Kernel, inputs: int, outputs: int, activations: torch.dtype, total_bytes: int) -> list[Linear]:
    """Linear layers that together do not fit the caches: ``total_bytes`` as held, or four layers."""
    # The same numbers at other addresses cost the same to read, and less to make.
    weight_OI = torch.randn(outputs, inputs)
    first = Linear([weight_OI], None, kernel, activations)
    count = max(4, min(128, total_bytes // first.nbytes))
    return [first, *(Linear([weight_OI], None, kernel, activations) for _ in range(count - 1))]


def microseconds(linears: Sequence[Linear], x_TI: Tensor, *, passes: int) -> float:
    """A product's time: the least mean of ``passes`` over all ``linears``."""
    best = float("inf")
    for _ in range(passes):
        begun = time.perf_counter()
        for linear in linears:
            linear(x_TI)
        best = min(best, (time.perf_counter() - begun) / len(linears))
    return 1e6 * best


# -- what is remembered


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


def _read(memory: Path | None) -> dict[str, Any]:
    """The timings remembered for this machine; none when the file is absent or garbled."""
    if memory is None:
        return {}
    try:
        known = json.loads(memory.read_bytes()).get(machine(), {})
    except (OSError, ValueError, AttributeError):
        return {}
    return known if isinstance(known, dict) else {}


def _known(entry: Any, dtype: str) -> list[KernelTiming]:
    """The timings of a shape as they were remembered; none when they are not of the kernels that there are now, or
    one is exact now that was not, or the other way."""
    try:
        timings = [timing_from(one) for one in entry]
    except (TypeError, KeyError):
        return []
    now = [(name, True) for name in _names(dtype)] + [(kernel.name, False) for kernel in inexact(dtype)]
    whole = sorted((timing.kernel, timing.exact) for timing in timings) == sorted(now)
    return timings if whole and [timing.exact for timing in timings if timing.chosen] == [True] else []


def timing_from(raw: dict[str, Any]) -> KernelTiming:
    """A timing out of its JSON."""
    return KernelTiming(**{**raw, "microseconds": tuple(raw["microseconds"])})


def _as_json(timings: Sequence[KernelTiming]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for t in timings:
        table.setdefault(t.shape, []).append(asdict(t))
    return table


def _write(memory: Path, known: dict[str, Any]) -> None:
    """Write the timings to the file; where that fails, the next run tries again."""
    with suppress(OSError, ValueError, OutputError):
        try:
            everything = json.loads(memory.read_bytes())
        except FileNotFoundError:
            everything = {}
        everything = {**everything, machine(): known} if isinstance(everything, dict) else {machine(): known}
        memory.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(memory, json.dumps(everything, indent=1).encode())
