"""The proxy's end of the iPad link as a state machine, sans I/O: it proves itself, brings the bundle, and calls.

Knows: which message may come when, request numbers, what is late.
Must not know: sockets, clocks, what a bundle holds, what is done with answers.
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
from mpgpt_ios.protocol.auth import (
    HANDSHAKE_S,
    LOAD_SILENCE_S,
    NODE_LABEL,
    PING_S,
    PROXY_LABEL,
    QUEUE,
    SessionError,
    prove,
)
from mpgpt_ios.protocol.frames import MAX_PIECE, Frames, VersionError, encode
from mpgpt_ios.protocol.messages import (
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


class BundleReader(Protocol):
    """A bundle as it is sent (``bundle.Bundle``)."""

    hash: bytes
    length: int

    @property
    def entries(self) -> tuple[Any, ...]: ...
    def read(self, offset: int, count: int) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Authenticated:
    """The other end has proved itself; ``facts`` are what it says of itself."""

    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Something to tell a person while loading takes long."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """The layers are loaded, and calls are welcome."""

    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to the oldest call that was open."""

    request: int
    y: Values
    """It may hold what is not finite: that is one sequence's trouble, and not the connection's."""
    compute_s: float
    seconds: float
    """Since the call was made, or since the answer before it where that was later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    facts: Mapping[str, Any]


Event = Authenticated | Progress | Serving | Reply | Health


@dataclass(frozen=True, slots=True)
class _Open:
    ask: Request
    since: float


class ProxySession:
    """The end that dials: proves itself, brings the bundle, has it loaded, and calls."""

    def __init__(
        self, token: bytes, bundle: BundleReader, nonce: bytes, now: float, *, epoch: int, timeout_s: float
    ) -> None:
        """``epoch`` names the life of the node's cache that begins with READY; ``timeout_s`` is how late an answer may
        be."""
        self.out = bytearray(encode(Hello(nonce=nonce)))
        self._frames, self._token, self._bundle, self._nonce = Frames(), token, bundle, nonce
        self._epoch, self._timeout = epoch, timeout_s
        self._begun = self._heard = self._pinged = now
        self._expect: tuple[type[Message], ...] = (Challenge,)
        self._sent: int | None = None
        self._open: deque[_Open] = deque()
        self._requests = 0
        self._answered = now
        self._dtype: Any = np.float16
        self.queue = QUEUE
        self.ready = False

    def receive(self, data: bytes, now: float) -> list[Event]:
        """What the bytes mean. Raises ``WireError`` or ``SessionError``: then close."""
        self._heard = now
        events: list[Event] = []
        try:
            self._frames.feed(data)
            while (message := self._frames.next()) is not None:
                events += self._take(message, now)
        except VersionError:
            raise
        except WireError as error:
            self.out += encode(Error(code="BAD_FRAME", text=str(error)))
            raise
        return events

    def _take(self, message: Message, now: float) -> list[Event]:
        if isinstance(message, Error):
            raise SessionError(f"it refused: {message.text or message.code}", message.code)
        if isinstance(message, Bye):
            raise SessionError("it said good-bye")
        if isinstance(message, Pong):
            if not self._known:
                raise SessionError("a PONG before it has proved itself")
            return [Health(facts=message.facts)]
        if not isinstance(message, self._expect):
            raise SessionError(f"{type(message).__name__.upper()} was not expected now")
        return TAKERS[type(message)](self, message, now)

    @property
    def _known(self) -> bool:
        return self._expect not in ((Challenge,), (Info,))

    def _take_challenge(self, message: Any, now: float) -> list[Event]:
        wanted = prove(self._token, NODE_LABEL, self._nonce, message.nonce)
        if not hmac.compare_digest(wanted, message.proof):
            self.out += encode(Error(code="BAD_TOKEN", text="the tokens of the two ends differ"))
            raise SessionError("it has another token: the token files of the two ends differ", "BAD_TOKEN")
        self.out += encode(Proof(proof=prove(self._token, PROXY_LABEL, message.nonce, self._nonce)))
        self._expect = (Info,)
        return []

    def _take_info(self, message: Any, now: float) -> list[Event]:
        files = tuple(File(name=e.name, length=e.length, sha256=e.sha256) for e in self._bundle.entries)
        self.out += encode(Offer(bundle=self._bundle.hash, files=files))
        self._expect = (Want,)
        return [Authenticated(facts=message.facts)]

    def _take_want(self, message: Any, now: float) -> list[Event]:
        if message.offset > self._bundle.length:
            raise SessionError(f"it wants the package from byte {message.offset} of {self._bundle.length}")
        self._sent, self._expect = message.offset, (Stored,)
        missing = self._bundle.length - message.offset
        return [Progress(text=f"sending its package, {missing / 1e6:.0f} MB")] if missing else []

    def fill(self) -> None:
        """Put the next piece of the bundle into ``out`` if it is the time for that; call it when ``out`` is empty."""
        if self._sent is not None and self._sent < self._bundle.length:
            piece = self._bundle.read(self._sent, MAX_PIECE)
            self.out += encode(Data(offset=self._sent, piece=piece))
            self._sent += len(piece)

    def _take_stored(self, message: Any, now: float) -> list[Event]:
        if message.bundle != self._bundle.hash or self._sent != self._bundle.length:
            raise SessionError("it stored another package than it was sent", "BAD_BUNDLE")
        self.out += encode(Load(bundle=self._bundle.hash))
        self._expect = (Loading, Ready)
        return []

    def _take_loading(self, message: Any, now: float) -> list[Event]:
        return [Progress(text=message.text)]

    def _take_ready(self, message: Any, now: float) -> list[Event]:
        facts = message.facts
        dtype, queue = facts.get("dtype"), facts.get("queue")
        if dtype not in ("float16", "float32") or type(queue) is not int or not 0 < queue <= 1024:
            raise SessionError(f"it is ready with the dtype {dtype!r} and a queue of {queue!r}")
        self._dtype, self.queue = np.dtype(dtype), queue
        self.out += encode(Reset(epoch=self._epoch))
        self._expect, self.ready, self._answered = (Result,), True, now
        return [Serving(facts=facts)]

    def call(self, positions: tuple[tuple[int, int], ...], x: NDArray[Any], now: float) -> int:
        """Ask for tokens ``x`` [tokens, embed], one of each place (slot, position) or all of one; gives the request's
        number."""
        assert self.ready and len(self._open) < self.queue, "not ready, or too many calls"
        self._requests += 1
        ask = Request(
            epoch=self._epoch, request=self._requests, positions=positions, prefill=len(x) != len(positions),
            x=np.ascontiguousarray(x, dtype=self._dtype),
        )  # fmt: skip
        self._open.append(_Open(ask, now))
        self.out += encode(ask)
        return self._requests

    def renew(self, epoch: int) -> None:
        """Begin another life of the node's cache, an empty one."""
        assert self.ready and not self._open, "not ready, or calls are open"
        self._epoch = epoch
        self.out += encode(Reset(epoch=epoch))

    def part(self) -> None:
        """Say that this was all."""
        self.out += encode(Bye())

    @property
    def open(self) -> int:
        """Calls that are not answered yet."""
        return len(self._open)

    def _take_answer(self, message: Any, now: float) -> list[Event]:
        if not self._open:
            raise SessionError("an answer to nothing")
        first = self._open.popleft()
        ask = first.ask
        if (message.epoch, message.request, message.positions) != (ask.epoch, ask.request, ask.positions):
            raise SessionError(f"an answer to request {message.request} or to other positions, not to {ask.request}")
        if message.y.shape != ask.x.shape or message.y.dtype != ask.x.dtype:
            raise SessionError(f"an answer of {message.y.dtype} {message.y.shape}")
        seconds = now - max(first.since, self._answered)
        self._answered = now
        return [Reply(request=ask.request, y=message.y, compute_s=message.compute_ns / 1e9, seconds=seconds)]

    def tick(self, now: float) -> None:
        """Call it now and then: asks for a sign of life, and raises ``SessionError`` when something is late."""
        if not self._known and now - self._begun > HANDSHAKE_S:
            raise SessionError(f"it did not prove itself within {HANDSHAKE_S:.0f} s")
        if self._open and now - max(self._open[0].since, self._answered) > self._timeout:
            raise SessionError(f"an answer is more than {self._timeout:g} s late")
        quiet = max(self._timeout, 2 * PING_S) if self.ready else LOAD_SILENCE_S
        if now - self._heard > quiet:
            raise SessionError(f"nothing was heard of it for {quiet:g} s")
        if self._known and now - max(self._heard, self._pinged) > PING_S:
            self._pinged = now
            self.out += encode(Ping(number=int(now * 1000) & (2**63 - 1)))


TAKERS: dict[type[Message], Callable[[ProxySession, Any, float], list[Event]]] = {
    Challenge: ProxySession._take_challenge, Info: ProxySession._take_info, Want: ProxySession._take_want,
    Stored: ProxySession._take_stored, Loading: ProxySession._take_loading, Ready: ProxySession._take_ready,
    Result: ProxySession._take_answer,
}  # fmt: skip
