"""The same bytes everywhere: in any company, in any chunks, with any threads, compiler and processor."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable
from importlib.resources import files

import pytest
import torch

from mpgpt.core import Row
from mpgpt.model.native import library
from mpgpt.model.native.golden import DTYPES, MODELS, PROMPT, GoldenModel, digest
from tests.model.native.conftest import BUILDS
from tests.model.native.replaying import unpacked

GOLDEN = json.loads((files("mpgpt.model.native") / "golden.json").read_text())

pytestmark = pytest.mark.skipif(isinstance(library.find(), library.Absent), reason="there are no compiled kernels")
every_model = pytest.mark.parametrize("name", MODELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize("built", BUILDS)
def test_every_build_gives_the_golden_bytes(built: str, build: Callable[[str], ctypes.CDLL]) -> None:
    calls = build(built)
    got = {
        name: {dtype: digest(GoldenModel(name, dtype, calls=calls, kv_dtype="float32").whole()) for dtype in DTYPES}
        for name in MODELS
    }
    assert got == GOLDEN["float32 cache"]


@pytest.mark.parametrize("built", BUILDS)
def test_every_build_unpacks_the_same_columns(built: str, build: Callable[[str], ctypes.CDLL]) -> None:
    calls = build(built)
    for dtype in DTYPES:
        here, there = (unpacked(GoldenModel("qwen3", dtype, threads=2, calls=c)) for c in (None, calls))
        assert here == there, dtype


@pytest.mark.parametrize("kv_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("built", BUILDS)
def test_a_cache_in_16_bit_is_the_same_bytes_too(
    built: str, kv_dtype: str, build: Callable[[str], ctypes.CDLL]
) -> None:
    calls = build(built)
    got = {name: digest(GoldenModel(name, "float32", calls=calls, kv_dtype=kv_dtype).whole()) for name in MODELS}
    assert got == GOLDEN[f"{kv_dtype} cache"]


@every_model
@every_dtype
@pytest.mark.parametrize("size", [1, 7, 48, 96])
def test_chunks_change_no_bit(name: str, dtype: str, size: int) -> None:
    model = GoldenModel(name, dtype)
    ids, whole = model.prompt(), model.whole()
    parts = [
        model.logits([Row(slot=2, start=at, ids=tuple(ids[at : at + size]), outputs=len(ids[at : at + size]))])
        for at in range(0, PROMPT, size)
    ]
    assert torch.equal(torch.cat(parts), whole)


@every_model
@every_dtype
@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
def test_several_ranks_give_the_golden_bytes(name: str, dtype: str, cuts: tuple[int, ...]) -> None:
    assert (
        digest(GoldenModel(name, dtype, kv_dtype="float32", cuts=cuts).whole()) == GOLDEN["float32 cache"][name][dtype]
    )


@every_model
@every_dtype
@pytest.mark.parametrize("threads", [1, 4])
def test_company_changes_no_bit(name: str, dtype: str, threads: int) -> None:
    """A token's logits beside 0 to 63 other sequences, each of its own length, and beside a prompt's chunk."""
    model = GoldenModel(name, dtype, threads=threads)
    ids, others = model.prompt(), model.prompt(seed=1)
    whole = model.whole()
    for slot in range(1, 65):
        model.logits([Row(slot=slot, start=0, ids=tuple(others[: slot + 3]), outputs=0)])
    for company in (0, 1, 2, 3, 5, 7, 8, 33, 63):
        strangers = [Row(slot=s, start=s + 3, ids=(others[s],), outputs=1) for s in range(1, company + 1)]
        got = model.logits([*strangers, Row(slot=0, start=PROMPT - 1, ids=(ids[-1],), outputs=1)])
        assert torch.equal(got[-1], whole[-1]), f"beside {company}"
    chunk = Row(slot=65, start=0, ids=tuple(others[:90]), outputs=0)
    assert torch.equal(model.logits([chunk, Row(slot=0, start=PROMPT - 1, ids=(ids[-1],), outputs=1)])[-1], whole[-1])


@every_model
def test_a_slot_forgets_its_last_sequence(name: str) -> None:
    """Pages go from sequence to sequence."""
    model = GoldenModel(name, "float32")
    first = model.whole()
    others = tuple(model.prompt(seed=1))
    for slot in (0, 1, 2):
        model.logits([Row(slot=slot, start=0, ids=others, outputs=0)])
    assert torch.equal(model.whole(slot=1), first)
