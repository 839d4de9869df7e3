"""Choosing kernels: what is tried, what is kept, what is pinned."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from mpgpt import __version__
from mpgpt.errors import UsageError
from mpgpt.model import autotune
from mpgpt.model.autotune import Budget, computing
from mpgpt.model.candidates import candidates, inexact
from mpgpt.model.kernel_timings import ROWS, machine
from mpgpt.model.kernels import DTYPES, Integers
from mpgpt.model.linear import MANY_ROWS, NATIVE, Weight, compiled
from mpgpt.model.native import library

WEIGHTS = [Weight(inputs=64, outputs=96), Weight(inputs=96, outputs=64), Weight(inputs=64, outputs=300, head=True)]


needs_library = pytest.mark.skipif(
    isinstance(library.find(), library.Absent), reason="there are no compiled kernels"
)  # fmt: skip
tune = partial(autotune.tune, native=False, budget=Budget(seconds=0.05, cold_bytes=1 << 16))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_candidate_is_tried_and_one_is_chosen(dtype: str) -> None:
    kernels, tried = tune(dtype, WEIGHTS)
    names = [kernel.name for kernel in candidates(dtype)]
    for weight in WEIGHTS:
        shape = f"{dtype} {weight.inputs}x{weight.outputs}"
        mine = [timing for timing in tried if timing.shape == shape and timing.exact]
        assert [timing.kernel for timing in mine] == names
        assert all(len(timing.microseconds) == len(ROWS) and min(timing.microseconds) > 0 for timing in mine)
        (best,) = [timing.kernel for timing in mine if timing.chosen]
        assert kernels.pick(weight.inputs, weight.outputs, head=weight.head).name == best


def test_a_choice_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = tmp_path / "made" / "kernels.json"
    kernels, tried = tune("int8", WEIGHTS, memory=memory)
    known = json.loads(memory.read_text())[machine()]
    assert set(known) == {timing.shape for timing in tried}
    # Turn a choice round in the file: it is what the file says, not what is fastest.
    entry = known["int8 64x96"]
    last = candidates("int8")[-1].name
    for one in entry:
        one["chosen"] = one["kernel"] == last
    memory.write_text(json.dumps({machine(): known, "another machine": {"x": 1}}))
    monkeypatch.setattr(autotune, "_try", lambda *a, **k: pytest.fail("tried again"))
    again, _ = tune("int8", WEIGHTS, memory=memory)
    assert again.pick(64, 96).name == last
    assert again.pick(96, 64).name == kernels.pick(96, 64).name
    assert list(tmp_path.rglob("*.part")) == []


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"MACHINE": 3}', '{"MACHINE": {"int8 64x96": [{"kernel": 1}]}}'])
def test_a_damaged_memory_is_tried_again(tmp_path: Path, text: str) -> None:
    memory = tmp_path / "kernels.json"
    memory.write_text(text.replace("MACHINE", machine()))
    kernels, tried = tune("int8", WEIGHTS, memory=memory)
    assert sum(timing.chosen for timing in tried) == 3 and kernels.chosen


def test_other_machines_are_not_forgotten(tmp_path: Path) -> None:
    memory = tmp_path / "kernels.json"
    memory.write_text('{"a Mac": {"int8 1x1": []}}')
    tune("int8", WEIGHTS, memory=memory)
    assert json.loads(memory.read_text())["a Mac"] == {"int8 1x1": []}


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    kernels, _ = tune("int8", WEIGHTS, memory=tmp_path / "file" / "kernels.json")
    assert kernels.chosen


def test_pinned() -> None:
    last = candidates("int8")[-1].name
    kernels, tried = tune("int8", WEIGHTS, pinned=last)
    assert not tried and {kernels.pick(w.inputs, w.outputs, head=w.head).name for w in WEIGHTS} == {last}
    kernels, _ = tune("int4", WEIGHTS, pinned=last)
    assert kernels.pick(64, 96).name != last, "there is none for int4"
    assert kernels.pick(64, 300, head=True).name == last


@pytest.fixture
def inexact_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor on which ``integers`` is inexact, and another kernel is not."""
    others = tuple(kernel for kernel in candidates("int8") if kernel.name != "integers")
    if not others:
        pytest.skip("this torch build has no other")
    monkeypatch.setattr(autotune, "candidates", lambda dtype: others if dtype == "int8" else candidates(dtype))
    monkeypatch.setattr(autotune, "inexact", lambda dtype: (Integers(),) if dtype == "int8" else inexact(dtype))


@pytest.mark.usefixtures("inexact_integers")
def test_a_kernel_that_is_inexact_is_said_but_not_taken() -> None:
    kernels, tried = tune("int4", WEIGHTS)
    wrong = [timing for timing in tried if not timing.exact]
    assert [timing.kernel for timing in wrong] == ["integers"], "of the head alone"
    assert not any(timing.chosen or timing.microseconds for timing in wrong)
    assert "integers" not in kernels.chosen.values()
    with pytest.raises(UsageError, match=r"integers multiplies inexactly on this processor.*; for int8 there are"):
        tune("int8", WEIGHTS, pinned="integers")


@pytest.mark.parametrize("turned", ["exact", "chosen", "exact chosen"])
def test_a_choice_that_was_made_where_other_kernels_were_exact_is_tried_again(
    tmp_path: Path, request: pytest.FixtureRequest, turned: str
) -> None:
    """The same machine with other switches in the environment, or a file that was written by an older version."""
    memory = tmp_path / "kernels.json"
    request.getfixturevalue("inexact_integers")
    tune("int8", WEIGHTS, memory=memory)
    everything = json.loads(memory.read_text())
    for one in everything[machine()]["int8 64x96"]:
        if "chosen" in turned:
            one["chosen"] = one["kernel"] == "integers"
        if "exact" in turned:
            one["exact"] = True
    memory.write_text(json.dumps(everything))
    kernels, _ = tune("int8", WEIGHTS, memory=memory)
    assert kernels.pick(64, 96).name != "integers" and "integers" not in kernels.chosen.values()
    assert json.loads(memory.read_text()) != everything, "what was tried again is kept"


def test_a_machine_is_its_processor_and_versions() -> None:
    assert f"mpgpt {__version__}, torch {torch.__version__}, " in machine()
    features = [name for name, has in torch.cpu.get_capabilities().items() if has is True]
    assert set(features) <= set(machine().replace("(", " ").replace(";", " ").split())


@pytest.mark.parametrize(
    ("dtype", "name", "said"), [("float32", "fbgemm", "holds another dtype"), ("int8", "warp", "not to be had")]
)
def test_a_kernel_that_cannot_be_is_named(dtype: str, name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        tune(dtype, WEIGHTS, pinned=name)


def test_a_build_without_any_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autotune, "candidates", lambda dtype: ())
    with pytest.raises(UsageError, match="no product for int4"):
        tune("int4", [Weight(inputs=64, outputs=64)])


# -- speed before bits


fast = partial(autotune.tune, fast=True, budget=Budget(seconds=0.05, cold_bytes=1 << 16))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, float]], None]:
    """Sets what a product of many rows takes by each of the kernels in turn, for each shape; of few rows all take as
    long."""

    def as_long_as(times: dict[str, float]) -> None:
        monkeypatch.setattr(
            autotune, "_times", lambda held, until: [[1.0, 1.0, t] for t in list(times.values())[: len(held)]]
        )  # fmt: skip

    return as_long_as


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_speed_first_tries_torch_for_many_rows(dtype: str, tmp_path: Path) -> None:
    memory = tmp_path / "kernels.json"
    kernels, tried = fast(dtype, WEIGHTS, memory=memory)
    assert kernels.native and kernels.chosen[next(k for k in kernels.chosen if k.endswith("x300"))] not in MANY_ROWS
    assert [timing.kernel for timing in tried] == [*compiled(dtype)] * 2, "not of the head"
    assert all(min(timing.microseconds) > 0 and timing.exact for timing in tried)
    steady = {timing.kernel: timing.batch_invariant for timing in tried}
    assert steady[NATIVE]
    again, same = fast(dtype, WEIGHTS, memory=memory)
    assert (again, same) == (kernels, tried), "remembered"
    exact, none = autotune.tune(dtype, WEIGHTS, memory=memory)
    assert set(exact.chosen.values()) == {NATIVE} and not none


@needs_library
def test_torch_is_taken_for_many_rows_where_it_is_a_good_deal_faster(timed: Callable[[dict[str, float]], None]) -> None:
    timed({NATIVE: 100.0, "native-float32": 30.0, "native-bfloat16": 60.0})
    kernels, _ = fast("int8", WEIGHTS)
    assert kernels.many_rows(64, 96) == kernels.many_rows(96, 64) == torch.float32
    assert kernels.many_rows(64, 300) is None, "of the head's shape"
    assert computing(kernels, "auto", native=True).endswith(", and torch's for many rows")
    timed({NATIVE: 100.0, "native-float32": 80.0, "native-bfloat16": 80.0})
    kernels, _ = fast("int8", WEIGHTS)
    assert set(kernels.chosen.values()) == {NATIVE}, "1.1 times as fast, over all row counts, are not enough"
    assert computing(kernels, "auto", native=True).endswith(")")


@needs_library
def test_many_rows_pinned() -> None:
    kernels, tried = autotune.tune("int8", WEIGHTS, pinned="native-float32")
    assert kernels.native and kernels.many_rows(64, 96) == torch.float32 and not tried
    with pytest.raises(UsageError, match=r"there are native, native-float32,.* torch"):
        autotune.tune("float32", WEIGHTS, pinned="native-bfloat16")


def test_speed_first_takes_a_kernel_of_torchs_whatever_its_bits(
    timed: Callable[[dict[str, float]], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names = [kernel.name for kernel in candidates("float32")]
    assert len(names) > 1
    steady = iter([True, *[False] * (len(names) - 1)] * 99)
    monkeypatch.setattr(autotune, "_is_batch_invariant", lambda linear: next(steady))
    timed({name: 100.0 / 3**i for i, name in enumerate(names)})
    memory = tmp_path / "kernels.json"
    for chosen, speed_first in ((names[0], False), (names[-1], True), (names[0], False)):
        kernels, _ = tune("float32", WEIGHTS, fast=speed_first, memory=memory)
        assert set(kernels.chosen.values()) == {chosen}
    assert len(json.loads(memory.read_text())[machine()]) == 2 * len(WEIGHTS), "both are remembered"
