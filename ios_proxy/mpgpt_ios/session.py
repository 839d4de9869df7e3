"""Who may say what when, between the proxy rank and the iPad: a state machine for each end, sans I/O.

Knows: the order of messages, proofs of the shared token, epochs, request numbers, what is late.
Must not know: sockets, clocks (``now`` is handed in, seconds), what a bundle holds or how a layer is computed.

Either end is driven alike: bytes that come in go to ``receive``, which gives events; what is to be sent lies in
``out``, from which the driver takes what its socket takes. ``WireError`` and ``SessionError`` end the connection; what
is in ``out`` then (the reason, for the other end) should still be sent.
"""

from __future__ import annotations

import hashlib
import hmac
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from mpgpt.errors import MpgptError, WireError
from mpgpt_ios.frames import (
    MAX_FILES,
    MAX_PIECE,
    Answer,
    Ask,
    Bye,
    Challenge,
    Code,
    Data,
    File,
    Frames,
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
    VersionError,
    Want,
    encode,
)  # fmt: skip

PING_S = 2.0
"""The proxy asks for a sign of life after so long without one."""
HANDSHAKE_S = 10.0
"""How long it may take until both ends have proved themselves."""
LOAD_SILENCE_S = 60.0
"""How long nothing may be heard while a bundle is sent or loaded; a first load may take minutes, but it is told of."""
QUEUE = 8
"""Requests that a node takes before it has answered the first; READY may say more."""
NODE_LABEL, PROXY_LABEL = b"mpgpt iPad link 1, node", b"mpgpt iPad link 1, proxy"


class SessionError(MpgptError):
    """The other end broke an agreement, refused, or fell silent."""

    def __init__(self, text: str, code: Code = "BAD_STATE") -> None:
        super().__init__(text)
        self.code = code


def prove(token: bytes, label: bytes, theirs: bytes, ours: bytes) -> bytes:
    """What only who holds the token can say: HMAC-SHA-256 over a role and both nonces, so that no proof can be sent
    back as one's own."""
    return hmac.new(token, label + theirs + ours, hashlib.sha256).digest()


# -- the proxy's end


class Parcel(Protocol):
    """A bundle as it is sent (``bundle.Bundle``)."""

    hash: bytes
    length: int

    @property
    def entries(self) -> tuple[Any, ...]: ...
    def read(self, offset: int, count: int) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Met:
    """The other end has proved itself; ``facts`` are what it says of itself."""

    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Something to tell a person while loading takes long."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Began:
    """The layers are loaded, and calls are welcome."""

    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The answer to the oldest call that was open."""

    request: int
    y: Values
    compute_s: float
    seconds: float
    """Since the call was made, or since the answer before it where that was later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Health:
    facts: Mapping[str, Any]


Event = Met | Progress | Began | Reply | Health


@dataclass(frozen=True, slots=True)
class _Open:
    ask: Ask
    since: float


class ProxySession:
    """The end that dials: proves itself, brings the bundle, has it loaded, and calls."""

    def __init__(self, token: bytes, bundle: Parcel, nonce: bytes, now: float, *, epoch: int, timeout_s: float) -> None:
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
            self.out += encode(Trouble(code="BAD_FRAME", text=str(error)))
            raise
        return events

    def _take(self, message: Message, now: float) -> list[Event]:
        if isinstance(message, Trouble):
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
            self.out += encode(Trouble(code="BAD_TOKEN", text="the tokens of the two ends differ"))
            raise SessionError("it has another token: the token files of the two ends differ", "BAD_TOKEN")
        self.out += encode(Proof(proof=prove(self._token, PROXY_LABEL, message.nonce, self._nonce)))
        self._expect = (Info,)
        return []

    def _take_info(self, message: Any, now: float) -> list[Event]:
        files = tuple(File(name=e.name, length=e.length, sha256=e.sha256) for e in self._bundle.entries)
        self.out += encode(Offer(bundle=self._bundle.hash, files=files))
        self._expect = (Want,)
        return [Met(facts=message.facts)]

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
        self._expect, self.ready, self._answered = (Answer,), True, now
        return [Began(facts=facts)]

    def call(self, places: tuple[tuple[int, int], ...], x: NDArray[Any], now: float) -> int:
        """Ask for tokens ``x`` [tokens, embed], one of each place (slot, position) or all of one; gives the request's
        number."""
        assert self.ready and len(self._open) < self.queue, "not ready, or too many calls"
        self._requests += 1
        ask = Ask(
            epoch=self._epoch, request=self._requests, places=places, prefill=len(x) != len(places),
            x=np.ascontiguousarray(x, dtype=self._dtype),
        )  # fmt: skip
        self._open.append(_Open(ask, now))
        self.out += encode(ask)
        return self._requests

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
        if (message.epoch, message.request, message.places) != (ask.epoch, ask.request, ask.places):
            raise SessionError(f"an answer to request {message.request} or to other positions, not to {ask.request}")
        if message.y.shape != ask.x.shape or message.y.dtype != ask.x.dtype or not np.isfinite(message.y).all():
            raise SessionError(f"an answer of {message.y.dtype} {message.y.shape}, or with numbers that are none")
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
    Answer: ProxySession._take_answer,
}  # fmt: skip


# -- the node's end


Asked = Offer | Data | Load | Reset | Ask
"""What a node is asked to do, once the proxy has proved itself; PINGs are answered here."""


class NodeSession:
    """The end that listens. ``facts`` are what it says of itself, ``health`` what it says now."""

    def __init__(
        self, token: bytes, nonce: bytes, now: float, *, facts: Mapping[str, Any],
        health: Callable[[], Mapping[str, Any]],
    ) -> None:  # fmt: skip
        self.out = bytearray()
        self._frames, self._token, self._nonce, self._begun = Frames(), token, nonce, now
        self._facts, self._health = facts, health
        self._theirs = b""
        self._expect: tuple[type[Message], ...] = (Hello,)
        self._offer: Offer | None = None
        self._length = self._next = 0
        self._epoch, self._requests, self._open = 0, 0, deque[Ask]()
        self.queue = QUEUE

    @property
    def known(self) -> bool:
        """Whether the proxy has proved itself."""
        return self._expect not in ((Hello,), (Proof,))

    def receive(self, data: bytes, now: float) -> list[Asked]:
        """What is asked. Raises ``WireError`` or ``SessionError``: then send ``out`` and close."""
        asked: list[Asked] = []
        try:
            self._frames.feed(data)
            while (message := self._frames.next()) is not None:
                asked += self._take(message)
        except VersionError as error:
            self.out += encode(Trouble(code="BAD_VERSION", text=str(error)))
            raise
        except WireError as error:
            self.out += encode(Trouble(code="BAD_FRAME", text=str(error)))
            raise
        except SessionError as error:
            self.out += encode(Trouble(code=error.code, text=str(error)))
            raise
        return asked

    def _take(self, message: Message) -> list[Asked]:
        if isinstance(message, Bye):
            raise SessionError("the proxy said good-bye")
        if isinstance(message, Trouble) and self.known:
            raise SessionError(f"the proxy gave up: {message.text or message.code}", message.code)
        if isinstance(message, Ping) and self.known:
            self.out += encode(Pong(number=message.number, facts=self._health()))
            return []
        if not isinstance(message, self._expect):
            raise SessionError(f"{type(message).__name__.upper()} was not expected now")
        match message:
            case Hello():
                self._theirs, self._expect = message.nonce, (Proof,)
                proof = prove(self._token, NODE_LABEL, message.nonce, self._nonce)
                self.out += encode(Challenge(nonce=self._nonce, proof=proof))
                return []
            case Proof():
                if not hmac.compare_digest(prove(self._token, PROXY_LABEL, self._nonce, self._theirs), message.proof):
                    raise SessionError("the tokens of the two ends differ", "BAD_TOKEN")
                self._expect = (Offer,)
                self.out += encode(Info(facts=self._facts))
                return []
            case Offer():
                return self._take_offer(message)
            case Data():
                return self._take_data(message)
            case Load() if self._offer is None or message.bundle != self._offer.bundle:
                raise SessionError("LOAD of a bundle that was not offered", "BAD_BUNDLE")
            case Load():
                self._expect = ()
                return [message]
            case Reset():
                self._epoch, self._expect = message.epoch, (Ask, Reset)
                self._open.clear()
                return [message]
            case Ask():
                return self._take_ask(message)
            case _:
                raise AssertionError("a kind of message that is never expected")

    def _take_offer(self, message: Offer) -> list[Asked]:
        if not message.files or len(message.files) > MAX_FILES:
            raise SessionError("an offer of no files", "BAD_BUNDLE")
        self._offer, self._expect = message, ()
        self._length = sum(file.length for file in message.files)
        return [message]

    def _take_data(self, message: Data) -> list[Asked]:
        if message.offset != self._next or message.offset + len(message.piece) > self._length:
            raise SessionError(f"DATA at byte {message.offset}, not {self._next} of {self._length}", "BAD_BUNDLE")
        self._next += len(message.piece)
        if self._next == self._length:
            self._expect = ()
        return [message]

    def _take_ask(self, message: Ask) -> list[Asked]:
        if message.epoch != self._epoch or message.request <= self._requests:
            raise SessionError(
                f"request {message.request} of epoch {message.epoch}, in epoch {self._epoch}", "BAD_REQUEST"
            )
        if len(self._open) >= self.queue:
            raise SessionError(f"more than {self.queue} requests at once", "BUSY")
        self._requests = message.request
        self._open.append(message)
        return [message]

    # what the node has to say

    def want(self, offset: int) -> None:
        """The bundle that was offered is wanted from that byte on; its length if nothing is missing."""
        self._next = offset
        self._expect = (Data,) if offset < self._length else ()
        self.out += encode(Want(offset=offset))

    def stored(self) -> None:
        assert self._offer
        self._expect = (Load,)
        self.out += encode(Stored(bundle=self._offer.bundle))

    def loading(self, text: str) -> None:
        self.out += encode(Loading(text=text))

    def ready(self, facts: Mapping[str, Any], queue: int = QUEUE) -> None:
        self.queue = queue
        self._expect = (Reset,)
        self.out += encode(Ready(facts={**facts, "queue": queue}))

    def answer(self, ask: Ask, y: Values, compute_s: float) -> None:
        """The result of the oldest request; nothing is sent when its epoch is over."""
        if not self._open or self._open[0] is not ask:
            return
        self._open.popleft()
        y = np.ascontiguousarray(y, dtype=ask.x.dtype)
        answer = Answer(
            epoch=ask.epoch, request=ask.request, places=ask.places, compute_ns=int(compute_s * 1e9), y=y
        )  # fmt: skip
        self.out += encode(answer)

    def trouble(self, code: Code, text: str, ask: Ask | None = None) -> None:
        self.out += encode(
            Trouble(code=code, text=text, epoch=ask.epoch if ask else 0, request=ask.request if ask else 0)
        )

    def late(self, now: float) -> bool:
        """Whether the proxy has had long enough to prove itself, and did not."""
        return not self.known and now - self._begun > HANDSHAKE_S
