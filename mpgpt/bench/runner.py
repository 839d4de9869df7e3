"""`mpgpt bench`: rings of several sizes, started one after the other, several times, and measured.

Knows: which rings are started in which order, what happens in each, and what to do when one fails or is interrupted.
Must not know: what the options mean together, how speed is measured, how figures are put.

``Bench`` is the command where no mpirun started it: it starts every ring as a process of its own, in turn, so that
no ring meets another's memory. ``RingMeasurement`` is the command in such a process, and under anybody's mpirun.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpgpt import config as configs
from mpgpt import stdio
from mpgpt.bench import plot
from mpgpt.bench.baselines import Baseline, BaselineSettings, Transformers
from mpgpt.bench.llama_cpp import LlamaRpc, programs
from mpgpt.bench.measure import REPEATS, measure, read_bandwidth
from mpgpt.bench.options import BenchArguments, check_outputs, fit, parse
from mpgpt.bench.random_model import random_model
from mpgpt.bench.report import Results, show
from mpgpt.cluster.bootstrap import DeviceFactory, connect_device, ensure_model, local_rank, negotiate
from mpgpt.cluster.processes import environment, listen, mpirun
from mpgpt.cluster.ring import Ring
from mpgpt.cluster.ring_config import RingOptions
from mpgpt.display import ProgressBar, counted, notify, silent
from mpgpt.errors import MpgptError, OutputError
from mpgpt.files import write_atomically
from mpgpt.machines import Workload
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.weights import model_config
from mpgpt.placement.costs import by_host
from mpgpt.transport.collective import on_all_ranks, on_rank0
from mpgpt.transport.link import SoloWorld, World


class RingMeasurement:
    """The command within a ring. ``start`` is called on every rank, ``run_rank0`` on rank 0 alone."""

    def __init__(self, arguments: BenchArguments, *, home: Path, device_factory: DeviceFactory) -> None:
        """``device_factory`` reaches for the iPad behind a rank."""
        self._arguments, self._home, self._device_factory = arguments, home, device_factory

    def start(self, world: World) -> Ring:
        """Agree, load, connect. Whatever is wrong anywhere is raised on every rank."""
        ipad = on_all_ranks(world, lambda: self._prepare(world))[0]
        device = connect_device(world, ipad, self._device_factory)
        wanted = self._wanted
        report = notify if world.rank == 0 and not self._arguments.child else silent
        folder = self._locate(world, report)
        on_rank0(world, lambda: fit(wanted, model_config(folder)))
        options = RingOptions(
            dtype=wanted.dtypes[0], slots=wanted.slots, context=wanted.context, threads=wanted.threads,
            kernel=wanted.kernel, fast=wanted.fast, memory=self._home.parent / "kernels.json",
            spans=lambda config: wanted.spans,
            everyone=True,
        )  # fmt: skip
        settings = negotiate(world, folder, options, device)
        return Ring(world, settings, folder, device, report)

    def _prepare(self, world: World) -> dict[str, Any] | None:
        self._wanted = parse(self._arguments, world.size)
        if world.rank == 0:
            check_outputs(self._arguments)
        if self._wanted.pin and not world.launched:
            cores = sorted(os.sched_getaffinity(0))[: self._wanted.threads]
            os.sched_setaffinity(0, cores)  # those to which mpirun would bind its first rank
        device = configs.load(self._arguments.config).device if world.rank == 0 and self._arguments.config else None
        return device.model_dump() if device else None

    def _locate(self, world: World, report: Callable[[str], None]) -> Path:
        name = self._wanted.model
        if not self._wanted.random:
            return ensure_model(world, name, self._home, report)
        on_all_ranks(world, lambda: str(random_model(name, self._home, report)) if local_rank(world) == 0 else "")
        return random_model(name, self._home)

    def run_rank0(self, ring: Ring) -> int:
        """Rank 0's part: measure, and print the table; or, for the ``Bench`` that started us, the bare figures."""
        wanted, child = self._wanted, self._arguments.child
        engine, results = ring.engine(drafts=wanted.drafts), Results(wanted.header(ring.config), wanted.json)
        for n in range(wanted.rounds):
            for concurrency in wanted.concurrency:
                work = Workload(sequences=concurrency, prompt_tokens=wanted.prompt_tokens, new_tokens=wanted.new_tokens)
                run = {
                    "ranks": ring.world.size, "concurrency": concurrency, "dtype": wanted.dtypes[0],
                    "oversubscribed": _crowded(ring), **measure(engine, ring, work),
                }  # fmt: skip
                if child:
                    _emit({"run": run})
                else:
                    results.add(run)
                    notify(f"round {n + 1} of {wanted.rounds}: {_line(run)}")
        # Last, because its buffer would be the most memory that this rank ever had.
        speed, way = read_bandwidth()
        engine.stop()
        if child:
            _emit({"read_bandwidth_gb_s": speed, "read_by": way})
        else:
            results.add_bandwidth(wanted.dtypes[0], ring.world.size, speed, way)
            try:
                results.finish()
                publish(results, wanted.plot)
            except OutputError as error:  # the ring is ended already
                return stdio.parting(error)
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A program that is started once in each round: a ring of ours, or a peer."""

    dtype: str
    ranks: int
    peer: Baseline | None = None
    compared: tuple[tuple[str, int], ...] = ()
    """Dtype and ranks of our rings that the peer's figures are for."""

    def __str__(self) -> str:
        return f"{_whose(self.peer.name if self.peer else '')}{counted(self.ranks, 'rank')}, {self.dtype}"


class Bench:
    """The command outside any ring: start each in turn, several rounds, and put their figures together."""

    def __init__(self, arguments: BenchArguments, *, home: Path, env: Mapping[str, str]) -> None:
        """``env`` is this process's environment."""
        self._arguments, self._home, self._env = arguments, home, env

    def run(self) -> int:
        """The exit status. Raises ``MpgptError`` for the first ring that fails, after showing what others did."""
        wanted = self._wanted = parse(self._arguments, None)
        check_outputs(self._arguments)
        self._llama = programs(wanted.llama_bin) if wanted.llama_bin else None
        folder = self._locate()
        config = model_config(folder)
        fit(wanted, config)
        results = Results(wanted.header(config), wanted.json)
        cases = self._cases(folder, config)
        try:
            with RunProgress(wanted.rounds * len(cases) * len(wanted.concurrency)) as bar:
                for _ in range(wanted.rounds):
                    for case in cases:
                        self._start(case, results, bar)
            results.finish()
        finally:
            publish(results, wanted.plot)
        return 0

    def _locate(self) -> Path:
        wanted = self._wanted
        if wanted.random:
            return random_model(wanted.model, self._home, notify)
        alone = SoloWorld()
        try:
            return ensure_model(alone, wanted.model, self._home, notify)
        finally:
            alone.close()

    def _cases(self, folder: Path, config: ModelConfig) -> list[Case]:
        """The cases of a round. A peer runs once for all rings that it is compared with, right after the first."""
        wanted, peers = self._wanted, self._peers(folder, config)
        rings = [(dtype, ranks) for dtype in wanted.dtypes for ranks in wanted.ranks]
        cases: dict[tuple[str, int, Baseline | None], Case] = {}
        for dtype, ranks in rings:
            cases[dtype, ranks, None] = Case(dtype=dtype, ranks=ranks)
            for peer in peers:
                theirs = peer.compared(dtype, ranks)
                same = tuple(ring for ring in rings if peer.compared(*ring) == theirs)
                cases.setdefault((*theirs, peer), Case(dtype=theirs[0], ranks=theirs[1], peer=peer, compared=same))
        return list(cases.values())

    def _peers(self, folder: Path, config: ModelConfig) -> list[Baseline]:
        wanted = self._wanted
        settings = BaselineSettings(
            folder=folder, layers=config.layers, concurrency=wanted.concurrency, prompt_tokens=wanted.prompt_tokens,
            new_tokens=wanted.new_tokens, repeats=REPEATS, threads=wanted.threads, pin=wanted.pin, env=self._env,
        )  # fmt: skip
        peers: list[Baseline] = []
        if Transformers.name in wanted.against:
            peers.append(Transformers(settings))
        if self._llama:
            peers.append(LlamaRpc(settings, self._llama, wanted.dtypes, self._home, notify))
        return peers

    def _command(self, dtype: str, ranks: int) -> list[str]:
        """One rank on this host needs no mpirun; it is bound as mpirun would bind it."""
        wanted = self._wanted
        alone = ranks == 1 and wanted.hostfile is None
        launcher = [] if alone else mpirun(
            ranks, threads=wanted.threads or 1, pin=wanted.pin, hostfile=wanted.hostfile, path=self._env.get("PATH")
        )  # fmt: skip
        given = {
            "random" if wanted.random else "model": wanted.model, "dtype": dtype, "rounds": 1,
            "concurrency": ",".join(map(str, wanted.concurrency)), "prompt-tokens": wanted.prompt_tokens,
            "new-tokens": wanted.new_tokens, "max-sequences": wanted.slots, "context": wanted.context,
            "threads": wanted.threads, "layers": self._arguments.layers, "kernel": wanted.kernel,
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in given.items() if value is not None]
        flags = ["--pin"] * (alone and wanted.pin) + ["--drafts"] * wanted.drafts + ["--fast"] * wanted.fast
        return [*launcher, sys.executable, "-m", "mpgpt", "bench", "--child", *words, *flags]

    def _start(self, case: Case, results: Results, bar: RunProgress) -> None:
        def on_output(figures: dict[str, Any]) -> None:
            if "peer" in figures:
                results.add_peer(figures, case.compared)
                bar.done(_line(figures))
            elif "run" in figures:
                results.add(figures["run"])
                bar.done(_line(figures["run"]))
            else:
                speed, how = figures["read_bandwidth_gb_s"], figures["read_by"]
                results.add_bandwidth(case.dtype, case.ranks, speed, how)

        bar.show(str(case))
        try:
            if case.peer:
                case.peer.run(case.dtype, case.ranks, on_output)
            else:
                listen(self._command(case.dtype, case.ranks), environment(self._env), on_output)
        except MpgptError as error:
            raise MpgptError(f"{case}: {error}") from None


class RunProgress(ProgressBar):
    """A bar of a bench's runs; where standard error is no terminal, a line for each run."""

    def __init__(self, total: int) -> None:
        super().__init__("runs", total=total, window_s=3600)

    def done(self, line: str) -> None:
        self.advance()
        if not self.watched:
            notify(line)


def publish(results: Results, picture: Path | None) -> None:
    """Print the table, and write the picture, of the runs so far."""
    document = results.document()
    if not document["runs"]:
        return
    try:
        show(document)
    finally:  # the table's pipe may be closed
        if picture:
            write_atomically(picture, plot.plot(document, picture.suffix), f"--plot {picture}")


def _crowded(ring: Ring) -> bool:
    """Whether the ranks on this host have more threads than it has cores; one rank alone may, too."""
    here = ring.reports[0].node
    return sum(node.threads for node in by_host(report.node for report in ring.reports)[here.host]) > here.cores


def _line(run: Mapping[str, Any]) -> str:
    speed = run["decode_tokens_per_s"]
    shared = ", sharing cores" if run.get("oversubscribed") else ""
    who = f"{_whose(run.get('peer', ''))}{counted(run['ranks'], 'rank')}{shared}, {run['dtype']}"
    figure = f"{speed:.1f} tokens/s" if speed else "no time at which all of them decode; more --new-tokens would help"
    return f"{who}, {counted(run['concurrency'], 'sequence')}: {figure}"


def _whose(peer: str) -> str:
    return f"{peer}, " if peer else ""


def _emit(figures: Mapping[str, Any]) -> None:
    print(json.dumps(figures), flush=True)
