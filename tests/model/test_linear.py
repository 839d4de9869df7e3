"""How a linear layer holds its weight: in parts, block by block, by the kernel for its shape."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mpgpt.model.candidates import candidates
from mpgpt.model.footprint import GROUP
from mpgpt.model.kernels import DTYPES, FLOATS, Kernel
from mpgpt.model.linear import HELD_BYTES, Kernels, Linear
from tests.support.products import ALL, ERROR, NAMES, off, pieces, random


@pytest.mark.parametrize(("dtype", "kernel"), ALL, ids=NAMES)
def test_parts_make_no_difference(dtype: str, kernel: Kernel) -> None:
    """A weight that is held in several parts, read in pieces of any size, is the weight."""
    width, activations = 512, FLOATS.get(dtype, torch.float32)
    outputs = 2 * HELD_BYTES // (width // 2) + 40 if dtype == "int4" else 2 * HELD_BYTES // width + 40
    weight_OI = random(outputs, width)
    split = Linear(pieces(weight_OI, 3001), None, kernel, activations)
    assert len(split.parts) > 1
    x_TI = random(4, width, seed=3).to(activations)
    exact = x_TI.double() @ weight_OI.double().t()
    assert off(split(x_TI), exact) < ERROR[dtype]


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
