"""The payloads of frames between the proxy rank and the iPad: every message as a header and bytes, and back.

Knows: each kind of message's number, how its payload is laid out, the bounds of what is counted inside it.
Must not know: how a frame is found in a stream, checked or cut (``frames.py``).

A payload that is cut, too long, or says what cannot be raises ``WireError``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from mpgpt.errors import WireError
from mpgpt_ios.protocol import messages as m

PAIR, SHORT, LONG = struct.Struct("<II"), struct.Struct("<H"), struct.Struct("<Q")
NONCE = PROOF = DIGEST = 32
MAX_TEXT, MAX_NAME, MAX_EMBED, MAX_DEPTH = 500, 200, 16384, 16

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
    """The fields of a frame's header that describe its payload; zero where a kind has none."""

    kind: int
    epoch: int = 0
    request: int = 0
    dtype: int = 0
    """A key of ``DTYPES``."""
    rows: int = 0
    tokens: int = 0


# -- messages to payloads


def write(message: m.Message) -> tuple[Head, bytes]:
    """A message's header and payload."""
    match message:
        case m.Hello(nonce=nonce):
            return Head(kind=Kind.HELLO), nonce
        case m.Challenge(nonce=nonce, proof=proof):
            return Head(kind=Kind.CHALLENGE), nonce + proof
        case m.Proof(proof=proof):
            return Head(kind=Kind.PROOF), proof
        case m.Info(facts=facts):
            return Head(kind=Kind.INFO), _json(facts)
        case m.Offer(bundle=bundle, files=files):
            return Head(kind=Kind.OFFER, rows=len(files)), bundle + b"".join(map(_file, files))
        case m.Want(offset=offset):
            return Head(kind=Kind.WANT), LONG.pack(offset)
        case m.Data(offset=offset, piece=piece):
            return Head(kind=Kind.DATA), LONG.pack(offset) + piece
        case m.Stored(bundle=bundle):
            return Head(kind=Kind.STORED), bundle
        case m.Load(bundle=bundle):
            return Head(kind=Kind.LOAD), bundle
        case m.Loading(text=text):
            return Head(kind=Kind.LOADING), _cut(text)
        case m.Ready(facts=facts):
            return Head(kind=Kind.READY), _json(facts)
        case m.Reset(epoch=epoch):
            return Head(kind=Kind.RESET, epoch=epoch), b""
        case m.Prefill(x=x):
            return _valued(Kind.PREFILL, message, x), _positions(message.positions) + x.tobytes()
        case m.Decode(x=x):
            return _valued(Kind.DECODE, message, x), _positions(message.positions) + x.tobytes()
        case m.Result(y=y):
            payload = LONG.pack(message.compute_ns) + _positions(message.positions) + y.tobytes()
            return _valued(Kind.RESULT, message, y), payload
        case m.Error(code=code, text=text):
            number = int(code[1:]) if code.startswith("#") else m.CODES.index(code) + 1
            payload = SHORT.pack(number) + _cut(text)
            return Head(kind=Kind.ERROR, epoch=message.epoch, request=message.request), payload
        case m.Ping(number=number):
            return Head(kind=Kind.PING), LONG.pack(number)
        case m.Pong(number=number, facts=facts):
            return Head(kind=Kind.PONG), LONG.pack(number) + _json(facts)
        case m.Bye():
            return Head(kind=Kind.BYE), b""


def _valued(kind: Kind, message: m.Request | m.Result, values: m.Values) -> Head:
    dtype = next(number for number, dtype in DTYPES.items() if dtype == values.dtype)
    rows, tokens = len(message.positions), len(values)
    return Head(kind=kind, epoch=message.epoch, request=message.request, dtype=dtype, rows=rows, tokens=tokens)


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, separators=(",", ":"), ensure_ascii=False, sort_keys=True).encode()


def _cut(text: str) -> bytes:
    """As much of a text as is sent, in whole characters."""
    return text.encode()[:MAX_TEXT].decode(errors="ignore").encode()


def _file(file: m.File) -> bytes:
    name = file.name.encode()
    return SHORT.pack(len(name)) + name + LONG.pack(file.length) + file.sha256


def _positions(positions: m.Positions) -> bytes:
    return b"".join(PAIR.pack(slot, position) for slot, position in positions)


# -- payloads to messages


def read(head: Head, payload: bytes) -> m.Message:
    """The message in a payload; the header has been checked, and the payload's length is its kind's."""
    return READERS[head.kind](head, payload)


def _read_challenge(head: Head, payload: bytes) -> m.Message:
    return m.Challenge(nonce=payload[:NONCE], proof=payload[NONCE:])


def _read_data(head: Head, payload: bytes) -> m.Message:
    return m.Data(offset=LONG.unpack_from(payload)[0], piece=payload[LONG.size :])


def _read_prefill(head: Head, payload: bytes) -> m.Message:
    positions, x = _read_rows(head, payload)
    if len(positions) != 1:
        raise _mismatched(head)
    return m.Prefill(epoch=head.epoch, request=head.request, positions=positions, x=x)


def _read_decode(head: Head, payload: bytes) -> m.Message:
    positions, x = _read_rows(head, payload)
    if len(positions) != len(x):
        raise _mismatched(head)
    return m.Decode(epoch=head.epoch, request=head.request, positions=positions, x=x)


def _mismatched(head: Head) -> WireError:
    return WireError(f"a request of kind {head.kind} for {head.rows} rows and {head.tokens} tokens")


def _read_result(head: Head, payload: bytes) -> m.Message:
    positions, y = _read_rows(head, payload[LONG.size :])
    compute_ns = LONG.unpack_from(payload)[0]
    return m.Result(epoch=head.epoch, request=head.request, positions=positions, compute_ns=compute_ns, y=y)


def _read_error(head: Head, payload: bytes) -> m.Message:
    number = int.from_bytes(payload[:2], "little")
    code = m.CODES[number - 1] if 0 < number <= len(m.CODES) else f"#{number}"
    return m.Error(code=code, text=_text(payload[2:]), epoch=head.epoch, request=head.request)


def _read_pong(head: Head, payload: bytes) -> m.Message:
    return m.Pong(number=LONG.unpack_from(payload)[0], facts=_facts(payload[LONG.size :]))


def _facts(payload: bytes) -> Mapping[str, Any]:
    try:
        facts = json.loads(
            payload.decode(), parse_constant=_no_number, parse_float=_float, parse_int=_integer,
            object_pairs_hook=_object,
        )  # fmt: skip
        json.dumps(facts, ensure_ascii=False).encode()  # a half of a surrogate pair has no UTF-8
    except (ValueError, RecursionError):
        raise WireError("a message whose JSON cannot be read") from None
    if not isinstance(facts, dict) or _depth(facts) > MAX_DEPTH:
        raise WireError("a message whose JSON is no object, or too deep a one")
    return facts


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a key that comes twice")
    return made


def _depth(value: Any) -> int:
    """Of objects and arrays in one another; one that is read is no deeper than Python's own stack."""
    within = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if within is None else 1 + max(map(_depth, within), default=0)


def _no_number(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON's")


def _float(word: str) -> float:
    if not math.isfinite(number := float(word)):
        raise ValueError(f"{word} is too large")
    return number


def _integer(word: str) -> int:
    if not -(1 << 63) <= (number := int(word)) < 1 << 63:
        raise ValueError(f"{word} is too large")
    return number


def _text(payload: bytes) -> str:
    """UTF-8 for a terminal: a replacement character stands for bytes that are cut or do not print."""
    text = payload.decode(errors="replace")
    return "".join(c if c.isprintable() else "�" for c in text)


def _read_rows(head: Head, payload: bytes) -> tuple[m.Positions, m.Values]:
    dtype = DTYPES[head.dtype]
    values_at = PAIR.size * head.rows
    per_token, rest = divmod(len(payload) - values_at, head.tokens * dtype.itemsize)
    if rest or not 0 < per_token <= MAX_EMBED:
        raise WireError(f"{len(payload)} bytes for {head.rows} rows and {head.tokens} tokens")
    positions = tuple((slot, position) for slot, position in PAIR.iter_unpack(payload[:values_at]))
    values = np.frombuffer(payload, dtype, offset=values_at).reshape(head.tokens, per_token).copy()
    return positions, values


def _read_offer(head: Head, payload: bytes) -> m.Offer:
    files, at = [], DIGEST
    for _ in range(head.rows):
        if at + SHORT.size > len(payload):
            raise WireError("an offer that is cut")
        (size,) = SHORT.unpack_from(payload, at)
        at += SHORT.size
        end = at + size + LONG.size + DIGEST
        if not 0 < size <= MAX_NAME or end > len(payload):
            raise WireError("an offer that is cut, or a file's name in it that is too long")
        try:
            name = payload[at : at + size].decode()
        except UnicodeDecodeError:
            raise WireError("an offer with a file's name that is not UTF-8") from None
        (length,) = LONG.unpack_from(payload, at + size)
        files.append(m.File(name=name, length=length, sha256=payload[end - DIGEST : end]))
        at = end
    if at != len(payload):
        raise WireError("an offer with more than its files")
    return m.Offer(bundle=payload[:DIGEST], files=tuple(files))


READERS: dict[int, Callable[[Head, bytes], m.Message]] = {
    Kind.HELLO: lambda head, payload: m.Hello(nonce=payload),
    Kind.CHALLENGE: _read_challenge,
    Kind.PROOF: lambda head, payload: m.Proof(proof=payload),
    Kind.INFO: lambda head, payload: m.Info(facts=_facts(payload)),
    Kind.OFFER: _read_offer,
    Kind.WANT: lambda head, payload: m.Want(offset=LONG.unpack(payload)[0]),
    Kind.DATA: _read_data,
    Kind.STORED: lambda head, payload: m.Stored(bundle=payload),
    Kind.LOAD: lambda head, payload: m.Load(bundle=payload),
    Kind.LOADING: lambda head, payload: m.Loading(text=_text(payload)),
    Kind.READY: lambda head, payload: m.Ready(facts=_facts(payload)),
    Kind.RESET: lambda head, payload: m.Reset(epoch=head.epoch),
    Kind.PREFILL: _read_prefill,
    Kind.DECODE: _read_decode,
    Kind.RESULT: _read_result,
    Kind.ERROR: _read_error,
    Kind.PING: lambda head, payload: m.Ping(number=LONG.unpack(payload)[0]),
    Kind.PONG: _read_pong,
    Kind.BYE: lambda head, payload: m.Bye(),
}
