"""The node's end of the iPad link as a state machine, sans I/O: it lets nobody in without the token, and does as asked.

Knows: which message may come when, epochs, which bytes of a bundle come next.
Must not know: sockets, clocks, how a bundle is kept or a request computed.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mpgpt.errors import WireError
from mpgpt_ios.protocol.auth import HANDSHAKE_S, NODE_LABEL, PROXY_LABEL, QUEUE, SessionError, prove
from mpgpt_ios.protocol.frames import MAX_FILES, Frames, VersionError, encode
from mpgpt_ios.protocol.messages import (
    Bye,
    Challenge,
    Code,
    Data,
    Error,
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

Command = Offer | Data | Load | Reset | Request
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
        self._epoch, self._requests, self._open = 0, 0, deque[Request]()
        self.queue = QUEUE

    @property
    def known(self) -> bool:
        """Whether the proxy has proved itself."""
        return self._expect not in ((Hello,), (Proof,))

    def receive(self, data: bytes, now: float) -> list[Command]:
        """What is asked. Raises ``WireError`` or ``SessionError``: then send ``out`` and close."""
        asked: list[Command] = []
        try:
            self._frames.feed(data)
            while (message := self._frames.next()) is not None:
                asked += self._take(message)
        except VersionError as error:
            self.out += encode(Error(code="BAD_VERSION", text=str(error)))
            raise
        except WireError as error:
            self.out += encode(Error(code="BAD_FRAME", text=str(error)))
            raise
        except SessionError as error:
            self.out += encode(Error(code=error.code, text=str(error)))
            raise
        return asked

    def _take(self, message: Message) -> list[Command]:
        if isinstance(message, Bye):
            raise SessionError("the proxy said good-bye")
        if isinstance(message, Error) and self.known:
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
                self._epoch, self._expect = message.epoch, (Request, Reset)
                self._open.clear()
                return [message]
            case Request():
                return self._take_ask(message)
            case _:
                raise AssertionError("a kind of message that is never expected")

    def _take_offer(self, message: Offer) -> list[Command]:
        if not message.files or len(message.files) > MAX_FILES:
            raise SessionError("an offer of no files", "BAD_BUNDLE")
        self._offer, self._expect = message, ()
        self._length = sum(file.length for file in message.files)
        return [message]

    def _take_data(self, message: Data) -> list[Command]:
        if message.offset != self._next or message.offset + len(message.piece) > self._length:
            raise SessionError(f"DATA at byte {message.offset}, not {self._next} of {self._length}", "BAD_BUNDLE")
        self._next += len(message.piece)
        if self._next == self._length:
            self._expect = ()
        return [message]

    def _take_ask(self, message: Request) -> list[Command]:
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

    def answer(self, ask: Request, y: Values, compute_s: float) -> None:
        """The result of the oldest request; nothing is sent when its epoch is over."""
        if not self._open or self._open[0] is not ask:
            return
        self._open.popleft()
        y = np.ascontiguousarray(y, dtype=ask.x.dtype)
        answer = Result(
            epoch=ask.epoch, request=ask.request, positions=ask.positions, compute_ns=int(compute_s * 1e9), y=y
        )  # fmt: skip
        self.out += encode(answer)

    def trouble(self, code: Code, text: str, ask: Request | None = None) -> None:
        self.out += encode(
            Error(code=code, text=text, epoch=ask.epoch if ask else 0, request=ask.request if ask else 0)
        )

    def late(self, now: float) -> bool:
        """Whether the proxy has had long enough to prove itself, and did not."""
        return not self.known and now - self._begun > HANDSHAKE_S
