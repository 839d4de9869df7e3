"""Forming the ring: every rank agrees on a model and a plan, loads its slice, and takes its place.

Knows: what has to happen in which order on which rank, and how an error anywhere ends the start everywhere.
Must not know: options, prompts, files other than the model's folder.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import psutil
import torch

from mpgpt.architecture import ModelConfig, read_config
from mpgpt.cluster import DTYPES, shape_of
from mpgpt.config import DtypeName
from mpgpt.core import Node, Row, Shape, Span, Step, Workload
from mpgpt.costs import Links, held_bytes
from mpgpt.drafts import ROW_COST
from mpgpt.engine import Engine
from mpgpt.errors import ModelError, MpgptError, UsageError
from mpgpt.folder import read_json
from mpgpt.kernels import Kernels
from mpgpt.ledger import Ledger
from mpgpt.link import World
from mpgpt.model import Slice, weights_of
from mpgpt.pipeline import Pipeline, relay, stand_by
from mpgpt.plan import AT_HOME, Objective, place
from mpgpt.profile import node_from, survey
from mpgpt.pull import find, pull
from mpgpt.sampler import Sampler
from mpgpt.scheduler import CHUNK, Scheduler
from mpgpt.stage import PassStage, Stage, TorchStage
from mpgpt.trials import Trial, choose, trial_from
from mpgpt.weights import Checkpoint, lean_heap
from mpgpt.wire import Codec

MAX_CONTEXT = 4096
"""The context that is taken when none is asked for and the model would allow more."""

TRIED_ROWS, TRIES = 8, 3
"""How many rows, how often, a rank computes to see what another row costs."""

Spans = list[tuple[int, int] | None]
"""Every rank's layers, for JSON; None for a rank without layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every rank must know before it can load. Made on rank 0 and broadcast as JSON."""

    config: dict[str, Any]
    spans: Spans
    dtype: str
    slots: int
    context: int
    threads: int | None

    chosen: list[dict[str, str]]
    """For each rank the kernels that its host chose (``Kernels.chosen``)."""

    def kernels(self, rank: int) -> Kernels:
        return Kernels(dtype=self.dtype, chosen=self.chosen[rank])

    def span(self, rank: int) -> Span | None:
        pair = self.spans[rank]
        return pair and Span(start=pair[0], stop=pair[1])

    @property
    def members(self) -> list[int]:
        """The ranks of the ring, in its order: rank 0, and all others that have layers."""
        return [rank for rank, pair in enumerate(self.spans) if pair or not rank]

    @property
    def stages(self) -> int:
        return sum(1 for pair in self.spans if pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """What the hosts found out about kernels."""

    chosen: list[dict[str, str]]
    """By rank."""
    trials: dict[str, list[Trial]]
    """By host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What a plan stands on."""

    shape: Shape
    nodes: list[Node]
    links: Links = field(repr=False)
    others: Mapping[str, Shape]
    """The same model held in fewer bytes, by dtype."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one rank became, as it reports it."""

    node: Node
    span: Span | None
    slice_bytes: int
    kv_bytes: int


def together(world: World, work: Callable[[], Any]) -> list[Any]:
    """Do ``work`` on every rank; every rank's (JSON) answer on every rank.

    If it fails anywhere, raises the same error everywhere, naming rank, host and cause, so that all end alike.
    """
    try:
        report: dict[str, Any] = {"answer": work()}
    except MpgptError as error:
        report = {"error": str(error), "status": error.exit_status}
    except Exception as error:
        report = {"error": f"{type(error).__name__}: {error}", "status": 1}
    reports = [json.loads(data) for data in world.gather(json.dumps(report).encode())]
    failed = [(rank, report) for rank, report in enumerate(reports) if "error" in report]
    if not failed:
        return [report["answer"] for report in reports]
    kind = UsageError if failed[0][1]["status"] == UsageError.exit_status else MpgptError
    if world.size == 1 or kind is UsageError:
        raise kind(failed[0][1]["error"])
    raise kind("\n".join(f"rank {rank} on {world.hosts[rank]}: {report['error']}" for rank, report in failed))


def locate(world: World, name: str, home: Path, report: Callable[[str], None]) -> Path:
    """The model's folder on this host. Where a host lacks it, its first rank pulls it."""

    def here() -> str:
        folder = find(name, home)
        if folder is None and Path(name).is_dir():
            raise ModelError(f"{name} is no model folder: it holds no config.json")
        if folder is None and local_rank(world) == 0:
            folder = pull(name, home=home, report=report, progress=world.rank == 0)
        return str(folder or "")

    mine = together(world, here)[world.rank]
    folder = Path(mine) if mine else find(name, home)
    together(world, lambda: _present(folder, name))
    assert folder is not None
    return folder


def _present(folder: Path | None, name: str) -> None:
    if folder is None:
        raise ModelError(f"the model {name} is not on this host")


def agree(
    world: World, config: ModelConfig, *, dtype: str, threads: int | None, kernel: str, memory: Path | None
) -> Tried:  # fmt: skip
    """Choose the kernels for this model on every host: its first rank tries, while the others wait, and all of the host
    take the same. ``memory`` is where each host keeps what it found. Raises on every rank what fails on any.
    """
    share_cores(world, threads)

    def mine() -> dict[str, Any] | None:
        if local_rank(world):
            return None
        with lean_heap():  # what is tried is less than a slice, and gone before the slice comes
            kernels, trials = choose(dtype, weights_of(config), pinned=kernel, memory=memory)
        return {"chosen": dict(kernels.chosen), "trials": [asdict(trial) for trial in trials]}

    answers = together(world, mine)
    of_host = {host: answers[world.hosts.index(host)] for host in world.hosts}
    return Tried(
        chosen=[of_host[host]["chosen"] for host in world.hosts],
        trials={host: [trial_from(raw) for raw in answer["trials"]] for host, answer in of_host.items()},
    )


def settle(
    world: World, folder: Path, *, dtype: DtypeName, slots: int, context: int | None, threads: int | None,
    plan: Callable[[ModelConfig], tuple[Span | None, ...] | None], objective: Objective = "throughput",
    workload: Workload = Workload(), report: Callable[[str], None] = lambda line: None,  # noqa: B008
    kernel: str = "auto", memory: Path | None = None, explain: Callable[[Tried], None] = lambda tried: None,
    everyone: bool = False,
) -> Settings:  # fmt: skip
    """Rank 0 decides the plan and the sizes; every rank gets them. ``plan`` gives the spans, or None for auto: then
    every rank is measured, and the layers are placed so that ``objective`` is best met for ``workload``.

    ``report`` hears, on rank 0, of ranks that are better left without layers, and ``explain`` of the kernels that were
    tried (see ``agree``). With ``everyone`` no rank is left without layers. Raises ``UsageError`` on every rank
    when the spans do not fit the model or the number of ranks, or the model does not fit the ranks' memory.
    """

    def decide() -> dict[str, Any]:
        raw = read_json(folder / "config.json")
        config = read_config(raw)
        positions = context_of(config, context)
        spans = plan(config) or (None if world.size > 1 else (Span(start=0, stop=config.layers),))
        return {"config": raw, "context": positions, "spans": spans and _plain(spans)}

    def placed() -> Spans:
        work = replace(workload, sequences=min(workload.sequences, slots))
        spans = place(
            ground.shape, ground.nodes, ground.links, work, objective, others=ground.others, home=AT_HOME,
            ranks=world.size if everyone else None,
        ).spans  # fmt: skip
        for node, span in zip(ground.nodes, spans, strict=True):
            if span is None:
                room = not node.free or held_bytes(ground.shape, 1, first=False, last=False) <= node.free
                why = "the ring is faster without it" if room else "its free memory does not hold one"
                report(f"rank {node.rank} on {node.host} has no layers: {why}")
        return _plain(spans)

    chosen = together(world, lambda: None if world.rank else decide())[0]
    config = read_config(chosen["config"])
    tried = agree(world, config, dtype=dtype, threads=threads, kernel=kernel, memory=memory)
    if world.rank == 0:
        explain(tried)
    if not chosen["spans"]:
        kernels = Kernels(dtype=dtype, chosen=tried.chosen[world.rank])
        ground = measure(world, config, kernels, slots=slots, context=chosen["context"], threads=threads)
        chosen["spans"] = together(world, lambda: None if world.rank else placed())[0]
    return Settings(**chosen, dtype=dtype, slots=slots, threads=threads, chosen=tried.chosen)


def context_of(config: ModelConfig, asked: int | None) -> int:
    """The positions of a slot; ``UsageError`` when the model has fewer than were asked for."""
    if asked is not None and asked > config.positions:
        raise UsageError(f"--context {asked} is more than the model's {config.positions} positions")
    return asked or min(config.positions, MAX_CONTEXT)


def _plain(spans: Sequence[Span | None]) -> Spans:
    return [(span.start, span.stop) if span else None for span in spans]


def measure(
    world: World, config: ModelConfig, kernels: Kernels, *, slots: int, context: int, threads: int | None
) -> Ground:
    """Measure every rank and the links for a model of this shape. All ranks must call it."""
    nodes, links = survey(
        world, partial(together, world), config, kernels=kernels, threads=share_cores(world, threads), context=context
    )
    shapes = {name: shape_of(config, name, slots, context) for name in get_args(DtypeName)}
    shape = shapes[kernels.dtype]
    others = {str(name): shapes[name] for name in DTYPES if shapes[name].layer_bytes < shape.layer_bytes}
    return Ground(shape=shape, nodes=nodes, links=links, others=others)


def local_rank(world: World) -> int:
    """This rank's position among those of its host."""
    return world.hosts[: world.rank].count(world.hosts[world.rank])


def share_cores(world: World, threads: int | None) -> int:
    """Give torch its threads: as many as told, which keeps whatever binding there is, or this rank's share of the
    host's cores. For that the binding to one core, which is mpirun's default, is undone."""
    if threads is None:
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_setaffinity"):
            if world.launched:
                os.sched_setaffinity(0, range(cores))
            cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // world.hosts.count(world.hosts[world.rank]))
    torch.set_num_threads(threads)
    return threads


class Ring:
    """This rank's place in a formed ring. Rank 0 has the ``engine``; the others ``serve``."""

    def __init__(self, world: World, settings: Settings, folder: Path) -> None:
        """Loads this rank's slice and connects it. Raises on every rank what failed on any."""
        self.config = read_config(settings.config)
        self.world, self._settings = world, settings
        threads = share_cores(world, settings.threads)
        self._load(folder)
        self.places = [_place(p) for p in together(world, lambda: self._report(threads))]
        itemsize = settings.kernels(world.rank).activations.itemsize
        self._codec = Codec(
            rows=settings.slots, tokens=settings.slots + CHUNK, token_bytes=self.config.embed * itemsize,
            slots=settings.slots, context=settings.context, ranks=world.size,
        )  # fmt: skip
        self._connect()
        self._stage: Stage = PassStage()
        if self._slice:
            self._stage = TorchStage(self._slice, self._sampler, self._outbound.progress)
        self._row_cost = self._try_rows() if settings.context >= TRIED_ROWS else ROW_COST
        gc.freeze()  # libraries and weights are here to stay: no collection in the middle of a step need look at them

    def _try_rows(self) -> float:
        """What one more row costs, of a step of one: every rank tries with its slice, as a draft would be computed."""

        def seconds() -> list[float]:
            return [self._seconds(rows) if self._slice else 0.0 for rows in (1, TRIED_ROWS)]

        one, many = (float(sum(times)) for times in zip(*together(self.world, seconds), strict=True))
        return max(0.0, (many - one) / ((TRIED_ROWS - 1) * one))

    def _seconds(self, rows: int) -> float:
        """The least of a few steps of so many positions. They are the first of a slot, which forgets them."""
        assert self._slice
        hidden = bytearray(0 if self._slice.first else rows * self._codec.token_bytes)
        row = Row(slot=0, start=0, ids=(0,) * rows, outputs=rows)
        times = []
        for _ in range(TRIES):
            begun = time.perf_counter()
            self._stage.forward(Step(epoch=0, number=0, rows=(row,), hidden=hidden))
            times.append(time.perf_counter() - begun)
        return min(times)

    def _load(self, folder: Path) -> None:
        s, span = self._settings, self._settings.span(self.world.rank)
        self._slice: Slice | None = None

        def load() -> None:
            if not span:
                return
            with lean_heap():
                self._slice = Slice(
                    self.config,
                    span,
                    Checkpoint(folder),
                    slots=s.slots,
                    context=s.context,
                    kernels=s.kernels(self.world.rank),
                )
            self._sampler = Sampler(slots=s.slots, context=s.context, vocab=self.config.vocab)

        together(self.world, load)

    def _connect(self) -> None:
        """The link to the next rank of the ring and from the one before; to ranks outside it only rank 0's."""
        world, members, capacity = self.world, self._settings.members, self._codec.max_frame
        outside = [rank for rank in range(world.size) if rank not in members]
        self._idle = [world.connect(0, rank, capacity) for rank in outside if world.rank in (0, rank)]
        if world.rank in outside:
            self._inbound = self._outbound = self._idle[0]
            return
        at = members.index(world.rank)
        before, after = members[at - 1], members[(at + 1) % len(members)]
        # A rank opens the edge to the next before the edge from the one before; in a ring of one they are the same.
        self._outbound = world.connect(world.rank, after, capacity)
        self._inbound = self._outbound if after == world.rank else world.connect(before, world.rank, capacity)

    def _report(self, threads: int) -> dict[str, Any]:
        world, memory, model = self.world, psutil.virtual_memory().total, self._slice
        node = Node(
            rank=world.rank, host=world.hosts[world.rank], kind="cpu", memory=memory, local_rank=local_rank(world),
            threads=threads,
        )  # fmt: skip
        nbytes, kv_nbytes = (model.nbytes, model.kv_nbytes) if model else (0, 0)
        span = self._settings.span(world.rank)
        return asdict(Place(node=node, span=span, slice_bytes=nbytes, kv_bytes=kv_nbytes))

    @property
    def slots(self) -> int:
        return self._settings.slots

    def engine(self, *, drafts: bool = False) -> Engine:
        """Rank 0's end: what takes requests. ``drafts`` are foretold tokens, checked in one step with the next."""
        assert self.world.rank == 0
        s, bell = self._settings, self.world.bell
        scheduler = Scheduler(
            slots=s.slots, context=s.context, stages=s.stages, drafts=drafts, row_cost=self._row_cost
        )  # fmt: skip
        # One step more than stages, so that the first stage has the next chunk in hand while results are under way;
        # alone, a second step would only wait.
        depth = 1 if len(s.members) == 1 else s.stages + 1
        ledger = Ledger(self.world.rank)
        pipeline = Pipeline(self._stage, self._codec, self._outbound, self._inbound, ledger, self._idle)
        return Engine(
            pipeline, scheduler, vocab=self.config.vocab, depth=depth, wake=bell.ring,
            sleep=lambda: bell.sleep(60.0),
        )  # fmt: skip

    def serve(self) -> None:
        """Every other rank's life: until rank 0 stops the ring."""
        if self.world.rank in self._settings.members:
            relay(self._stage, self._codec, self._inbound, self._outbound, Ledger(self.world.rank))
        else:
            stand_by(self._codec, self._inbound)


def _place(raw: dict[str, Any]) -> Place:
    return Place(**{**raw, "node": node_from(raw["node"]), "span": raw["span"] and Span(**raw["span"])})
