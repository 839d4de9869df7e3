"""Output for a person: text as it streams, a line of figures, a bar for a batch.

Knows: standard output and error, and how figures are put.
Must not know: how any figure came about.
"""

from __future__ import annotations

import codecs
import sys
import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from mpgpt import stdio
from mpgpt.core import Span, StageStats
from mpgpt.display import ProgressBar, counted
from mpgpt.engine.engine import Engine, Stream
from mpgpt.errors import UsageError
from mpgpt.machines import Node
from mpgpt.model.kernel_timings import ROWS, KernelTiming


def echo(stream: Stream, piece: str) -> None:
    """A listener that prints the text as it comes."""
    stdio.put(piece)


def read_all() -> str:
    """All of standard input; ``UsageError`` when it cannot be read or is not UTF-8."""
    try:
        raw = sys.stdin.buffer.read()
    except OSError as error:
        raise UsageError(f"standard input cannot be read: {error.strerror or error}") from None
    text = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return text.decode().strip("\r\n")
    except UnicodeDecodeError as error:
        raise UsageError(f"standard input is not UTF-8: byte {error.start + 1 + len(raw) - len(text)}") from None


def read_line() -> str:
    """A line of standard input, of a person whose terminal may have another encoding; empty at the end."""
    try:
        raw = sys.stdin.buffer.readline().rstrip(b"\r\n")
        return raw.decode()
    except OSError:  # the terminal has gone
        return ""
    except UnicodeDecodeError:
        return raw.decode(sys.stdin.encoding, "replace")


def stream_summary(stream: Stream, reports: Sequence[tuple[Node, Span | None]]) -> str:
    """A finished stream in one line: tokens, time to first token, decoding speed, layers per rank."""
    new = len(stream.ids)
    first = stream.ttft_s or 0.0
    speed = (new - 1) / (stream.seconds - first) if new > 1 else new / max(stream.seconds, 1e-9)
    layers = " | ".join(
        f"{node.host} {span or '-'}" if _several(reports) else str(span or "-") for node, span in reports
    )
    return (
        f"[{len(stream.request.ids)} prompt + {new} new tokens, first after {first:.3f} s, {speed:.1f} tokens/s, "
        f"{drafts(stream) + ', ' if stream.drafted else ''}layers {layers}]"
    )


def devices(accounts: Sequence[StageStats]) -> str:
    """The iPads' figures, a line each; empty without any."""
    lines = []
    for account in accounts:
        if d := account.device:
            each = 1000 / max(d.requests, 1)
            away = f"away {counted(d.falls, 'time')}, {d.away_s:.1f} s" if d.away_s else "never away"
            lines.append(
                f"[iPad of rank {account.rank}: {d.requests} requests of {d.compute_s * each:.1f} ms computing and "
                f"{d.network_s * each:.1f} ms network, {(d.sent + d.received) / 1e6:.1f} MB, "
                f"thermal state {d.thermal}, {away}]"
            )
    return "\n".join(lines)


def drafts(counts: Stream | Engine) -> str:
    """The drafts that were right, and the average number of tokens of a sequence's step."""
    tokens = (counts.decode_steps + counts.accepted) / max(counts.decode_steps, 1)
    return f"drafts {counts.accepted} of {counts.drafted} accepted, {tokens:.1f} tokens a step"


def _several(reports: Sequence[tuple[Node, Span | None]]) -> bool:
    return len({node.host for node, _ in reports}) > 1


def explain(timings: Mapping[str, Sequence[KernelTiming]], computing: Mapping[str, str]) -> None:
    """What computes on each host, and of the kernels that it tried which one it takes, as a table on standard error;
    then what it refused."""
    console = Console(stderr=True)
    for host, every in timings.items():
        console.print(f"On {host}: {computing[host]}", highlight=False, soft_wrap=True)
        tried = [timing for timing in every if timing.exact]
        table = Table(title=f"Kernels on {host}: microseconds for a product", title_justify="left")
        for heading in ("weight", "kernel"):
            table.add_column(heading, no_wrap=True)
        for rows in ROWS:
            table.add_column(counted(rows, "row"), justify="right")
        table.add_column("steady bits")
        for timing in tried:
            times = [f"{time:.0f}" for time in timing.microseconds]
            bits = "yes" if timing.batch_invariant else "no"
            table.add_row(
                timing.shape, timing.kernel, *times, bits, style="bold" if timing.chosen else "dim",
                end_section=timing is tried[-1] or tried[tried.index(timing) + 1].shape != timing.shape,
            )  # fmt: skip
        if tried:
            console.print(table)
        wrong = list(dict.fromkeys(timing.kernel for timing in every if not timing.exact))
        if wrong:
            console.print(
                f"Not taken on {host}, because their products of integers are inexact on its processor (16-bit sums "
                f"overflow): {', '.join(wrong)}. Those called -split multiply each row as two, which is exact.",
                highlight=False, soft_wrap=True,
            )  # fmt: skip


class BatchProgress(ProgressBar):
    """A bar of a batch's prompts, with tokens a second; nothing where standard error is no terminal."""

    def __init__(self, total: int, done: int) -> None:
        super().__init__("prompts", total=total, done=done, text=_speed(0.0), refresh_per_second=4)
        self._begun, self._tokens = time.monotonic(), 0

    def done(self, tokens: int) -> None:
        """One more prompt is finished, with so many new tokens."""
        self._tokens += tokens
        self.advance()

    def running(self, tokens: int) -> None:
        """Show the speed with the new tokens of the prompts that are not finished."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        self.show(_speed((self._tokens + tokens) / seconds))


def _speed(tokens_per_s: float) -> str:
    return f"{tokens_per_s:.1f} tokens/s"
