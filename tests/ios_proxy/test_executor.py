"""A package with its slots: chunks, padding, positions, and sequences in any order, against torch."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("coremltools")

from mpgpt.errors import ModelError
from mpgpt.model.attention import Rotary
from mpgpt.model.known_families import read_config
from mpgpt_ios.executor import BadPosition, CoreMLBackend, EvaluatorBackend, Executor
from mpgpt_ios.mil.program import Precision
from tests.ios_proxy.packages import (
    CHUNK,
    CONTEXT,
    EMBED,
    NAMES,
    SLOTS,
    Array,
    Model,
    Recording,
    Small,
    SmallSizes,
    Turning,
    rows,
)
from tests.ios_proxy.protos import edited


class Sequences:
    """Sequences in slots, as they should be."""

    def __init__(self, executor: Executor, model: Model) -> None:
        executor.reset()
        self._executor, self._model = executor, model
        self._x: dict[int, Array] = {}
        self._y: dict[int, Array] = {}
        self._seed = 0

    def prefill(self, slot: int, pos: int, count: int) -> None:
        x = self._more(count)
        self._write(slot, pos, x, self._executor.prefill(slot, pos, x))

    def decode(self, *slots: int) -> None:
        x, positions = self._more(len(slots)), [len(self._x.get(slot, ())) for slot in slots]
        y = self._executor.decode(slots, positions, x)
        for i, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            self._write(slot, position, x[i : i + 1], y[i : i + 1])

    def difference(self) -> float:
        """Of every position of every slot from the whole sequence at once in float32."""
        filled = self._executor.filled
        assert all(filled[slot] == len(x) for slot, x in self._x.items())
        return max(
            float(np.abs(self._y[slot].astype(np.float32) - self._model.whole(x)).max()) for slot, x in self._x.items()
        )

    def _write(self, slot: int, pos: int, x: Array, y: Array) -> None:
        assert y.dtype == np.float16 and y.shape == x.shape
        empty = np.zeros((0, EMBED), np.float16)
        self._x[slot] = np.concatenate((self._x.get(slot, empty)[:pos], x))
        self._y[slot] = np.concatenate((self._y.get(slot, empty)[:pos], y))

    def _more(self, count: int) -> Array:
        self._seed += 1
        return rows(count, self._seed)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("precision", "tolerance"), [("declared", 0.03), ("float32", 0.005)])
def test_sequences_in_slots(
    executors: dict[tuple[str, Precision], Executor],
    small: dict[str, Small],
    name: str,
    precision: Precision,
    tolerance: float,
) -> None:
    """Staggered prefills, decodes at different positions, a slot again. The wire's float16 is in the tolerance."""
    sequences = Sequences(executors[name, precision], small[name].model)
    sequences.prefill(0, 0, 2 * CHUNK + 3)
    sequences.prefill(2, 0, 5)
    for _ in range(3):
        sequences.decode(2, 0)
    sequences.prefill(1, 0, CHUNK)
    sequences.prefill(2, 8, 4)  # more of the same prompt, behind decoded positions
    for _ in range(3):
        sequences.decode(0, 1, 2)
    assert sequences.difference() <= tolerance
    sequences.prefill(0, 0, 1)
    sequences.decode(1, 0)
    sequences.prefill(2, 3, 6)  # five positions are taken back
    sequences.decode(2)
    sequences.prefill(3, 0, CONTEXT)  # to the last position
    assert sequences.difference() <= tolerance


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_of_calls(
    executors: dict[tuple[str, Precision], Executor], small: dict[str, Small], data: st.DataObject
) -> None:
    executor = executors["gpt2", "float32"]
    sequences = Sequences(executor, small["gpt2"].model)
    for _ in range(data.draw(st.integers(1, 8))):
        room = [slot for slot in range(SLOTS) if executor.filled[slot] < CONTEXT]
        if room and data.draw(st.sampled_from((True, False))):
            sequences.decode(*data.draw(st.lists(st.sampled_from(room), min_size=1, unique=True)))
        else:
            slot = data.draw(st.integers(0, SLOTS - 1))
            pos = data.draw(st.integers(0, min(executor.filled[slot], CONTEXT - 1)))
            sequences.prefill(slot, pos, data.draw(st.integers(1, CONTEXT - pos)))
    assert sequences.difference() <= 0.005


@pytest.mark.parametrize("name", NAMES)
def test_other_slots_stay_as_they_are(small: dict[str, Small], name: str) -> None:
    backend, sizes = EvaluatorBackend(small[name].path), small[name].sizes
    executor, K = Executor(backend, sizes), small[name].sizes.kv_heads
    for slot in range(SLOTS):
        executor.prefill(slot, 0, rows(20 + slot, slot))

    def cache() -> Array:
        kv = backend.state.array("kv")
        return kv.reshape(len(kv), SLOTS, K, CONTEXT, -1)

    for places in ([(2, 22)], [(3, 23), (0, 20)]):  # a step, and a decode
        before = cache()
        executor.decode([slot for slot, _ in places], [position for _, position in places], rows(len(places)))
        after = cache()
        changed = (after != before).any(axis=(2, 4))
        assert {(int(slot), int(at)) for _, slot, at in np.argwhere(changed)} == set(places)
        assert all(changed[:, slot, at].all() for slot, at in places), "keys and values of every layer"
    executor.prefill(1, 3, rows(2))
    np.testing.assert_array_equal(np.delete(cache(), 1, 1), np.delete(after, 1, 1))


def test_a_decode_does_not_depend_on_its_company(executors: dict[tuple[str, Precision], Executor]) -> None:
    executor = executors["llama", "declared"]
    few: list[Array] = []
    many: list[Array] = []
    for company, got in (([0], few), ([3, 0, 2], many)):
        executor.reset()
        executor.prefill(1, 0, rows(9))
        for slot in company:
            executor.prefill(slot, 0, rows(13, 1 + slot))
        for i in range(4):
            positions = [*(13 + i for _ in company), 9 + i]
            x = np.concatenate([rows(len(company), 50 + i), rows(1, i)])
            got.append(executor.decode([*company, 1], positions, x)[-1])
    np.testing.assert_array_equal(np.stack(few), np.stack(many))


@pytest.mark.parametrize("name", NAMES)
def test_one_token_is_a_step_as_near_as_a_decode(small: dict[str, Small], name: str) -> None:
    """A token by itself and beside another: other functions, which agree as far as float16 does."""
    cut: list[tuple[list[Array], Array]] = []
    for together in (False, True):
        backend = EvaluatorBackend(small[name].path)
        executor, ys = Executor(backend, small[name].sizes), list[Array]()
        for slot, count in ((1, 9), (3, 5)):
            executor.prefill(slot, 0, rows(count, slot))
        for i in range(6):
            x = rows(2, 50 + i)
            if together:
                ys.append(executor.decode([1, 3], [9 + i, 5 + i], x))
            else:
                ys += [np.concatenate([executor.decode([1], [9 + i], x[:1]), executor.decode([3], [5 + i], x[1:])])]
        cut.append((ys, backend.state.array("kv")))
    (steps, one), (decodes, many) = cut
    np.testing.assert_allclose(np.stack(steps), np.stack(decodes), atol=0.02)
    np.testing.assert_allclose(one, many, atol=0.02)
    assert all((one[:, slot * small[name].sizes.kv_heads, at] != 0).any() for slot, at in ((1, 14), (3, 10)))


def test_a_prefill_is_cut_into_chunks() -> None:
    backend = Recording()
    executor, x = Executor(backend, SmallSizes(kv_heads=3)), rows(CHUNK + 3)
    np.testing.assert_array_equal(executor.prefill(2, 0, x), x)
    assert backend.names == ["prefill", "prefill"] and executor.filled == (0, 0, CHUNK + 3, 0)
    _, inputs = backend.calls[1]
    np.testing.assert_array_equal(inputs["x"][0, :, 0, :3].T, x[CHUNK:])
    assert not inputs["x"][0, :, 0, 3:].any()
    assert inputs["pos"].tolist() == [CHUNK] and inputs["row"].tolist() == [6]
    assert inputs["pos"].dtype == inputs["row"].dtype == np.int32
    seen = inputs["mask"][0, 0] == 0
    assert (seen == np.tri(CHUNK, CONTEXT, CHUNK, dtype=bool)).all() and (inputs["mask"][0, 0][~seen] == -10000).all()
    assert {name: array.shape for name, array in inputs.items()} == {
        "x": (1, EMBED, 1, CHUNK), "mask": (1, 1, CHUNK, CONTEXT), "pos": (1,), "row": (1,)
    }  # fmt: skip


def test_a_request_that_fails_midway_leaves_what_was_before_it() -> None:
    class Failing(Recording):
        def run(self, function: str, inputs: dict[str, Array]) -> Array:
            if len(self.calls) == 2:
                raise RuntimeError("no luck")
            return super().run(function, inputs)

    executor = Executor(Failing(), SmallSizes())
    executor.prefill(1, 0, rows(5))
    with pytest.raises(RuntimeError, match="no luck"):
        executor.prefill(1, 3, rows(2 * CHUNK))
    assert executor.filled == (0, 3, 0, 0)
    with pytest.raises(RuntimeError, match="no luck"):
        executor.decode([1, 2], [2, 0], rows(2))
    assert executor.filled == (0, 2, 0, 0)


def test_a_chunk_that_would_go_past_the_context_is_taken_step_by_step() -> None:
    backend = Recording()
    executor, x = Executor(backend, SmallSizes()), rows(CONTEXT - 3)
    np.testing.assert_array_equal(executor.prefill(0, 0, x), x)
    assert backend.names == ["prefill"] * (CONTEXT // CHUNK)  # the last one is cut, and ends where the context does
    backend.calls.clear()
    more = rows(3, 1)
    np.testing.assert_array_equal(executor.prefill(0, CONTEXT - 3, more), more)
    assert backend.names == ["step"] * 3 and executor.filled[0] == CONTEXT
    assert [inputs["pos"].tolist() for _, inputs in backend.calls] == [[CONTEXT - 3 + i] for i in range(3)]


def test_one_token_of_one_slot_is_a_step_whatever_it_is_of() -> None:
    backend, step = Recording(), rows(1, 9)
    executor = Executor(backend, SmallSizes(kv_heads=3))
    executor.prefill(2, 0, rows(CHUNK + 1))  # a chunk, and one token that is left
    executor.prefill(1, 0, step)
    np.testing.assert_array_equal(executor.decode([2], [CHUNK + 1], step), step)
    assert backend.names == ["prefill", "step", "step", "step"] and executor.filled == (0, 1, CHUNK + 2, 0)
    _, inputs = backend.calls[-1]
    assert {name: array.shape for name, array in inputs.items()} == {
        "x": (1, EMBED, 1, 1), "mask": (1, 1, 1, CONTEXT), "pos": (1,), "row": (1,)
    }  # fmt: skip
    assert inputs["pos"].tolist() == [CHUNK + 1] and inputs["row"].tolist() == [6]
    assert (inputs["mask"][0, 0, 0] == 0).tolist() == [True] * (CHUNK + 2) + [False] * (CONTEXT - CHUNK - 2)


def test_a_decode_writes_in_its_slots_only() -> None:
    backend = Recording()
    executor = Executor(backend, SmallSizes())
    executor.prefill(3, 0, rows(5))
    executor.prefill(1, 0, rows(2))
    x = rows(2, 1)
    np.testing.assert_array_equal(executor.decode([3, 1], [4, 2], x), x)
    assert executor.filled == (0, 3, 0, 5)
    name, inputs = backend.calls[-1]
    assert name == "decode" and np.argwhere(inputs["wmask"]).tolist() == [[1, 0, 2, 0], [3, 0, 4, 0]]
    assert inputs["wmask"].sum() == 2
    assert (inputs["mask"] == 0).sum(axis=(1, 2, 3)).tolist() == [0, 3, 0, 5]
    assert (inputs["mask"][3, 0, 0, :5] == 0).all() and (inputs["mask"][1, 0, 0, :3] == 0).all()
    np.testing.assert_array_equal(inputs["x"][[3, 1], :, 0, 0], x)
    assert not inputs["x"][[0, 2]].any()


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


def test_rotary_tables_are_the_models() -> None:
    config = read_config({
        "model_type": "llama", "vocab_size": 9, "hidden_size": EMBED, "intermediate_size": 8, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "rope_parameters": YARN,
    })  # fmt: skip
    backend = Recording()
    sizes = SmallSizes(kv_heads=2, rotary=Turning(inv_freq=tuple(config.inv_freq), gain=config.rope_gain))
    assert sizes.rotary is not None and sizes.rotary.gain != 1
    executor = Executor(backend, sizes)
    executor.prefill(1, 0, rows(CHUNK + 2))
    executor.decode([1], [7], rows(1))
    executor.decode([3, 1], [0, 8], rows(2))
    for at, positions, shape in (
        (0, range(CHUNK), (1, 1, CHUNK, 16)), (1, range(CHUNK, 2 * CHUNK), (1, 1, CHUNK, 16)), (2, [7], (1, 1, 1, 16)),
        (3, [0, 8, 0, 0], (SLOTS, 1, 1, 16)),
    ):  # fmt: skip
        cos, sin = Rotary(config, CONTEXT, torch.float32).at(torch.tensor(list(positions)))
        _, inputs = backend.calls[at]
        np.testing.assert_array_equal(inputs["cos"], cos.numpy().reshape(shape))
        np.testing.assert_array_equal(inputs["sin"], sin.numpy().reshape(shape))


def test_a_float32_beyond_float16_becomes_infinite() -> None:
    class Loud(Recording):
        def run(self, function: str, inputs: dict[str, Array]) -> Array:
            return np.full(inputs["x"].shape, 1e6, np.float32)

    assert np.isposinf(Executor(Loud(), SmallSizes()).prefill(0, 0, rows(1))).all()


def test_refuses_positions_that_do_not_follow() -> None:
    backend = Recording()
    executor = Executor(backend, SmallSizes())
    executor.prefill(0, 0, rows(4))
    backend.calls.clear()
    for pos in (5, CONTEXT, -1):
        with pytest.raises(BadPosition, match=rf"slot 0 holds 4 of 64 positions: 1 at {pos} cannot follow"):
            executor.prefill(0, pos, rows(1))
        with pytest.raises(BadPosition):
            executor.decode([0], [pos], rows(1))
    with pytest.raises(BadPosition, match="61 at 4 cannot follow"):
        executor.prefill(0, 4, rows(CONTEXT - 3))
    with pytest.raises(BadPosition, match="slot 2 holds 0"):
        executor.decode([0, 2], [4, 1], rows(2))
    assert not backend.calls and executor.filled == (4, 0, 0, 0)
    executor.decode([0], [4], rows(1))
    executor.reset()
    with pytest.raises(BadPosition, match="slot 0 holds 0"):
        executor.decode([0], [5], rows(1))


def test_refuses_slots_and_shapes() -> None:
    backend = Recording()
    executor = Executor(backend, SmallSizes())
    for slot in (-1, SLOTS):
        with pytest.raises(ModelError, match=f"no slot {slot}; there are 4"):
            executor.prefill(slot, 0, rows(1))
        with pytest.raises(ModelError, match="no slot"):
            executor.decode([slot], [0], rows(1))
    for slots, positions, count in (([1, 1], [0, 1], 2), ([1, 2], [0], 2), ([1, 2], [0, 0], 1), ([1], [0], 2)):
        with pytest.raises(ModelError, match="a decode of"):
            executor.decode(slots, positions, rows(count))
    for x in (rows(1)[0], rows(1)[:, :5], rows(0), rows(2).astype(np.float32)):
        with pytest.raises(ModelError, match="hidden states of"):
            executor.prefill(0, 0, x)
    with pytest.raises(ModelError, match="hidden states of"):
        executor.decode([], [], rows(0))
    assert not backend.calls


def test_refuses_an_output_of_another_shape() -> None:
    class Short(Recording):
        def run(self, function: str, inputs: dict[str, Array]) -> Array:
            return inputs["x"][..., :-1]

    with pytest.raises(ModelError, match=r"prefill gives \(1, 64, 1, 7\)"):
        Executor(Short(), SmallSizes()).prefill(0, 0, rows(2))


def test_refuses_a_package_without_a_function(small: dict[str, Small], tmp_path: Path) -> None:
    """As an earlier mpgpt made it."""

    def edit(spec: Any) -> None:
        del spec.mlProgram.functions["step"]
        (described,) = (function for function in spec.description.functions if function.name == "step")
        spec.description.functions.remove(described)

    package = edited(small["gpt2"].path, tmp_path / "early.mlpackage", edit)
    with pytest.raises(ModelError, match=r"early.mlpackage has no function step: an earlier mpgpt made it; `mpgpt c"):
        EvaluatorBackend(package)


@pytest.mark.skipif(platform.system() == "Darwin", reason="there Core ML is")
def test_core_ml_is_on_macos_only(small: dict[str, Small]) -> None:
    with pytest.raises(ModelError, match="macOS 15 or later only; elsewhere run the package in the evaluator"):
        CoreMLBackend(small["gpt2"].path)
