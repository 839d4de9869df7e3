"""Frames: a step, a result, a stop or a tally as one contiguous run of bytes, and back.

Knows: the layout of a frame, its bounds, its checksum. Sans I/O: bytes in, values out.
Must not know: torch, MPI, sockets, or what a stage does with a step.

All integers are little-endian. A frame is a 32-byte header and a body:

    offset size
         0    4  magic, b"mpg1"
         4    1  kind: 1 step, 2 result, 3 stop, 4 tally
         5    1  zero
         6    2  rows; accounts of a tally
         8    4  epoch
        12    4  number (of the step, within its epoch)
        16    4  tokens: ids in the body; logprobs in a result; 1 in a tally that says to dial again
        20    4  outputs: ids that the last stage owes, or gives
        24    4  length of the body, bytes
        28    4  CRC-32 of the whole frame with these four bytes zero

    body of a step      rows x 88 bytes, tokens x int32, zeros up to a multiple of 16, hidden states
    body of a result    outputs x int32, logprobs x (int32, float32)
    body of a stop      nothing
    body of a tally     accounts x 136 bytes

A row is slot, start, count, outputs, prompt, logprobs, top_k, zero (uint32 each), temperature, top_p, min_p,
repetition_penalty, frequency_penalty, presence_penalty (float64 each), seed (uint64). An id of a result is -1 where
the logits were NaN or infinite; no logprobs belong to it. A logprob is a token id and the natural logarithm of its
probability. An account is rank, device (uint32 each), steps, tokens, peak_rss (uint64
each), wall, compute, wait, send, other (float64 each, seconds); and of the machine behind the rank requests, sent,
received, falls (uint64 each), compute, network, away (float64 each, seconds), thermal (uint64).
``device`` is 1 where there is such a machine and 2 while it is away, else it is 0 and so are the eight numbers of the
machine.

Whatever is cut, longer than announced, out of bounds or damaged in any bit raises ``WireError``; nothing is
allocated from a length that has not been checked.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from mpgpt.core import (
    MAX_LOGPROBS,
    NO_TOKEN,
    Buffer,
    DeviceAccount,
    Result,
    Row,
    Sampling,
    StageStats,
    StatsRound,
    Step,
    Stop,
    Thermal,
)
from mpgpt.errors import WireError

MAGIC = b"mpg1"
STEP, RESULT, STOP, TALLY = 1, 2, 3, 4

HEADER = struct.Struct("<4sBBHIIIIII")
ROW = struct.Struct("<8I6dQ")
LOGPROB = struct.Struct("<if")
ACCOUNT = struct.Struct("<2I3Q5d4Q3dQ")
THERMAL: tuple[Thermal, ...] = get_args(Thermal)
CRC_AT = 28
ALIGN = 16

Message = Step | Result | Stop | StatsRound
type_of = {STEP: "step", RESULT: "result", STOP: "stop", TALLY: "tally"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Codec:
    """Frames of one ring: what a row, a step and a token may be at most."""

    rows: int
    """Most rows in a step."""
    tokens: int
    """Most tokens in a step."""
    token_bytes: int
    """Bytes of one token's hidden state: embed x size of the activation dtype."""
    slots: int
    context: int
    """Positions are below this."""
    ranks: int
    """Most accounts in a tally."""

    @property
    def max_frame(self) -> int:
        """The length of the longest frame, bytes."""
        step = _hidden_at(self.rows, self.tokens) + self.tokens * self.token_bytes
        result = HEADER.size + self.tokens * (4 + MAX_LOGPROBS * LOGPROB.size)
        return max(step, result, HEADER.size + self.ranks * ACCOUNT.size)

    def encode(self, message: Message) -> bytearray:
        """The frame of ``message``, with the hidden states copied once."""
        if isinstance(message, Step):
            frame = self._encode_step(message)
        elif isinstance(message, Result):
            frame = self._encode_result(message)
        elif isinstance(message, Stop):
            frame = bytearray(HEADER.pack(MAGIC, STOP, 0, 0, message.epoch, 0, 0, 0, 0, 0))
        else:
            frame = self._encode_tally(message)
        struct.pack_into("<I", frame, CRC_AT, zlib.crc32(frame))
        return frame

    def _encode_result(self, result: Result) -> bytearray:
        count, logprobs = len(result.ids), b"".join(LOGPROB.pack(*logprob) for logprob in result.logprobs)
        length = 4 * count + len(logprobs)
        head = HEADER.pack(
            MAGIC, RESULT, 0, 0, result.epoch, result.number, len(result.logprobs), count, length, 0
        )  # fmt: skip
        return bytearray(b"".join((head, struct.pack(f"<{count}i", *result.ids), logprobs)))

    def _encode_step(self, step: Step) -> bytearray:
        rows, tokens = len(step.rows), step.tokens
        hidden_at = _hidden_at(rows, tokens)
        total = hidden_at + len(step.hidden)
        assert 0 < rows <= self.rows and tokens <= self.tokens, "the step is larger than the ring was built for"
        assert len(step.hidden) in (0, tokens * self.token_bytes), "hidden states do not fit the tokens"
        frame = bytearray(total)
        HEADER.pack_into(
            frame, 0, MAGIC, STEP, 0, rows, step.epoch, step.number, tokens, step.outputs, total - HEADER.size, 0
        )
        at = HEADER.size
        for row in step.rows:
            s = row.sampling
            ROW.pack_into(
                frame, at, row.slot, row.start, len(row.ids), row.outputs, row.prompt, row.logprobs, s.top_k, 0,
                s.temperature, s.top_p, s.min_p, s.repetition_penalty, s.frequency_penalty, s.presence_penalty, s.seed,
            )  # fmt: skip
            at += ROW.size
        struct.pack_into(f"<{tokens}i", frame, at, *(id for row in step.rows for id in row.ids))
        frame[hidden_at:] = step.hidden
        return frame

    def _encode_tally(self, stats_round: StatsRound) -> bytearray:
        count = len(stats_round.accounts)
        assert count <= self.ranks, "more accounts than ranks"
        head = HEADER.pack(
            MAGIC, TALLY, 0, count, stats_round.epoch, 0, int(stats_round.redial), 0, count * ACCOUNT.size, 0
        )
        return bytearray(b"".join((head, *map(_pack_account, stats_round.accounts))))

    def decode(self, frame: Buffer) -> Message:
        """The message in ``frame``. A step's hidden states are a view into it, not a copy.

        Raises ``WireError`` for anything that ``encode`` cannot have made.
        """
        view = memoryview(frame).cast("B")
        if not HEADER.size <= len(view) <= self.max_frame:
            raise WireError(f"a frame of {len(view)} bytes; {HEADER.size} to {self.max_frame} are possible")
        magic, kind, zero, rows, epoch, number, tokens, outputs, length, crc = HEADER.unpack_from(view)
        if magic != MAGIC:
            raise WireError(f"a frame that begins with {bytes(magic)!r}, not {MAGIC!r}")
        if length != len(view) - HEADER.size:
            raise WireError(f"a frame of {len(view)} bytes that announces {length + HEADER.size}")
        if crc != zlib.crc32(view[HEADER.size :], zlib.crc32(b"\0\0\0\0", zlib.crc32(view[:CRC_AT]))):
            raise WireError("a damaged frame: its checksum does not fit")
        if kind not in type_of or zero:
            raise WireError(f"a frame of unknown kind {kind}")
        if kind == STEP:
            return self._decode_step(view, rows, epoch, number, tokens, outputs)
        if kind == TALLY:
            if number or tokens > 1 or outputs or length != rows * ACCOUNT.size:
                raise WireError(f"a tally of {rows} accounts with {length} bytes, or with what belongs to a step")
            return self._decode_tally(view, rows, epoch, redial=bool(tokens))
        whole = length == 4 * outputs + LOGPROB.size * tokens
        if rows or not whole or (kind == STOP and (number or outputs or tokens)):
            raise WireError(f"a {type_of[kind]} with rows, tokens or outputs that it cannot have")
        if kind == STOP:
            return Stop(epoch=epoch)
        return self._decode_result(view, epoch, number, tokens, outputs)

    def _decode_result(self, view: memoryview, epoch: int, number: int, tokens: int, outputs: int) -> Result:
        if outputs > self.tokens or tokens > outputs * MAX_LOGPROBS:
            raise WireError(f"a result of {outputs} ids and {tokens} logprobs; {self.tokens} ids are possible")
        ids = struct.unpack_from(f"<{outputs}i", view, HEADER.size)
        logprobs = tuple(LOGPROB.iter_unpack(view[HEADER.size + 4 * outputs :]))
        if min(ids, default=0) < NO_TOKEN or any(id < 0 for id, _ in logprobs):
            raise WireError("a result with a negative token id")
        if tokens > (said := outputs - ids.count(NO_TOKEN)) * MAX_LOGPROBS:
            raise WireError(f"a result of {said} tokens with {tokens} logprobs")
        if not all(math.isfinite(log) for _, log in logprobs):
            raise WireError("a result with a logprob that is no number")
        return Result(epoch=epoch, number=number, ids=ids, logprobs=logprobs)

    def _decode_step(self, view: memoryview, rows: int, epoch: int, number: int, tokens: int, outputs: int) -> Step:
        if not 0 < rows <= self.rows or not rows <= tokens <= self.tokens:
            raise WireError(f"a step of {rows} rows and {tokens} tokens; {self.rows} and {self.tokens} are possible")
        hidden_at = _hidden_at(rows, tokens)
        if len(view) - hidden_at not in (0, tokens * self.token_bytes):
            raise WireError(f"a step of {tokens} tokens with {len(view) - hidden_at} bytes of hidden states")
        ids_at = HEADER.size + rows * ROW.size
        ids = struct.unpack_from(f"<{tokens}i", view, ids_at)
        if any(view[ids_at + 4 * tokens : hidden_at]):
            raise WireError("a step whose padding is not zero")
        if min(ids) < 0:
            raise WireError("a step with a negative token id")
        unpacked = self._decode_rows(view, rows, ids)
        if sum(row.outputs for row in unpacked) != outputs:
            raise WireError("a step whose rows do not add up to its outputs")
        return Step(epoch=epoch, number=number, rows=unpacked, hidden=view[hidden_at:])

    def _decode_tally(self, view: memoryview, count: int, epoch: int, *, redial: bool) -> StatsRound:
        if count > self.ranks:
            raise WireError(f"a tally of {count} accounts; there are {self.ranks} ranks")
        accounts: list[StageStats] = []
        for fields in ACCOUNT.iter_unpack(view[HEADER.size :]):
            account = _unpack_account(*fields)
            if account.rank >= self.ranks or account.rank in {other.rank for other in accounts}:
                raise WireError(f"a tally with an account of rank {account.rank}; each of {self.ranks} has one")
            accounts.append(account)
        return StatsRound(epoch=epoch, accounts=tuple(accounts), redial=redial)

    def _decode_rows(self, view: memoryview, rows: int, ids: Sequence[int]) -> tuple[Row, ...]:
        unpacked, used = [], 0
        for i in range(rows):
            slot, start, count, outputs, prompt, logprobs, top_k, zero, *numbers, seed = ROW.unpack_from(
                view, HEADER.size + i * ROW.size
            )
            temperature, top_p, min_p, repetition, frequency, presence = numbers
            if slot >= self.slots or start + count > self.context or zero:
                raise WireError(f"a row of slot {slot} and positions {start} to {start + count} is out of bounds")
            if not 0 < count <= len(ids) - used or outputs > count or logprobs > MAX_LOGPROBS:
                raise WireError(f"a row with {count} ids, {outputs} outputs and {logprobs} logprobs")
            sampling = Sampling(
                temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
                repetition_penalty=repetition, frequency_penalty=frequency, presence_penalty=presence, seed=seed,
            )  # fmt: skip
            row_ids = tuple(ids[used : used + count])
            unpacked.append(
                Row(
                    slot=slot, start=start, ids=row_ids, outputs=outputs, prompt=prompt, logprobs=logprobs,
                    sampling=sampling,
                )
            )  # fmt: skip
            used += count
        if used != len(ids):
            raise WireError("a step whose rows do not add up to its tokens")
        return tuple(unpacked)


def _pack_account(a: StageStats) -> bytes:
    d = a.device
    behind = (
        (d.requests, d.sent, d.received, d.falls, d.compute_s, d.network_s, d.away_s, THERMAL.index(d.thermal))
        if d
        else (0,) * 8
    )
    seconds = (a.wall_s, a.compute_s, a.wait_s, a.send_s, a.other_s)
    return ACCOUNT.pack(a.rank, 1 + d.away if d else 0, a.steps, a.tokens, a.peak_rss, *seconds, *behind)


def _unpack_account(rank: int, has_device: int, steps: int, tokens: int, peak: int, *rest: Any) -> StageStats:
    seconds, (requests, sent, received, falls), away, thermal = rest[:5], rest[5:9], rest[9:12], rest[12]
    if not all(math.isfinite(part) and part >= 0 for part in (*seconds, *away)):
        raise WireError(f"an account of {[*seconds, *away]} seconds")
    if has_device > 2 or thermal >= len(THERMAL) or (not has_device and any(rest[5:])):
        raise WireError(f"an account with the device {has_device} and its numbers {list(rest[5:])}")
    wall, compute, wait, send, other = seconds
    device = DeviceAccount(
        requests=requests, compute_s=away[0], network_s=away[1], sent=sent, received=received, falls=falls,
        away_s=away[2], thermal=THERMAL[thermal], away=has_device == 2,
    )  # fmt: skip
    return StageStats(
        rank=rank, steps=steps, tokens=tokens, wall_s=wall, compute_s=compute, wait_s=wait, send_s=send, other_s=other,
        peak_rss=peak, device=device if has_device else None,
    )  # fmt: skip


def _hidden_at(rows: int, tokens: int) -> int:
    end = HEADER.size + rows * ROW.size + 4 * tokens
    return -(-end // ALIGN) * ALIGN
