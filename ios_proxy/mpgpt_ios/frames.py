"""Frames between the proxy rank and the iPad: messages as bytes, and back. ``ios_proxy/PROTOCOL.md`` is the standard.

Knows: the header, every message's payload, the bound of every length. Sans I/O: bytes in, messages out.
Must not know: sockets, which message may follow which (``dialling.py``, ``listening.py``), what is done with any.

Whatever is cut, damaged, out of bounds or of an unknown kind raises ``WireError``. A frame's length is checked before
anything of it is kept, so no more than the longest frame is ever held.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpgpt.errors import WireError
from mpgpt_ios.messages import (
    CODES,
    Answer,
    Ask,
    Bye,
    Challenge,
    Data,
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
    Reset,
    Stored,
    Trouble,
    Values,
    Want,
)

MAGIC, VERSION = b"mpIP", 1
HEADER = struct.Struct("<4sBBHIIBBHHHII")
CRC_AT = 28
PAIR, ENTRY_HEAD, LONG = struct.Struct("<II"), struct.Struct("<H"), struct.Struct("<Q")
NONCE = PROOF = DIGEST = 32
MAX_JSON, MAX_TEXT, MAX_NAME, MAX_FILES, MAX_PIECE = 64 << 10, 500, 200, 1000, 256 << 10
MAX_ROWS, MAX_TOKENS, MAX_EMBED = 64, 512, 16384
MAX_PAYLOAD = 4 << 20

DTYPES: dict[int, Any] = {1: np.dtype("<f2"), 2: np.dtype("<f4")}
HELLO, CHALLENGE, PROVE, INFO, OFFER, WANT, DATA, STORED, LOAD, LOADING, READY, RESET = range(1, 13)
PREFILL, DECODE, RESULT, ERROR, PING, PONG, BYE = range(13, 20)

# -- messages to bytes


def encode(message: Message) -> bytes:
    """The frame of a message."""
    kind, payload, epoch, request, dtype, rows, tokens = _parts(message)
    assert len(payload) <= MAX_PAYLOAD, "a message longer than a frame may be"
    head = HEADER.pack(MAGIC, VERSION, kind, 0, epoch, request, dtype, 0, rows, tokens, 0, len(payload), 0)
    crc = zlib.crc32(payload, zlib.crc32(head))
    return head[:CRC_AT] + struct.pack("<I", crc) + payload


def _parts(m: Message) -> tuple[int, bytes, int, int, int, int, int]:
    """Type, payload, epoch, request, dtype, rows, tokens."""
    match m:
        case Hello():
            return HELLO, m.nonce, 0, 0, 0, 0, 0
        case Challenge():
            return CHALLENGE, m.nonce + m.proof, 0, 0, 0, 0, 0
        case Proof():
            return PROVE, m.proof, 0, 0, 0, 0, 0
        case Info():
            return INFO, _json(m.facts), 0, 0, 0, 0, 0
        case Offer():
            return OFFER, m.bundle + b"".join(map(_file, m.files)), 0, 0, 0, len(m.files), 0
        case Want():
            return WANT, LONG.pack(m.offset), 0, 0, 0, 0, 0
        case Data():
            return DATA, LONG.pack(m.offset) + m.piece, 0, 0, 0, 0, 0
        case Stored():
            return STORED, m.bundle, 0, 0, 0, 0, 0
        case Load():
            return LOAD, m.bundle, 0, 0, 0, 0, 0
        case Loading():
            return LOADING, m.text.encode(), 0, 0, 0, 0, 0
        case Ready():
            return READY, _json(m.facts), 0, 0, 0, 0, 0
        case Reset():
            return RESET, b"", m.epoch, 0, 0, 0, 0
        case Ask():
            kind = PREFILL if m.prefill else DECODE
            payload = _places(m.places) + _raw(m.x)
            return kind, payload, m.epoch, m.request, _number(m.x), len(m.places), len(m.x)
        case Answer():
            payload = LONG.pack(m.compute_ns) + _places(m.places) + _raw(m.y)
            return RESULT, payload, m.epoch, m.request, _number(m.y), len(m.places), len(m.y)
        case Trouble():
            payload = struct.pack("<H", CODES.index(m.code) + 1) + m.text.encode()[:MAX_TEXT]
            return ERROR, payload, m.epoch, m.request, 0, 0, 0
        case Ping():
            return PING, LONG.pack(m.number), 0, 0, 0, 0, 0
        case Pong():
            return PONG, LONG.pack(m.number) + _json(m.facts), 0, 0, 0, 0, 0
        case Bye():
            return BYE, b"", 0, 0, 0, 0, 0


def _json(facts: Mapping[str, Any]) -> bytes:
    return json.dumps(facts, separators=(",", ":"), ensure_ascii=False, sort_keys=True).encode()


def _file(file: File) -> bytes:
    name = file.name.encode()
    return ENTRY_HEAD.pack(len(name)) + name + LONG.pack(file.length) + file.sha256


def _places(places: tuple[tuple[int, int], ...]) -> bytes:
    return b"".join(PAIR.pack(slot, position) for slot, position in places)


def _number(values: Values) -> int:
    return next(number for number, dtype in DTYPES.items() if dtype == values.dtype)


def _raw(values: Values) -> bytes:
    return values.tobytes()


# -- bytes to messages


@dataclass(frozen=True, slots=True)
class _Head:
    kind: int
    epoch: int
    request: int
    dtype: int
    rows: int
    tokens: int
    length: int
    crc: int


class Frames:
    """Bytes as they come in, and the messages in them."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._head: _Head | None = None

    def feed(self, data: bytes) -> None:
        """Any bytes, cut anywhere. Call ``next`` until it gives None before feeding more than ``MAX_PIECE``."""
        self._buffer += data

    @property
    def held(self) -> int:
        return len(self._buffer)

    def next(self) -> Message | None:
        """The next message; None when more bytes are needed. After a ``WireError`` nothing more can be read."""
        if self._head is None:
            if len(self._buffer) < HEADER.size:
                _check_start(self._buffer)
                return None
            self._head = _read_head(self._buffer)
        head, end = self._head, HEADER.size + self._head.length
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._head = None
        if zlib.crc32(frame[HEADER.size :], zlib.crc32(frame[:CRC_AT] + bytes(4))) != head.crc:
            raise WireError("a damaged frame: its checksum does not fit")
        return _read(head, frame[HEADER.size :])


def _check_start(data: bytearray) -> None:
    """What cannot become a frame need not be waited for."""
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise WireError(f"bytes that begin with {bytes(data[:4])!r}, not {MAGIC!r}: this is no mpgpt iPad link")
    if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
        raise VersionError(data[len(MAGIC)])


class VersionError(WireError):
    """The other end speaks another version of the protocol."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the other end speaks version {version} of the protocol, not {VERSION}: update the older")


def _read_head(buffer: bytearray) -> _Head:
    _check_start(buffer)
    _, _, kind, flags, epoch, request, dtype, zero, rows, tokens, zero2, length, crc = HEADER.unpack_from(buffer)
    least, most = LENGTHS.get(kind, (1, 0))
    if not least <= length <= most:
        raise WireError(f"a frame of kind {kind} with {length} bytes; {least} to {most} are possible")
    numbered, valued = kind in (PREFILL, DECODE, RESULT), kind in (PREFILL, DECODE, RESULT)
    if flags or zero or zero2 or (request and not (numbered or kind == ERROR)):
        raise WireError(f"a frame of kind {kind} with flags or numbers that it cannot have")
    if (dtype not in DTYPES) if valued else dtype:
        raise WireError(f"a frame of kind {kind} with values of the unknown dtype {dtype}")
    if epoch and not (numbered or kind in (RESET, ERROR)):
        raise WireError(f"a frame of kind {kind} with an epoch")
    bound = (MAX_ROWS, MAX_TOKENS) if valued else (MAX_FILES if kind == OFFER else 0, 0)
    if rows > bound[0] or tokens > bound[1] or (valued and not 0 < rows <= tokens):
        raise WireError(f"a frame of kind {kind} with {rows} rows and {tokens} tokens")
    return _Head(kind, epoch, request, dtype, rows, tokens, length, crc)


LENGTHS = {
    HELLO: (NONCE, NONCE), CHALLENGE: (NONCE + PROOF, NONCE + PROOF), PROVE: (PROOF, PROOF), INFO: (2, MAX_JSON),
    OFFER: (DIGEST, MAX_PAYLOAD), WANT: (8, 8), DATA: (9, 8 + MAX_PIECE), STORED: (DIGEST, DIGEST),
    LOAD: (DIGEST, DIGEST), LOADING: (0, MAX_TEXT), READY: (2, MAX_JSON), RESET: (0, 0), PREFILL: (10, MAX_PAYLOAD),
    DECODE: (10, MAX_PAYLOAD), RESULT: (18, MAX_PAYLOAD), ERROR: (2, 2 + MAX_TEXT), PING: (8, 8),
    PONG: (10, 8 + MAX_JSON), BYE: (0, 0),
}  # fmt: skip
"""Bytes of each kind's payload, at least and at most."""


def _read(head: _Head, payload: bytes) -> Message:
    return READERS[head.kind](head, payload)


def _read_challenge(head: _Head, payload: bytes) -> Message:
    return Challenge(nonce=payload[:NONCE], proof=payload[NONCE:])


def _read_data(head: _Head, payload: bytes) -> Message:
    return Data(offset=LONG.unpack_from(payload)[0], piece=payload[LONG.size :])


def _read_ask(head: _Head, payload: bytes) -> Message:
    places, x = _read_rows(head, payload)
    prefill = head.kind == PREFILL
    if (len(places) != 1) if prefill else (len(places) != len(x)):
        raise WireError(f"a request of kind {head.kind} for {len(places)} rows and {len(x)} tokens")
    return Ask(epoch=head.epoch, request=head.request, places=places, prefill=prefill, x=x)


def _read_answer(head: _Head, payload: bytes) -> Message:
    places, y = _read_rows(head, payload[LONG.size :])
    compute_ns = LONG.unpack_from(payload)[0]
    return Answer(epoch=head.epoch, request=head.request, places=places, compute_ns=compute_ns, y=y)


def _read_trouble(head: _Head, payload: bytes) -> Message:
    code = int.from_bytes(payload[:2], "little")
    if not 0 < code <= len(CODES):
        raise WireError(f"an error of the unknown code {code}")
    return Trouble(code=CODES[code - 1], text=_text(payload[2:]), epoch=head.epoch, request=head.request)


def _read_pong(head: _Head, payload: bytes) -> Message:
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


def _read_rows(head: _Head, payload: bytes) -> tuple[tuple[tuple[int, int], ...], Values]:
    dtype = DTYPES[head.dtype]
    values_at = PAIR.size * head.rows
    per_token, rest = divmod(len(payload) - values_at, head.tokens * dtype.itemsize)
    if rest or not 0 < per_token <= MAX_EMBED:
        raise WireError(f"{len(payload)} bytes for {head.rows} rows and {head.tokens} tokens")
    places = tuple((slot, position) for slot, position in PAIR.iter_unpack(payload[:values_at]))
    values = np.frombuffer(payload, dtype, offset=values_at).reshape(head.tokens, per_token).copy()
    return places, values


def _read_offer(head: _Head, payload: bytes) -> Offer:
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


READERS: dict[int, Callable[[_Head, bytes], Message]] = {
    HELLO: lambda head, payload: Hello(nonce=payload), CHALLENGE: _read_challenge,
    PROVE: lambda head, payload: Proof(proof=payload), INFO: lambda head, payload: Info(facts=_facts(payload)),
    OFFER: _read_offer, WANT: lambda head, payload: Want(offset=LONG.unpack(payload)[0]), DATA: _read_data,
    STORED: lambda head, payload: Stored(bundle=payload), LOAD: lambda head, payload: Load(bundle=payload),
    LOADING: lambda head, payload: Loading(text=_text(payload)),
    READY: lambda head, payload: Ready(facts=_facts(payload)), RESET: lambda head, payload: Reset(epoch=head.epoch),
    PREFILL: _read_ask, DECODE: _read_ask, RESULT: _read_answer, ERROR: _read_trouble,
    PING: lambda head, payload: Ping(number=LONG.unpack(payload)[0]), PONG: _read_pong,
    BYE: lambda head, payload: Bye(),
}  # fmt: skip
