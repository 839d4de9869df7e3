"""Forming the ring: every rank loads its slice, and takes its place between two others.

Knows: what has to happen in which order on which rank once all have agreed (``bootstrap.py``).
Must not know: options, prompts, files other than the model's folder.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from mpgpt.cluster.bootstrap import local_rank, share_cores
from mpgpt.cluster.rank_probe import node_from
from mpgpt.cluster.ring_config import RingConfig
from mpgpt.core import Row, Span, Step
from mpgpt.display import silent
from mpgpt.engine.drafts import ROW_COST
from mpgpt.engine.engine import Engine
from mpgpt.engine.pipeline import Pipeline, relay, stand_by
from mpgpt.engine.scheduler import CHUNK, Scheduler
from mpgpt.engine.stage import Device, PassStage, Stage, TorchStage
from mpgpt.engine.stage_timer import OTHER, WAIT, StageTimer
from mpgpt.machines import Node
from mpgpt.model.footprint import HIDDEN_BYTES
from mpgpt.model.known_families import read_config
from mpgpt.model.sampler import Sampler
from mpgpt.model.slice import Slice, has_another_head
from mpgpt.model.weights import Checkpoint, lean_heap
from mpgpt.transport.collective import on_all_ranks
from mpgpt.transport.link import World
from mpgpt.transport.wire import Codec

ANOTHER_HEAD = "config.json says that head and embedding are one; the file has another lm_head.weight, which is used"
TRIED_ROWS, TRIES = 8, 3
"""How many rows, how often, a rank computes to see what another row costs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank became, as it reports it."""

    node: Node
    span: Span | None
    slice_bytes: int
    kv_bytes: int


class Ring:
    """This rank's place in a formed ring. Rank 0 has the ``engine``; the others ``serve``."""

    def __init__(
        self, world: World, settings: RingConfig, folder: Path, device: Device | None = None,
        report: Callable[[str], None] = silent,
    ) -> None:  # fmt: skip
        """Loads this rank's slice and connects it; ``device`` is the machine behind this rank, if there is one.
        ``report`` gets, on rank 0, what is odd about the weights. Raises on every rank what failed on any."""
        self.config = read_config(settings.config)
        self.world, self._settings, self._device = world, settings, device
        threads = share_cores(world, settings.threads)
        for line in self._load(folder):
            if world.rank == 0:
                report(line)
        self.reports = [_place(p) for p in on_all_ranks(world, lambda: self._report(threads))]
        self._codec = Codec(
            rows=settings.slots, tokens=settings.slots + CHUNK, token_bytes=self.config.embed * HIDDEN_BYTES,
            slots=settings.slots, context=settings.context, ranks=world.size,
        )  # fmt: skip
        self._connect()
        own = TorchStage(self._slice, self._sampler, self._outbound.progress) if self._slice else None
        self._own, self._stage = own, self._make_stage(own)
        self._row_cost = self._try_rows() if settings.context >= TRIED_ROWS else ROW_COST
        gc.freeze()  # libraries and weights are here to stay: no collection in the middle of a step need look at them

    def _make_stage(self, own: TorchStage | None) -> Stage:
        s, device = self._settings, self._device
        if device:
            return device.stage(own, slots=s.slots, context=s.context)
        return own or PassStage()

    def _try_rows(self) -> float:
        """What one more row costs, of a step of one: every rank tries with its slice, as a draft would be computed."""

        def seconds() -> list[float]:
            return [self._seconds(self._own, rows) if self._own else 0.0 for rows in (1, TRIED_ROWS)]

        one, many = (float(sum(times)) for times in zip(*on_all_ranks(self.world, seconds), strict=True))
        return max(0.0, (many - one) / ((TRIED_ROWS - 1) * one))

    def _seconds(self, stage: TorchStage, rows: int) -> float:
        """The least of a few steps of so many positions. They are the first of a slot, which forgets them."""
        assert self._slice
        hidden = bytearray(0 if self._slice.first else rows * self._codec.token_bytes)
        row = Row(slot=0, start=0, ids=(0,) * rows, outputs=rows)
        times = []
        for _ in range(TRIES):
            begun = time.perf_counter()
            stage.forward(Step(epoch=0, number=0, rows=(row,), hidden=hidden))
            times.append(time.perf_counter() - begun)
        return min(times)

    def _load(self, folder: Path) -> list[str]:
        """What any rank found odd, in sentences."""
        s, span = self._settings, self._settings.span(self.world.rank)
        self._slice: Slice | None = None

        def load() -> str:
            if self._device:
                self._device.check(folder)
            if not span or (self._device and not self._device.fallback):
                return ""
            checkpoint = Checkpoint(folder)
            with lean_heap():
                self._slice = Slice(
                    self.config,
                    span,
                    checkpoint,
                    slots=s.slots,
                    context=s.context,
                    kernels=s.kernels(self.world.rank),
                )
            self._sampler = Sampler(slots=s.slots, context=s.context, vocab=self.config.vocab)
            another = self._slice.last and has_another_head(self.config, checkpoint)
            return f"{folder}: {ANOTHER_HEAD}" if another else ""

        return [line for line in on_all_ranks(self.world, load) if line]

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
            rank=world.rank, host=world.hosts[world.rank], kind="ipad" if self._device else "cpu", memory=memory,
            local_rank=local_rank(world), threads=threads,
        )  # fmt: skip
        nbytes, kv_nbytes = (model.nbytes, model.kv_nbytes) if model else (0, 0)
        span = self._settings.span(world.rank)
        return asdict(RankReport(node=node, span=span, slice_bytes=nbytes, kv_bytes=kv_nbytes))

    @property
    def slots(self) -> int:
        return self._settings.slots

    def engine(self, *, drafts: bool = False) -> Engine:
        """Rank 0's end: what takes requests. ``drafts`` are foretold tokens, checked in one step with the next."""
        assert self.world.rank == 0
        s, world, bell = self._settings, self.world, self.world.bell
        scheduler = Scheduler(
            slots=s.slots, context=s.context, stages=s.stages, drafts=drafts, row_cost=self._row_cost
        )  # fmt: skip
        # One step more than stages, so that the first stage has the next chunk in hand while results are under way;
        # alone, a second step would only wait.
        depth = 1 if len(s.members) == 1 else s.stages + 1
        timer = StageTimer(self.world.rank)
        pipeline = Pipeline(self._stage, self._codec, self._outbound, self._inbound, timer, self._idle)

        def sleep() -> None:
            timer.enter(WAIT)  # for requests, here
            bell.sleep(60.0)
            world.check()
            timer.enter(OTHER)

        return Engine(pipeline, scheduler, vocab=self.config.vocab, depth=depth, wake=bell.ring, sleep=sleep)

    def serve(self) -> None:
        """Every other rank's life: until rank 0 stops the ring."""
        if self.world.rank in self._settings.members:
            relay(self._stage, self._codec, self._inbound, self._outbound, StageTimer(self.world.rank))
        else:
            stand_by(self._codec, self._inbound)


def _place(raw: dict[str, Any]) -> RankReport:
    return RankReport(**{**raw, "node": node_from(raw["node"]), "span": raw["span"] and Span(**raw["span"])})
