"""A description of machines and links, read from a YAML file into the values that placement takes.

Knows: the file's keys and their bounds; how bandwidth and arithmetic become the time of a layer.
Must not know: MPI, how anything is placed, or any machine that is really there.

The seconds are a roofline: a product of few rows takes as long as reading its weights, one of many rows as long as its
arithmetic, whichever is longer; software gets the share ``efficiency`` of both. Reading the cache costs its bytes.
Norms, activations and sampling are left out, and belong into ``efficiency`` and ``step_ms``.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, ValidationError

from mpgpt.config import LAYER_RANGE, Blank, Count, DtypeName, NonEmptyStr, Section
from mpgpt.core import Span
from mpgpt.engine.scheduler import CHUNK
from mpgpt.errors import UsageError
from mpgpt.machines import ClusterProfile, Edge, Links, Node, Speed, Workload
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.footprint import (
    MAX_CONTEXT,
    cache_bytes,
    head_dtype,
    layer_outputs,
    shape_of,
    smaller_shapes,
    weight_bytes,
)
from mpgpt.model.known_families import NAMED, read_config
from mpgpt.model.known_shapes import PUBLISHED
from mpgpt.placement.plan import Objective
from mpgpt.yamlfile import problems, read_yaml, shown

ROWS = (1, 2, 4, 8, 16, 32, 64, CHUNK)
"""The rows for which seconds are given; between them is a straight line."""
SPARE = 0.75
"""The share of a machine's memory that is taken to be free where the file does not say."""
SLOTS = 16


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError(f"is {shown(name)}; a name has printable characters only")
    return name


def _known_family(name: str) -> str:
    if name not in NAMED:
        raise ValueError(f"is {shown(name)}; it should be one of {', '.join(NAMED)}")
    return name


Name = Annotated[NonEmptyStr, Field(max_length=60), AfterValidator(_printable)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]


def _named(value: Any) -> Any:
    """A model's numbers for its name."""
    if not isinstance(value, str):
        return value
    if value in PUBLISHED:
        return numbers_of(value)
    near = difflib.get_close_matches(value, PUBLISHED, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(PUBLISHED)}"
    raise ValueError(f"is {shown(value)}, whose numbers are not known; {hint}, or give its numbers")


def numbers_of(name: str) -> dict[str, Any]:
    """A known model's sizes under the file's keys."""
    config = read_config(PUBLISHED[name], rotary=False)
    return {key: getattr(config, key) for key in Numbers.model_fields}


def _range(value: Any) -> Any:
    """A span as it is written for ranks, such as 4-7."""
    if isinstance(value, Span):
        return value
    match = LAYER_RANGE.fullmatch(str(value).strip()) if type(value) in (str, int) else None
    start, stop = (int(match[1]), int(match[2] or match[1]) + 1) if match else (0, 0)
    if start >= stop:
        raise ValueError(f"is {shown(value)}; it should be a range of layers such as 4-7")
    return Span(start=start, stop=stop)


Layers = Annotated[Span, BeforeValidator(_range)]


class Numbers(Section):
    """A model's sizes, in elements."""

    family: Annotated[NonEmptyStr, AfterValidator(_known_family)]
    layers: Count
    embed: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    inner: Count
    vocab: Count
    positions: Count

    @property
    def config(self) -> ModelConfig:
        family = NAMED[self.family]
        return ModelConfig(
            family=self.family, vocab=self.vocab, embed=self.embed, layers=self.layers, heads=self.heads,
            kv_heads=self.kv_heads, head_dim=self.head_dim, inner=self.inner, positions=self.positions, eps=1e-5,
            activation=family.activation, gated=family.gated, tied=True,
            windows=(0,) * self.layers,
            scales=(self.head_dim**-0.5,) * self.layers,
        )  # fmt: skip


class Machine(Section):
    """One machine, or ``count`` like it; a rank on each."""

    name: Name
    kind: Literal["cpu", "ipad"] = "cpu"
    """An ``ipad`` can have neither the first layer nor the last."""
    count: Annotated[int, Field(strict=True, ge=1, le=100_000)] = 1
    memory_gb: Positive
    free_gb: Positive | None = None
    cores: Annotated[int, Field(strict=True, ge=1, le=4096)] = 1
    threads: Annotated[int, Field(strict=True, ge=1, le=4096)] | None = None
    read_gb_s: Positive
    """Memory bandwidth with all threads."""
    gflops: Positive
    """Of products with many rows, with all threads; a multiplication and an addition are two."""
    efficiency: Annotated[Share, Field(validation_alias=AliasChoices("efficiency", "reaches"))] = 1.0
    """How much of the two software gets."""
    step_ms: Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)] = 0.0
    """What every step costs besides."""
    allowed_layers: Annotated[Layers | None, Field(validation_alias=AliasChoices("allowed_layers", "within"))] = None
    pinned_layers: Annotated[Layers | None, Field(validation_alias=AliasChoices("pinned_layers", "fixed"))] = None
    source: NonEmptyStr | None = None

    @property
    def hosts(self) -> list[str]:
        return [self.name] if self.count == 1 else [f"{self.name}-{n}" for n in range(1, self.count + 1)]


class LinkSpec(Section):
    latency_ms: Positive
    """One way, for a small message."""
    gbit_s: Positive
    """For a large one."""
    source: NonEmptyStr | None = None

    @property
    def edge(self) -> Edge:
        return Edge(latency_s=self.latency_ms / 1e3, bytes_per_s=self.gbit_s * 1e9 / 8)


class Between(LinkSpec):
    machines: tuple[NonEmptyStr, NonEmptyStr]
    """Both ways between them; twice the same name is among the machines that have it."""


class LinkSpecs(Section):
    default: LinkSpec
    between: tuple[Between, ...] = ()


class WorkloadSpec(Section):
    sequences: Count = 8
    prompt_tokens: Count = 256
    new_tokens: Count = 128


class WhatIf(Section):
    """The file. All of it is checked; ``scene`` makes values of it."""

    model: Annotated[Numbers, BeforeValidator(_named)]
    dtype: DtypeName = "float32"
    context: Count | None = None
    slots: Annotated[int, Field(strict=True, ge=1, le=65535)] | None = None
    objective: Objective = "throughput"
    workload: Annotated[WorkloadSpec, Blank] = WorkloadSpec()
    machines: Annotated[tuple[Machine, ...], Field(min_length=1)]
    links: LinkSpecs

    def contradictions(self) -> list[str]:
        """The mistakes for which no single key is to blame, a sentence each."""
        names, sentences = [machine.name for machine in self.machines], []
        for name in sorted({name for name in names if names.count(name) > 1}):
            sentences.append(f"machines: more than one is called {shown(name)}; count says how many are alike")
        for strange in sorted({name for pair in self.links.between for name in pair.machines} - set(names)):
            sentences.append(f"links.between: there is no machine {shown(strange)}; there are {', '.join(names)}")
        if self.context and self.context > self.model.positions:
            sentences.append(f"context is {self.context}, more than the model's {self.model.positions} positions")
        return sentences

    def scene(self, dtype: DtypeName | None, workload: Workload, slots: int) -> Scene:
        """Shape, nodes and links for a dtype (the file's for None) and so many slots."""
        config, dtype = self.model.config, dtype or self.dtype
        context = self.context or min(config.positions, MAX_CONTEXT)
        if (tokens := workload.prompt_tokens + workload.new_tokens) > context:
            raise UsageError(
                f"{workload.prompt_tokens} prompt tokens and {workload.new_tokens} new ones are {tokens}, "
                f"more than the context of {context}"
            )
        machines = [(machine, host) for machine in self.machines for host in machine.hosts]
        nodes = [_node(rank, host, machine, config, dtype) for rank, (machine, host) in enumerate(machines)]
        profile = ClusterProfile(
            shape=shape_of(config, dtype, slots, context),
            nodes=nodes,
            links=_links(self.links, [machine.name for machine, _ in machines]),
            others=smaller_shapes(config, dtype, slots, context),
        )
        return Scene(profile=profile, workload=workload, context=context, slots=slots)

    @property
    def work(self) -> Workload:
        return Workload(**self.workload.model_dump())


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A profile of the file's machines, and the work for them."""

    profile: ClusterProfile
    workload: Workload
    context: int
    slots: int


def load_cluster(path: Path) -> WhatIf:
    """Read and check a file. The ``UsageError`` holds all that is wrong with it, one sentence a line."""
    tree, wrong = read_yaml(path)
    try:
        cluster = WhatIf.model_validate(tree)
        wrong += cluster.contradictions()
    except ValidationError as error:
        wrong += problems(error, WhatIf)
    if wrong:
        raise UsageError("\n".join(f"{path}: {sentence}" for sentence in wrong))
    return cluster


def speed_of(machine: Machine, config: ModelConfig, dtype: DtypeName) -> Speed:
    """A machine's speed for a model, by the roofline of the module's docstring."""
    bandwidth, flops = machine.read_gb_s * 1e9 * machine.efficiency, machine.gflops * 1e9 * machine.efficiency

    def product(weights: int, outputs: int, held: str = dtype) -> tuple[tuple[int, float], ...]:
        read = weight_bytes(weights, outputs, held) / bandwidth
        return tuple((rows, max(read, 2 * weights * rows / flops)) for rows in ROWS)

    return Speed(
        layer_s=product(config.layer_weights, layer_outputs(config)),
        head_s=product(config.head_weights, config.vocab, head_dtype(dtype)),
        attend_s=max(
            config.kv_bytes(1, 1, 1, cache_bytes(dtype)) / bandwidth, 4 * config.heads * config.head_dim / flops
        ),
        step_s=machine.step_ms / 1e3,
    )  # fmt: skip


def _node(rank: int, host: str, machine: Machine, config: ModelConfig, dtype: DtypeName) -> Node:
    free = (machine.free_gb or SPARE * machine.memory_gb) * 1e9
    return Node(
        rank=rank, host=host, kind=machine.kind, memory=round(machine.memory_gb * 1e9), local_rank=0,
        threads=machine.threads or machine.cores, cores=machine.cores,
        free=max(1, round(free)), speed=speed_of(machine, config, dtype),
        allowed_span=machine.allowed_layers, pinned_span=machine.pinned_layers,
        can_be_first_or_last=machine.kind != "ipad",
    )  # fmt: skip


def _links(wires: LinkSpecs, names: list[str]) -> Links:
    """``names`` are the machines' by rank."""
    default = wires.default.edge
    between = {frozenset(between.machines): between.edge for between in wires.between}
    return {
        (a, b): between.get(frozenset((names[a], names[b])), default)
        for a in range(len(names))
        for b in range(len(names))
        if a != b
    }
