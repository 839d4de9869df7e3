"""The proxy's end of the iPad link as a state machine, sans I/O: it authenticates, sends the bundle, and calls.

Knows: which message may come when, request numbers, what is late.
Must not know: sockets, clocks, what a bundle holds, what is done with results.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpgpt.errors import WireError
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import (
    HANDSHAKE_S,
    LOAD_SILENCE_S,
    NODE_LABEL,
    PING_S,
    PROXY_LABEL,
    QUEUE,
    PeerClosed,
    SessionError,
    prove,
    refused,
)
from mpgpt_ios.protocol.frames import MAX_PIECE, Frames, VersionError, encode
from mpgpt_ios.protocol.payloads import Kind


class BundleReader(Protocol):
    """A bundle's files and bytes (``bundle.Bundle``)."""

    hash: bytes
    length: int

    @property
    def entries(self) -> tuple[Any, ...]: ...
    def read(self, offset: int, count: int) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Authenticated:
    """The node has proved that it has the token; ``facts`` are INFO's."""

    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A sentence for a person while a bundle is sent or loaded."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """The layers are loaded: ``call`` may be used. ``facts`` are READY's."""

    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The result of the oldest open call."""

    request: int
    y: m.Values
    """It may hold numbers that are not finite, which concern one sequence and not the connection."""
    compute_s: float
    seconds: float
    """Since the call, or since the previous result where that came later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    facts: Mapping[str, Any]


Event = Authenticated | Progress | Ready | Reply | Health


@dataclass(frozen=True, slots=True)
class _Open:
    request: m.Request
    since: float


class ProxySession:
    """The dialling end: it authenticates, sends the bundle, has it loaded, and calls."""

    def __init__(
        self, token: bytes, bundle: BundleReader, nonce: bytes, now: float, *, epoch: int, timeout_s: float
    ) -> None:
        """``epoch`` is that of the first RESET; a result may take ``timeout_s``."""
        self.out = bytearray(encode(m.Hello(nonce=nonce)))
        self._frames, self._token, self._bundle, self._nonce = Frames(self._allow), token, bundle, nonce
        self._epoch, self._timeout = epoch, timeout_s
        self._begun = self._heard = self._pinged = now
        self._expect: tuple[Kind, ...] = (Kind.CHALLENGE,)
        self._proved = False
        """Whether the node has proved that it has the token."""
        self._sent: int | None = None
        self._open: deque[_Open] = deque()
        self._requests = 0
        self._answered = now
        self._dtype: Any = np.float16
        self.queue = QUEUE
        self._admitted = self.ready = False
        self._takers: dict[type[m.Message], Callable[[Any, float], list[Event]]] = {
            m.Challenge: self._take_challenge, m.Info: self._take_info, m.Want: self._take_want,
            m.Stored: self._take_stored, m.Loading: self._take_loading, m.Ready: self._take_ready,
            m.Result: self._take_result,
        }  # fmt: skip

    def receive(self, data: bytes, now: float) -> list[Event]:
        """The events in ``data``. Raises ``WireError`` or ``SessionError``: then close."""
        self._heard = now
        events: list[Event] = []
        try:
            self._frames.feed(data)
            while (message := self._frames.next()) is not None:
                events += self._take(message, now)
        except (VersionError, PeerClosed):
            raise
        except WireError as error:
            self._error("BAD_FRAME", str(error))
            raise
        except SessionError as error:
            self._error(error.code, str(error))
            raise
        return events

    def _error(self, code: str, text: str) -> None:
        self.out += encode(m.Error(code=code, text=text))

    def _allow(self, kind: Kind) -> None:
        always = (Kind.ERROR, Kind.BYE, Kind.PONG) if self._proved else (Kind.ERROR, Kind.BYE)
        if kind not in (*always, *self._expect):
            raise SessionError(f"{kind.name} was not expected now")

    def _take(self, message: m.Message, now: float) -> list[Event]:
        match message:
            case m.Error():
                raise refused(message, proved=self._proved)
            case m.Bye():
                raise PeerClosed("it said good-bye")
            case m.Pong():
                return [Health(facts=message.facts)]
            case _:
                return self._takers[type(message)](message, now)

    def _take_challenge(self, message: Any, now: float) -> list[Event]:
        expected = prove(self._token, NODE_LABEL, self._nonce, message.nonce)
        if not hmac.compare_digest(expected, message.proof):
            raise SessionError("it has another token: the token files of the two ends differ", "BAD_TOKEN")
        self.out += encode(m.Proof(proof=prove(self._token, PROXY_LABEL, message.nonce, self._nonce)))
        self._proved, self._expect = True, (Kind.INFO,)
        return []

    def _take_info(self, message: Any, now: float) -> list[Event]:
        files = tuple(m.File(name=e.name, length=e.length, sha256=e.sha256) for e in self._bundle.entries)
        self.out += encode(m.Offer(bundle=self._bundle.hash, files=files))
        self._admitted, self._expect = True, (Kind.WANT,)
        return [Authenticated(facts=message.facts)]

    def _take_want(self, message: Any, now: float) -> list[Event]:
        if message.offset > self._bundle.length:
            raise SessionError(f"it wants the package from byte {message.offset} of {self._bundle.length}")
        self._sent, self._expect = message.offset, (Kind.STORED,)
        missing = self._bundle.length - message.offset
        return [Progress(text=f"sending its package, {missing / 1e6:.0f} MB")] if missing else []

    def fill(self) -> None:
        """Put the bundle's next piece into ``out`` while one is due; to be called when ``out`` is empty."""
        if self._sent is not None and self._sent < self._bundle.length:
            piece = self._bundle.read(self._sent, MAX_PIECE)
            self.out += encode(m.Data(offset=self._sent, piece=piece))
            self._sent += len(piece)

    def _take_stored(self, message: Any, now: float) -> list[Event]:
        if message.bundle != self._bundle.hash or self._sent != self._bundle.length:
            raise SessionError("it stored another package than it was sent", "BAD_BUNDLE")
        self.out += encode(m.Load(bundle=self._bundle.hash))
        self._expect = (Kind.LOADING, Kind.READY)
        return []

    def _take_loading(self, message: Any, now: float) -> list[Event]:
        return [Progress(text=message.text)]

    def _take_ready(self, message: Any, now: float) -> list[Event]:
        facts = message.facts
        dtype, queue = facts.get("dtype"), facts.get("queue")
        if dtype not in ("float16", "float32") or type(queue) is not int or not 0 < queue <= 1024:
            raise SessionError(f"it is ready with the dtype {dtype!r} and a queue of {queue!r}")
        self._dtype, self.queue = np.dtype(dtype), queue
        self.out += encode(m.Reset(epoch=self._epoch))
        self._expect, self.ready, self._answered = (Kind.RESULT,), True, now
        return [Ready(facts=facts)]

    def call(self, positions: m.Positions, x: NDArray[Any], now: float) -> int:
        """Send tokens ``x`` [tokens, embed], one for each position, or all from the only one on.

        Returns the request's number.
        """
        assert self.ready and len(self._open) < self.queue, "not ready, or too many calls"
        self._requests += 1
        kind = m.Decode if len(x) == len(positions) else m.Prefill
        x = np.ascontiguousarray(x, dtype=self._dtype)
        request = kind(epoch=self._epoch, request=self._requests, positions=positions, x=x)
        self._open.append(_Open(request, now))
        self.out += encode(request)
        return self._requests

    def renew(self, epoch: int) -> None:
        """RESET: begin another epoch, whose cache is empty."""
        assert self.ready and not self._open, "not ready, or calls are open"
        self._epoch = epoch
        self.out += encode(m.Reset(epoch=epoch))

    def bye(self) -> None:
        """BYE: end the session."""
        self.out += encode(m.Bye())

    @property
    def open(self) -> int:
        """Calls without a result so far."""
        return len(self._open)

    def _take_result(self, message: Any, now: float) -> list[Event]:
        if not self._open:
            raise SessionError("an answer to nothing")
        first = self._open.popleft()
        request = first.request
        if (message.epoch, message.request, message.positions) != (request.epoch, request.request, request.positions):
            raise SessionError(
                f"an answer to request {message.request} or to other positions, not to {request.request}"
            )
        if message.y.shape != request.x.shape or message.y.dtype != request.x.dtype:
            raise SessionError(f"an answer of {message.y.dtype} {message.y.shape}")
        seconds = now - max(first.since, self._answered)
        self._answered = now
        return [Reply(request=request.request, y=message.y, compute_s=message.compute_ns / 1e9, seconds=seconds)]

    def tick(self, now: float) -> None:
        """Send a PING when one is due, and raise ``SessionError`` when the node is late; to be called often."""
        if not self._admitted and now - self._begun > HANDSHAKE_S:
            raise SessionError(f"it did not prove itself within {HANDSHAKE_S:.0f} s")
        if self._open and now - max(self._open[0].since, self._answered) > self._timeout:
            raise SessionError(f"an answer is more than {self._timeout:g} s late")
        quiet = max(self._timeout, 2 * PING_S) if self.ready else LOAD_SILENCE_S
        if now - self._heard > quiet:
            raise SessionError(f"nothing was heard of it for {quiet:g} s")
        if self._proved and now - max(self._heard, self._pinged) > PING_S:
            self._pinged = now
            self.out += encode(m.Ping(number=int(now * 1000) & (2**63 - 1)))
