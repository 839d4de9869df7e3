"""Measurements of one ring from within: its speed for a workload, and where its stages' time goes.

Knows: an engine, clocks, what the figures mean.
Must not know: how rings are started, options, files.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from mpgpt.cluster.ring import RankReport, Ring
from mpgpt.core import Request, StageStats
from mpgpt.engine.engine import Engine, Stream
from mpgpt.errors import MpgptError
from mpgpt.machines import Workload

REPEATS = 3
"""The number of passes over the workload in one measurement."""
WARM_UP_TOKENS = 8
BUFFER_BYTES = 256 << 20
"""What is read to find the memory's speed: many times the largest cache."""
PASSES = 8
MEGA = 1e6


class TokenTimes:
    """A ``Detokenizer`` that makes no text and keeps the time of each token."""

    stopped = False
    text = ""

    def __init__(self) -> None:
        self.at: list[float] = []

    def push(self, token: int) -> str:
        self.at.append(time.perf_counter())
        return ""

    def finish(self) -> str:
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass over the workload. Times in seconds from the submission of all its requests."""

    decoded: int
    """New tokens between ``all_decode_s`` and ``one_done_s``."""
    all_decode_s: float
    """When the last sequence had its first token."""
    one_done_s: float
    """When the first sequence had its last token; not after ``all_decode_s`` where prompts take that long."""
    first_s: list[float]
    """Each sequence's first token."""
    gaps_s: list[float]
    """Between two tokens of a sequence, for all of them."""

    @property
    def speed(self) -> float | None:
        """Tokens a second while all decode; None where they never all did."""
        return self.decoded / (self.one_done_s - self.all_decode_s) if self.decoded else None


def measure(engine: Engine, ring: Ring, work: Workload, repeats: int = REPEATS) -> dict[str, Any]:
    """One run's figures under their keys in the JSON, which ``report.py`` describes.

    Warms up first. The stages' statistics cover the measured passes alone, all of them together.
    """
    vocab = ring.config.vocab
    _one_pass(engine, replace(work, new_tokens=min(work.new_tokens, WARM_UP_TOKENS)), vocab, seed=0)
    engine.stats_round()
    passes = [_one_pass(engine, work, vocab, seed) for seed in range(1, repeats + 1)]
    accounts = engine.stats_round()
    reports = {place.node.rank: place for place in ring.reports}
    speeds = [one.speed for one in passes if one.speed is not None]
    prompts = work.sequences * work.prompt_tokens
    return {
        "decode_tokens_per_s": statistics.median(speeds) if speeds else None,
        "prompt_tokens_per_s": statistics.median(prompts / one.all_decode_s for one in passes),
        "ttft_ms": _percentiles([s for one in passes for s in one.first_s]),
        "tpot_ms": _percentiles([s for one in passes for s in one.gaps_s]),
        "stages": [_stage(account, reports[account.rank]) for account in accounts],
    }


def _one_pass(engine: Engine, work: Workload, vocab: int, seed: int) -> Pass:
    """All sequences at once, once. The ids differ between sequences and seeds, and are the same every time.

    Raises ``MpgptError`` if one of them ends with an error: its figures would be meaningless.
    """
    dice = random.Random(seed)
    texts = [TokenTimes() for _ in range(work.sequences)]
    begun = time.perf_counter()
    streams = [
        engine.submit(
            Request(ids=tuple(dice.choices(range(vocab), k=work.prompt_tokens)), max_new_tokens=work.new_tokens),
            text, lambda stream, piece: None,
        )
        for text in texts
    ]  # fmt: skip
    while not all(text.at for text in texts):
        _step(engine, streams)
    before, all_decode = sum(len(text.at) for text in texts), time.perf_counter()
    while not any(stream.finish_reason for stream in streams):
        _step(engine, streams)
    after, one_done = sum(len(text.at) for text in texts), time.perf_counter()
    while engine.busy:
        _step(engine, streams)
    return Pass(
        decoded=after - before, all_decode_s=all_decode - begun, one_done_s=one_done - begun,
        first_s=[text.at[0] - begun for text in texts],
        gaps_s=[b - a for text in texts for a, b in zip(text.at, text.at[1:], strict=False)],
    )  # fmt: skip


def _step(engine: Engine, streams: Sequence[Stream]) -> None:
    engine.step()
    if error := next((stream.error for stream in streams if stream.error), ""):
        raise MpgptError(error)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p95 = np.percentile(seconds, [50, 95])
    return {"p50": 1000 * float(p50), "p95": 1000 * float(p95)}


def _stage(account: StageStats, place: RankReport) -> dict[str, Any]:
    return {
        "rank": account.rank,
        "host": place.node.host,
        "layers": [place.span.start, place.span.stop] if place.span else None,
        "steps": account.steps,
        "tokens": account.tokens,
        "compute_s": account.compute_s,
        "wait_s": account.wait_s,
        "send_s": account.send_s,
        "other_s": account.other_s,
        "wall_s": account.wall_s,
        "peak_rss_mb": account.peak_rss / MEGA,
        "slice_mb": place.slice_bytes / MEGA,
        "kv_mb": place.kv_bytes / MEGA,
        "device": account.device and asdict(account.device),
    }


def read_bandwidth(nbytes: int = BUFFER_BYTES) -> tuple[float, str]:
    """How fast this process reads memory with torch's threads: (GB/s, the way of reading that was fastest).

    The best of several passes over a buffer that no cache holds, read by a sum and by a product of a matrix with a
    vector: what a decoding step could do at best. Takes a quarter of a second, and the buffer's memory.
    """
    x = torch.ones(nbytes // 4)
    matrix, vector = x.view(-1, 4096), torch.ones(4096)
    ways: dict[str, Callable[[], object]] = {
        "sum of float32": x.sum,
        "sum of int64": x.view(torch.int64).sum,
        "matrix x vector, float32": lambda: matrix @ vector,
    }
    speed, way = max((_fastest(read, nbytes), name) for name, read in ways.items())
    return speed / 1e9, way


@torch.inference_mode()
def _fastest(read: Callable[[], object], nbytes: int) -> float:
    """Bytes a second of the fastest of several passes."""
    read()
    times = []
    for _ in range(PASSES):
        begun = time.perf_counter()
        read()
        times.append(time.perf_counter() - begun)
    return nbytes / min(times)
