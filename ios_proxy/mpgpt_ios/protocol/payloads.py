"""What is in the frames between the proxy rank and the iPad: every message's payload as bytes, and back.

Knows: each kind of message's number, how its payload is laid out, the bounds of what is counted inside it.
Must not know: how a frame is found in a stream, checked or cut (``frames.py``).

A payload that is cut, too long, or says what cannot be raises ``WireError``.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from mpgpt.errors import WireError
from mpgpt_ios.protocol.messages import (
    CODES,
    Bye,
    Challenge,
    Data,
    Error,
    File,
    Hello,
    Info,
    Load,
    Loading,
    Message,
    Offer,
    Ping,
    Pong,
    Proof,
    Ready,
    Request,
    Reset,
    Result,
    Stored,
    Values,
    Want,
)

PAIR, ENTRY_HEAD, LONG = struct.Struct("<II"), struct.Struct("<H"), struct.Struct("<Q")
NONCE = PROOF = DIGEST = 32
MAX_TEXT, MAX_NAME, MAX_EMBED = 500, 200, 16384

DTYPES: dict[int, Any] = {1: np.dtype("<f2"), 2: np.dtype("<f4")}


class Kind(IntEnum):
    """A message's number in the header."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    INFO = 4
    OFFER = 5
    WANT = 6
    DATA = 7
    STORED = 8
    LOAD = 9
    LOADING = 10
    READY = 11
    RESET = 12
    PREFILL = 13
    DECODE = 14
    RESULT = 15
    ERROR = 16
    PING = 17
    PONG = 18
    BYE = 19


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What a frame's header says of its payload; zero where a kind has no such thing."""

    kind: int
    epoch: int = 0
    request: int = 0
    dtype: int = 0
    """A key of ``DTYPES``."""
    rows: int = 0
    tokens: int = 0


# -- messages to payloads


def write(message: Message) -> tuple[Head, bytes]:
    """What its header says, and its payload."""
    m = message
    match m:
        case Hello():
            return Head(kind=Kind.HELLO), m.nonce
        case Challenge():
            return Head(kind=Kind.CHALLENGE), m.nonce + m.proof
        case Proof():
            return Head(kind=Kind.PROOF), m.proof
        case Info():
            return Head(kind=Kind.INFO), _json(m.facts)
        case Offer():
            return Head(kind=Kind.OFFER, rows=len(m.files)), m.bundle + b"".join(map(_file, m.files))
        case Want():
            return Head(kind=Kind.WANT), LONG.pack(m.offset)
        case Data():
            return Head(kind=Kind.DATA), LONG.pack(m.offset) + m.piece
        case Stored():
            return Head(kind=Kind.STORED), m.bundle
        case Load():
            return Head(kind=Kind.LOAD), m.bundle
        case Loading():
            return Head(kind=Kind.LOADING), m.text.encode()
        case Ready():
            return Head(kind=Kind.READY), _json(m.facts)
        case Reset():
            return Head(kind=Kind.RESET, epoch=m.epoch), b""
        case Request():
            return _valued(Kind.PREFILL if m.prefill else Kind.DECODE, m, m.x), _places(m.positions) + m.x.tobytes()
        case Result():
            payload = LONG.pack(m.compute_ns) + _places(m.positions) + m.y.tobytes()
            return _valued(Kind.RESULT, m, m.y), payload
        case Error():
            payload = struct.pack("<H", CODES.index(m.code) + 1) + m.text.encode()[:MAX_TEXT]
            return Head(kind=Kind.ERROR, epoch=m.epoch, request=m.request), payload
        case Ping():
            return Head(kind=Kind.PING), LONG.pack(m.number)
        case Pong():
            return Head(kind=Kind.PONG), LONG.pack(m.number) + _json(m.facts)
        case Bye():
            return Head(kind=Kind.BYE), b""


def _valued(kind: Kind, m: Request | Result, values: Values) -> Head:
    dtype = next(number for number, dtype in DTYPES.items() if dtype == values.dtype)
    return Head(
        kind=kind, epoch=m.epoch, request=m.request, dtype=dtype, rows=len(m.positions), tokens=len(values)
    )  # fmt: skip


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, separators=(",", ":"), ensure_ascii=False, sort_keys=True).encode()


def _file(file: File) -> bytes:
    name = file.name.encode()
    return ENTRY_HEAD.pack(len(name)) + name + LONG.pack(file.length) + file.sha256


def _places(positions: tuple[tuple[int, int], ...]) -> bytes:
    return b"".join(PAIR.pack(slot, position) for slot, position in positions)


# -- payloads to messages


def read(head: Head, payload: bytes) -> Message:
    """The message of a header that has been checked, and of a payload as long as its kind's may be."""
    return READERS[head.kind](head, payload)


def _read_challenge(head: Head, payload: bytes) -> Message:
    return Challenge(nonce=payload[:NONCE], proof=payload[NONCE:])


def _read_data(head: Head, payload: bytes) -> Message:
    return Data(offset=LONG.unpack_from(payload)[0], piece=payload[LONG.size :])


def _read_ask(head: Head, payload: bytes) -> Message:
    positions, x = _read_rows(head, payload)
    prefill = head.kind == Kind.PREFILL
    if (len(positions) != 1) if prefill else (len(positions) != len(x)):
        raise WireError(f"a request of kind {head.kind} for {len(positions)} rows and {len(x)} tokens")
    return Request(epoch=head.epoch, request=head.request, positions=positions, prefill=prefill, x=x)


def _read_answer(head: Head, payload: bytes) -> Message:
    positions, y = _read_rows(head, payload[LONG.size :])
    compute_ns = LONG.unpack_from(payload)[0]
    return Result(epoch=head.epoch, request=head.request, positions=positions, compute_ns=compute_ns, y=y)


def _read_trouble(head: Head, payload: bytes) -> Message:
    code = int.from_bytes(payload[:2], "little")
    if not 0 < code <= len(CODES):
        raise WireError(f"an error of the unknown code {code}")
    return Error(code=CODES[code - 1], text=_text(payload[2:]), epoch=head.epoch, request=head.request)


def _read_pong(head: Head, payload: bytes) -> Message:
    return Pong(number=LONG.unpack_from(payload)[0], facts=_facts(payload[LONG.size :]))


def _facts(payload: bytes) -> Mapping[str, Any]:
    try:
        facts = json.loads(payload)
    except (ValueError, RecursionError):
        raise WireError("a message whose JSON cannot be read") from None
    if not isinstance(facts, dict):
        raise WireError("a message whose JSON is no object")
    return facts


def _text(payload: bytes) -> str:
    """UTF-8; what is cut or does not print is shown as such, for it goes to a terminal."""
    text = payload.decode(errors="replace")
    return "".join(c if c.isprintable() else "�" for c in text)


def _read_rows(head: Head, payload: bytes) -> tuple[tuple[tuple[int, int], ...], Values]:
    dtype = DTYPES[head.dtype]
    values_at = PAIR.size * head.rows
    per_token, rest = divmod(len(payload) - values_at, head.tokens * dtype.itemsize)
    if rest or not 0 < per_token <= MAX_EMBED:
        raise WireError(f"{len(payload)} bytes for {head.rows} rows and {head.tokens} tokens")
    positions = tuple((slot, position) for slot, position in PAIR.iter_unpack(payload[:values_at]))
    values = np.frombuffer(payload, dtype, offset=values_at).reshape(head.tokens, per_token).copy()
    return positions, values


def _read_offer(head: Head, payload: bytes) -> Offer:
    files, at = [], DIGEST
    for _ in range(head.rows):
        if at + ENTRY_HEAD.size > len(payload):
            raise WireError("an offer that is cut")
        (size,) = ENTRY_HEAD.unpack_from(payload, at)
        at += ENTRY_HEAD.size
        end = at + size + LONG.size + DIGEST
        if not 0 < size <= MAX_NAME or end > len(payload):
            raise WireError("an offer that is cut, or a file's name in it that is too long")
        try:
            name = payload[at : at + size].decode()
        except UnicodeDecodeError:
            raise WireError("an offer with a file's name that is not UTF-8") from None
        (length,) = LONG.unpack_from(payload, at + size)
        files.append(File(name=name, length=length, sha256=payload[end - DIGEST : end]))
        at = end
    if at != len(payload):
        raise WireError("an offer with more than its files")
    return Offer(bundle=payload[:DIGEST], files=tuple(files))


READERS: dict[int, Callable[[Head, bytes], Message]] = {
    Kind.HELLO: lambda head, payload: Hello(nonce=payload),
    Kind.CHALLENGE: _read_challenge,
    Kind.PROOF: lambda head, payload: Proof(proof=payload),
    Kind.INFO: lambda head, payload: Info(facts=_facts(payload)),
    Kind.OFFER: _read_offer,
    Kind.WANT: lambda head, payload: Want(offset=LONG.unpack(payload)[0]),
    Kind.DATA: _read_data,
    Kind.STORED: lambda head, payload: Stored(bundle=payload),
    Kind.LOAD: lambda head, payload: Load(bundle=payload),
    Kind.LOADING: lambda head, payload: Loading(text=_text(payload)),
    Kind.READY: lambda head, payload: Ready(facts=_facts(payload)),
    Kind.RESET: lambda head, payload: Reset(epoch=head.epoch),
    Kind.PREFILL: _read_ask,
    Kind.DECODE: _read_ask,
    Kind.RESULT: _read_answer,
    Kind.ERROR: _read_trouble,
    Kind.PING: lambda head, payload: Ping(number=LONG.unpack(payload)[0]),
    Kind.PONG: _read_pong,
    Kind.BYE: lambda head, payload: Bye(),
}
