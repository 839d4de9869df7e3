"""The options of `mpgpt bench` as one checked value.

Knows: what the options mean together, and with a model of so many layers and positions.
Must not know: how rings are started or measured.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from mpgpt.bench import plot
from mpgpt.bench.measure import REPEATS
from mpgpt.config import DtypeName, parse_layers
from mpgpt.core import Span, check_spans
from mpgpt.display import notify
from mpgpt.errors import UsageError
from mpgpt.files import check_writable
from mpgpt.model.architecture import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchArguments:
    """The options of `mpgpt bench` as they are written on the command line."""

    model: str | None
    random: str | None
    ranks: str | None
    concurrency: str
    prompt_tokens: int
    new_tokens: int
    dtype: str
    kernel: str
    fast: bool | None
    threads: int | None
    pin: bool
    rounds: int
    layers: str | None
    max_sequences: int | None
    context: int | None
    drafts: bool
    hostfile: Path | None
    config: Path | None
    against: tuple[str, ...]
    llama_bin: Path | None
    json: Path | None
    plot: Path | None
    child: bool
    """Whether another `mpgpt bench` started this one, and reads its figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """The checked options of `mpgpt bench`."""

    model: str
    random: bool
    ranks: tuple[int, ...]
    concurrency: tuple[int, ...]
    dtypes: tuple[DtypeName, ...]
    prompt_tokens: int
    new_tokens: int
    threads: int | None
    pin: bool
    rounds: int
    spans: tuple[Span | None, ...] | None
    slots: int
    context: int
    hostfile: Path | None
    drafts: bool
    kernel: str
    fast: bool
    against: tuple[str, ...]
    llama_bin: Path | None
    json: Path | None
    plot: Path | None
    """None too where there is no matplotlib."""

    def header(self, config: ModelConfig) -> dict[str, Any]:
        """The part of the JSON that holds the model and the settings."""
        settings = {
            "prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "threads": self.threads,
            "pin": self.pin, "rounds": self.rounds, "repeats": REPEATS, "max_sequences": self.slots,
            "context": self.context, "hostfile": str(self.hostfile) if self.hostfile else None, "drafts": self.drafts,
            "layers": ",".join(str(span or "-") for span in self.spans) if self.spans else "auto",
            "kernel": self.kernel, "fast": self.fast, "against": list(self.against),
        }  # fmt: skip
        return {"model": {"name": self.model, "random": self.random, "layers": config.layers}, "settings": settings}


def parse(arguments: BenchArguments, size: int | None) -> BenchOptions:
    """The options, checked as far as no model is needed. ``size`` is that of the mpirun that we are in, if any.

    Raises ``UsageError``.
    """
    if bool(arguments.model) == bool(arguments.random):
        raise UsageError("give --model NAME or --random SHAPE, and not both; --random gpt2 needs no download")
    concurrency = _numbers(arguments.concurrency, "--concurrency")
    prompt, new = arguments.prompt_tokens, arguments.new_tokens
    slots, context = arguments.max_sequences or max(concurrency), arguments.context or prompt + new
    if slots < max(concurrency):
        raise UsageError(f"--concurrency {max(concurrency)} needs --max-sequences of at least that, not {slots}")
    if context < prompt + new:
        raise UsageError(f"--context {context} is too small for {prompt} prompt and {new} new tokens")
    ranks = _ranks(arguments, size)
    _check_pin(arguments, ranks)
    _check_config(arguments, size)
    _check_against(arguments, size)
    return BenchOptions(
        model=arguments.model or arguments.random or "", random=bool(arguments.random), ranks=ranks,
        concurrency=concurrency, dtypes=_dtypes(arguments, size), prompt_tokens=prompt, new_tokens=new,
        # Bound to a core, more threads than one would only take turns on it.
        threads=arguments.threads or (1 if arguments.pin else None), pin=arguments.pin, rounds=arguments.rounds,
        spans=parse_layers(arguments.layers) if arguments.layers else None, slots=slots, context=context,
        hostfile=arguments.hostfile, drafts=arguments.drafts, kernel=arguments.kernel, fast=bool(arguments.fast),
        against=tuple(dict.fromkeys(arguments.against)), llama_bin=arguments.llama_bin, json=arguments.json,
        plot=arguments.plot if plot.installed() else None,
    )  # fmt: skip


def _ranks(arguments: BenchArguments, size: int | None) -> tuple[int, ...]:
    if size is None:
        return _numbers(arguments.ranks or "1", "--ranks")
    if arguments.ranks and _numbers(arguments.ranks, "--ranks") != (size,):
        raise UsageError(
            f"--ranks {arguments.ranks}, but mpirun started {size} (-n {size}): leave --ranks out to measure the ring "
            "that is there, or mpirun, to have the rings started one after the other"
        )
    for option, given, instead in (
        ("hostfile", arguments.hostfile, "give it to mpirun"),
        ("pin", arguments.pin, "give mpirun --bind-to core --map-by core"),
    ):
        if given and not arguments.child:
            raise UsageError(f"--{option} is for starting rings, and mpirun has started this one: {instead}")
    return (size,)


def _check_config(arguments: BenchArguments, size: int | None) -> None:
    if arguments.config and size is None:
        raise UsageError("--config says which rank of a ring stands before an iPad, so mpirun must start the ring")


def _check_pin(arguments: BenchArguments, ranks: tuple[int, ...]) -> None:
    if arguments.pin and not hasattr(os, "sched_setaffinity"):
        raise UsageError("--pin: this system cannot bind a process to cores")
    threads, cores = arguments.threads or 1, os.cpu_count() or 1
    # One thread can share a core; several cannot be bound to cores that are not there.
    if arguments.pin and threads > 1 and not arguments.hostfile and threads * max(ranks) > cores:
        raise UsageError(
            f"--pin: {max(ranks)} ranks of {threads} threads need {threads * max(ranks)} cores, not {cores}"
        )


def _check_against(arguments: BenchArguments, size: int | None) -> None:
    against, folder = arguments.against, arguments.llama_bin
    if against and size is not None and not arguments.child:
        raise UsageError("--against is run in turn with rings, and mpirun has started this one: leave mpirun out")
    if against and arguments.hostfile:
        raise UsageError("--against runs on this host alone, so it cannot be compared with the rings of a --hostfile")
    if "llama-rpc" in against and folder is None:
        raise UsageError("--against llama-rpc needs --llama-bin, the folder of llama.cpp's programs")
    if folder is not None and "llama-rpc" not in against:
        raise UsageError("--llama-bin is for --against llama-rpc, which is not asked for")


def _dtypes(arguments: BenchArguments, size: int | None) -> tuple[DtypeName, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in arguments.dtype.split(",")))
    for name in names:
        if name not in get_args(DtypeName):
            raise UsageError(
                f"--dtype {arguments.dtype}: there is no {name!r}; there are {', '.join(get_args(DtypeName))}"
            )
    if size is not None and len(names) > 1:
        raise UsageError("--dtype: a ring that is there has one dtype; without mpirun several are measured in turn")
    return tuple(name for name in get_args(DtypeName) if name in names)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    numbers = [int(piece) if piece.strip().isdecimal() and len(piece) < 6 else 0 for piece in text.split(",")]
    for number, piece in zip(numbers, text.split(","), strict=True):
        if not 0 < number <= 65535:
            raise UsageError(
                f"{option} {text}: {piece.strip()!r} is no number from 1 to 65535; write for example 1,2,3"
            )
    return tuple(dict.fromkeys(numbers))


def fit(options: BenchOptions, config: ModelConfig) -> None:
    """Raise ``UsageError`` if the model is too small for the options."""
    if max(options.ranks) > config.layers:
        raise UsageError(f"--ranks {max(options.ranks)}: the model has {config.layers} layers")
    if options.context > config.positions:
        raise UsageError(
            f"{options.prompt_tokens} prompt and {options.new_tokens} new tokens, or a context of {options.context}, "
            f"are more than the model's {config.positions} positions"
        )
    for ranks in options.ranks if options.spans else ():
        check_spans(options.spans or (), ranks, config.layers, "--layers")


def check_outputs(arguments: BenchArguments) -> None:
    """Raise ``UsageError`` if a file of the options cannot be written. Without matplotlib a line says that there will
    be no picture."""
    if arguments.json:
        check_writable(arguments.json, "--json")
    if arguments.plot:
        plot.check(arguments.plot)
        if not plot.installed():
            notify(f"mpgpt: --plot {arguments.plot}: {plot.LACKING}")
