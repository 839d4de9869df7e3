"""The values that a plan stands on: what machines, links, models and work are, in bytes and seconds.

Knows: what a rank reports of itself and of its speed, what a link carries, how large a model is as it is held.
Must not know: how any of these is measured, or what is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mpgpt.core import Span


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A rank's report of itself."""

    rank: int
    host: str
    kind: str
    """``cpu``, or ``ipad`` where a package behind the rank computes."""
    memory: int
    """Physical memory of the host, bytes."""
    local_rank: int
    """Position among the ranks of the same host."""
    threads: int
    cores: int = 1
    """Of the host, for all its ranks together."""
    free: int = 0
    """Bytes that this rank may fill with its slice and cache: its share of what its host has to spare. 0 where no limit
    is known."""
    speed: Speed | None = None
    """What it does in a second; None where nobody measured."""
    allowed_span: Span | None = None
    """The layers that it can run, if not all."""
    pinned_span: Span | None = None
    """The layers that it runs, whatever else might be better."""
    can_be_first_or_last: bool = True
    """Whether it can embed tokens and sample them, so that it may have the first and the last layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """What a rank needs for a step, in seconds. ``layer_s`` and ``head_s`` are (rows, seconds), rows ascending."""

    layer_s: tuple[tuple[int, float], ...]
    """One layer with a nearly empty cache; the largest row count is a prompt chunk's."""
    head_s: tuple[tuple[int, float], ...]
    """The last norm, the head and sampling, by the rows of which a token is wanted."""
    attend_s: float = 0.0
    """More for each layer, row, and position in the cache."""
    attend_chunk_s: float | None = None
    """The same for the tokens of a prompt's chunk, which read the cache together; None if it is not known apart."""
    step_s: float = 0.0
    """What every step costs a stage besides: taking the frame apart, making the next, and Python."""
    cold: float = 1.0
    """How many times as long one row alone takes a rank that has slept since the last one, as all ranks of a ring do
    while a single sequence is at another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Edge:
    """What a frame needs from one rank to another: ``latency_s`` (waking up included) and ``bytes_per_s``."""

    latency_s: float
    bytes_per_s: float

    def seconds(self, nbytes: int) -> float:
        return self.latency_s + nbytes / self.bytes_per_s


Links = Mapping[tuple[int, int], Edge]
"""Every ordered pair of ranks; none is looked up where one rank does everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's sizes as it is held, in bytes."""

    layers: int
    layer_bytes: int
    """The weights of one layer."""
    head_bytes: int
    kv_bytes: int
    """The cache of one layer: all slots, the whole context."""
    token_bytes: int
    """One token's hidden state on the wire."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The work that a plan is made for: sequences that run at once, each with a prompt and new tokens."""

    sequences: int = 8
    prompt_tokens: int = 256
    new_tokens: int = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterProfile:
    """A model's shape, and the nodes and links that are to run it."""

    shape: Shape
    nodes: Sequence[Node]
    """By rank."""
    links: Links = field(repr=False)
    others: Mapping[str, Shape] = field(default_factory=dict)
    """The same model held in fewer bytes, by dtype, the largest first."""
