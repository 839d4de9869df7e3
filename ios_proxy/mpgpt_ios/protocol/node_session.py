"""The node's end of the iPad link as a state machine, sans I/O: it admits a proxy by its token, and returns commands.

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
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import HANDSHAKE_S, NODE_LABEL, PROXY_LABEL, QUEUE, SessionError, prove
from mpgpt_ios.protocol.frames import MAX_FILES, Frames, VersionError, encode

Command = m.Offer | m.Data | m.Load | m.Reset | m.Request
"""A message that the node must act on; the session itself answers the handshake and PINGs."""


class NodeSession:
    """The listening end. INFO carries ``facts``, and every PONG what ``health`` returns then."""

    def __init__(
        self, token: bytes, nonce: bytes, now: float, *, facts: Mapping[str, Any],
        health: Callable[[], Mapping[str, Any]],
    ) -> None:  # fmt: skip
        self.out = bytearray()
        self._frames, self._token, self._nonce, self._begun = Frames(), token, nonce, now
        self._facts, self._health = facts, health
        self._theirs = b""
        self._expect: tuple[type[m.Message], ...] = (m.Hello,)
        self._offer: m.Offer | None = None
        self._length = self._next = 0
        self._epoch, self._requests, self._open = 0, 0, deque[m.Request]()
        self.queue = QUEUE

    @property
    def authenticated(self) -> bool:
        """Whether the proxy has proved that it has the token."""
        return self._expect not in ((m.Hello,), (m.Proof,))

    def receive(self, data: bytes, now: float) -> list[Command]:
        """The commands in ``data``. Raises ``WireError`` or ``SessionError``: then send ``out`` and close."""
        commands: list[Command] = []
        try:
            self._frames.feed(data)
            while (message := self._frames.next()) is not None:
                commands += self._take(message)
        except VersionError as error:
            self.out += encode(m.Error(code="BAD_VERSION", text=str(error)))
            raise
        except WireError as error:
            self.out += encode(m.Error(code="BAD_FRAME", text=str(error)))
            raise
        except SessionError as error:
            self.out += encode(m.Error(code=error.code, text=str(error)))
            raise
        return commands

    def _take(self, message: m.Message) -> list[Command]:
        if isinstance(message, m.Bye):
            raise SessionError("the proxy said good-bye")
        if isinstance(message, m.Error) and self.authenticated:
            raise SessionError(f"the proxy gave up: {message.text or message.code}", message.code)
        if isinstance(message, m.Ping) and self.authenticated:
            self.out += encode(m.Pong(number=message.number, facts=self._health()))
            return []
        if not isinstance(message, self._expect):
            raise SessionError(f"{type(message).__name__.upper()} was not expected now")
        match message:
            case m.Hello():
                self._theirs, self._expect = message.nonce, (m.Proof,)
                proof = prove(self._token, NODE_LABEL, message.nonce, self._nonce)
                self.out += encode(m.Challenge(nonce=self._nonce, proof=proof))
                return []
            case m.Proof():
                if not hmac.compare_digest(prove(self._token, PROXY_LABEL, self._nonce, self._theirs), message.proof):
                    raise SessionError("the tokens of the two ends differ", "BAD_TOKEN")
                self._expect = (m.Offer,)
                self.out += encode(m.Info(facts=self._facts))
                return []
            case m.Offer():
                return self._take_offer(message)
            case m.Data():
                return self._take_data(message)
            case m.Load() if self._offer is None or message.bundle != self._offer.bundle:
                raise SessionError("LOAD of a bundle that was not offered", "BAD_BUNDLE")
            case m.Load():
                self._expect = ()
                return [message]
            case m.Reset():
                self._epoch, self._expect = message.epoch, (m.Prefill, m.Decode, m.Reset)
                self._open.clear()
                return [message]
            case m.Prefill() | m.Decode():
                return self._take_request(message)
            case _:
                raise AssertionError("a type of message that is never expected")

    def _take_offer(self, message: m.Offer) -> list[Command]:
        if not message.files or len(message.files) > MAX_FILES:
            raise SessionError("an offer of no files", "BAD_BUNDLE")
        self._offer, self._expect = message, ()
        self._length = sum(file.length for file in message.files)
        return [message]

    def _take_data(self, message: m.Data) -> list[Command]:
        if message.offset != self._next or message.offset + len(message.piece) > self._length:
            raise SessionError(f"DATA at byte {message.offset}, not {self._next} of {self._length}", "BAD_BUNDLE")
        self._next += len(message.piece)
        if self._next == self._length:
            self._expect = ()
        return [message]

    def _take_request(self, message: m.Request) -> list[Command]:
        if message.epoch != self._epoch or message.request <= self._requests:
            raise SessionError(
                f"request {message.request} of epoch {message.epoch}, in epoch {self._epoch}", "BAD_REQUEST"
            )
        if len(self._open) >= self.queue:
            raise SessionError(f"more than {self.queue} requests at once", "BUSY")
        self._requests = message.request
        self._open.append(message)
        return [message]

    # -- messages to the proxy

    def want(self, offset: int) -> None:
        """WANT: the offered bundle's bytes from ``offset`` on are missing; its length if none are."""
        self._next = offset
        self._expect = (m.Data,) if offset < self._length else ()
        self.out += encode(m.Want(offset=offset))

    def stored(self) -> None:
        assert self._offer
        self._expect = (m.Load,)
        self.out += encode(m.Stored(bundle=self._offer.bundle))

    def loading(self, text: str) -> None:
        self.out += encode(m.Loading(text=text))

    def ready(self, facts: Mapping[str, Any], queue: int = QUEUE) -> None:
        self.queue = queue
        self._expect = (m.Reset,)
        self.out += encode(m.Ready(facts={**facts, "queue": queue}))

    def result(self, request: m.Request, y: m.Values, compute_s: float) -> None:
        """RESULT of the oldest open request; nothing is sent when its epoch is over."""
        if not self._open or self._open[0] is not request:
            return
        self._open.popleft()
        result = m.Result(
            epoch=request.epoch,
            request=request.request,
            positions=request.positions,
            compute_ns=int(compute_s * 1e9),
            y=np.ascontiguousarray(y, dtype=request.x.dtype),
        )
        self.out += encode(result)

    def error(self, code: m.Code, text: str, request: m.Request | None = None) -> None:
        epoch, number = (request.epoch, request.request) if request else (0, 0)
        self.out += encode(m.Error(code=code, text=text, epoch=epoch, request=number))

    def late(self, now: float) -> bool:
        """Whether the handshake is not over in time."""
        return not self.authenticated and now - self._begun > HANDSHAKE_S
