"""Every kernel that this machine has, against plain arithmetic in float64."""

from __future__ import annotations

import math

import pytest
import torch

from mpgpt.model.candidates import candidates, is_exact
from mpgpt.model.kernels import FLOATS, Fbgemm, Kernel, OneDNN, Widened
from mpgpt.model.linear import Linear
from tests.support.products import ALL, ERROR, NAMES, off, pieces, random

MATRIX_UNIT = torch.cpu.get_capabilities().get("amx_bf16", False)
STEADY = [
    (dtype, kernel)
    for dtype, kernel in ALL
    if kernel.name not in ("plain", "columns") and not (dtype == "bfloat16" and MATRIX_UNIT)
]
"""Those that keep a row's bits in any company on x86-64; the others are taken only where there is none of these."""


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


@pytest.mark.parametrize("kernel", [Widened(), Fbgemm(split=True), OneDNN(split=True)], ids=repr)
def test_what_stands_in_is_a_kernel_as_the_others(kernel: Kernel) -> None:
    """Those that this processor may not need keep the promises too: precision, bits in any company, parts."""
    if kernel.name not in ("widened", *(k.name.removesuffix("-split") for k in candidates("int8"))):
        pytest.skip(f"this torch build has no {kernel.name}")
    weight_OI, bias_O = random(8000, 1600), random(8000, seed=1)
    linear = Linear(pieces(weight_OI, 1999), bias_O, kernel, torch.float32)
    assert len(linear.parts) > 1 and is_exact(kernel)
    x_TI = random(96, 1600, seed=2)
    whole = linear(x_TI)
    assert off(whole, x_TI.double() @ weight_OI.double().t() + bias_O.double()) < ERROR["int8"]
    for rows in (1, 2, 3, 17):
        assert torch.equal(linear(x_TI[:rows].clone()), whole[:rows]), rows
    zeros = linear(torch.zeros(2, 1600))
    assert torch.equal(zeros, bias_O.expand(2, -1))
