"""Every kernel that this machine has, against plain arithmetic in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mpgpt.kernels import DTYPES, FLOATS, GROUP, HELD_BYTES, Kernel, Kernels, Linear, candidates

ALL = [(dtype, kernel) for dtype in DTYPES for kernel in candidates(dtype)]
NAMES = [f"{dtype}-{kernel.name}" for dtype, kernel in ALL]
STEADY = [(dtype, kernel) for dtype, kernel in ALL if kernel.name not in ("plain", "columns")]
"""Those that keep a row's bits in any company on x86-64; the others are taken only where there is none of these."""
ERROR = {"float32": 1e-6, "bfloat16": 1e-2, "float16": 1e-3, "int8": 2e-2, "int4": 0.12}
"""The most that a product may be off, as a share of the whole."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pieces(weight_OI: Tensor, rows: int) -> Iterator[Tensor]:
    yield from torch.split(weight_OI, rows)


def off(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def test_every_dtype_has_a_kernel() -> None:
    assert all(candidates(dtype) for dtype in DTYPES)


@pytest.mark.parametrize(("dtype", "kernel"), ALL, ids=NAMES)
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_what_arithmetic_says(dtype: str, kernel: Kernel, biased: bool) -> None:
    weight_OI, bias_O = random(200, 192), random(200, seed=1) if biased else None
    activations = FLOATS.get(dtype, torch.float32)
    linear = Linear(pieces(weight_OI, 67), bias_O, kernel, activations)
    assert (linear.in_features, linear.out_features) == (192, 200)
    for rows in (1, 2, 3, 8, 33, 100):
        x_TI = random(rows, 192, seed=rows).to(activations)
        exact = x_TI.double() @ weight_OI.double().t() + (bias_O.double() if bias_O is not None else 0)
        got = linear(x_TI)
        assert got.dtype == activations and got.shape == (rows, 200)
        assert off(got, exact) < ERROR[dtype]


@pytest.mark.parametrize(("dtype", "kernel"), STEADY, ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 48), (1536, 576), (96, 3000)])
def test_a_row_is_the_same_bits_in_any_company(dtype: str, kernel: Kernel, inputs: int, outputs: int) -> None:
    activations = FLOATS.get(dtype, torch.float32)
    linear = Linear([random(outputs, inputs)], random(outputs, seed=1), kernel, activations)
    x_TI = random(96, inputs, seed=2).to(activations)
    whole = linear(x_TI)
    for rows in (1, 2, 3, 5, 8, 16, 31, 95):
        for first in (0, 96 - rows):
            assert torch.equal(linear(x_TI[first : first + rows].clone()), whole[first : first + rows]), rows


@pytest.mark.parametrize(("dtype", "kernel"), ALL, ids=NAMES)
def test_parts_make_no_difference(dtype: str, kernel: Kernel) -> None:
    """A weight that is held in several parts, read in pieces of any size, is the weight."""
    width, activations = 512, FLOATS.get(dtype, torch.float32)
    outputs = 2 * HELD_BYTES // (width // 2) + 40 if dtype == "int4" else 2 * HELD_BYTES // width + 40
    weight_OI = random(outputs, width)
    split = Linear(pieces(weight_OI, 3001), None, kernel, activations)
    assert len(split._parts) > 1
    x_TI = random(4, width, seed=3).to(activations)
    exact = x_TI.double() @ weight_OI.double().t()
    assert off(split(x_TI), exact) < ERROR[dtype]


@pytest.mark.parametrize(("dtype", "kernel"), [one for one in ALL if one[0] == "int8"], ids=lambda x: str(x))
def test_a_row_of_large_features_keeps_its_small_ones(dtype: str, kernel: Kernel) -> None:
    """One feature 300 times as large as the rest must not drown them: what the rotation is for."""
    weight_OI, x_TI = random(64, 576), random(8, 576, seed=1)
    x_TI[:, 100] *= 300
    weight_OI[:, 100] = 0
    exact = x_TI.double() @ weight_OI.double().t()
    assert off(Linear([weight_OI], None, kernel, torch.float32)(x_TI), exact) < 0.15


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rows_of_zeros_and_of_nothing_finite(dtype: str) -> None:
    for kernel in candidates(dtype):
        linear = Linear([random(32, 64)], None, kernel, torch.float32)
        x_TI = random(3, 64)
        x_TI[1] = 0
        y_TO = linear(x_TI)
        assert torch.equal(y_TO[1], torch.zeros(32)) and y_TO.isfinite().all()
        zeros = Linear([torch.zeros(32, 64)], None, kernel, torch.float32)
        assert zeros(x_TI).abs().max() < 1e-6


@pytest.mark.parametrize("damage", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("dtype", "kernel"), ALL, ids=NAMES)
def test_a_row_that_is_not_finite_spoils_itself_alone(dtype: str, kernel: Kernel, damage: float) -> None:
    """And all of itself: a NaN must not become a number on the way."""
    activations = FLOATS.get(dtype, torch.float32)
    linear = Linear([random(48, 192)], random(48, seed=1), kernel, activations)
    for rows in (2, 3, 8, 33):
        whole = random(rows, 192, seed=rows).to(activations)
        clean = linear(whole)
        for bad in {0, rows // 2, rows - 1}:
            x_TI = whole.clone()
            x_TI[bad, 70] = damage
            y_TO = linear(x_TI)
            others = [row for row in range(rows) if row != bad]
            assert torch.equal(y_TO[others], clean[others])
            assert not y_TO[bad].isfinite().any()


def test_what_is_held() -> None:
    sizes = {
        dtype: Kernels(dtype=dtype).linear([random(256, 512)], None, 512, 256).nbytes / (256 * 512) for dtype in DTYPES
    }
    assert (sizes["float32"], sizes["bfloat16"], sizes["float16"]) == (4, 2, 2)
    assert sizes["int8"] == pytest.approx(1, abs=0.01)
    assert sizes["int4"] <= 0.5 + 4 / GROUP


def test_what_int4_is_not_made_for_is_int8() -> None:
    kernels = Kernels(dtype="int4")
    assert kernels.dtype_of(64) == "int4" and kernels.dtype_of(64, head=True) == "int8"
    assert kernels.dtype_of(112) == "int8", "112 is no multiple of a group"
    assert Kernels(dtype="float32").dtype_of(112, head=True) == "float32"


def test_blocks_are_let_go_one_by_one() -> None:
    """While a weight is taken in, no more of it exists in float than a block."""
    alive: list[int] = []

    def blocks() -> Iterator[Tensor]:
        for n in range(4):
            block = random(64, 64, seed=n)
            alive.append(block.data_ptr())
            yield block

    linear = Linear(blocks(), None, candidates("int8")[0], torch.float32)
    assert linear.out_features == 256 and linear.nbytes < 256 * 64 * 1.2
