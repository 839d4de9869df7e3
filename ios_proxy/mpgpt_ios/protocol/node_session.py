"""The node's end of the iPad link as a state machine, sans I/O: it checks a proxy's token, and returns commands.

Knows: which message may come when, epochs, which bytes of a bundle come next.
Must not know: sockets, clocks, whether the proxy is served, how a bundle is kept or a request computed.
"""

from __future__ import annotations

import hmac
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mpgpt.errors import WireError
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import (
    HANDSHAKE_S,
    NODE_LABEL,
    PROXY_LABEL,
    PROXY_SILENCE_S,
    QUEUE,
    PeerClosed,
    SessionError,
    prove,
    refused,
)
from mpgpt_ios.protocol.frames import Frames, VersionError, encode
from mpgpt_ios.protocol.payloads import Kind

Command = m.Proof | m.Offer | m.Data | m.Load | m.Reset | m.Request
"""A message that the node must act on; the session itself answers HELLO and PINGs."""


class NodeSession:
    """The listening end. INFO carries ``facts``, and every PONG what ``health`` returns then."""

    def __init__(
        self, token: bytes, nonce: bytes, now: float, *, facts: Mapping[str, Any],
        health: Callable[[], Mapping[str, Any]],
    ) -> None:  # fmt: skip
        self.out = bytearray()
        self._frames, self._token, self._nonce = Frames(self._allow), token, nonce
        self._facts, self._health = facts, health
        self._begun = self.heard_at = now
        """``heard_at`` is when the proxy last sent anything."""
        self._theirs = b""
        self.authenticated = False
        """Whether the proxy has proved that it has the token."""
        self._expect: tuple[Kind, ...] = (Kind.HELLO,)
        self._offer: m.Offer | None = None
        self._length = self._next = 0
        self._sizes: Mapping[str, Any] = {}
        self._epoch, self._requests, self._open = 0, 0, deque[m.Request]()
        self.queue = QUEUE

    def receive(self, data: bytes, now: float) -> list[Command]:
        """The commands in ``data``. Raises ``WireError`` or ``SessionError``: then send ``out`` and close."""
        self.heard_at = now
        commands: list[Command] = []
        try:
            self._frames.feed(data)
            while (message := self._frames.next()) is not None:
                commands += self._take(message)
        except VersionError as error:
            self.error("BAD_VERSION", str(error))
            raise
        except WireError as error:
            self.error("BAD_FRAME", str(error))
            raise
        except PeerClosed:
            raise
        except SessionError as error:
            self.error(error.code, str(error), error.request)
            raise
        return commands

    def _allow(self, kind: Kind) -> None:
        always = (Kind.ERROR, Kind.BYE, Kind.PING) if self.authenticated else (Kind.ERROR, Kind.BYE)
        if kind not in (*always, *self._expect):
            raise SessionError(f"{kind.name} was not expected now")

    def _take(self, message: m.Message) -> list[Command]:
        match message:
            case m.Hello():
                self._theirs, self._expect = message.nonce, (Kind.PROOF,)
                proof = prove(self._token, NODE_LABEL, message.nonce, self._nonce)
                self.out += encode(m.Challenge(nonce=self._nonce, proof=proof))
                return []
            case m.Proof():
                if not hmac.compare_digest(prove(self._token, PROXY_LABEL, self._nonce, self._theirs), message.proof):
                    raise SessionError("the tokens of the two ends differ", "BAD_TOKEN")
                self.authenticated, self._expect = True, ()
                return [message]
            case m.Ping():
                self.out += encode(m.Pong(number=message.number, facts=self._health()))
                return []
            case m.Offer():
                self._offer, self._expect = message, ()
                self._length = message.length
                return [message]
            case m.Data():
                return self._take_data(message)
            case m.Load() if self._offer is None or message.bundle != self._offer.bundle:
                raise SessionError("LOAD of a bundle that was not offered", "BAD_BUNDLE")
            case m.Load():
                self._expect = ()
                return [message]
            case m.Reset():
                self._epoch, self._expect = message.epoch, (Kind.PREFILL, Kind.DECODE, Kind.RESET)
                self._open.clear()
                return [message]
            case m.Prefill() | m.Decode():
                return self._take_request(message)
            case m.Bye():
                raise PeerClosed("the proxy said good-bye")
            case m.Error():
                raise refused(message, proved=self.authenticated)
            case _:
                raise AssertionError("a type of message that is never expected")

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
                f"request {message.request} of epoch {message.epoch}, in epoch {self._epoch}", "BAD_REQUEST", message
            )
        self._check_sizes(message)
        if len(self._open) >= self.queue:
            raise SessionError(f"more than {self.queue} requests at once", "BUSY", message)
        self._requests = message.request
        self._open.append(message)
        return [message]

    def _check_sizes(self, request: m.Request) -> None:
        """Whether the request is for what READY said."""
        width, dtype = request.x.shape[1], request.x.dtype.name
        if dtype != self._sizes.get("dtype", dtype) or width != self._sizes.get("embed", width):
            raise SessionError(f"values of {width} {dtype} each, which is not what READY said", "BAD_REQUEST", request)
        slots = [slot for slot, _ in request.positions]
        if len(set(slots)) < len(slots) or max(slots) >= self._sizes.get("slots", 1 << 32):
            raise SessionError(f"a request for slots {slots} of {self._sizes.get('slots')}", "BAD_REQUEST", request)

    # -- messages to the proxy

    def admit(self) -> None:
        """INFO: this proxy, which has proved itself, is the one to be served."""
        self._expect = (Kind.OFFER,)
        self.out += encode(m.Info(facts=self._facts))

    def want(self, offset: int) -> None:
        """WANT: the offered bundle's bytes from ``offset`` on are missing; its length if none are."""
        self._next = offset
        self._expect = (Kind.DATA,) if offset < self._length else ()
        self.out += encode(m.Want(offset=offset))

    def stored(self) -> None:
        assert self._offer
        self._expect = (Kind.LOAD,)
        self.out += encode(m.Stored(bundle=self._offer.bundle))

    def loading(self, text: str) -> None:
        self.out += encode(m.Loading(text=text))

    def ready(self, facts: Mapping[str, Any], queue: int = QUEUE) -> None:
        self.queue, self._sizes = queue, facts
        self._expect = (Kind.RESET,)
        self.out += encode(m.Ready(facts={**facts, "queue": queue}))

    def result(self, request: m.Request, y: m.Values, compute_s: float) -> None:
        """RESULT of the oldest open request; nothing is sent when its epoch is over."""
        if self._close(request):
            result = m.Result(
                epoch=request.epoch,
                request=request.request,
                positions=request.positions,
                compute_ns=int(compute_s * 1e9),
                y=np.ascontiguousarray(y, dtype=request.x.dtype),
            )
            self.out += encode(result)

    def failed(self, request: m.Request, code: m.Code, text: str) -> None:
        """ERROR in the place of the oldest open request's RESULT; nothing is sent when its epoch is over."""
        if self._close(request):
            self.error(code, text, request)

    def _close(self, request: m.Request) -> bool:
        """Whether the request is still to be answered; then it is the oldest open one, and is open no longer."""
        answered = bool(self._open) and self._open[0] is request
        if answered:
            self._open.popleft()
        return answered

    def error(self, code: str, text: str, request: m.Request | None = None) -> None:
        """ERROR, about a request or none: to be followed by closing, but for ``failed``."""
        epoch, number = (request.epoch, request.request) if request else (0, 0)
        self.out += encode(m.Error(code=code, text=text, epoch=epoch, request=number))

    def bye(self) -> None:
        self.out += encode(m.Bye())

    def late(self, now: float) -> str:
        """Why the proxy is to be given up, if it is: the handshake is not over in time, or nothing comes any more."""
        if not self.authenticated:
            return "it did not prove itself in time" if now - self._begun > HANDSHAKE_S else ""
        return f"nothing was heard of it for {PROXY_SILENCE_S:g} s" if now - self.heard_at > PROXY_SILENCE_S else ""
