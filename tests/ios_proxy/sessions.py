"""Both ends of the iPad link without a network, which exchange bytes in memory."""

from __future__ import annotations

from typing import Any

from mpgpt_ios.protocol import frames as f
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.node_session import NodeSession
from mpgpt_ios.protocol.proxy_session import ProxySession
from tests.ios_proxy.vectors import FACTS, HASH, OTHER

TOKEN, PIECES = b"the shared token", bytes(range(256)) * 3000


class InMemory:
    """A bundle of one file, in memory."""

    hash, length = HASH, len(PIECES)
    entries = (m.File(name="manifest.json", length=len(PIECES), sha256=OTHER),)

    def read(self, offset: int, count: int) -> bytes:
        return PIECES[offset : offset + count]


def proxy_session(token: bytes = TOKEN, now: float = 0.0) -> ProxySession:
    return ProxySession(token, InMemory(), HASH, now, epoch=5, timeout_s=10.0)


def node_session(token: bytes = TOKEN, now: float = 0.0) -> NodeSession:
    return NodeSession(token, OTHER, now, facts={"name": "iPad"}, health=lambda: FACTS)


class Pair:
    """The two, and what each heard."""

    def __init__(self) -> None:
        self.proxy, self.node, self.now = proxy_session(), node_session(), 0.0
        self.events: list[Any] = []
        self.commands: list[Any] = []

    def talk(self) -> None:
        """Until neither has anything to say."""
        while self.proxy.out or self.node.out:
            up, self.proxy.out = bytes(self.proxy.out), bytearray()
            for command in self.node.receive(up, self.now):
                if isinstance(command, m.Proof):
                    self.node.admit()
                else:
                    self.commands.append(command)
            down, self.node.out = bytes(self.node.out), bytearray()
            self.events += self.proxy.receive(down, self.now)
            self.proxy.fill()

    def until(self, state: str) -> Pair:
        """Go on as far as ``offered``, ``stored``, ``loaded`` or ``serving``."""
        self.talk()
        assert isinstance(self.commands[-1], m.Offer)
        if state == "offered":
            return self
        self.node.want(0)
        self.talk()
        self.node.stored()
        if state == "stored":
            return self
        self.talk()
        assert isinstance(self.commands[-1], m.Load)
        self.node.loading("compiling")
        if state == "loaded":
            return self
        self.node.ready({"dtype": "float16"})
        self.talk()
        return self

    def answer(self, request: m.Request, /, **changes: Any) -> None:
        """The node's answer, or another one than it would give."""
        fields: dict[str, Any] = {"epoch": request.epoch, "request": request.request, "positions": request.positions}
        fields |= {"y": request.x, "compute_ns": 10**9}
        self.node.out += f.encode(m.Result(**(fields | changes)))


def read(data: bytes | bytearray) -> list[m.Message]:
    frames, messages = f.Frames(), list[m.Message]()
    frames.feed(bytes(data))
    while (message := frames.next()) is not None:
        messages.append(message)
    return messages
