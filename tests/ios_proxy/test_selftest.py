"""The self-test of a package, passed and failed, and files that are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("coremltools")

from mpgpt.errors import ModelError
from mpgpt_ios.executor import Executor, run_selftest
from mpgpt_ios.mil.program import Precision
from tests.ios_proxy.packages import (
    CHUNK,
    NAMES,
    SLOTS,
    Array,
    Model,
    Recording,
    Small,
    SmallSizes,
    rows,
)

Call = tuple[str, list[int], list[int]]
SCRIPT: tuple[Call, ...] = (
    ("prefill", [0] * (CHUNK + 2), list(range(CHUNK + 2))),
    ("prefill", [2] * 3, [0, 1, 2]),
    ("decode", [2, 0], [3, CHUNK + 2]),
    ("prefill", [0] * 2, [0, 1]),
    ("decode", [0, 2], [2, 4]),
)
KINDS = {f"kind.{i}": kind for i, (kind, *_) in enumerate(SCRIPT)}


def write_selftest(path: Path, model: Model) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    sequences: dict[int, Array] = {}
    for i, (_, slots, positions) in enumerate(SCRIPT):
        x = rows(len(slots), i)
        for row, slot, position in zip(x, slots, positions, strict=True):
            before = sequences.get(slot, x[:0])[:position]
            sequences[slot] = np.concatenate((before, row[None]))
        y = np.stack([model.whole(sequences[s])[p] for s, p in zip(slots, positions, strict=True)])
        tensors |= {f"{i}.slot": np.array(slots, np.int32), f"{i}.pos": np.array(positions, np.int32)}
        tensors |= {f"{i}.x": x, f"{i}.y": y}
    save_file(tensors, path, metadata=KINDS)
    return tensors


@pytest.mark.parametrize("name", NAMES)
def test_selftest_passes(
    executors: dict[tuple[str, Precision], Executor], small: dict[str, Small], tmp_path: Path, name: str
) -> None:
    executor, path = executors[name, "declared"], tmp_path / "selftest.safetensors"
    write_selftest(path, small[name].model)
    executor.prefill(0, 0, rows(3))  # of which nothing must be left
    difference = run_selftest(executor, path, 0.03)
    assert 0 < difference <= 0.03 and executor.filled == (0,) * SLOTS
    assert run_selftest(executors[name, "float32"], path, 0.03) < difference
    with pytest.raises(ModelError, match=r"fails its self-test: off by .* where 1e-05 is allowed"):
        run_selftest(executor, path, 1e-5)


def test_selftest_fails(
    executors: dict[tuple[str, Precision], Executor], small: dict[str, Small], tmp_path: Path
) -> None:
    executor, path = executors["gpt2", "declared"], tmp_path / "selftest.safetensors"
    tensors, kinds = (
        write_selftest(path, small["gpt2"].model),
        {f"kind.{i}": kind for i, (kind, *_) in enumerate(SCRIPT)},
    )
    for wrong in (0.5, np.nan, np.inf):
        y = tensors["2.y"].copy()
        y[1, 7] += wrong
        save_file(tensors | {"2.y": y}, path, metadata=kinds)
        with pytest.raises(ModelError, match="fails its self-test"):
            run_selftest(executor, path, 0.03)
    with pytest.raises(ModelError, match="fails its self-test"):
        run_selftest(Executor(Recording(), SmallSizes()), path, 0.03)


def test_what_is_no_selftest_is_refused(small: dict[str, Small], tmp_path: Path) -> None:
    executor, path = Executor(Recording(), SmallSizes()), tmp_path / "selftest.safetensors"
    with pytest.raises(ModelError, match="is not a self-test"):
        run_selftest(executor, path, 0.03)
    path.write_bytes(b"no tensors")
    with pytest.raises(ModelError, match="is not a self-test"):
        run_selftest(executor, path, 0.03)
    tensors, kinds = (
        write_selftest(path, small["gpt2"].model),
        {f"kind.{i}": kind for i, (kind, *_) in enumerate(SCRIPT)},
    )
    without = {name: tensor for name, tensor in tensors.items() if name != "1.pos"}
    for broken, named in ((without, kinds), (tensors, {}), (tensors, kinds | {"kind.5": "decode"})):
        save_file(broken, path, metadata=named)
        with pytest.raises(ModelError, match="its tensors are not those of"):
            run_selftest(executor, path, 0.03)
    save_file(tensors, path, metadata=kinds | {"kind.2": "guess"})
    with pytest.raises(ModelError, match="a guess call of slots"):
        run_selftest(executor, path, 0.03)
    for change in ({"0.pos": tensors["0.pos"][::-1].copy()}, {"1.slot": np.array([0, 1, 2], np.int32)}):
        save_file(tensors | change, path, metadata=kinds)
        with pytest.raises(ModelError, match="a prefill call of slots"):
            run_selftest(executor, path, 0.03)
    save_file(tensors | {"1.y": tensors["1.y"][:1]}, path, metadata=kinds)
    with pytest.raises(ModelError, match="call 1 expects"):
        run_selftest(executor, path, 0.03)
    assert executor.filled == (0,) * SLOTS
