"""The speed of every rank and of every link between two, measured in about a second.

Knows: how long layers, the head and a step's rest take here, and how memory is shared by the ranks of a host;
in which order ranks measure, so that they disturb one another as little or as much as they will at work.
Must not know: what a plan makes of the figures, nor the model's weights: it multiplies with its own.

What is timed is a ``TorchStage`` with some layers of the model's shape, enough of them that no cache holds their
weights, and a part of the head. Several ranks of one host share its memory, and slow each other down where both
read it. With one sequence only one of them has work at any time, so one row is measured by the ranks of a host
in turn; everything else by all of them at once, as in a ring that is full.

A rank may not have its core for itself: another program, a quota, more ranks than cores. That comes in slices of
milliseconds, which hit one sample and miss the next. So single steps are timed in processor time, and all of it
is then stretched by what the whole measurement took longer by the clock.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import psutil
import torch
from torch import Tensor

from mpgpt.cluster.link_probe import measure_links
from mpgpt.core import Row, Span, Step
from mpgpt.engine.scheduler import CHUNK
from mpgpt.engine.stage import Device, TorchStage
from mpgpt.machines import Links, Node, Speed
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.footprint import HIDDEN_BYTES
from mpgpt.model.known_families import family_of
from mpgpt.model.linear import Kernels
from mpgpt.model.sampler import Sampler
from mpgpt.model.slice import Slice
from mpgpt.model.weights import lean_heap
from mpgpt.transport.collective import on_all_ranks
from mpgpt.transport.link import World
from mpgpt.transport.wire import Codec

ROWS = (2, 4, 8, 16, 32)
"""Rows for which a step is timed, besides one alone and a prompt's chunk."""
LEAST_BYTES = 96 << 20
"""Weights of the layers together at least: three times the largest cache that a core usually has to itself."""
THICK_BYTES = 64 << 20
"""A layer that is larger is measured by a part of its heads and of its MLP."""
HEAD_BYTES = 64 << 20
LAYERS = 3
"""Layers at least: what lies between two layers' ends is a layer, and the last one of a chunk is not whole."""
LONG = 1024
"""Positions in the cache when attention is timed."""
WINDOW_S = 0.06
"""How long one row count is timed, if three steps do not take longer."""
INTERRUPTED = 1.25
"""The ratio of time by the clock to processor time above which a rank alone does not have its core for itself."""
NAP_S, NAPS = 0.008, 9
"""How long, and how often, a rank sleeps before a step to find out what sleeping costs: as long as others have work."""
BLOCK = 1 << 21


class SyntheticWeights:
    """A ``Source`` of weights that cost nothing to come by. None is zero or close to it: pages of zeros are all one
    page, and denormal numbers are slow."""

    def __init__(self, config: ModelConfig) -> None:
        family = family_of(config)
        self._embed, self._head = config.embed, (config.vocab, config.embed)
        self._shapes = family.shapes(config)
        self._positions, self._position_count = family.positions, config.positions
        self._generator = torch.Generator().manual_seed(1)

    def _shape(self, name: str, default: tuple[int, ...]) -> tuple[int, ...]:
        return self._shapes.get(".".join(name.split(".")[-3:-1]), default)

    def blocks(self, name: str, *, transpose: bool = False) -> Iterator[Tensor]:
        outputs, inputs = self._shape(name, self._head)
        row_I = self._some(inputs) / math.sqrt(inputs)
        for column_O in torch.split(self._some(outputs), max(1, BLOCK // inputs)):
            yield torch.outer(column_O, row_I)

    def holds(self, name: str) -> bool:
        return True

    def vector(self, name: str) -> Tensor:
        if name == self._positions:
            return self._some(self._embed).expand(self._position_count, self._embed)
        return self._some(self._shape(name, (self._embed,))[0])

    def mapped(self, name: str) -> Tensor:
        return self._some(self._head[1]).expand(self._head)

    def _some(self, count: int) -> Tensor:
        """Numbers of either sign, of a size between a half and one."""
        x = torch.rand(count, generator=self._generator) - 0.5
        return x + x.sign() * 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One step's times: of each whole layer, of the head, and of the rest; seconds of processor time."""

    layers: tuple[float, ...]
    head: float
    rest: float


class Probe:
    """Some layers and a part of the head of a model's shape, and how long a step through them takes."""

    def __init__(self, config: ModelConfig, kernels: Kernels, context: int, free: int) -> None:
        """Uses a quarter of the ``free`` bytes at most, where three of the thinnest layers fit into half of that. Times
        are of the whole layer and the whole head."""
        thin = _thinned(config, int(min(THICK_BYTES, free / 4 / (2 * LAYERS)) / kernels.weight_bytes))
        layer_bytes = int(thin.layer_weights * kernels.weight_bytes)
        layers = max(LAYERS, min(-(-LEAST_BYTES // layer_bytes), int(free / 8 / layer_bytes), config.layers))
        vocab = min(config.vocab, max(1, int(min(HEAD_BYTES, free / 8) / (config.embed * kernels.weight_bytes))))
        self._layer_scale = config.layer_weights / thin.layer_weights
        self._head_scale = config.vocab / vocab
        self._context = max(CHUNK, min(context, LONG))
        # One layer more than are built: those of the span are then not the first, and need no embedding.
        cycled = [i % config.layers for i in range(layers + 1)]
        shape = replace(
            thin, layers=layers + 1, vocab=vocab, scales=tuple(config.scales[i] for i in cycled),
            windows=tuple(config.windows[i] for i in cycled),
        )  # fmt: skip
        with lean_heap():
            model = Slice(
                shape,
                Span(start=1, stop=layers + 1),
                SyntheticWeights(shape),
                slots=1,
                context=self._context,
                kernels=kernels,
            )
        model.fill_cache(0.5)
        self._marks: list[float] = []
        self._hidden = torch.ones(CHUNK, shape.embed).view(torch.uint8).numpy().reshape(CHUNK, -1)
        self._codec = Codec(
            rows=CHUNK, tokens=CHUNK, token_bytes=self._hidden.shape[1], slots=1, context=self._context, ranks=1
        )
        sampler = Sampler(slots=1, context=self._context, vocab=vocab)
        self._stage = TorchStage(model, sampler, lambda: self._marks.append(time.thread_time()))

    def decode(self, rows: int) -> dict[str, float]:
        """A step of ``rows`` rows with hardly anything in the cache."""
        return self._time([Row(slot=0, start=i, ids=(1,), outputs=1) for i in range(rows)])

    def alone(self) -> dict[str, float]:
        """One row, and what the cache adds to a layer for each position in it."""
        return self._attended(1, outputs=1)

    def cold(self) -> float:
        """How many times as long a step of one row takes after sleeping; by the clock, for that is what others see."""
        step = self._step_of([Row(slot=0, start=0, ids=(1,), outputs=1)])

        def seconds(nap: float) -> float:
            time.sleep(nap)
            begun = time.perf_counter()
            self._step(step)
            return time.perf_counter() - begun

        # In turn, so that a moment that is slow for other reasons is slow for both.
        pairs = [(seconds(NAP_S), seconds(0.0)) for _ in range(NAPS)]
        return max(1.0, statistics.median(slept / awake for slept, awake in pairs))

    def prompt(self) -> dict[str, float]:
        """A prompt's chunk, and what the cache adds to a layer for each of its tokens and each position."""
        return self._attended(CHUNK, outputs=0)

    def short_prompt(self) -> dict[str, float]:
        """Half a chunk."""
        return self._time([Row(slot=0, start=0, ids=(1,) * (CHUNK // 2), outputs=0)])

    def _attended(self, tokens: int, outputs: int) -> dict[str, float]:
        """One row, with nothing in the cache before it and with all that there is room for."""
        before = self._context - tokens
        short, long = (
            self._time([Row(slot=0, start=start, ids=(1,) * tokens, outputs=outputs)]) for start in (0, before)
        )
        both = {key: short[key] + long[key] for key in ("wall", "cpu")}
        attend = max(0.0, long["layer"] - short["layer"]) / (tokens * max(1, before))
        return short | both | {"attend": attend}

    def _time(self, rows: Sequence[Row]) -> dict[str, float]:
        """Of as many steps as the window allows the medians of ``layer``, ``head`` and ``rest``, and the sums of
        ``wall`` and ``cpu``; seconds, all but ``wall`` of processor time."""
        step = self._step_of(rows)
        self._step(step)  # libraries choose their code, and come into memory
        samples, begun, cpu = list[Sample](), time.perf_counter(), time.thread_time()
        while len(samples) < 3 or time.perf_counter() - begun < WINDOW_S:
            samples.append(self._step(step))
        return {
            "layer": self._layer_scale * statistics.median(s for sample in samples for s in sample.layers),
            "head": self._head_scale * statistics.median(sample.head for sample in samples),
            "rest": statistics.median(sample.rest for sample in samples),
            "wall": time.perf_counter() - begun,
            "cpu": time.thread_time() - cpu,
        }

    def _step_of(self, rows: Sequence[Row]) -> Step:
        tokens = sum(len(row.ids) for row in rows)
        return Step(epoch=0, number=0, rows=tuple(rows), hidden=self._hidden[:tokens].reshape(-1).data)

    def _step(self, step: Step) -> Sample:
        marks = self._marks
        marks.clear()
        begun = time.thread_time()
        self._stage.forward(self._codec.decode(self._codec.encode(step)))  # type: ignore[arg-type]
        done = time.thread_time()
        layers = [b - a for a, b in pairwise(marks if step.outputs else marks[:-1])]
        rest = marks[0] - begun - statistics.median(layers)
        return Sample(layers=tuple(layers), head=done - marks[-1], rest=max(0.0, rest))


def _thinned(config: ModelConfig, weights: int) -> ModelConfig:
    """The same with layers of fewer heads and a narrower MLP, if one has more than ``weights`` weights.

    Not where heads must fill the width of the hidden states, as in GPT-2; its largest layer has 31 million weights.
    """
    if not family_of(config).heads_reducible:
        return config
    parts = [n for n in range(1, config.kv_heads + 1) if config.kv_heads % n == config.heads % n == 0]
    part = next((n for n in parts if config.layer_weights / n <= weights), parts[-1])
    return replace(
        config, heads=config.heads // part, kv_heads=config.kv_heads // part, inner=max(1, config.inner // part)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HostShare:
    """One rank's part of its host."""

    free: int
    """Bytes that are its to use."""
    local_rank: int
    """Its place among the ranks of its host."""
    crowd: float
    """How many threads want each of the host's cores."""


def probe_ranks(
    world: World, config: ModelConfig, *, kernels: Kernels, threads: int, context: int, device: Device | None = None
) -> tuple[list[Node], Links]:  # fmt: skip
    """Every rank as a node with its speed and free memory, and every pair's edge. All ranks must call it.

    ``device`` is the machine behind this rank, if there is one: then its speed counts, and its layers are fixed; while
    it is away, the rank's own speed. Raises on every rank what fails on any.
    """
    mine, cores = world.hosts[world.rank], os.cpu_count() or 1
    reports = on_all_ranks(world, lambda: (psutil.virtual_memory().available, min(threads, cores)))
    spare, busy = zip(*(report for report, host in zip(reports, world.hosts, strict=True) if host == mine), strict=True)
    free, local = min(spare) // len(spare), world.hosts[: world.rank].count(mine)
    share = HostShare(free=free, local_rank=local, crowd=max(1.0, sum(busy) / cores))
    speed = measure_speed(world, config, kernels=kernels, context=context, share=share)
    node = Node(
        rank=world.rank, host=mine, kind="cpu", memory=psutil.virtual_memory().total,
        local_rank=local, threads=threads, cores=cores, free=free, speed=speed,
    )  # fmt: skip

    def report() -> dict[str, Any]:
        if not device:
            return asdict(node)
        return asdict(
            replace(
                node, kind="ipad", pinned_span=device.span, can_be_first_or_last=False, speed=device.speed() or speed
            )
        )

    nodes = [node_from(raw) for raw in on_all_ranks(world, report)]
    return nodes, measure_links(world, CHUNK * config.embed * HIDDEN_BYTES)


def measure_speed(
    world: World, config: ModelConfig, *, kernels: Kernels, context: int, share: HostShare
) -> Speed:  # fmt: skip
    """This rank's speed, beside the other ranks of its host. All ranks must call it."""
    probes: list[Probe] = []
    on_all_ranks(world, lambda: probes.append(Probe(config, kernels, context, share.free)))
    probe = probes[0]
    most = max(world.hosts.count(host) for host in world.hosts)

    def here(work: Callable[[], Any]) -> Any:
        return on_all_ranks(world, work)[world.rank]

    alone, cold = [
        here(lambda: (probe.alone(), probe.cold()) if share.local_rank == now else None)  # noqa: B023
        for now in range(most)
    ][share.local_rank]
    full = {rows: here(partial(probe.decode, rows)) for rows in ROWS} | {CHUNK // 2: here(probe.short_prompt)}
    chunk = here(probe.prompt)
    # What the ranks of one host take from each other is left out: a plan knows their cores, and how many take part.
    # Nor is it one core's own if its processor time differs from the others' of the host: a neighbour was reading.
    # But a rank that has to give its core away all the time finds its caches cold, and that is its own.
    first, rest = _stretch([alone]), max(1.0, _stretch([*full.values(), chunk]) / share.crowd)
    found = on_all_ranks(world, lambda: [[0, alone], *full.items(), [CHUNK, chunk]])
    host = world.hosts[world.rank]
    alike = [dict(report) for report, other in zip(found, world.hosts, strict=True) if other == host]
    if first > INTERRUPTED:
        alike = [dict(found[world.rank])]
    (_, alone), *several, (_, chunk) = (
        (rows, {key: min(report[rows][key] for report in alike) for key in alike[0][rows]}) for rows in alike[0]
    )
    full = dict(several)
    steps = {rows: {key: rest * seconds for key, seconds in step.items()} for rows, step in full.items()}
    steps = {1: {key: first * seconds for key, seconds in alone.items()}} | steps
    return Speed(
        layer_s=(*((rows, step["layer"]) for rows, step in steps.items()), (CHUNK, rest * chunk["layer"])),
        head_s=tuple((rows, step["head"]) for rows, step in steps.items() if rows in (1, *ROWS)),
        attend_s=steps[1]["attend"], attend_chunk_s=rest * chunk["attend"],
        step_s=statistics.median(step["rest"] for step in steps.values()), cold=cold,
    )  # fmt: skip


def _stretch(steps: Sequence[Mapping[str, float]]) -> float:
    """The ratio of these steps' time by the clock to their processor time, at least 1."""
    return max(1.0, sum(step["wall"] for step in steps) / max(1e-9, sum(step["cpu"] for step in steps)))


def node_from(raw: dict[str, Any]) -> Node:
    """A node out of its JSON."""
    speed, spans = raw["speed"], {key: raw[key] and Span(**raw[key]) for key in ("allowed_span", "pinned_span")}
    if speed:
        points = {key: tuple((rows, seconds) for rows, seconds in speed[key]) for key in ("layer_s", "head_s")}
        speed = Speed(**{**speed, **points})
    return Node(**{**raw, **spans, "speed": speed})
