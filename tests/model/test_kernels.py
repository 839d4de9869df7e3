"""Every kernel that this machine has, against plain arithmetic in float64."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpgpt.model.candidates import candidates, exact_of, is_exact
from mpgpt.model.footprint import GROUP
from mpgpt.model.kernels import DTYPES, FLOATS, Fbgemm, Int8, Kernel, OneDNN, Widened
from mpgpt.model.linear import HELD_BYTES, Kernels, Linear

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


# -- products of integers are exact, or the kernel is none

Multiply = Callable[["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"]


def exactly(x_TI: np.ndarray[Any, Any], weight_OI: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(x_TI @ weight_OI.T)


def saturating(x_TI: np.ndarray[Any, Any], weight_OI: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """As x86-64 without VNNI (``vpmaddubsw``): bytes without a sign times signed ones, pairs added up in 16 bits."""
    pairs_TON = ((x_TI + 128)[:, None] * weight_OI).reshape(len(x_TI), len(weight_OI), -1, 2).sum(3)
    return np.asarray(pairs_TON.clip(-(1 << 15), (1 << 15) - 1).sum(2) - 128 * weight_OI.sum(1))


def of_fewer_bits(x_TI: np.ndarray[Any, Any], weight_OI: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return exactly(x_TI // 2 * 2, weight_OI)


def of_one_row_alone(x_TI: np.ndarray[Any, Any], weight_OI: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (saturating if len(x_TI) == 1 else exactly)(x_TI, weight_OI)


def of_many_outputs(x_TI: np.ndarray[Any, Any], weight_OI: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (saturating if len(weight_OI) > 100 else exactly)(x_TI, weight_OI)


@dataclass(frozen=True)
class Made(Int8):
    """An 8-bit kernel whose product of integers is a function of numpy's."""

    name: str = "made"
    of: Multiply = exactly

    def hold(self, *reduced: Tensor) -> Any:
        return reduced

    def multiply(self, x_TI: Tensor, parts: Any, bias_O: Tensor | None) -> Tensor:
        turned_TI, scale_T1 = self.ready(x_TI)
        rows_TI = self.split_rows((turned_TI * (127 / scale_T1)).round(), 0).numpy().astype(np.int64)
        outs = [torch.from_numpy(self.of(rows_TI, w.numpy().astype(np.int64))).float() * scale for w, scale in parts]
        return self.finish(self.join_rows(outs), scale_T1, bias_O)


@pytest.mark.parametrize("split", [False, True])
def test_a_kernel_that_multiplies_exactly_is_found_exact(split: bool) -> None:
    assert is_exact(Made(of=exactly, split=split))


@pytest.mark.parametrize("of", [saturating, of_fewer_bits, of_one_row_alone, of_many_outputs])
def test_a_kernel_that_does_not_is_found_out(of: Multiply) -> None:
    assert not is_exact(Made(of=of))


def test_sums_of_16_bits_hold_what_is_split() -> None:
    assert is_exact(Made(of=saturating, split=True))


def test_where_no_kernel_is_exact_one_is_made() -> None:
    made = Made(of=saturating)
    assert exact_of([made]) == ((Widened(),), (made,))
    assert exact_of([]) == ((Widened(),), ())
    assert is_exact(Widened())


@pytest.mark.parametrize("kernel", [Widened(), Fbgemm(split=True), OneDNN(split=True)], ids=repr)
def test_what_stands_in_is_a_kernel_as_the_others(kernel: Kernel) -> None:
    """Those that this processor may not need keep the promises too: precision, bits in any company, parts."""
    if kernel.name not in ("widened", *(k.name.removesuffix("-split") for k in candidates("int8"))):
        pytest.skip(f"this torch build has no {kernel.name}")
    weight_OI, bias_O = random(8000, 1600), random(8000, seed=1)
    linear = Linear(pieces(weight_OI, 1999), bias_O, kernel, torch.float32)
    assert len(linear._parts) > 1 and is_exact(kernel)
    x_TI = random(96, 1600, seed=2)
    whole = linear(x_TI)
    assert off(whole, x_TI.double() @ weight_OI.double().t() + bias_O.double()) < ERROR["int8"]
    for rows in (1, 2, 3, 17):
        assert torch.equal(linear(x_TI[:rows].clone()), whole[:rows]), rows
    zeros = linear(torch.zeros(2, 1600))
    assert torch.equal(zeros, bias_O.expand(2, -1))


WITHOUT_VNNI = {
    "as it is": {},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX512"},
    "SSE4.1": {"ONEDNN_MAX_CPU_ISA": "SSE41", "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2", "ATEN_CPU_CAPABILITY": "default"},
    "FBGEMM alone": {"FBGEMM_ENABLE_INSTRUCTIONS": "AVX2"},
    "oneDNN alone": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
}
"""A processor as the libraries are told to see it: those without VNNI are met, or the tests' machine is one."""

CHOSEN = """
import json, sys
from pathlib import Path
import numpy as np, torch
from scipy.linalg import hadamard
from mpgpt.model import autotune
from mpgpt.model.linear import Weight
from mpgpt.model.candidates import inexact

budget = autotune.Budget(seconds=0.05, cold_bytes=1 << 16)
torch.set_num_threads(1)
random = np.random.default_rng(5)
turned = lambda numbers: (numbers.reshape(-1, 64) @ (hadamard(64) / 8)).reshape(numbers.shape)
worst, names = 0.0, {}
for dtype in ("int8", "int4"):
    shapes = [(64, 96), (192, 64), (576, 300)]
    kernels, tried = autotune.tune(
        dtype, [Weight(inputs=i, outputs=o, head=True) for i, o in shapes], memory=Path(sys.argv[1]), budget=budget
    )
    assert any(trial.chosen and trial.exact for trial in tried)
    assert {trial.kernel for trial in tried if not trial.exact} == {kernel.name for kernel in inexact("int8")}
    for inputs, outputs in shapes:
        for low in (-127, 0, 126):
            weight, x = (random.integers(low, 128, (n, inputs)) for n in (outputs, 40))
            weight[:, 7] = x[:, 7] = 127
            weight[::2], x[::3] = -weight[::2], -x[::3]
            linear = kernels.linear([torch.tensor(turned(weight)).float()], None, inputs, outputs, head=True)
            for rows in (1, 2, 40):
                got = linear(torch.tensor(turned(x[:rows])).float()).double().numpy()
                worst = max(worst, np.abs(got - x[:rows] @ weight.T).max() / (127 * 127 * inputs))
        names[f"{dtype} {inputs}x{outputs}"] = kernels.pick(inputs, outputs, head=True).name
print(json.dumps([worst, names]))
"""


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one folder that is taken from processor to processor: what was chosen on one must not be taken on another."""
    return tmp_path_factory.mktemp("home") / "kernels.json"


@pytest.mark.parametrize("processor", [*WITHOUT_VNNI, "as it is"])
def test_what_is_chosen_multiplies_integers_exactly_on_any_processor(processor: str, memory: Path) -> None:
    environment = {**os.environ, **WITHOUT_VNNI[processor]}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", CHOSEN, str(memory)],
        env=environment, text=True, capture_output=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    worst, names = json.loads(done.stdout)
    assert worst < 1e-6
    if platform.machine() == "x86_64" and processor in ("AVX2", "AVX-512", "SSE4.1"):
        assert all(name.endswith("-split") or name == "integers" for name in names.values()), names
