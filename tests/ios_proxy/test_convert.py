"""The converter: what it writes, what it refuses, and what its own check catches."""

from __future__ import annotations

import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from mpgpt.core import Row, Span, Step
from mpgpt.errors import ModelError, UsageError
from mpgpt.model.weights import Checkpoint, model_config
from tests.support.launch import mpgpt
from tests.support.models import save_random

pytest.importorskip("coremltools")

from mpgpt_ios.bundle import Bundle, slice_hash
from mpgpt_ios.convert import command
from mpgpt_ios.convert import package as conversion
from mpgpt_ios.convert.blocks import Decode, Prefill, build
from mpgpt_ios.convert.package import PackageOptions, convert, refuse, script
from mpgpt_ios.convert.verify import check
from mpgpt_ios.executor import EvaluatorBackend, Executor, run_selftest

SPAN, SIZES = Span(start=1, stop=3), dict[str, Any](slots=3, context=64, chunk=8)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models whose heads are as wide as the Neural Engine wants them."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(5)
    small: dict[str, Any] = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": None}
    gpt2 = transformers.GPT2Config(n_embd=64, n_layer=4, n_head=2, n_positions=128, initializer_range=0.2, **small)
    llama = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=128, initializer_range=0.2, **small,
    )  # fmt: skip
    for name, model in (
        ("gpt2", transformers.GPT2LMHeadModel(gpt2)), ("llama", transformers.LlamaForCausalLM(llama))
    ):  # fmt: skip
        for value in model.parameters():
            if value.dim() == 1:  # norms and biases that are no identity: coremltools leaves those out, or merges them
                value.data += 0.2 * torch.randn_like(value)
        model.save_pretrained(root / name)
    return {name: root / name for name in ("gpt2", "llama")}


@pytest.fixture(scope="module")
def bundles(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Bundle, float]]:
    out = tmp_path_factory.mktemp("packages")
    sizes = PackageOptions(**SIZES)
    made = {name: convert(folder, SPAN, out / f"{name}.mlpackage", sizes) for name, folder in folders.items()}
    return made | {"int8": convert(folders["gpt2"], SPAN, out / "int8.mlpackage", replace(sizes, weights="int8"))}


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
        truth = conversion._stage(config, SPAN, Checkpoint(folders[name]), 3, 64)
        torch.manual_seed(11)
        for slot, start, count in ((0, 0, 20), (1, 0, 3), (0, 20, 1), (1, 3, 1), (0, 0, 5), (0, 60, 0), (0, 5, 59)):
            if not count:
                continue
            x = torch.randn(count, 64).half().float()
            step = Step(
                epoch=0, number=0, rows=(Row(slot=slot, start=start, ids=(0,) * count),),
                hidden=bytearray(x.numpy().tobytes()),
            )  # fmt: skip
            y = conversion._hidden(truth.forward(step), 64)
            got = executor.prefill(slot, start, x.numpy().astype(dtype)).astype(np.float32)
            scale = np.maximum(1, np.abs(y).max(axis=1, keepdims=True))
            worst[precision] = max(worst.get(precision, 0.0), float((np.abs(got - y) / scale).max()))
    assert worst["float32"] < worst["declared"] < 0.02


def test_a_self_test_has_prompts_single_tokens_and_a_slot_used_again() -> None:
    calls = script(4, 512, 32)
    assert [kind for kind, _ in calls].count("decode") >= 4
    prompts = [positions[0] for kind, positions in calls if kind == "prefill"]
    assert max(tokens for _, _, tokens in prompts) > 32 and [place[:2] for place in prompts].count((0, 0)) == 2


@pytest.mark.parametrize(
    ("slots", "context", "chunk"), [(1, 32, 32), (2, 32, 8), (3, 64, 8), (4, 512, 32), (64, 32, 2)]
)
def test_a_self_test_reads_back_what_every_decode_wrote(slots: int, context: int, chunk: int) -> None:
    """In each slot, and once where most of what is read was written by decodes; all of it where it may be."""
    written: dict[int, list[str]] = {}
    read: dict[int, set[int]] = {}
    for kind, positions in script(slots, context, chunk):
        for slot, start, tokens in positions:
            held = written.setdefault(slot, [])[:start]
            assert len(held) == start and start + tokens <= context and slot < slots
            if kind == "decode":
                read.setdefault(slot, set()).add(held.count("decode"))
            written[slot] = held + [kind] * tokens
    assert len(written) == min(slots, 3) and all(max(read[slot]) >= 1 for slot in written)
    assert written[0].count("decode") > written[0].count("prefill") + 1


class Dropped(Decode):
    """Writes its cache by an index, which torch does rightly, and which is lost in the conversion."""

    def forward(self, x: Tensor, mask: Tensor, wmask: Tensor, *turns: Tensor) -> Tensor:
        heads = self._kv_heads
        for i, block in enumerate(self.blocks):
            q, k, v = block.project(x, turns)  # type: ignore[operator]
            at = (wmask[0, 0, :, 0] * torch.arange(self.context)).sum(0, keepdim=True).to(torch.int32)
            self.kv[2 * i : 2 * i + 1, :, at, :] = k
            self.kv[2 * i + 1 : 2 * i + 2, :, at, :] = v
            keys, values = (self.kv[j : j + 1, :heads] for j in (2 * i, 2 * i + 1))
            x = block.finish(x, q, keys, values, mask)  # type: ignore[operator]
        return x


def test_a_cache_write_that_is_lost_is_caught(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(config: Any, span: Span, source: Any, **sizes: int) -> tuple[Prefill, Decode]:
        prefill, _ = build(config, span, source, **sizes)
        return prefill, Dropped(prefill.blocks, config, sizes["slots"], sizes["context"]).eval()

    monkeypatch.setattr(conversion, "build", broken)
    with pytest.raises(ModelError, match=r"writes to its cache \d+ times, not 4: a write was lost"):
        convert(folders["gpt2"], SPAN, tmp_path / "a.mlpackage", PackageOptions(slots=1, context=64, chunk=8))
    assert not list(tmp_path.iterdir()), "nothing is kept of it"


class Elsewhere(Decode):
    """Attends rightly, and writes rightly but for the last slot, whose keys and values go where ``moved`` says."""

    def __init__(self, like: Decode, config: Any, moved: Callable[[Tensor], Tensor]) -> None:
        super().__init__(like.blocks, config, like.slots, like.context)
        self._moved = moved

    def forward(self, x: Tensor, mask: Tensor, wmask: Tensor, *turns: Tensor) -> Tensor:
        shape = (self.slots, self._kv_heads, self.context, self._dim)
        flat = (1, self.slots * self._kv_heads, self.context, self._dim)
        last = self._moved(wmask[-1:])
        there = last if self.slots == 1 else torch.cat((wmask[:-1], last))
        for i, block in enumerate(self.blocks):
            q, k, v = block.project(x, turns)  # type: ignore[operator]
            held = [self.kv[j : j + 1].view(shape) for j in (2 * i, 2 * i + 1)]
            keys, values = (old * (1 - wmask) + new * wmask for old, new in zip(held, (k, v), strict=True))
            for j, (old, new) in enumerate(zip(held, (k, v), strict=True)):
                self.kv[2 * i + j : 2 * i + j + 1] = (old * (1 - there) + new * there).view(flat)
            x = block.finish(x, q, keys, values, mask)  # type: ignore[operator]
        return x


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "lost": lambda wmask: wmask * 0.0,
    "one position further": lambda wmask: torch.cat((wmask[:, :, -1:], wmask[:, :, :-1]), 2),
}


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("moved", MOVED)
def test_a_decodes_write_that_is_lost_or_misplaced_fails_the_self_test(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: str, slots: int
) -> None:
    """There are as many writes as there should be, and each decode by itself is right."""

    def broken(config: Any, span: Span, source: Any, **sizes: int) -> tuple[Prefill, Decode]:
        prefill, decode = build(config, span, source, **sizes)
        return prefill, Elsewhere(decode, config, MOVED[moved]).eval()

    monkeypatch.setattr(conversion, "build", broken)
    with pytest.raises(ModelError, match="fails its self-test"):
        sizes = PackageOptions(slots=slots, context=32, chunk=8)
        convert(folders["gpt2"], Span(start=1, stop=2), tmp_path / "a.mlpackage", sizes)
    assert not list(tmp_path.iterdir()), "nothing is kept of it"


def test_a_package_that_does_not_compute_what_it_should_is_caught(
    bundles: dict[str, tuple[Bundle, float]], tmp_path: Path
) -> None:
    """The GPT-2 package with the self-test of its int8 sister moved a little, and with a manifest of other sizes."""
    source = bundles["gpt2"][0].package
    for suffix in ("mlpackage", "manifest.json", "selftest.safetensors"):
        path = source.with_name(f"gpt2.{suffix}")
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    manifest = json.loads((tmp_path / "gpt2.manifest.json").read_text())
    (tmp_path / "gpt2.manifest.json").write_text(json.dumps(manifest | {"chunk": 16}))
    with pytest.raises(ModelError, match="prefill has the inputs"):
        check(Bundle.at(tmp_path / "gpt2.mlpackage"))
    (tmp_path / "gpt2.manifest.json").write_text(json.dumps(manifest | {"tolerance": 1e-6}))
    bundle = Bundle.at(tmp_path / "gpt2.mlpackage")
    with pytest.raises(ModelError, match="fails its self-test"):
        check(bundle)
    with pytest.raises(ModelError, match="fails its self-test"):
        run_selftest(Executor(EvaluatorBackend(bundle.package), bundle.manifest), bundle.selftest, 1e-6)


def test_an_old_package_stays_until_the_new_one_has_passed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.mlpackage"
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
        refuse(config, span, out, **wanted)
    assert not list(tmp_path.iterdir())


def test_a_head_that_is_too_narrow_and_a_numpy_that_is_too_new(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="head dimension is 16, and the Neural Engine"):
        convert(models["llama"], SPAN, tmp_path / "a.mlpackage", PackageOptions(context=64))
    monkeypatch.setattr(np, "__version__", "2.4.1")
    with pytest.raises(UsageError, match=r'cannot work with numpy 2.4.1: pip install "numpy<2.4"'):
        convert(models["llama"], SPAN, tmp_path / "a.mlpackage")


def test_on_the_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    model, out = save_random("gpt2", tmp_path / "model"), tmp_path / "a.mlpackage"
    run = mpgpt(0, "convert", "coreml", "--model", model, "--layers", "1-2", "--context", "64", "--out", out)
    assert run.returncode == 2 and "mpgpt: the model's head dimension is 16" in run.stderr
    run = mpgpt(0, "convert", "coreml", "--model", folders["llama"], "--layers", "1,2", "--out", out)
    assert run.returncode == 2 and "one range, such as 4-7" in run.stderr
    run = mpgpt(
        0, "convert", "coreml", "--model", folders["llama"], "--layers", "1-2", "--context", "64", "--slots", "2",
        "--chunk", "8", "--out", out,
    )  # fmt: skip
    assert run.returncode == 0 and not run.stderr.strip(), run.stderr
    assert Bundle.at(out).hash.hex()[:12] in run.stdout and "self-test within 0.0" in run.stdout
    assert f"package: {out}" in run.stdout and "its layers are 1 to 2" in run.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_says_how_far_it_is_and_libraries_say_nothing(
    folders: dict[str, Path], bundles: dict[str, tuple[Bundle, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()

    def slow(
        folder: Path, span: Span, out: Path, sizes: PackageOptions, report: Callable[[str], None]
    ) -> tuple[Bundle, float]:
        with conversion._quiet():
            for line in ("reading layers", "converting prefill"):
                report(line)
                print("a library's bar", file=sys.stderr)
                deadline = time.monotonic() + 10.0
                while line not in terminal.getvalue():
                    assert time.monotonic() < deadline, "it is not seen"
                    time.sleep(0.01)
        return bundles["gpt2"]

    monkeypatch.setattr(command, "convert", slow)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    sizes = PackageOptions(slots=1, context=32, chunk=8)
    command.run_convert(str(folders["gpt2"]), "1-2", tmp_path / "a.mlpackage", sizes, home=tmp_path)
    assert sys.stderr is terminal and "a library's bar" not in terminal.getvalue()


def test_a_link_is_written_through(
    folders: dict[str, Path], bundles: dict[str, tuple[Bundle, float]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package is made beside the folder that the link points to, and takes its place, not the link's."""
    made: list[Path] = []

    def convert(folder: Path, span: Any, out: Path, *more: Any) -> tuple[Bundle, float]:
        made.append(out)
        return bundles["gpt2"]

    monkeypatch.setattr(command, "convert", convert)
    (tmp_path / "far" / "b.mlpackage").mkdir(parents=True)
    (tmp_path / "a.mlpackage").symlink_to("far/b.mlpackage")
    for name in ("a.mlpackage", "far/b.mlpackage", "far/new.mlpackage"):
        sizes = PackageOptions(slots=1, context=32, chunk=8)
        command.run_convert(str(folders["gpt2"]), "1-2", tmp_path / name, sizes, home=tmp_path)
    assert made == [tmp_path / "far" / name for name in ("b.mlpackage", "b.mlpackage", "new.mlpackage")]
