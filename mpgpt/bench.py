"""`mpgpt bench`: rings of several sizes, one after the other, several times, and what they did.

Knows: what the options mean together; which rings are started in which order; what to do when
one fails or is interrupted.
Must not know: how a ring is measured, or how figures are put.

``Bench`` is the command where no mpirun started it: it starts every ring as a process of its own, in turn, so that
no ring meets another's memory. ``InRing`` is the command in such a process, and under anybody's mpirun.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, get_args

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from mpgpt import plot
from mpgpt.architecture import ModelConfig
from mpgpt.config import DtypeName, check_spans, parse_layers
from mpgpt.core import Span, Workload
from mpgpt.errors import MpgptError, UsageError
from mpgpt.launch import environment, listen, mpirun
from mpgpt.link import SoloWorld, World
from mpgpt.measure import REPEATS, measure, read_bandwidth
from mpgpt.random_model import random_model
from mpgpt.results import Results, show, writable, write_whole
from mpgpt.ring import Ring, local_rank, locate, settle, together
from mpgpt.weights import model_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the options ask for."""

    model: str
    random: bool
    ranks: tuple[int, ...]
    concurrency: tuple[int, ...]
    dtypes: tuple[str, ...]
    prompt_tokens: int
    new_tokens: int
    threads: int | None
    pin: bool
    rounds: int
    spans: tuple[Span, ...] | None
    slots: int
    context: int
    hostfile: Path | None
    json: Path | None
    plot: Path | None

    def header(self, config: ModelConfig) -> dict[str, Any]:
        """The part of the JSON that says what was asked."""
        settings = {
            "prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "threads": self.threads,
            "pin": self.pin, "rounds": self.rounds, "repeats": REPEATS, "max_sequences": self.slots,
            "context": self.context, "hostfile": str(self.hostfile) if self.hostfile else None, "drafts": False,
            "layers": ",".join(map(str, self.spans)) if self.spans else "auto",
        }  # fmt: skip
        return {"model": {"name": self.model, "random": self.random, "layers": config.layers}, "settings": settings}


def read(options: Mapping[str, Any], size: int | None) -> Wanted:
    """Everything that can be found wrong without a model. ``size`` is that of the mpirun that we are in, if any.

    Raises ``UsageError``.
    """
    if bool(options["model"]) == bool(options["random"]):
        raise UsageError("give --model NAME or --random SHAPE, and not both; --random gpt2 needs no download")
    concurrency = _numbers(options["concurrency"], "--concurrency")
    prompt, new = options["prompt_tokens"], options["new_tokens"]
    slots, context = options["max_sequences"] or max(concurrency), options["context"] or prompt + new
    if slots < max(concurrency):
        raise UsageError(f"--concurrency {max(concurrency)} needs --max-sequences of at least that, not {slots}")
    if context < prompt + new:
        raise UsageError(f"--context {context} is too small for {prompt} prompt and {new} new tokens")
    if options["drafts"]:
        raise UsageError("--drafts: this version drafts nothing yet")
    ranks = _ranks(options, size)
    _check_pin(options, ranks)
    return Wanted(
        model=options["model"] or options["random"], random=bool(options["random"]), ranks=ranks,
        concurrency=concurrency, dtypes=_dtypes(options, size), prompt_tokens=prompt, new_tokens=new,
        # Bound to a core, more threads than one would only take turns on it.
        threads=options["threads"] or (1 if options["pin"] else None), pin=options["pin"], rounds=options["rounds"],
        spans=parse_layers(options["layers"]) if options["layers"] else None, slots=slots, context=context,
        hostfile=options["hostfile"], json=options["json"], plot=options["plot"],
    )  # fmt: skip


def _ranks(options: Mapping[str, Any], size: int | None) -> tuple[int, ...]:
    if size is None:
        return _numbers(options["ranks"] or "1", "--ranks")
    if options["ranks"] and _numbers(options["ranks"], "--ranks") != (size,):
        raise UsageError(
            f"--ranks {options['ranks']}, but mpirun started {size} (-n {size}): leave --ranks out to measure the ring "
            "that is there, or mpirun, to have the rings started one after the other"
        )
    for option, instead in (("hostfile", "give it to mpirun"), ("pin", "give mpirun --bind-to core --map-by core")):
        if options[option] and not options["child"]:
            raise UsageError(f"--{option} is for starting rings, and mpirun has started this one: {instead}")
    return (size,)


def _check_pin(options: Mapping[str, Any], ranks: tuple[int, ...]) -> None:
    if options["pin"] and not hasattr(os, "sched_setaffinity"):
        raise UsageError("--pin: this system cannot bind a process to cores")
    threads, cores = options["threads"] or 1, os.cpu_count() or 1
    # One thread can share a core; several cannot be bound to cores that are not there.
    if options["pin"] and threads > 1 and not options["hostfile"] and threads * max(ranks) > cores:
        raise UsageError(
            f"--pin: {max(ranks)} ranks of {threads} threads need {threads * max(ranks)} cores, not {cores}"
        )


def _dtypes(options: Mapping[str, Any], size: int | None) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in options["dtype"].split(",")))
    for name in names:
        if name not in get_args(DtypeName):
            raise UsageError(
                f"--dtype {options['dtype']}: there is no {name!r}; there are {', '.join(get_args(DtypeName))}"
            )
    if size is not None and len(names) > 1:
        raise UsageError("--dtype: a ring that is there has one dtype; without mpirun several are measured in turn")
    return names


def _numbers(text: str, option: str) -> tuple[int, ...]:
    numbers = [int(piece) if piece.strip().isdecimal() and len(piece) < 6 else 0 for piece in text.split(",")]
    for number, piece in zip(numbers, text.split(","), strict=True):
        if not 0 < number <= 65535:
            raise UsageError(
                f"{option} {text}: {piece.strip()!r} is no number from 1 to 65535; write for example 1,2,3"
            )
    return tuple(dict.fromkeys(numbers))


def fit(wanted: Wanted, config: ModelConfig) -> None:
    """Raises ``UsageError`` when the model is too small for what is asked of it."""
    if max(wanted.ranks) > config.layers:
        raise UsageError(f"--ranks {max(wanted.ranks)}: the model has {config.layers} layers")
    if wanted.context > config.positions:
        raise UsageError(
            f"{wanted.prompt_tokens} prompt and {wanted.new_tokens} new tokens, or a context of {wanted.context}, are "
            f"more than the model's {config.positions} positions"
        )
    for ranks in wanted.ranks if wanted.spans else ():
        check_spans(wanted.spans or (), ranks, config.layers, "--layers")


def writing(options: Mapping[str, Any]) -> None:
    """Raises ``UsageError`` when a file that is asked for cannot be written."""
    if options["json"]:
        writable(options["json"], "--json")
    if options["plot"]:
        plot.check(options["plot"])


class InRing:
    """The command within a ring. ``form`` is called on every rank, ``lead`` on rank 0 alone."""

    def __init__(self, options: Mapping[str, Any], *, home: Path) -> None:
        self._options, self._home = options, home

    def form(self, world: World) -> Ring:
        """Agree, load, connect. Whatever is wrong anywhere is raised on every rank."""
        together(world, lambda: self._prepare(world))
        wanted = self._wanted
        report = _say if world.rank == 0 and not self._options["child"] else _silent
        folder = self._locate(world, report)
        together(world, lambda: fit(wanted, model_config(folder)) if world.rank == 0 else None)
        settings = settle(
            world, folder, dtype=wanted.dtypes[0], slots=wanted.slots, context=wanted.context,
            threads=wanted.threads, plan=lambda config: wanted.spans,
        )  # fmt: skip
        return Ring(world, settings, folder)

    def _prepare(self, world: World) -> None:
        self._wanted = read(self._options, world.size)
        if world.rank == 0:
            writing(self._options)
        if self._wanted.pin and not world.launched:
            cores = sorted(os.sched_getaffinity(0))[: self._wanted.threads]
            os.sched_setaffinity(0, cores)  # those to which mpirun would bind its first rank

    def _locate(self, world: World, report: Callable[[str], None]) -> Path:
        name = self._wanted.model
        if not self._wanted.random:
            return locate(world, name, self._home, report)
        together(world, lambda: str(random_model(name, self._home, report)) if local_rank(world) == 0 else "")
        return random_model(name, self._home)

    def lead(self, ring: Ring) -> int:
        """Rank 0's part: measure, and print the table; or, for the ``Bench`` that started us, the bare figures."""
        wanted, child = self._wanted, self._options["child"]
        engine, results = ring.engine(), Results(wanted.header(ring.config), wanted.json)
        for n in range(wanted.rounds):
            for concurrency in wanted.concurrency:
                work = Workload(sequences=concurrency, prompt_tokens=wanted.prompt_tokens, new_tokens=wanted.new_tokens)
                run = {
                    "ranks": ring.world.size, "concurrency": concurrency, "dtype": wanted.dtypes[0],
                    "oversubscribed": _crowded(ring), **measure(engine, ring, work),
                }  # fmt: skip
                if child:
                    _print({"run": run})
                else:
                    results.add(run)
                    _say(f"round {n + 1} of {wanted.rounds}: {_line(run)}")
        # Last, because its buffer would be the most memory that this rank ever had.
        speed, way = read_bandwidth()
        engine.stop()
        if child:
            _print({"read_bandwidth_gb_s": speed, "read_by": way})
        else:
            results.add_bandwidth(wanted.dtypes[0], ring.world.size, speed, way)
            results.finish()
            publish(results, wanted)
        return 0


class Bench:
    """The command outside any ring: start each in turn, several rounds, and put together what they say."""

    def __init__(self, options: Mapping[str, Any], *, home: Path, env: Mapping[str, str]) -> None:
        """``env`` is this process's environment."""
        self._options, self._home, self._env = options, home, env

    def run(self) -> int:
        """The exit status. Raises ``MpgptError`` for the first ring that fails, after showing what others did."""
        wanted = self._wanted = read(self._options, None)
        writing(self._options)
        config = model_config(self._locate())
        fit(wanted, config)
        results = Results(wanted.header(config), wanted.json)
        turns = [(dtype, ranks) for dtype in wanted.dtypes for ranks in wanted.ranks]
        commands = [self._command(dtype, ranks) for dtype, ranks in turns]
        try:
            with Bar(wanted.rounds * len(turns) * len(wanted.concurrency)) as bar:
                for _ in range(wanted.rounds):
                    for (dtype, ranks), command in zip(turns, commands, strict=True):
                        self._start(command, dtype, ranks, results, bar)
            results.finish()
        finally:
            publish(results, wanted)
        return 0

    def _locate(self) -> Path:
        wanted = self._wanted
        if wanted.random:
            return random_model(wanted.model, self._home, _say)
        alone = SoloWorld()
        try:
            return locate(alone, wanted.model, self._home, _say)
        finally:
            alone.close()

    def _command(self, dtype: str, ranks: int) -> list[str]:
        """One rank on this host needs no mpirun; it is bound as mpirun would bind it."""
        wanted, options = self._wanted, self._options
        alone = ranks == 1 and wanted.hostfile is None
        launcher = [] if alone else mpirun(
            ranks, threads=wanted.threads or 1, pin=wanted.pin, hostfile=wanted.hostfile, path=self._env.get("PATH")
        )  # fmt: skip
        given = {
            "random" if wanted.random else "model": wanted.model, "dtype": dtype, "rounds": 1,
            "concurrency": ",".join(map(str, wanted.concurrency)), "prompt-tokens": wanted.prompt_tokens,
            "new-tokens": wanted.new_tokens, "max-sequences": wanted.slots, "context": wanted.context,
            "threads": wanted.threads, "layers": options["layers"],
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        return [
            *launcher,
            sys.executable,
            "-m",
            "mpgpt",
            "bench",
            "--child",
            *words,
            *["--pin"] * (alone and wanted.pin),
        ]

    def _start(self, command: list[str], dtype: str, ranks: int, results: Results, bar: Bar) -> None:
        def hear(said: dict[str, Any]) -> None:
            if "run" in said:
                results.add(said["run"])
                bar.done(_line(said["run"]))
            else:
                results.add_bandwidth(dtype, ranks, said["read_bandwidth_gb_s"], said["read_by"])

        bar.begin(f"{_count(ranks, 'rank')}, {dtype}")
        try:
            listen(command, environment(self._env), hear)
        except MpgptError as error:
            raise MpgptError(f"{_count(ranks, 'rank')}, {dtype}: {error}") from None


class Bar:
    """Runs done and time left, on standard error; where nobody watches, a line for each run."""

    def __init__(self, total: int) -> None:
        console = Console(stderr=True)
        self._watched = console.is_terminal
        self._bar = Progress(
            SpinnerColumn(), BarColumn(), MofNCompleteColumn(), TextColumn("runs"), TextColumn("{task.description}"),
            TimeRemainingColumn(), console=console, disable=not self._watched, speed_estimate_period=3600,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def begin(self, what: str) -> None:
        self._bar.update(self._task, description=what)

    def done(self, line: str) -> None:
        self._bar.advance(self._task)
        if not self._watched:
            _say(line)


def publish(results: Results, wanted: Wanted) -> None:
    """The table, and the picture, of whatever there is."""
    document = results.document()
    if not document["runs"]:
        return
    show(document)
    sys.stdout.flush()
    if wanted.plot:
        write_whole(wanted.plot, plot.plot(document, wanted.plot.suffix))


def _crowded(ring: Ring) -> bool:
    """Whether the threads of the ranks on this host are more than its cores."""
    here = ring.places[0].node.host
    return sum(place.node.threads for place in ring.places if place.node.host == here) > (os.cpu_count() or 1)


def _line(run: Mapping[str, Any]) -> str:
    speed = run["decode_tokens_per_s"]
    shared = ", sharing cores" if run["oversubscribed"] else ""
    return f"{_count(run['ranks'], 'rank')}{shared}, {run['dtype']}, {_count(run['concurrency'], 'sequence')}: " + (
        f"{speed:.1f} tokens/s" if speed else "no time at which all of them decode; more --new-tokens would help"
    )


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number > 1)}"


def _print(said: Mapping[str, Any]) -> None:
    print(json.dumps(said), flush=True)


def _say(line: str) -> None:
    click.echo(line, err=True)


def _silent(line: str) -> None:
    """For the ranks that do not speak."""
