"""Products of integers are exact, or the kernel is no candidate."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpgpt.model.candidates import candidates, exact_of, is_exact
from mpgpt.model.kernels import DTYPES, Int8, Widened

Multiply = Callable[["np.ndarray[Any, Any]", "np.ndarray[Any, Any]"], "np.ndarray[Any, Any]"]


def test_every_dtype_has_a_kernel() -> None:
    assert all(candidates(dtype) for dtype in DTYPES)


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
        spread_TI, scale_T1 = self.ready(x_TI)
        rows_TI = self.split_rows((spread_TI * (127 / scale_T1)).round(), 0).numpy().astype(np.int64)
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
spread = lambda numbers: (numbers.reshape(-1, 64) @ (hadamard(64) / 8)).reshape(numbers.shape)
worst, names = 0.0, {}
for dtype in ("int8", "int4"):
    shapes = [(64, 96), (192, 64), (576, 300)]
    kernels, tried = autotune.tune(
        dtype, [Weight(inputs=i, outputs=o, head=True) for i, o in shapes],
        native=False, memory=Path(sys.argv[1]), budget=budget,
    )
    assert any(timing.chosen and timing.exact for timing in tried)
    assert {timing.kernel for timing in tried if not timing.exact} == {kernel.name for kernel in inexact("int8")}
    for inputs, outputs in shapes:
        for low in (-127, 0, 126):
            weight, x = (random.integers(low, 128, (n, inputs)) for n in (outputs, 40))
            weight[:, 7] = x[:, 7] = 127
            weight[::2], x[::3] = -weight[::2], -x[::3]
            linear = kernels.linear([torch.tensor(spread(weight)).float()], None, inputs, outputs, head=True)
            for rows in (1, 2, 40):
                got = linear(torch.tensor(spread(x[:rows])).float()).double().numpy()
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
