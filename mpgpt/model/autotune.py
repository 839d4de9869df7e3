"""Which kernel is fastest here: every candidate is tried on the shapes of the model at hand, and the choice is kept.

Knows: how a product is timed fairly, and by what a kernel is chosen.
Must not know: ranks, layers, or what the shapes are for.

A kernel for which a row's bits depend on the rows beside it is taken only where there is no other, or where the user
wants speed first (``--fast``); one that does not multiply integers exactly is not taken at all, however fast. And as
a choice may change the last bits of a result, it must not change from run to run: it is kept by machine and what its
processor can do, versions, threads, dtype and shape, and another candidate must be a good deal faster than the usual
one to be taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mpgpt.errors import UsageError
from mpgpt.model.candidates import candidates, inexact
from mpgpt.model.kernel_timings import ROWS, KernelTiming, TimingFile
from mpgpt.model.kernels import DTYPES, Kernel
from mpgpt.model.linear import MANY_ROWS, NATIVE, Kernels, Linear, Weight, compiled, key
from mpgpt.model.native import library
from mpgpt.model.native.trial import Products

MARGIN = 1.1
"""How many times as fast another kernel must be than the first candidate."""
LARGEST_BYTES = 8 << 20
"""A larger weight is tried by a part of its outputs."""
PASSES = 6
TORCH = "torch"
"""Stands for whichever of torch's kernels is fastest."""
PRODUCTS = 4
"""Weights in turn where the compiled kernels are tried: those that are told apart differ for many rows alone."""


class Multiplies(Protocol):
    """A product that is timed, or several of one shape."""

    in_features: int
    dtype: torch.dtype

    def __call__(self, x_TI: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The limits of trying kernels."""

    seconds: float = 1.5
    """For all shapes of a model; making the weights takes some of it, too."""
    cold_bytes: int = 40 << 20
    """Weights in turn at least: more than caches keep, so that each product reads its weight from memory."""


BUDGET = Budget()


def tune(
    dtype: str,
    weights: Iterable[Weight],
    *,
    pinned: str = "auto",
    native: bool = True,
    fast: bool = False,
    memory: Path | None = None,
    budget: Budget = BUDGET,
) -> tuple[Kernels, list[KernelTiming]]:
    """The kernels for a model of these ``weights``: ``pinned`` by name, remembered in ``memory``, or tried now.

    The compiled kernels, where there are some and ``native`` allows them, are taken untried for all weights: no others
    give the same bits on every processor. Where speed goes before bits (``fast``), those with torch's products for
    many rows are tried, too, and none of torch's own is refused for its bits. ``pinned`` may be ``torch``, too, for
    one of torch's, as tried. Trying takes the ``budget`` at most, or little more. Raises ``UsageError`` for a name
    that is no candidate here.
    """
    usual, kinds = Kernels(dtype=dtype), {}
    for weight in weights:
        held = usual.dtype_of(weight.inputs, head=weight.head)
        kinds[key(held, weight.inputs, weight.outputs)] = (held, weight)
    found = library.find()
    if pinned != "auto" and pinned in compiled(dtype):
        if isinstance(found, library.Absent):
            raise UsageError(f"the kernels {pinned} are not to be had: {found.why}")
        return Kernels(dtype=dtype, chosen=dict.fromkeys(kinds, pinned)), []
    if pinned == "auto" and native and isinstance(found, library.Library):
        taken = dict.fromkeys(kinds, NATIVE)
        layers = {shape: kind for shape, kind in kinds.items() if not kind[1].head}  # the head has few rows
        tried = _trials(layers, by_library=True, fast=True, memory=memory, budget=budget) if fast else []
        return Kernels(dtype=dtype, chosen=taken | _chosen(tried)), tried
    if pinned == TORCH:
        pinned = "auto"
    for held, _ in kinds.values():
        if not candidates(held):
            raise UsageError(f"this machine's torch has no product for {held}; take another --dtype")
    _check(pinned, {held for held, _ in kinds.values()})
    if pinned != "auto":
        names = {k: pinned for k, (held, _) in kinds.items() if pinned in _names(held)}
        return Kernels(dtype=dtype, chosen=names), []
    tried = _trials(kinds, by_library=False, fast=fast, memory=memory, budget=budget)
    return Kernels(dtype=dtype, chosen=_chosen(tried)), tried


def _chosen(tried: Iterable[KernelTiming]) -> dict[str, str]:
    return {timing.shape: timing.kernel for timing in tried if timing.chosen}


def _trials(
    kinds: Mapping[str, tuple[str, Weight]], *, by_library: bool, fast: bool, memory: Path | None, budget: Budget
) -> list[KernelTiming]:
    """Every kernel's timings for these shapes, remembered or made now: of the compiled kernels, or of torch's."""
    file, timings, anew = TimingFile(memory), dict[str, list[KernelTiming]](), False
    deadline = time.perf_counter() + budget.seconds
    for number, (shape, (dtype, weight)) in enumerate(kinds.items()):
        names = compiled(dtype) if by_library else _names(dtype)
        wrong = [] if by_library else [kernel.name for kernel in inexact(dtype)]
        kept_as = f"{shape}, fast" if fast else shape
        timings[kept_as] = file.known(kept_as, names, wrong)
        if not timings[kept_as]:
            share = replace(budget, seconds=(deadline - time.perf_counter()) / (len(kinds) - number))
            make = _compiled_products if by_library else _torch_products
            timings[kept_as] = _try(shape, make(dtype, weight, share), wrong, fast=fast, seconds=share.seconds)
            anew = True
    if anew:
        file.remember(timings)
    return [timing for some in timings.values() for timing in some]


def computing(kernels: Kernels, pinned: str, native: bool) -> str:
    """What computes on this host after ``tune``, and why, in words."""
    found = library.find()
    if kernels.native and isinstance(found, library.Library):
        ours = f"compiled kernels for {found.kind} ({found.compiler})"
        return f"{ours}, and torch's for many rows" if set(kernels.chosen.values()) & set(MANY_ROWS) else ours
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
    if pinned == "auto":
        return
    ours = dict.fromkeys(name for dtype in dtypes for name in compiled(dtype))
    known = [*ours, TORCH, *sorted({name for dtype in dtypes for name in _names(dtype)})]
    if pinned not in known:
        every = {kernel.name for dtype in DTYPES for kernel in (*candidates(dtype), *inexact(dtype))}
        why = "holds another dtype" if pinned in every else "is not to be had on this machine"
        if pinned in {kernel.name for dtype in dtypes for kernel in inexact(dtype)}:
            why = "multiplies inexactly on this processor: its 16-bit sums overflow"
        raise UsageError(f"the kernel {pinned} {why}; for {'/'.join(sorted(dtypes))} there are {', '.join(known)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A kernel as it is tried."""

    name: str
    products: Sequence[Multiplies]
    """Of one shape, with weights of their own."""
    scale: float
    """What the time of a call is multiplied by."""


def _torch_products(dtype: str, weight: Weight, budget: Budget) -> list[Candidate]:
    outputs, activations = _part(weight), Kernels(dtype=dtype).activations
    return [
        Candidate(
            name=kernel.name, scale=weight.outputs / outputs,
            products=products(kernel, weight.inputs, outputs, activations, budget.cold_bytes),
        )
        for kernel in candidates(dtype)
    ]  # fmt: skip


def _compiled_products(dtype: str, weight: Weight, budget: Budget) -> list[Candidate]:
    outputs = _part(weight)
    return [
        Candidate(
            name=name, scale=weight.outputs / outputs / PRODUCTS,
            products=[Products(name, dtype, weight.inputs, outputs, count=PRODUCTS, rows=max(ROWS))],
        )
        for name in compiled(dtype)
    ]  # fmt: skip


def _part(weight: Weight) -> int:
    """How many of the outputs are tried."""
    return max(64, min(weight.outputs, LARGEST_BYTES // (4 * weight.inputs) // 64 * 64))


def _try(
    shape: str, tried: Sequence[Candidate], wrong: Iterable[str], *, fast: bool, seconds: float
) -> list[KernelTiming]:
    """Every candidate for one shape; the best by the product of its times, so that each row count weighs alike."""
    with torch.inference_mode():
        batch_invariant = [_is_batch_invariant(one.products[0]) for one in tried]
        best = _times([one.products for one in tried], time.perf_counter() + seconds)
    scores = [one.scale * math.prod(times) ** (1 / len(times)) for one, times in zip(tried, best, strict=True)]
    eligible = [i for i, steady in enumerate(batch_invariant) if steady or fast or not any(batch_invariant)]
    winner = min(eligible, key=lambda i: scores[i])
    winner = winner if scores[winner] * MARGIN < scores[eligible[0]] else eligible[0]
    return [
        KernelTiming(
            shape=shape, kernel=one.name, microseconds=tuple(one.scale * t for t in best[i]),
            batch_invariant=batch_invariant[i], exact=True, chosen=i == winner,
        )
        for i, one in enumerate(tried)
    ] + [
        KernelTiming(shape=shape, kernel=name, microseconds=(), batch_invariant=False, exact=False, chosen=False)
        for name in wrong
    ]  # fmt: skip


def _is_batch_invariant(linear: Multiplies) -> bool:
    x_TI = torch.randn(max(ROWS), linear.in_features).to(linear.dtype)
    whole_TO = linear(x_TI)
    return all(torch.equal(linear(x_TI[:rows].clone()), whole_TO[:rows]) for rows in (1, 2, 3, 8, 17, 48))


def _times(held: Sequence[Sequence[Multiplies]], until: float) -> list[list[float]]:
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


def microseconds(linears: Sequence[Multiplies], x_TI: Tensor, *, passes: int) -> float:
    """A product's time: the least mean of ``passes`` over all ``linears``."""
    best = float("inf")
    for _ in range(passes):
        begun = time.perf_counter()
        for linear in linears:
            linear(x_TI)
        best = min(best, (time.perf_counter() - begun) / len(linears))
    return 1e6 * best
