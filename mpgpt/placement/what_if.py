"""A description of machines and links, as a YAML file, as the values that placement takes.

Knows: the file's keys and their bounds; how bandwidth and arithmetic become the time of a layer; some models' sizes.
Must not know: MPI, how anything is placed, or any machine that is really there.

The seconds are a roofline: a product of few rows takes as long as reading its weights, one of many rows as long as its
arithmetic, whichever is longer; software gets the share ``efficiency`` of both. Reading the cache costs its bytes. What
is left out (norms, activations, sampling) belongs into ``efficiency`` and ``step_ms``.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, BeforeValidator, Field, ValidationError

from mpgpt.config import LAYER_RANGE, Blank, Count, DtypeName, NonEmptyStr, Section
from mpgpt.core import Span
from mpgpt.engine.scheduler import CHUNK
from mpgpt.errors import UsageError
from mpgpt.machines import Edge, Node, Shape, Speed, Workload
from mpgpt.model.architecture import ModelConfig
from mpgpt.placement.costs import Links
from mpgpt.placement.plan import Objective
from mpgpt.yamlfile import problems, read_yaml, shown

ROWS = (1, 2, 4, 8, 16, 32, 64, CHUNK)
"""The rows for which seconds are given; between them is a straight line."""
SPARE = 0.75
"""The share of a machine's memory that is taken to be free where the file does not say."""
SLOTS = 16
MAX_CONTEXT = 4096
GROUP = 32
"""Weights of int4 that share a scale and a zero, two bytes each."""
BITS: Mapping[str, int] = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int4": 4}
DTYPES: tuple[DtypeName, ...] = ("float32", "bfloat16", "int8", "int4")
"""From the largest to the smallest, as they are suggested to whom memory is short."""


def _printable(name: str) -> str:
    if not name.isprintable():
        raise ValueError(f"is {shown(name)}; a name has printable characters only")
    return name


Name = Annotated[NonEmptyStr, Field(max_length=60), AfterValidator(_printable)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(gt=0, le=1, strict=True)]

_GPT2 = {"family": "gpt2", "head_dim": 64, "vocab": 50257, "positions": 1024}
# From their published config.json.
MODELS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": _GPT2 | {"layers": 12, "embed": 768, "heads": 12, "kv_heads": 12, "inner": 3072},
    "gpt2-medium": _GPT2 | {"layers": 24, "embed": 1024, "heads": 16, "kv_heads": 16, "inner": 4096},
    "gpt2-large": _GPT2 | {"layers": 36, "embed": 1280, "heads": 20, "kv_heads": 20, "inner": 5120},
    "gpt2-xl": _GPT2 | {"layers": 48, "embed": 1600, "heads": 25, "kv_heads": 25, "inner": 6400},
    "smollm2-135m": {
        "family": "llama", "layers": 30, "embed": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "inner": 1536,
        "vocab": 49152, "positions": 8192,
    },
    "llama-3.1-8b": {
        "family": "llama", "layers": 32, "embed": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "inner": 14336,
        "vocab": 128256, "positions": 131072,
    },
}  # fmt: skip


def _named(value: Any) -> Any:
    """A model's numbers for its name."""
    if not isinstance(value, str):
        return value
    if value in MODELS:
        return MODELS[value]
    near = difflib.get_close_matches(value, MODELS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(MODELS)}"
    raise ValueError(f"is {shown(value)}, whose numbers are not known; {hint}, or give its numbers")


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

    family: Literal["gpt2", "llama"]
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
        return ModelConfig(
            family=self.family, vocab=self.vocab, embed=self.embed, layers=self.layers, heads=self.heads,
            kv_heads=self.kv_heads, head_dim=self.head_dim, inner=self.inner, positions=self.positions, eps=1e-5,
            activation="gelu" if self.family == "gpt2" else "silu", gated=self.family != "gpt2", tied=True,
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
        """What no single key is to blame for, a sentence each."""
        names, said = [machine.name for machine in self.machines], []
        for name in sorted({name for name in names if names.count(name) > 1}):
            said.append(f"machines: more than one is called {shown(name)}; count says how many are alike")
        for strange in sorted({name for pair in self.links.between for name in pair.machines} - set(names)):
            said.append(f"links.between: there is no machine {shown(strange)}; there are {', '.join(names)}")
        if self.context and self.context > self.model.positions:
            said.append(f"context is {self.context}, more than the model's {self.model.positions} positions")
        return said

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
        return Scene(
            shape=shape_of(config, dtype, slots, context), nodes=tuple(nodes), workload=workload, context=context,
            links=_links(self.links, [machine.name for machine, _ in machines]), slots=slots,
            others={d: shape_of(config, d, slots, context) for d in DTYPES[_size(dtype) :]},
        )  # fmt: skip

    @property
    def work(self) -> Workload:
        return Workload(**self.workload.model_dump())


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """What placement and simulation take."""

    shape: Shape
    nodes: tuple[Node, ...]
    links: Links
    workload: Workload
    context: int
    slots: int
    others: Mapping[str, Shape]
    """The shape in each smaller dtype."""


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


def shape_of(config: ModelConfig, dtype: DtypeName, slots: int, context: int) -> Shape:
    """A model's bytes in a dtype. The cache and what is sent are 2 bytes a number in 16 bit, else 4.

    The embedding counts nothing: its rows are looked up in the mapped file.
    """
    itemsize = _itemsize(dtype)
    return Shape(
        layers=config.layers, layer_bytes=weight_bytes(config.layer_weights, _outputs(config), dtype),
        head_bytes=weight_bytes(config.head_weights, config.vocab, _head(dtype)), embedding_bytes=0,
        kv_bytes=config.kv_bytes(1, slots, context, itemsize), token_bytes=config.embed * itemsize,
    )  # fmt: skip


def weight_bytes(weights: int, outputs: int, dtype: DtypeName) -> int:
    """Bytes of weights: int8 has a scale of 4 bytes for each output channel, int4 4 bytes for each 32 weights."""
    scales = {"int8": 4 * outputs, "int4": 4 * -(-weights // GROUP)}.get(dtype, 0)
    return weights * BITS[dtype] // 8 + scales


def speed_of(machine: Machine, config: ModelConfig, dtype: DtypeName) -> Speed:
    """See the module's docstring."""
    bandwidth, flops = machine.read_gb_s * 1e9 * machine.efficiency, machine.gflops * 1e9 * machine.efficiency

    def product(weights: int, outputs: int, held: DtypeName = dtype) -> tuple[tuple[int, float], ...]:
        read = weight_bytes(weights, outputs, held) / bandwidth
        return tuple((rows, max(read, 2 * weights * rows / flops)) for rows in ROWS)

    return Speed(
        layer_s=product(config.layer_weights, _outputs(config)),
        head_s=product(config.head_weights, config.vocab, _head(dtype)),
        attend_s=max(
            config.kv_bytes(1, 1, 1, _itemsize(dtype)) / bandwidth, 4 * config.heads * config.head_dim / flops
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


def _outputs(config: ModelConfig) -> int:
    """Output channels of a layer's products."""
    attention = config.head_dim * (config.heads + 2 * config.kv_heads) + config.embed
    return attention + config.inner * (2 if config.gated else 1) + config.embed


def _head(dtype: DtypeName) -> DtypeName:
    """The head is held in 8 bit where the layers are in 4."""
    return "int8" if dtype == "int4" else dtype


def _itemsize(dtype: DtypeName) -> int:
    return 2 if dtype in ("bfloat16", "float16") else 4


def _size(dtype: DtypeName) -> int:
    """Where the smaller dtypes begin."""
    return next(at for at in range(len(DTYPES) + 1) if at == len(DTYPES) or BITS[DTYPES[at]] < BITS[dtype])
