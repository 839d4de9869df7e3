"""A run's settings: a YAML file that becomes a checked, frozen ``RunConfig``.

Knows: the file's keys and their bounds; how layers are written down for ranks, in the file and on the command line.
Must not know: torch, MPI, models (a layer count is given to it), nor YAML.

All that is wrong with a file is reported at once: who fixes one mistake to meet the next starts a cluster twice.
"""

from __future__ import annotations

import ipaddress
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from mpgpt.core import SEEDS, Sampling, Span, check_spans
from mpgpt.errors import UsageError
from mpgpt.machines import Workload
from mpgpt.yamlfile import parse_yaml, printable, problems, read_yaml, shown

DtypeName = Literal["float32", "bfloat16", "float16", "int8", "int4"]
CacheDtype = Literal["auto", "float32", "bfloat16", "float16"]
StrategyName = Literal["greedy", "sampling", "top_k", "top_p"]
Layers = tuple[int, ...]

# Strict one by one, not by ConfigDict: a strict model would refuse the plain mappings that YAML gives.
# Encoding refuses half a surrogate pair, which YAML can write ("\uD800") and the broadcast could not.
Encodable = AfterValidator(lambda text: text.encode().decode())
NonEmptyStr = Annotated[str, Field(strict=True, min_length=1), Encodable]
Count = Annotated[int, Field(strict=True, ge=1, le=100_000_000)]
Port = Annotated[int, Field(strict=True, ge=1, le=65535)]
Seed = Annotated[int, Field(strict=True, ge=-(SEEDS // 2), lt=SEEDS // 2)]  # a signed 64-bit integer, as OpenAI's
Temperature = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
CutToCount = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
CutToMass = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
MinP = Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
OpenAIPenalty = Annotated[float, Field(strict=True, ge=-2, le=2, allow_inf_nan=False)]
# A section whose settings are all commented out reads as null in YAML, and means an empty one.
Blank = BeforeValidator(lambda value: {} if value is None else value)

DISTRIBUTION_FORM = "auto, or for each rank a list of layers, such as {rank_0: [0, 1], rank_1: [2, 3]}"
RANK_KEY = re.compile("rank_[0-9]+")
LAYER_RANGE = re.compile(r"([0-9]{1,6})(?:\s*-\s*([0-9]{1,6}))?")
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:\[\]]+):([0-9]{1,5})")
ORIGIN = re.compile(r"([A-Za-z][\w+.-]*)://(\[[\w:.]+\]|[^\s:/\\?#@\[\]]*)(?::([0-9]{0,5}))?/?", re.ASCII)
ORIGIN_FORM = "scheme, host and port, such as http://localhost:3000 or app://obsidian.md; or null"
ORIGIN_HOST = re.compile(r"[\w.~-]+|\[[0-9a-f:]+\]", re.ASCII)
DEFAULT_PORTS = {"http": 80, "https": 443, "ws": 80, "wss": 443}
IPAD_FORM = "ipad: {rank: 1, address: HOST:PORT, token_file: FILE, package: NAME.mlpackage}"


def read_origin(text: str) -> str:
    """An origin of web pages as browsers serialise it (WHATWG HTML, "Origin"): lower case, without a default port.

    Its scheme may be any. ``null`` stands for all pages that have no origin. Raises ``ValueError`` with what is wrong.
    """
    if text == "null":
        return text
    match = ORIGIN.fullmatch(text)
    if not match:
        raise ValueError(f"it should be {ORIGIN_FORM}")
    if "*" in match[2]:
        raise ValueError("each origin is listed by its full name, without *")
    scheme, host, port = match[1].lower(), _origin_host(match[2]), int(match[3]) if match[3] else None
    if scheme == "file":
        if host or match[3]:
            raise ValueError("pages of files have the origin file:// in some programs, and null in browsers")
        return "file://"
    if not ORIGIN_HOST.fullmatch(host) or (port or 0) > 65535:
        raise ValueError(f"it should be {ORIGIN_FORM}")
    return f"{scheme}://{host}" + (f":{port}" if port not in (None, DEFAULT_PORTS.get(scheme)) else "")


def _origin_host(host: str) -> str:
    """A host's name as a browser writes it in an origin. ``ValueError`` for what is no host."""
    if host.startswith("["):
        return f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"
    try:
        return host.lower() if host.isascii() else host.encode("idna").decode()
    except UnicodeError:
        raise ValueError("its host is no name") from None


def _listed_origin(value: Any) -> str:
    if value is None:
        raise ValueError('is null; write "null" in quotes if pages without an origin are meant')
    if not isinstance(value, str):
        raise ValueError(f"is {shown(value)}; it should be {ORIGIN_FORM}")
    try:
        return read_origin(value)
    except ValueError as error:
        raise ValueError(f"is {shown(value)}; {error}") from None


Origin = Annotated[str, BeforeValidator(_listed_origin)]


class Section(BaseModel):
    """What all parts of the settings share: unknown keys are refused, nothing changes later."""

    model_config = {"frozen": True, "extra": "forbid"}


class Strategy(Section):
    """``greedy`` and ``sampling``. Greedy's temperature is accepted, for the reference's sake, and unused."""

    temperature: Temperature = 1.0
    min_p: MinP = 0.0
    repetition_penalty: Penalty = 1.0


class TopK(Strategy):
    k: CutToCount = 40


class TopP(Strategy):
    p: CutToMass = 0.9


class Chosen(Strategy):
    """A strategy with all that may be laid over it: the bounds of core's Sampling."""

    top_k: CutToCount = 0
    top_p: CutToMass = 1.0
    frequency_penalty: OpenAIPenalty = 0.0
    presence_penalty: OpenAIPenalty = 0.0
    seed: Seed


class Strategies(Section):
    greedy: Annotated[Strategy, Blank] = Strategy()
    sampling: Annotated[Strategy, Blank] = Strategy()
    top_k: Annotated[TopK, Blank] = TopK()
    top_p: Annotated[TopP, Blank] = TopP()


class Placing(Section):
    """What ``layer_distribution: auto`` is to be best at."""

    objective: Literal["throughput", "latency"] = "throughput"
    """``throughput``: the busiest rank has least to do. ``latency``: one sequence alone is fastest."""
    sequences: Count = 8
    prompt_tokens: Count = 256
    new_tokens: Count = 128


class Heartbeats(Section):
    """How often ranks send one another heartbeats, and after how long a silence the run ends."""

    interval_s: Annotated[float, Field(ge=0.05, le=3600, allow_inf_nan=False)] = 1.0
    timeout_s: Annotated[float, Field(ge=0.2, le=86400, allow_inf_nan=False)] = 10.0

    @model_validator(mode="after")
    def _several_in_time(self) -> Self:
        if self.timeout_s < 2 * self.interval_s:
            raise ValueError("timeout_s must be at least twice interval_s: one late beat is no loss")
        return self


class IPad(Section):
    """The iPad in the ring, and the rank that stands before it. Its files are read on that rank's host."""

    rank: Annotated[int, Field(strict=True, ge=1, le=65535)]
    address: NonEmptyStr
    """HOST:PORT on which it listens."""
    token_file: NonEmptyStr
    """Holds the token that both ends must have."""
    package: NonEmptyStr
    """What ``mpgpt convert coreml`` wrote; its layers are the rank's."""
    fallback: Literal["torch", "none"] = "torch"
    """What runs the layers while it is away: the rank itself, or nobody, and that ends the run."""
    timeout_s: Annotated[float, Field(strict=True, ge=0.1, le=600)] = 10.0
    """How late an answer may be before the iPad counts as gone."""

    @field_validator("address")
    @classmethod
    def _address_form(cls, value: str) -> str:
        match = ADDRESS.fullmatch(value)
        if not match or not 0 < int(match[2]) < 65536:
            raise ValueError(f"is {shown(value)}; it should be HOST:PORT, such as 10.10.0.5:8000")
        return value


class WebInterface(Section):
    """What ``mpgpt serve`` takes where the command line does not say."""

    host: NonEmptyStr | None = None
    port: Port | None = None
    api_port: Port | None = None
    """Goes before ``port``, which in the reference's files may be the page's."""
    frontend_port: Port | None = None
    """Accepted because the reference's files have it: here the API serves the page."""
    api_key_file: NonEmptyStr | None = None
    origins: tuple[Origin, ...] = ()
    """Pages of other origins that may use the API."""
    queue: Annotated[int, Field(strict=True, ge=0, le=100_000)] = 64
    """Answers that may wait for a slot."""
    time_limit_s: Annotated[float, Field(strict=True, gt=0, le=86_400)] = 600.0
    """How long an answer may take, waiting included."""


def native_wanted() -> bool:
    """Whether the compiled kernels may be taken on this host: unless its environment has MPGPT_NATIVE=0."""
    return os.environ.get("MPGPT_NATIVE", "1") != "0"


class RunConfig(Section):
    """All settings of a run. ``RunConfig()`` is valid, and names no model."""

    hf_model_name: NonEmptyStr | None = None
    weights_model_name: NonEmptyStr | None = None
    """Accepted because the reference's files have it; ``hf_model_name`` alone decides."""
    num_nodes: Count | None = None
    num_layers: Count | None = None
    layer_distribution: Literal["auto"] | dict[str, Layers] = "auto"
    max_new_tokens: Annotated[int, Field(strict=True, ge=1, le=1_000_000)] = 256
    ctx_length: Count | None = None
    active_decoding_strategy: StrategyName = "greedy"
    decoding_strategies: Annotated[Strategies, Blank] = Strategies()
    web_interface: Annotated[WebInterface, Blank] = WebInterface()
    dtype: DtypeName = "float32"
    kv_dtype: CacheDtype = "auto"
    """Of the cache: 16 bits halve it. As ``dtype`` where that is a float, else float32 (auto)."""
    kernel: NonEmptyStr = "auto"
    """What multiplies: the compiled kernels where there are some, else torch's fastest (auto); or one by name."""
    fast: Annotated[bool, Field(strict=True)] = False
    """Whether kernels are taken that are faster and give a row other bits in other company."""
    drafts: Annotated[bool, Field(strict=True)] = True
    plan: Annotated[Placing, Blank] = Placing()
    heartbeat: Annotated[Heartbeats, Blank] = Heartbeats()
    threads: Annotated[int, Field(strict=True, ge=1, le=4096)] | None = None
    max_sequences: Annotated[int, Field(strict=True, ge=1, le=65535)] = 16
    seed: Seed | None = None
    system: Annotated[str, Field(strict=True), Encodable] | None = None
    ipad: IPad | None = None
    use_coreml_rank1: Annotated[bool, Field(strict=True)] | None = None
    """The reference's word for an iPad behind rank 1: true needs ``ipad`` to say where it is, false leaves it out."""

    @model_validator(mode="after")
    def _ipad_where_it_is_said_to_be(self) -> Self:
        if self.use_coreml_rank1 and (self.ipad is None or self.ipad.rank != 1):
            raise ValueError(f"use_coreml_rank1 needs an iPad behind rank 1: {IPAD_FORM}")
        return self

    @property
    def device(self) -> IPad | None:
        """The iPad that takes part, if one does."""
        return None if self.use_coreml_rank1 is False else self.ipad

    @field_validator("layer_distribution", mode="before")
    @classmethod
    def _distribution_form(cls, value: Any) -> Literal["auto"] | dict[str, Layers]:
        """Its form alone; ``spans`` proves the layers, once ranks and layers are known."""
        if value == "auto":
            return "auto"
        if not isinstance(value, Mapping):
            raise ValueError(f"is {shown(value)}; it should be {DISTRIBUTION_FORM}")
        for key, layers in value.items():
            # type() and not isinstance(): a bool is an int, and no layer.
            whole = isinstance(layers, list | tuple) and all(type(n) is int and n >= 0 for n in layers)
            if not whole or not RANK_KEY.fullmatch(str(key)):
                raise ValueError(f"gives {printable(key)} {shown(layers)}; it should be {DISTRIBUTION_FORM}")
        return {str(key): tuple(layers) for key, layers in value.items()}

    def spans(self, ranks: int, layers: int) -> tuple[Span | None, ...] | None:
        """The file's span for each rank, or None where it leaves that to the planner.

        ``ranks`` is what mpirun started, ``layers`` what the model has. Raises UsageError if they contradict
        ``num_nodes``, ``num_layers`` or ``layer_distribution``.
        """
        if self.num_nodes not in (None, ranks):
            raise UsageError(
                f"num_nodes is {self.num_nodes} but mpirun started {ranks} (-n {ranks}); "
                f"start with -n {self.num_nodes}, or change or remove num_nodes"
            )
        if self.num_layers not in (None, layers):
            raise UsageError(
                f"num_layers is {self.num_layers} but the model has {layers}; correct or remove num_layers"
            )
        if self.layer_distribution == "auto":
            return None
        return check_spans(_named_spans(self.layer_distribution), ranks, layers, "layer_distribution")

    @property
    def workload(self) -> Workload:
        """What ``auto`` places layers for."""
        return Workload(**self.plan.model_dump(exclude={"objective"}))

    def strategy(self, name: str | None = None) -> Strategy:
        """A strategy's parameters, the active one's unless named. UsageError if there is no such strategy."""
        name = self.active_decoding_strategy if name is None else name
        if name not in (known := get_args(StrategyName)):
            raise UsageError(f"there is no decoding strategy {shown(name)}; there are {', '.join(known)}")
        found: Strategy = getattr(self.decoding_strategies, name)
        return found

    def sampling(self, strategy: str | None, seed: int, **overrides: float | None) -> Sampling:
        """How a request is sampled: a strategy's parameters (the active one's for None), and over them
        ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty`` where given and not None.

        ``greedy`` asked for by name stays greedy whatever the temperature, since a web page always sends one;
        but a temperature or a cut given over a file whose active strategy happens to be greedy is meant. A ``top_p``
        of 0 leaves the likeliest token alone, which is greedy. A negative seed is the engine's modulo 2**64.
        Raises UsageError for an unknown strategy or impossible parameters.
        """
        words = {"k": "top_k", "p": "top_p"}
        params = {words.get(key, key): value for key, value in self.strategy(strategy)}
        given = {key: value for key, value in overrides.items() if value is not None}
        try:
            chosen = Chosen.model_validate(params | given | {"seed": seed}).model_dump()
        except ValidationError as error:
            raise UsageError("\n".join(problems(error, Chosen))) from None
        lifted = not strategy and not {"temperature", "top_k", "top_p", "min_p"}.isdisjoint(given)
        if chosen["top_p"] == 0 or ((strategy or self.active_decoding_strategy) == "greedy" and not lifted):
            chosen["temperature"] = 0.0
        if chosen["top_p"] == 0:
            chosen["top_p"] = 1.0
        return Sampling(**chosen | {"seed": seed % SEEDS})


def _named_spans(named: Mapping[str, Layers]) -> list[Span]:
    """``rank_0``'s span first, wherever it stands in the file."""
    keys = [f"rank_{rank}" for rank in range(len(named))]
    if strange := sorted(set(named) - set(keys)):
        raise UsageError(
            f"layer_distribution names {len(named)} ranks, among them {', '.join(map(printable, strange))}; "
            "its keys must be rank_0, rank_1 and so on, without gaps"
        )
    for key in keys:
        layers = named[key]
        if not layers or layers != tuple(range(layers[0], layers[0] + len(layers))):
            raise UsageError(
                f"layer_distribution gives {key} {shown(list(layers))}; "
                "a rank's layers must be at least one, consecutive and ascending"
            )
    return [Span(start=named[key][0], stop=named[key][-1] + 1) for key in keys]


def parse_layers(text: str, option: str = "--layers") -> tuple[Span | None, ...]:
    """The command line's ``0-3,4-7,-,8``: a span for each rank, or ``-``. UsageError says where it is wrong."""
    spans: list[Span | None] = []
    column = 1
    for rank, piece in enumerate(text.split(",")):
        match = LAYER_RANGE.fullmatch(piece.strip())
        start, stop = (int(match[1]), int(match[2] or match[1]) + 1) if match else (0, 0)
        if start >= stop and piece.strip() != "-":
            raise UsageError(
                f"{option}: {shown(piece)} at character {column}, for rank {rank}, "
                f"{'runs backwards' if match else 'is no range of layers'}; write for example 0-3,4-7,8-11"
            )
        spans.append(Span(start=start, stop=stop) if match else None)
        column += len(piece) + 1
    return tuple(spans)


def load(path: Path, text: str | None = None) -> RunConfig:
    """A checked settings file, or its ``text`` if it lies elsewhere. UsageError has all that is wrong, line by line."""
    tree, wrong = read_yaml(path) if text is None else parse_yaml(text, path)
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        wrong += problems(error, RunConfig)
    if wrong:
        raise UsageError("\n".join(f"{path}: {sentence}" for sentence in wrong))
    return config
