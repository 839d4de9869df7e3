"""A connection between two ranks' heartbeats: its greeting, its proof, its frames.

Knows: bytes and sockets. Must not know: who is lost, or when anything is sent.

A connection begins with a greeting each way: magic, rank (uint32), nonce (16 bytes); then a proof each way: HMAC-SHA256
of the secret over the other's nonce and the own rank. After that frames: magic, kind (uint8), zero, length of the body
(uint16). The body of a beat is a pair of rank (uint32) and seconds of silence (float32) for each neighbour that is
silent; that of a farewell is 0 or 1 (the rank failed), and a sentence in UTF-8. All integers are little-endian.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

MAGIC = b"mpgb"
GREETING = struct.Struct("<4sI16s")
PROOF_BYTES = 32
FRAME = struct.Struct("<4sBBH")
BEAT, FAREWELL = 1, 2
MOST_BODY = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """Another rank, and where its heartbeat listens."""

    rank: int
    host: str
    port: int
    addresses: tuple[str, ...]
    """All are dialled at once, the likeliest first."""

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


@dataclass(slots=True, eq=False)
class Connection:
    """One end of a connection between two ranks' heartbeats."""

    socket: socket.socket
    begun: float
    dialled: int | None = None
    """Whom this end dialled."""
    nonce: bytes = field(default_factory=lambda: os.urandom(16))
    theirs: bytes = b""
    claims: int | None = None
    """The rank that the other end claims to be."""
    rank: int | None = None
    """The rank that it has proved to be."""
    received: bytearray = field(default_factory=bytearray)
    unsent: bytes = b""
    """The rest of a frame that did not fit."""
    mutual: bool = False
    """Whether both ends know that the other has proved itself: only then does its end mean a loss."""

    def send(self, kind: int, body: bytes) -> None:
        self.write(FRAME.pack(MAGIC, kind, 0, len(body)) + body)

    def write(self, data: bytes) -> None:
        """Send what the other end takes at once; of what does not fit only the rest of a frame is kept. A connection
        that has broken is left to its reader: a farewell may lie there."""
        data, held = self.unsent + data, len(self.unsent)
        try:
            sent = self.socket.send(data)
        except OSError:
            return
        if sent < held:
            self.unsent = data[sent:held]
        else:
            self.unsent = data[sent:] if sent > held or not held else b""

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """The kind and the body of every whole frame that has come. Raises ``ValueError`` at what is none."""
        received = self.received
        while len(received) >= FRAME.size:
            magic, kind, _, length = FRAME.unpack_from(received)
            if magic != MAGIC or length > MOST_BODY:
                raise ValueError("no frame of a heartbeat")
            if len(received) < FRAME.size + length:
                return
            body = bytes(received[FRAME.size : FRAME.size + length])
            del received[: FRAME.size + length]
            yield kind, body


def prove(secret: bytes, nonce: bytes, rank: int) -> bytes:
    """The proof that this is ``rank``, over the other end's nonce."""
    return hmac.digest(secret, nonce + struct.pack("<I", rank), hashlib.sha256)


def listen() -> socket.socket:
    """A listener on a free port of all networks, of IPv6 too where the host has it."""
    try:
        listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=128, dualstack_ipv6=True)
    except (OSError, ValueError):
        listener = socket.create_server(("", 0), backlog=128)
    listener.setblocking(False)
    return listener


def family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def encoded(sentence: str) -> bytes:
    """A sentence as it fits into a farewell: cut between characters, and what is no character written out."""
    whole = sentence.encode(errors="backslashreplace")
    return whole[: MOST_BODY - 1].decode(errors="ignore").encode()
