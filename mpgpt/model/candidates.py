"""The kernels that this machine has for a dtype, found by trial.

Knows: which kernels there are for a dtype, whether each works here, and whether its products of integers are exact.
Must not know: models, shapes of theirs, or which kernel is fastest (``autotune.py`` measures).

Not every product of integers is exact: FBGEMM and oneDNN add two products of bytes up in 16 bits where an x86-64
processor has no VNNI, and what does not fit is cut off. A trial shows that, and then such a kernel is no candidate.

Legend: T tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch

from mpgpt.model.footprint import GROUP
from mpgpt.model.kernels import (
    FLOATS,
    Columns,
    Fbgemm,
    Int4,
    Integers,
    Kernel,
    Kleidi,
    OneDNN,
    Packed,
    Plain,
    Widened,
    spread,
)


def candidates(dtype: str) -> tuple[Kernel, ...]:
    """The kernels that this machine has for a dtype, the one that is most often the fastest first."""
    return _found(dtype)[0]


def inexact(dtype: str) -> tuple[Kernel, ...]:
    """The kernels that this machine has for a dtype and that do not multiply integers exactly: no candidates."""
    return _found(dtype)[1]


@cache
def _found(dtype: str) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """The candidates, and those that are inexact."""
    kinds: tuple[Kernel, ...]
    if dtype in FLOATS:
        kinds = Packed(FLOATS[dtype]), Plain(FLOATS[dtype]), Columns(FLOATS[dtype])
    else:
        kinds = (Fbgemm(), OneDNN(), Integers()) if dtype == "int8" else (Kleidi(), Int4())
    works = tuple(kernel for kernel in kinds if _works(kernel, FLOATS.get(dtype, torch.float32)))
    return exact_of(works) if dtype == "int8" else (works, ())


def exact_of(kernels: Sequence[Kernel]) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """The 8-bit kernels that are exact on this processor, and the others.

    Those that are not are split if that makes them exact; ``Widened`` is there where else there would be none.
    """
    wrong = tuple(kernel for kernel in kernels if not is_exact(kernel))
    right = [kernel for kernel in kernels if kernel not in wrong]
    halves = [replace(k, name=f"{k.name}-split", split=True) for k in wrong if isinstance(k, (Fbgemm, OneDNN))]
    right += [kernel for kernel in halves if is_exact(kernel)]
    return tuple(right) or (Widened(),), wrong


def is_exact(kernel: Kernel) -> bool:
    """Whether an 8-bit kernel's products are those of the integers, also of the largest, but for a last rounding.

    Some shapes and row counts take other code than the rest, so several are tried. A kernel that fails for one of them
    is not exact either.
    """
    random = np.random.default_rng(8)
    try:
        return all(_multiplies_exactly(kernel, random, *shape) for shape in ((64, 1), (64, 33), (320, 64), (1536, 192)))
    except RuntimeError:
        return False


def _multiplies_exactly(kernel: Kernel, random: np.random.Generator, inputs: int, outputs: int) -> bool:
    """Weights and rows are spread first: the kernel spreads them back into these integers; the product is the same."""
    x_TI, weight_OI = _extremes(random, 96, inputs), _extremes(random, outputs, inputs)
    exact_TO = torch.from_numpy(x_TI @ weight_OI.T).double()
    held = [kernel.hold(*kernel.reduce(spread(torch.from_numpy(weight_OI).float())))]
    spread_TI = spread(torch.from_numpy(x_TI).float())
    for rows in (1, 2, 8, 96):
        off_TO = kernel.multiply(spread_TI[:rows].clone(), held, None).double() - exact_TO[:rows]
        if not bool((off_TO.abs() < 1e-6 * 127 * 127 * inputs).all()):
            return False
    return True


def _extremes(random: np.random.Generator, rows: int, inputs: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Rows of nothing but the largest, of nothing but the least, of both, and of all between, in turn; int64."""
    kinds_4I = np.stack([np.full(inputs, 127), np.full(inputs, -127), np.zeros(inputs), np.zeros(inputs)])
    numbers = np.tile(kinds_4I.astype(np.int64), (rows // 4 + 1, 1))
    numbers[2::4] = random.choice([-127, 127], numbers[2::4].shape)
    numbers[3::4] = random.integers(-127, 128, numbers[3::4].shape)
    numbers[3::4, 0] = 127  # a row's largest decides its scale
    return numbers[:rows]


def _works(kernel: Kernel, dtype: torch.dtype) -> bool:
    """Tried, because torch has no word for it: some builds lack a kernel."""
    x_TI = torch.linspace(-1, 1, 2 * 2 * GROUP).view(2, -1).to(dtype)
    weight_OI = torch.linspace(1, -2, 16 * 2 * GROUP).sin().view(16, -1)
    try:
        if not kernel.here():
            return False
        y_TO = kernel.multiply(x_TI, [kernel.hold(*kernel.reduce(weight_OI))], None).float()
    except (RuntimeError, AttributeError, NotImplementedError):
        return False
    return bool((y_TO - x_TI.float() @ weight_OI.t()).abs().max() < 1.0)
