"""What tests of products share: every kernel that this machine has, numbers, and how far off a product is."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpgpt.model.candidates import candidates
from mpgpt.model.kernels import DTYPES

ALL = [(dtype, kernel) for dtype in DTYPES for kernel in candidates(dtype)]
NAMES = [f"{dtype}-{kernel.name}" for dtype, kernel in ALL]
ERROR = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3, "int8": 2e-2, "int4": 0.12}
"""The most that a product may be off, as a share of the whole."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pieces(weight_OI: Tensor, rows: int) -> Iterator[Tensor]:
    yield from torch.split(weight_OI, rows)


def off(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())
