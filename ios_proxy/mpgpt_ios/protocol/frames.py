"""Frames between the proxy rank and the iPad: messages as bytes, and back. ``ios_proxy/PROTOCOL.md`` is the standard.

Knows: the header, the checksum, how long each kind's payload may be. Sans I/O: bytes in, messages out.
Must not know: what is in a payload (``payloads.py``), sockets, which message may follow which (``proxy_session.py``,
``node_session.py``), what is done with any.

Whatever is cut, damaged, out of bounds or of an unknown kind raises ``WireError``. A frame's length is checked before
anything of it is kept, so no more than the longest frame is ever held.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable

from mpgpt.errors import WireError
from mpgpt_ios.protocol.messages import Message
from mpgpt_ios.protocol.payloads import DIGEST, DTYPES, LONG, MAX_TEXT, NONCE, PROOF, Head, Kind, read, write

MAGIC, VERSION = b"mpIP", 1
HEADER = struct.Struct("<4sBBHIIBBHHHII")
CRC_AT = 28
MAX_JSON, MAX_FILES, MAX_PIECE = 64 << 10, 1000, 256 << 10
MAX_ROWS, MAX_TOKENS = 64, 512
MAX_PAYLOAD = 4 << 20
MAX_REQUEST = MAX_PAYLOAD - LONG.size
"""Its RESULT has the same positions and shape, and a time before them."""
LENGTHS: dict[int, tuple[int, int]] = {
    Kind.HELLO: (NONCE, NONCE), Kind.CHALLENGE: (NONCE + PROOF, NONCE + PROOF), Kind.PROOF: (PROOF, PROOF),
    Kind.INFO: (2, MAX_JSON), Kind.OFFER: (DIGEST, MAX_PAYLOAD), Kind.WANT: (8, 8), Kind.DATA: (9, 8 + MAX_PIECE),
    Kind.STORED: (DIGEST, DIGEST), Kind.LOAD: (DIGEST, DIGEST), Kind.LOADING: (0, MAX_TEXT), Kind.READY: (2, MAX_JSON),
    Kind.RESET: (0, 0), Kind.PREFILL: (10, MAX_REQUEST), Kind.DECODE: (10, MAX_REQUEST),
    Kind.RESULT: (18, MAX_PAYLOAD), Kind.ERROR: (2, 2 + MAX_TEXT), Kind.PING: (8, 8), Kind.PONG: (10, 8 + MAX_JSON),
    Kind.BYE: (0, 0),
}  # fmt: skip
"""Bytes of each kind's payload, at least and at most."""
VALUED = (Kind.PREFILL, Kind.DECODE, Kind.RESULT)
"""Kinds with values, which also have an epoch and a number."""


def encode(message: Message) -> bytes:
    """The frame of a message."""
    h, payload = write(message)
    assert len(payload) <= LENGTHS[h.kind][1], "a message longer than a frame may be"
    fields = (h.kind, 0, h.epoch, h.request, h.dtype, 0, h.rows, h.tokens, 0, len(payload), 0)
    head = HEADER.pack(MAGIC, VERSION, *fields)
    crc = zlib.crc32(payload, zlib.crc32(head))
    return head[:CRC_AT] + struct.pack("<I", crc) + payload


class Frames:
    """Bytes as they come in, and the messages in them."""

    def __init__(self, allow: Callable[[Kind], None] = lambda kind: None) -> None:
        """``allow`` is called with a frame's kind before its payload has come, and may raise."""
        self._allow = allow
        self._buffer = bytearray()
        self._next: tuple[Head, int, int] | None = None
        """The next frame's header, the length of its payload, its checksum."""

    def feed(self, data: bytes) -> None:
        """Any bytes, cut anywhere. Call ``next`` until it gives None before feeding more than ``MAX_PIECE``."""
        self._buffer += data

    @property
    def held(self) -> int:
        return len(self._buffer)

    def next(self) -> Message | None:
        """The next message; None when more bytes are needed. After a ``WireError`` nothing more can be read."""
        if self._next is None:
            if len(self._buffer) < HEADER.size:
                _check_start(self._buffer)
                return None
            self._next = _read_head(self._buffer)
            self._allow(Kind(self._next[0].kind))
        head, length, crc = self._next
        end = HEADER.size + length
        if len(self._buffer) < end:
            return None
        frame = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._next = None
        if zlib.crc32(frame[HEADER.size :], zlib.crc32(frame[:CRC_AT] + bytes(4))) != crc:
            raise WireError("a damaged frame: its checksum does not fit")
        return read(head, frame[HEADER.size :])


def _check_start(data: bytearray) -> None:
    """Raise ``WireError`` for bytes that cannot become a frame."""
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise WireError(f"bytes that begin with {bytes(data[:4])!r}, not {MAGIC!r}: this is no mpgpt iPad link")
    if len(data) > len(MAGIC) and data[len(MAGIC)] != VERSION:
        raise VersionError(data[len(MAGIC)])


class VersionError(WireError):
    """The other end speaks another version of the protocol."""

    def __init__(self, version: int) -> None:
        super().__init__(f"the other end speaks version {version} of the protocol, not {VERSION}: update the older")


def _read_head(buffer: bytearray) -> tuple[Head, int, int]:
    """The header, the length of its payload, its checksum."""
    _check_start(buffer)
    _, _, kind, flags, epoch, request, dtype, zero, rows, tokens, zero2, length, crc = HEADER.unpack_from(buffer)
    least, most = LENGTHS.get(kind, (1, 0))
    if not least <= length <= most:
        raise WireError(f"a frame of kind {kind} with {length} bytes; {least} to {most} are possible")
    valued = kind in VALUED
    if flags or zero or zero2 or (request and not (valued or kind == Kind.ERROR)):
        raise WireError(f"a frame of kind {kind} with flags or numbers that it cannot have")
    if (dtype not in DTYPES) if valued else dtype:
        raise WireError(f"a frame of kind {kind} with values of the unknown dtype {dtype}")
    if epoch and not (valued or kind in (Kind.RESET, Kind.ERROR)):
        raise WireError(f"a frame of kind {kind} with an epoch")
    bound = (MAX_ROWS, MAX_TOKENS) if valued else (MAX_FILES if kind == Kind.OFFER else 0, 0)
    few = (valued and not 0 < rows <= tokens) or (kind == Kind.OFFER and not rows)
    if rows > bound[0] or tokens > bound[1] or few:
        raise WireError(f"a frame of kind {kind} with {rows} rows and {tokens} tokens")
    return Head(kind=kind, epoch=epoch, request=request, dtype=dtype, rows=rows, tokens=tokens), length, crc
