"""Packages that load, run and are wrong: each is caught before it is kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpgpt.core import Span
from mpgpt.errors import ModelError

pytest.importorskip("coremltools")

from mpgpt_ios.bundle import Bundle
from mpgpt_ios.convert import package as conversion
from mpgpt_ios.convert.blocks import Decode, Prefill, build
from mpgpt_ios.convert.package import PackageOptions, convert
from mpgpt_ios.convert.verify import check
from mpgpt_ios.executor import EvaluatorBackend, Executor, run_selftest
from tests.ios_proxy.convert.conftest import SPAN


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


class StepElsewhere(Prefill):
    """Attends rightly; a single token's keys and values are multiplied, and go some positions further."""

    def __init__(self, like: Prefill, config: Any, times: float, by: int) -> None:
        super().__init__(like.blocks, config, like.slots, like.context)
        self._times, self._by = times, by

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor, row: Tensor, *turns: Tensor) -> Tensor:
        if x.shape[3] > 1:
            return super().forward(x, mask, pos, row, *turns)
        p, r, heads = pos[0] + self._by, row[0], self._kv_heads
        before = torch.cat((mask[..., 1:], torch.full((1, 1, 1, 1), -1e4), torch.zeros(1, 1, 1, 1)), -1)
        for i, block in enumerate(self.blocks):
            q, k, v = block.project(x, turns)  # type: ignore[operator]
            held = [self.kv[j : j + 1, r : r + heads] for j in (2 * i, 2 * i + 1)]
            keys, values = (torch.cat((old, new), 2) for old, new in zip(held, (k, v), strict=True))
            self.kv[2 * i : 2 * i + 1, r : r + heads, p : p + 1, :] = k * self._times
            self.kv[2 * i + 1 : 2 * i + 2, r : r + heads, p : p + 1, :] = v * self._times
            x = block.finish(x, q, keys, values, before)  # type: ignore[operator]
        return x


@pytest.mark.parametrize(("times", "by"), [(0.0, 0), (1.0, 1)], ids=["lost", "a position further"])
def test_a_steps_write_that_is_lost_or_misplaced_fails_the_self_test(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float, by: int
) -> None:
    """Prompts and decodes of several are right, and so is every step by itself."""

    def broken(config: Any, span: Span, source: Any, **sizes: int) -> tuple[Prefill, Decode]:
        prefill, decode = build(config, span, source, **sizes)
        return StepElsewhere(prefill, config, times, by).eval(), decode

    monkeypatch.setattr(conversion, "build", broken)
    with pytest.raises(ModelError, match="fails its self-test"):
        convert(
            folders["gpt2"], Span(start=1, stop=2), tmp_path / "a.mlpackage",
            PackageOptions(slots=1, context=32, chunk=8),
        )  # fmt: skip
    assert not list(tmp_path.iterdir()), "nothing is kept of it"


MOVED: dict[str, Callable[[Tensor], Tensor]] = {
    "lost": lambda wmask: wmask * 0.0,
    "one position further": lambda wmask: torch.cat((wmask[:, :, -1:], wmask[:, :, :-1]), 2),
}


@pytest.mark.parametrize("moved", MOVED)
def test_a_decodes_write_that_is_lost_or_misplaced_fails_the_self_test(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: str
) -> None:
    """There are as many writes as there should be, each decode is right by itself, and the third slot has few."""

    def broken(config: Any, span: Span, source: Any, **sizes: int) -> tuple[Prefill, Decode]:
        prefill, decode = build(config, span, source, **sizes)
        return prefill, Elsewhere(decode, config, MOVED[moved]).eval()

    monkeypatch.setattr(conversion, "build", broken)
    with pytest.raises(ModelError, match="fails its self-test"):
        convert(
            folders["gpt2"],
            Span(start=1, stop=2),
            tmp_path / "a.mlpackage",
            PackageOptions(slots=3, context=32, chunk=8),
        )
    assert not list(tmp_path.iterdir()), "nothing is kept of it"


def test_a_package_that_does_not_compute_what_it_should_is_caught(
    bundles: dict[str, tuple[Bundle, float]], tmp_path: Path
) -> None:
    """A right package with a manifest of other sizes, and one that is to be nearer to float32 than it is."""
    original, _ = bundles["gpt2"]
    shutil.copytree(original.package, tmp_path / "gpt2.mlpackage")
    for part in ("manifest.json", "selftest.safetensors"):
        shutil.copy(original.package.with_name(f"gpt2.{part}"), tmp_path)
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
