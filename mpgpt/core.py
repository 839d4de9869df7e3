"""The values that travel: between modules, and between ranks.

Knows: what a span, sampling, row, step, result, request and sequence are, and their bounds.
Must not know: torch, MPI, files, or how any of these is computed or sent.

All but ``Sequence`` are frozen: a step that is in flight cannot change under the stage that runs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from mpgpt.errors import UsageError

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Span:
    """A half-open range of layers, ``[start, stop)``."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        assert 0 <= self.start < self.stop, f"empty or negative span [{self.start}, {self.stop})"

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return f"{self.start}-{self.stop - 1}" if len(self) > 1 else f"{self.start}"


def check_spans(
    spans: Iterable[Span | None], ranks: int, layers: int, source: str, counted: str = ""
) -> tuple[Span | None, ...]:
    """Prove that ``spans`` are one per rank (None: without layers), contiguous from layer 0, disjoint and complete.

    ``source`` is where the user wrote them, ``counted`` says where there are so many ranks, if not under mpirun.
    Raises UsageError that names the source, the rank and the layers.
    """
    spans = tuple(spans)
    if len(spans) != ranks:
        names = f"{source} names {len(spans)} rank{'s' * (len(spans) != 1)} but"
        if counted:
            raise UsageError(f"{names} {counted}; give each rank its layers, - for none")
        raise UsageError(
            f"{names} mpirun started {ranks} (-n {ranks}); give each rank its layers, or start with -n {len(spans)}"
        )
    stop = last = 0
    for rank, span in enumerate(spans):
        if span is None:
            continue
        if span.start != stop:
            raise UsageError(
                f"{source} gives rank {rank} layers {span}, but it must begin at layer {stop}: "
                "each layer runs once, and in order"
            )
        stop, last = span.stop, rank
    if not stop:
        raise UsageError(f"{source} gives no rank any layers; the model has {layers}")
    if stop != layers:
        raise UsageError(f"{source} ends with layer {stop - 1}, on rank {last}, but the model's last is {layers - 1}")
    return spans


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one sequence's logits become a token.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0, ``repetition_penalty`` 1, and 0 of the other two
    penalties are off.
    The noise for a token depends on ``seed`` and the token's position alone, so a sequence's text does not
    depend on its company, on how many ranks there are, or on being computed twice.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """On all that stands before, the prompt too."""
    frequency_penalty: float = 0.0
    """Off a token's logit for each time that it was output; the prompt does not count."""
    presence_penalty: float = 0.0
    """Off the logit of a token that was output, however often."""
    seed: int = 0
    """Below ``SEEDS``. Clients write signed integers: ``signed_seed``."""


GREEDY = Sampling()
SEEDS = 2**64
"""How many there are: as many as unsigned 64-bit integers."""


def signed_seed(seed: int) -> int:
    """A seed as clients write it: the signed 64-bit integer of the same bits."""
    return seed - SEEDS if seed >= SEEDS // 2 else seed


TokenLogprob = tuple[int, float]
"""A token id, and the natural logarithm of its probability under the model itself: before penalties and temperature."""
MAX_LOGPROBS = 21
"""With one token: its own, and the twenty likeliest."""
NO_TOKEN = -1
"""In place of an id that no logits could be made into, because they are NaN or infinite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One sequence's part in a step: ``ids`` at the absolute positions ``start, start + 1, ...``

    A row that starts at position 0 resets its slot on every stage. Rows may go back over positions that were
    written before: the cache and the history are overwritten from ``start`` on.
    """

    slot: int
    start: int
    ids: tuple[int, ...]
    outputs: int = 0
    """After how many of the last positions a token is sampled: 0 inside a prompt, 1 at its end and in decoding."""
    prompt: int = 0
    """How many of the sequence's first tokens are the prompt; those behind them were output."""
    logprobs: int = 0
    """How many logprobs each sampled token comes with: its own first, then those of the likeliest; 0 for none."""
    sampling: Sampling = GREEDY

    @property
    def stop(self) -> int:
        return self.start + len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One immutable unit through the ring.

    ``hidden`` is empty before stage 0; after it, the raw little-endian bytes of a ``[tokens, embed]`` tensor,
    rows one after another in the order of ``rows``, in the ring's activation dtype.
    """

    epoch: int
    number: int
    rows: tuple[Row, ...]
    hidden: Buffer = b""

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)

    @property
    def outputs(self) -> int:
        return sum(row.outputs for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the last stage makes of a step: ``outputs`` ids of each row, rows in the step's order, flat."""

    epoch: int
    number: int
    ids: tuple[int, ...]
    """``NO_TOKEN`` in place of an id whose logits are NaN or infinite; the other outputs do not suffer from it."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """``logprobs`` of each row for each of its ids, flat; none for ``NO_TOKEN``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """The end of an epoch: goes once around the ring; every rank that passes it on is done."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStats:
    """Where one rank's time went since the tally before, in seconds; the four parts add up to ``wall_s``."""

    rank: int
    steps: int
    tokens: int
    wall_s: float
    compute_s: float
    """In the stage."""
    wait_s: float
    """For frames from the rank before; on rank 0 for requests too."""
    send_s: float
    """Making frames, and handing them over."""
    other_s: float
    """Taking frames apart; on rank 0 scheduling and text too."""
    peak_rss: int
    """The most memory that the process ever had, bytes."""
    device: DeviceAccount | None = None
    """Of the machine behind the rank, where there is one."""


Thermal = Literal["unknown", "nominal", "fair", "serious", "critical"]
"""How hot a device reports itself to be, in its system's terms; the hotter the later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceAccount:
    """What a machine behind a rank, an iPad, did since the tally before."""

    requests: int
    compute_s: float
    """On the device, by its own clock."""
    network_s: float
    """From sending requests to having their answers, without ``compute_s`` and without waiting for those before."""
    sent: int
    """Bytes to the device."""
    received: int
    falls: int
    """How often it was lost, and the rank computed in its stead."""
    away_s: float
    """For how long it was away, in all."""
    thermal: Thermal = "unknown"
    away: bool = False
    """Whether it is away now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsRound:
    """Goes once around the ring, behind the steps that are out: every rank adds its account and begins a new one."""

    epoch: int
    accounts: tuple[StageStats, ...]
    redial: bool = False
    """Whether ranks that miss the machine behind them should try again now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What somebody asks for, already as token ids."""

    ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = GREEDY
    stop_ids: frozenset[int] = frozenset()
    """A token that ends the text and is not part of it."""
    logprobs: int = 0
    """How many logprobs each new token comes with, up to ``MAX_LOGPROBS``: its own, and those of the likeliest."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """A request on its way. Rank 0's scheduler owns it; nobody else may change it.

    ``tokens`` are prompt and new ids, ``sent`` how many of them have entered the ring, ``in_flight`` how many
    of its rows are out. A sequence can be computed again from its own ``tokens`` alone (``sent = 0``).
    """

    request: Request
    tokens: list[int] = field(default_factory=list)
    slot: int = -1
    sent: int = 0
    in_flight: int = 0
    drafted: int = 0
    """Tokens that were foretold, and checked in the same step as the one before."""
    accepted: int = 0
    """How many of them were right."""
    finish_reason: str = ""
    """Empty while it runs; then ``stop``, ``length``, ``cancelled`` or ``error``."""

    def __post_init__(self) -> None:
        self.tokens.extend(self.request.ids)

    @property
    def new_ids(self) -> list[int]:
        return self.tokens[len(self.request.ids) :]
