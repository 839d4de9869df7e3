"""The converter: the files that it writes, its self-test, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpgpt.core import Row, Span, Step
from mpgpt.errors import ModelError, UsageError
from mpgpt.model.weights import Checkpoint, model_config

pytest.importorskip("coremltools")

from mpgpt_ios.bundle import Bundle, slice_hash
from mpgpt_ios.convert import package as conversion
from mpgpt_ios.convert.package import PackageOptions, convert, refuse, script
from mpgpt_ios.executor import EvaluatorBackend, Executor
from tests.ios_proxy.convert.conftest import SPAN


@pytest.mark.parametrize("name", ["gpt2", "llama", "int8"])
def test_a_bundle_is_whole_and_says_what_it_is(
    folders: dict[str, Path], bundles: dict[str, tuple[Bundle, float]], name: str
) -> None:
    (bundle, difference), folder = bundles[name], folders["gpt2" if name == "int8" else name]
    m = bundle.manifest
    assert (m.layers, m.slots, m.context, m.chunk, m.embed, m.head_dim) == ((1, 3), 3, 64, 8, 64, 32)
    assert (m.rotary is not None) == (name == "llama") and m.weights == ("int8" if name == "int8" else "float16")
    assert m.model_hash == slice_hash(model_config(folder), Checkpoint(folder), SPAN)
    assert 0 < difference <= m.tolerance == (0.1 if name == "int8" else 0.02)
    assert Bundle.at(bundle.package).hash == bundle.hash, "read again it is the same"
    names = [entry.name for entry in bundle.entries]
    assert names[0] == "manifest.json" and names[-1] == "selftest.safetensors" and names == sorted(names)
    assert {path.name for path in bundle.package.parent.iterdir() if path.name.startswith(name)} == {
        f"{name}.mlpackage", f"{name}.manifest.json", f"{name}.selftest.safetensors",
    }  # fmt: skip
    assert not [path for path in bundle.package.parent.iterdir() if path.name.startswith(".")], "nothing is left over"


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_package_computes_what_the_ring_computes(
    folders: dict[str, Path], bundles: dict[str, tuple[Bundle, float]], name: str
) -> None:
    """On other inputs than the self-test's; nearer in float32 than as it is declared."""
    (bundle, _), config = bundles[name], model_config(folders[name])
    worst: dict[str, float] = {}
    for precision, dtype in (("declared", np.float16), ("float32", np.float32)):
        backend = EvaluatorBackend(bundle.package, precision)  # type: ignore[arg-type]
        executor = Executor(backend, bundle.manifest, dtype)
        truth = conversion.torch_stage(config, SPAN, Checkpoint(folders[name]), 3, 64)
        torch.manual_seed(11)
        for slot, start, count in ((0, 0, 20), (1, 0, 3), (0, 20, 1), (1, 3, 1), (0, 0, 5), (0, 60, 0), (0, 5, 59)):
            if not count:
                continue
            x = torch.randn(count, 64).half().float()
            step = Step(
                epoch=0, number=0, rows=(Row(slot=slot, start=start, ids=(0,) * count),),
                hidden=bytearray(x.numpy().tobytes()),
            )  # fmt: skip
            y = conversion.hidden_states(truth.forward(step), 64)
            got = executor.prefill(slot, start, x.numpy().astype(dtype)).astype(np.float32)
            scale = np.maximum(1, np.abs(y).max(axis=1, keepdims=True))
            worst[precision] = max(worst.get(precision, 0.0), float((np.abs(got - y) / scale).max()))
    assert worst["float32"] < worst["declared"] < 0.02


def test_a_self_test_has_prompts_single_tokens_and_a_slot_used_again() -> None:
    calls = script(4, 512, 32)
    counts = [len(parts) for kind, parts in calls if kind == "decode"]
    assert counts.count(1) >= 8 and sum(count > 1 for count in counts) >= 8
    prompts = [parts[0] for kind, parts in calls if kind == "prefill"]
    assert max(tokens for _, _, tokens in prompts) > 32 and [part[:2] for part in prompts].count((0, 0)) == 2


@pytest.mark.parametrize(
    ("slots", "context", "chunk"), [(1, 32, 32), (2, 32, 8), (3, 64, 8), (4, 512, 32), (64, 32, 2)]
)
def test_a_self_test_reads_back_what_every_function_wrote(slots: int, context: int, chunk: int) -> None:
    """In each slot, and where most of what is read was written by steps, and by decodes of several if there are any."""
    written: dict[int, list[str]] = {}
    read: dict[tuple[int, str], float] = {}
    for kind, parts in script(slots, context, chunk):
        for slot, start, tokens in parts:
            held = written.setdefault(slot, [])[:start]
            assert len(held) == start and start + tokens <= context and slot < slots
            alone = "step" if tokens == 1 else "prefill"  # of prompts, a chunk's rest may be a step, too
            function = kind if kind == "decode" and len(parts) > 1 else alone
            for name in ("step", "decode"):
                share = held.count(name) / (len(held) + 1)
                read[slot, name] = max(read.get((slot, name), 0.0), share if kind == "decode" else 0.0)
            written[slot] = held + [function] * tokens
    assert len(written) == min(slots, 3)
    assert all(share > 0 for (slot, name), share in read.items() if slots > 1 or name == "step")
    assert max(read[slot, "step"] for slot in written) > 0.75
    assert slots == 1 or max(read[slot, "decode"] for slot in written) > 0.75


def test_an_old_package_stays_until_the_new_one_has_passed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.mlpackage"

    def package(config: Any, prefill: Any, decode: Any, options: Any, out: Path, report: Any) -> None:
        out.mkdir()
        (out / "Manifest.json").write_text("{}")

    monkeypatch.setattr(conversion, "_package", package)  # what is in it is other tests' affair
    monkeypatch.setattr(conversion, "check", lambda bundle: 0.0)
    first, _ = convert(folders["gpt2"], SPAN, out, PackageOptions(slots=1, context=32, chunk=8))

    def fail(bundle: Bundle) -> float:
        raise ModelError("it fails")

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "check", fail)
        with pytest.raises(ModelError, match="it fails"):
            convert(folders["gpt2"], SPAN, out, PackageOptions(slots=2, context=32, chunk=8))
    assert Bundle.at(out).hash == first.hash
    second, _ = convert(folders["gpt2"], SPAN, out, PackageOptions(slots=2, context=32, chunk=8))
    assert Bundle.at(out).hash == second.hash != first.hash and second.manifest.slots == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"span": Span(start=2, stop=9)}, "the model has layers 0 to 4"),
        ({"span": Span(start=0, stop=2)}, "neither the first nor the last layer; 1-3 is the most"),
        ({"span": Span(start=2, stop=5)}, "neither the first nor the last"),
        ({"context": 100}, "--context is 100, and the Neural Engine takes multiples of 32"),
        ({"context": 1024}, "more than the model's 512 positions"),
        ({"chunk": 1}, "--chunk 1 is not between 2 and"), ({"chunk": 96}, "--chunk 96"), ({"slots": 0}, "--slots 0"),
        ({"out": "a.zip"}, "is named NAME.mlpackage"), ({"out": "no/a.mlpackage"}, "is not there"),
    ],
)  # fmt: skip
def test_what_no_package_can_be_is_refused(
    models: dict[str, Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    wanted: dict[str, Any] = {"span": SPAN, "out": "a.mlpackage", "slots": 1, "context": 64, "chunk": 8} | change
    span, out = wanted.pop("span"), tmp_path / wanted.pop("out")
    config = replace(model_config(models["llama"]), head_dim=32)
    with pytest.raises(UsageError, match=words):
        refuse(config, span, out, PackageOptions(**wanted))
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_too_narrow_and_a_numpy_that_is_too_new(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="head dimension is 16, and the Neural Engine"):
        convert(models["llama"], SPAN, tmp_path / "a.mlpackage", PackageOptions(context=64))
    monkeypatch.setattr(np, "__version__", "2.4.1")
    with pytest.raises(UsageError, match=r'cannot work with numpy 2.4.1: pip install "numpy<2.4"'):
        convert(models["llama"], SPAN, tmp_path / "a.mlpackage", PackageOptions())
