"""Forming the ring: every rank agrees on a model and a plan, loads its slice, and takes its place.

Knows: what has to happen in which order on which rank, and how an error anywhere ends the start everywhere.
Must not know: options, prompts, files other than the model's folder.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from mpgpt.architecture import ModelConfig, read_config
from mpgpt.core import Node, Span
from mpgpt.drafts import ROW_COST
from mpgpt.engine import Engine
from mpgpt.errors import ModelError, MpgptError, UsageError
from mpgpt.folder import read_json
from mpgpt.kernels import Kernels
from mpgpt.ledger import Ledger
from mpgpt.link import World
from mpgpt.model import Slice
from mpgpt.pipeline import Pipeline, relay
from mpgpt.plan import divide, head_in_layers
from mpgpt.pull import find, pull
from mpgpt.sampler import Sampler
from mpgpt.scheduler import CHUNK, Scheduler
from mpgpt.stage import TorchStage
from mpgpt.weights import Checkpoint, lean_heap
from mpgpt.wire import Codec

MAX_CONTEXT = 4096
"""The context that is taken when none is asked for and the model would allow more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What every rank must know before it can load. Made on rank 0 and broadcast as JSON."""

    config: dict[str, Any]
    spans: list[tuple[int, int]]
    dtype: str
    slots: int
    context: int
    threads: int | None

    @property
    def kernels(self) -> Kernels:
        return Kernels(dtype=self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """What one rank became, as it reports it."""

    node: Node
    span: Span
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


def settle(
    world: World, folder: Path, *, dtype: str, slots: int, context: int | None, threads: int | None,
    plan: Callable[[ModelConfig], tuple[Span, ...] | None],
) -> Settings:  # fmt: skip
    """Rank 0 decides the plan and the sizes; every rank gets them. ``plan`` gives the spans, or None for auto.

    Raises ``UsageError`` on every rank when they do not fit the model or the number of ranks.
    """

    def decide() -> dict[str, Any] | None:
        if world.rank:
            return None
        raw = read_json(folder / "config.json")
        config = read_config(raw)
        if context is not None and context > config.positions:
            raise UsageError(f"--context {context} is more than the model's {config.positions} positions")
        spans = plan(config) or divide(
            config.layers, world.size, head_in_layers(config.head_weights, config.layer_weights)
        )
        chosen = Settings(
            config=raw, spans=[(s.start, s.stop) for s in spans], dtype=dtype, slots=slots,
            context=context or min(config.positions, MAX_CONTEXT), threads=threads,
        )  # fmt: skip
        return asdict(chosen)

    return Settings(**together(world, decide)[0])


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
        itemsize = settings.kernels.activations.itemsize
        self._codec = Codec(
            rows=settings.slots, tokens=settings.slots + CHUNK, token_bytes=self.config.embed * itemsize,
            slots=settings.slots, context=settings.context, ranks=world.size,
        )  # fmt: skip
        rank, size, capacity = world.rank, world.size, self._codec.max_frame
        # A rank opens the edge to the next before the edge from the one before; in a ring of one they are the same.
        self._outbound = world.connect(rank, (rank + 1) % size, capacity)
        self._inbound = self._outbound if size == 1 else world.connect((rank - 1) % size, rank, capacity)
        self._stage = TorchStage(self._slice, self._sampler, self._outbound.progress)
        gc.freeze()  # libraries and weights are here to stay: no collection in the middle of a step need look at them

    def _load(self, folder: Path) -> None:
        s = self._settings
        start, stop = s.spans[self.world.rank]

        def load() -> None:
            with lean_heap():
                self._slice = Slice(
                    self.config, Span(start=start, stop=stop), Checkpoint(folder), slots=s.slots, context=s.context,
                    kernels=s.kernels,
                )  # fmt: skip
            self._sampler = Sampler(slots=s.slots, context=s.context, vocab=self.config.vocab)

        together(self.world, load)

    def _report(self, threads: int) -> dict[str, Any]:
        world, memory = self.world, psutil.virtual_memory().total
        node = Node(
            rank=world.rank, host=world.hosts[world.rank], kind="cpu", memory=memory, local_rank=local_rank(world),
            threads=threads,
        )  # fmt: skip
        return asdict(
            Place(node=node, span=self._slice.span, slice_bytes=self._slice.nbytes, kv_bytes=self._slice.kv_nbytes)
        )

    @property
    def slots(self) -> int:
        return self._settings.slots

    def engine(self, *, drafts: bool = False, row_cost: float = ROW_COST) -> Engine:
        """Rank 0's end: what takes requests.

        ``drafts`` are foretold tokens, checked in one step with the next; ``row_cost`` is as in ``Scheduler``.
        """
        assert self.world.rank == 0
        s, bell = self._settings, self.world.bell
        stages = self.world.size
        scheduler = Scheduler(
            slots=s.slots, context=s.context, stages=stages, drafts=drafts, row_cost=row_cost
        )  # fmt: skip
        # One step more than stages, so that the first stage has the next chunk in hand while results are under way;
        # alone, a second step would only wait.
        depth = 1 if stages == 1 else stages + 1
        pipeline = Pipeline(self._stage, self._codec, self._outbound, self._inbound, Ledger(self.world.rank))
        return Engine(
            pipeline, scheduler, vocab=self.config.vocab, depth=depth, wake=bell.ring,
            sleep=lambda: bell.sleep(60.0),
        )  # fmt: skip

    def serve(self) -> None:
        """Every other rank's life: until rank 0 stops the ring."""
        relay(self._stage, self._codec, self._inbound, self._outbound, Ledger(self.world.rank))


def _place(raw: dict[str, Any]) -> Place:
    return Place(**{**raw, "node": Node(**raw["node"]), "span": Span(**raw["span"])})
