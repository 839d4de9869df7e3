"""Torch's products beside the compiled player: the same weights, other sums, and only where rows are many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mpgpt.core import Row
from mpgpt.model.known_families import family_of
from mpgpt.model.linear import MANY_ROWS, NATIVE, Kernels, key
from mpgpt.model.loader import Loader
from mpgpt.model.native import library, many_rows
from mpgpt.model.native.golden import DTYPES, MODELS, GoldenModel, WholeWeights
from mpgpt.model.native.many_rows import LEAST_ROWS, ManyRows
from mpgpt.model.native.player import NativePlayer
from mpgpt.model.program import Add, Buffer, Operation, Product, Select
from tests.model.native.test_player import CONFIG, near, play, product, random

pytestmark = pytest.mark.skipif(isinstance(library.find(), library.Absent), reason="there are no compiled kernels")

EXACT = {"native-float32": 1e-6, "native-bfloat16": 5e-3}
"""Of a weight: how far it may be from what the compiled kernels make of it."""


def multiplied(
    x_TE: Tensor, outputs: int, leaves: tuple[int, ...], dtype: str, kernel: str, *, biased: bool = False
) -> Tensor:
    """``x_TE`` and a product of it that is as wide as it, by way of one with so many outputs."""
    width = x_TE.shape[1]
    operations: list[Operation] = [
        replace(product(Buffer.HIDDEN, Buffer.INNER, "w", width, outputs, leaves=leaves), biased=biased),
        product(Buffer.INNER, Buffer.CHANGE, "back", outputs, width),
        Add(source=Buffer.CHANGE, target=Buffer.HIDDEN),
    ]
    tensors = {
        "w.weight": random(outputs, width, seed=1) / 8, "w.bias": random(outputs, seed=2),
        "back.weight": random(width, outputs, seed=3) / 8,
    }  # fmt: skip
    config = replace(CONFIG, embed=width, inner=outputs, gated=False)
    return play(operations, x_TE, tensors, config=config, dtype=dtype, kernel=kernel)


@pytest.mark.parametrize("kernel", MANY_ROWS)
@pytest.mark.parametrize("dtype", [*DTYPES, "int8-group"])
@pytest.mark.parametrize("leaves", [(), (64, 128, 192), (40, 100, 192)])
@pytest.mark.parametrize("part_bytes", [1, 1 << 22])
def test_weights_are_those_of_the_compiled_kernels(
    kernel: str, dtype: str, leaves: tuple[int, ...], part_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that pick one input each show the weights as they are held, in every format, in one part or many."""
    monkeypatch.setattr(many_rows, "PART_BYTES", part_bytes)
    one_each = torch.eye(192)
    operations: list[Operation] = [
        product(Buffer.HIDDEN, Buffer.CHANGE, "w", 192, 192, leaves=leaves),
        Add(source=Buffer.CHANGE, target=Buffer.HIDDEN),
    ]
    config, tensors = replace(CONFIG, embed=192), {"w.weight": random(192, 192, seed=1)}
    expected, got = (
        play(operations, one_each, tensors, config=config, dtype=dtype, kernel=name) for name in (NATIVE, kernel)
    )
    near(got, expected, EXACT[kernel])


@pytest.mark.parametrize("kernel", MANY_ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "outputs"), [(96, 300), (100, 15), (45, 64)])
def test_products_are_near(kernel: str, dtype: str, width: int, outputs: int) -> None:
    """With a bias, of sizes that are no whole panels or groups."""
    x_TE = random(LEAST_ROWS + 6, width)
    expected, got = (multiplied(x_TE, outputs, (), dtype, name, biased=True) for name in (NATIVE, kernel))
    few_bits = 0.03 if dtype in ("int8", "int4") else 0.0  # of rows, which the compiled kernels round to 8 bits
    near(got, expected, 2 * EXACT[kernel] + few_bits)


def test_few_rows_are_the_compiled_kernels_own() -> None:
    x_TE = random(LEAST_ROWS, 96)
    few, many = x_TE[1:], x_TE
    for dtype in DTYPES:
        assert torch.equal(*(multiplied(few, 300, (), dtype, kernel) for kernel in (NATIVE, "native-bfloat16")))
        assert not torch.equal(*(multiplied(many, 300, (), dtype, kernel) for kernel in (NATIVE, "native-bfloat16")))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_whole_models(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt in one step, and one whose last layer has few outputs; then a token decoded upon that cache."""
    golden = GoldenModel(name, dtype, kv_dtype="float32")
    config, source = golden.config, WholeWeights(golden.config)
    family = family_of(config)
    programs = family.programs(config, range(config.layers))
    usual = Kernels(dtype=dtype)
    shapes = [(op.inputs, op.outputs) for program in programs for op in program.products]
    chosen = {"": NATIVE} | {key(usual.dtype_of(shape[0]), *shape): "native-float32" for shape in shapes}
    loader = Loader(config=config, source=source, kernels=Kernels(dtype=dtype, chosen=chosen, kv_dtype="float32"))
    player = NativePlayer(
        programs, family.closing(config, "head.weight"), loader, slots=70, context=256, threads=2
    )  # fmt: skip
    ids, called = golden.prompt(), list[int]()
    multiply = ManyRows.multiply

    def counted(self: ManyRows, x_TI: Tensor, *others: Any) -> None:
        called.append(len(x_TI))
        multiply(self, x_TI, *others)

    monkeypatch.setattr(ManyRows, "multiply", counted)
    selecting = programs[-1].operations.index(next(op for op in programs[-1].operations if isinstance(op, Select)))
    late = sum(isinstance(op, Product) for op in programs[-1].operations[selecting:])
    bound = 0.05 if dtype in ("int8", "int4") else 1e-4

    def both(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
        return golden.logits(rows), player.play(rows, golden.embed(rows), lambda: None)

    for outputs, few in ((len(ids), 0), (3, late)):
        called.clear()
        expected, got = both([Row(slot=0, start=0, ids=tuple(ids), outputs=outputs)])
        assert called == [len(ids)] * (len(shapes) - few)
        near(got, expected, bound)
    expected, got = both([Row(slot=0, start=len(ids), ids=(5,), outputs=1)])
    near(got, expected, bound)
