"""`mpgpt verify`: whether all hosts compute the same bits, together as well, and those that mpgpt was released with.

Knows: what is compared with what, and how it is said.
Must not know: how a layer is computed, how ranks reach one another.

Three comparisons: every host's golden models with the digests that mpgpt brings; each of a model's layers, as every
host computes all of them by itself, with rank 0's; and the model in as many parts as there are ranks, each of which
hands its hidden states to the next, with rank 0 by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from mpgpt.cluster.bootstrap import ensure_model
from mpgpt.cluster.chain import part_of, pass_through
from mpgpt.config import DtypeName
from mpgpt.core import Row, Span
from mpgpt.display import silent
from mpgpt.errors import UsageError
from mpgpt.model.linear import NATIVE, Kernels
from mpgpt.model.native import library
from mpgpt.model.native.golden import DTYPES, MODELS, GoldenModel, digest
from mpgpt.model.slice import Slice
from mpgpt.model.tokenizer import Tokenizer
from mpgpt.model.weights import Checkpoint, lean_heap, model_config
from mpgpt.transport.collective import on_all_ranks, on_rank0
from mpgpt.transport.link import World

PROMPT = "The quick brown fox jumps over the lazy dog, and 1234567890 other things happen. Why is that so?"
LONGEST = 512
"""Tokens of a prompt at most: verifying is no reading of books."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions:
    """The options of `mpgpt verify`."""

    model: str | None = None
    """Whose layers are computed besides the golden models'; none where it is not given."""
    prompt: str = PROMPT
    dtype: DtypeName = "float32"
    threads: int = 1


@dataclass(frozen=True, slots=True)
class Part:
    """What a rank's part of a model came to."""

    start: int
    """Its first layer."""
    stop: int
    """The layer behind its last; ``start`` where it has none."""
    digest: str

    def __str__(self) -> str:
        return str(Span(start=self.start, stop=self.stop)) if self.start < self.stop else "none"


class Verification:
    """One run. ``start`` is called on every rank, then ``run_rank0`` on rank 0 and ``serve`` on the others."""

    def __init__(self, options: VerifyOptions, *, home: Path, console: Console, report: Callable[[str], None]) -> None:
        self._options, self._home, self._console, self._report = options, home, console, report

    def start(self, world: World) -> Verification:
        """Compute. Whatever is wrong anywhere, but for bits, is raised on every rank."""
        options = self._options
        self._hosts = world.hosts
        torch.set_num_threads(options.threads)
        self._kernels: list[str] = on_all_ranks(world, _kernels)
        golden = {} if _lacks(self._kernels) else on_all_ranks(world, lambda: _golden(options.threads))
        self._golden: list[dict[str, dict[str, str]]] = list(golden)
        self._layers: list[list[str]] = []
        self._parts: list[Part] = []
        if options.model and not _lacks(self._kernels):
            folder = ensure_model(world, options.model, self._home, self._report if world.rank == 0 else silent)
            ids: list[int] = on_rank0(world, lambda: _ids(folder, options.prompt))
            kernels = Kernels(dtype=options.dtype, chosen={"": NATIVE})
            self._layers = on_all_ranks(world, lambda: _layers(folder, kernels, ids))
            if world.size > 1:
                self._parts = [Part(*part) for part in on_all_ranks(world, lambda: _part(world, folder, kernels, ids))]
        return self

    def run_rank0(self, ring: Verification) -> int:
        """Rank 0's part: compare, and say it; 1 where anything differs."""
        lacking, model = _lacks(self._kernels), self._options.model or ""
        if lacking:
            raise UsageError(f"{self._name(lacking[0])} has no compiled kernels: {self._kernels[lacking[0]][1:]}")
        expected = json.loads((files("mpgpt.model.native") / "golden.json").read_text())["float32 cache"]
        troubles = [
            f"{self._name(rank)} differs in {', '.join(wrong)}: its kernels do not compute what they should"
            for rank, got in enumerate(self._golden)
            if (wrong := _differences(got, expected))
        ]
        troubles += [
            f"{self._name(rank)} differs from {self._name(0)} in {model} ({self._options.dtype}), {where} on"
            for rank, got in enumerate(self._layers)
            if (where := _first_difference(got, self._layers[0]))
        ]
        if wrong_part := self._first_wrong_part():
            whole = f"{model} ({self._options.dtype}) in {len(self._parts)} parts"
            troubles.append(f"{whole} differs from rank 0 alone, from {wrong_part} on")
        table = Table("rank", "host", "kernels", "golden models", *([model] if self._layers else []))
        for rank, host in enumerate(self._hosts):
            same = "differ" if _differences(self._golden[rank], expected) else "same bits"
            row = [str(rank), host, self._kernels[rank], same]
            if self._layers:
                row.append(self._layers[rank][-1])
            table.add_row(*row)
        self._console.print(table)
        for trouble in troubles:
            self._console.print(f"mpgpt: {trouble}", highlight=False, soft_wrap=True)
        if self._parts and not wrong_part:
            parts = ", ".join(map(str, self._parts))
            self._console.print(f"Layers {parts} on the ranks together: the bits of one.", highlight=False)
        if not troubles:
            self._console.print("All bits are as they should be.", highlight=False)
        return 1 if troubles else 0

    def serve(self) -> None:
        """Every other rank's part: it has computed, and is done."""

    def _first_wrong_part(self) -> str:
        """Behind which rank's layers what the ranks compute together is not what rank 0 does; empty where all is."""
        return next(
            (
                f"{self._name(rank)} with layers {part}"
                for rank, part in enumerate(self._parts)
                if part.start < part.stop and part.digest != self._layers[0][part.stop - 1]
            ),
            "",
        )

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"


def _kernels() -> str:
    """This host's; with a "!" before it, why there are none."""
    found = library.find()
    return f"!{found.why}" if isinstance(found, library.Absent) else f"{found.kind}, {found.compiler}"


def _lacks(kernels: list[str]) -> list[int]:
    return [rank for rank, words in enumerate(kernels) if words.startswith("!")]


def _golden(threads: int) -> dict[str, dict[str, str]]:
    """By model and dtype the digests of the golden models' logits."""
    return {
        name: {dtype: digest(GoldenModel(name, dtype, threads=threads, kv_dtype="float32").whole()) for dtype in DTYPES}
        for name in MODELS
    }


@torch.inference_mode()
def _layers(folder: Path, kernels: Kernels, ids: Sequence[int]) -> list[str]:
    """Digests of a prompt's hidden states behind each layer, and of its logits; one layer is held at a time."""
    config, checkpoint = model_config(folder), Checkpoint(folder)
    rows = [Row(slot=0, start=0, ids=tuple(ids), outputs=len(ids))]
    digests, x_TE = list[str](), torch.empty(0)
    for layer in range(config.layers):
        with lean_heap():
            one = Slice(
                config, Span(start=layer, stop=layer + 1), checkpoint, slots=1, context=len(ids), kernels=kernels
            )  # fmt: skip
        x_TE = one.forward(rows, x_TE if layer else one.embed(rows))
        digests.append(digest(x_TE))
    return digests


def _part(world: World, folder: Path, kernels: Kernels, ids: Sequence[int]) -> tuple[int, int, str]:
    """See ``Part``."""
    out = pass_through(world, folder, kernels, ids)
    span = part_of(model_config(folder).layers, world.rank, world.size)
    return (span.start, span.stop, digest(out)) if span and out is not None else (0, 0, "")


def _ids(folder: Path, prompt: str) -> list[int]:
    return Tokenizer(folder).encode(prompt)[: min(LONGEST, model_config(folder).positions)]


def _differences(got: Mapping[str, Mapping[str, str]], expected: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {dtype}" for name in expected for dtype in expected[name] if got[name][dtype] != expected[name][dtype]
    ]


def _first_difference(got: list[str], expected: list[str]) -> str:
    """In which layer they part, in words; empty where they do not."""
    return next(
        (f"from layer {layer}" for layer, pair in enumerate(zip(got, expected, strict=True)) if pair[0] != pair[1]), ""
    )
