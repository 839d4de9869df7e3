"""HTTP connections: how many there may be, how long one may keep the server waiting, and which one makes room.

Knows: sockets, descriptors, and how far a request and its answer have come (h11's states).
Must not know: what is in a request or an answer.

uvicorn accepts as many as come, and waits for a request's head for ever; when descriptors run out, asyncio retries with
a traceback each time. So the sockets are accepted here, counted, and a silent connection gives way to a new one.
"""

from __future__ import annotations

import asyncio
import logging
import math
import resource
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import Any

import click
import h11
import psutil
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 1000
"""Connections at once, where the process may have enough descriptors."""
SHARE = 3 / 4
"""Of the descriptors that are free at the start: the page's files and the ring need some, too."""
FEWEST = 8
HEAD_S = 10.0
"""How long a request's head may take to arrive: from the connection, or from the first byte of a later request."""
BODY_S = 40.0
"""How long a body may take that nobody reads any more; the guard's own deadline comes first where somebody does."""
IDLE_S = 30
"""How long a connection is kept that has had its answer."""
STALL_S = 30.0
"""How long a client may leave the buffer full that it is to read from."""
SEND_BYTES = 256 * 1024
"""The kernel's buffer of a connection; by itself it grows to megabytes for a client that does not read."""
BACKLOG = 128
AT_ONCE = 16
"""Connections accepted before anything else has its turn."""
REST_S = 0.2
"""After an accept for which there was no descriptor."""
TOLD_S = 600.0
"""Crowding is reported once, and again after so long at the earliest."""
TIMED_OUT = b"HTTP/1.1 408 Request Timeout\r\ncontent-type: text/plain; charset=utf-8\r\nconnection: close\r\n"


def most_connections() -> int:
    """The bound that suits this process: a share of the descriptors that it may still open."""
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return MOST
    return max(FEWEST, min(MOST, int((allowed - psutil.Process().num_fds()) * SHARE)))


def most_requests(connections: int) -> int:
    """The number of requests that may be answered at once: some connections are left for health checks."""
    return connections - max(2, connections // 8)


class Phase(Enum):
    """What a connection waits for."""

    HEAD = auto()
    """Its client, to send a request's head."""
    BODY = auto()
    """Its client, to send the rest of a body."""
    ANSWER = auto()
    """Us."""
    IDLE = auto()
    """Its client, to make another request."""
    CLOSING = auto()
    """Its client, to take the rest of an answer."""


PATIENCE_S = {
    Phase.HEAD: HEAD_S, Phase.BODY: BODY_S, Phase.ANSWER: math.inf, Phase.IDLE: math.inf, Phase.CLOSING: STALL_S,
}  # fmt: skip
"""How long each phase may last. uvicorn ends ``IDLE``, and an answer has a time limit of its own; a client that does
not read is given as long in any phase as in ``CLOSING``."""


class Connection(H11Protocol):
    """A connection that knows its phase, and since when."""

    def __init__(
        self, left: Callable[[Connection], None], patience_s: Mapping[Phase, float] = PATIENCE_S, **uvicorns: Any
    ) -> None:
        """``left`` is called when it is lost; each phase may last for ``patience_s``."""
        super().__init__(**uvicorns)
        self._left, self._patience_s = left, patience_s
        self._answered: object = None
        self._stalled = math.inf
        self.phase, self.since = Phase.HEAD, self.loop.time()
        self.address = ""
        """Its client's, known before the connection is made."""

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._left(self)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._look()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled = self.loop.time()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled = math.inf

    def drop(self) -> None:
        """Close it at once."""
        self.phase = Phase.CLOSING
        self.transport.abort()

    def check(self, now: float) -> None:
        """Close it if its client is late."""
        if self.begins:
            return
        self._look()
        late = now - self.since > self._patience_s[self.phase]
        if now - self._stalled > self._patience_s[Phase.CLOSING] or (late and self.phase is Phase.CLOSING):
            self.drop()
        elif late:
            if self.phase is Phase.HEAD and self.conn.trailing_data[0]:
                sentence = b"the request's head did not arrive within %.0f s\n" % self._patience_s[Phase.HEAD]
                self.transport.write(TIMED_OUT + b"content-length: %d\r\n\r\n" % len(sentence) + sentence)
            self.transport.close()

    @property
    def stalled(self) -> bool:
        """Whether its client does not read what is sent to it."""
        return self._stalled < math.inf

    @property
    def begins(self) -> bool:
        """Whether it is accepted, and not more."""
        return self.transport is None

    @property
    def yields(self) -> bool:
        """Whether it may be closed for another: it waits for its client, not for us."""
        return not self.begins and (
            self.phase in (Phase.HEAD, Phase.BODY, Phase.IDLE) or (self.phase is Phase.ANSWER and self.stalled)
        )

    def _look(self) -> None:
        phase = self._find()
        if phase is not self.phase or self._answered is not self.cycle:
            self.phase, self._answered, self.since = phase, self.cycle, self.loop.time()

    def _find(self) -> Phase:
        if self.transport.is_closing():
            return Phase.CLOSING
        if self.conn.their_state is h11.SEND_BODY:
            return Phase.BODY
        if self.cycle is not None and not self.cycle.response_complete:
            return Phase.ANSWER
        return Phase.HEAD if self.cycle is None or self.conn.trailing_data[0] else Phase.IDLE


class Acceptor:
    """Accepts connections on a socket, up to a bound."""

    def __init__(self, listening: socket.socket, make: Callable[[Callable[[Connection], None]], Connection], most: int):
        """``make`` is given what a connection calls when it is lost. To be begun and closed on an event loop."""
        self._listening, self._make, self._most = listening, make, most
        self._connections: set[Connection] = set()
        self._beginning: dict[Connection, tuple[asyncio.Task[None], socket.socket]] = {}
        self._told = -math.inf
        listening.setblocking(False)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)  # those accepted have it, too
        listening.listen(BACKLOG)

    def begin(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._listen()

    def close(self) -> None:
        """Accept no more. Those that are open stay."""
        self._open = False
        self._loop.remove_reader(self._listening.fileno())
        for task, _ in self._beginning.values():
            task.cancel()

    def check(self) -> None:
        """Close every connection whose client is late."""
        now = self._loop.time()
        for connection in list(self._connections):
            connection.check(now)

    def _listen(self) -> None:
        if self._open:
            self._loop.add_reader(self._listening.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(AT_ONCE):
            try:
                accepted, peer = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # The socket stays readable: whoever does not rest now, does nothing else.
                self._tell(f"a connection cannot be accepted: {error.strerror}")
                self._make_room()
                self._loop.remove_reader(self._listening.fileno())
                self._loop.call_later(REST_S, self._listen)
                return
            self._admit(accepted, str(peer[0]) if isinstance(peer, tuple) else "")

    def _admit(self, accepted: socket.socket, address: str) -> None:
        if len(self._connections) >= self._most:
            self._tell(
                f"{self._most} connections are open, the most that this process may have: of those whose clients are "
                "silent the oldest are closed for new ones (more open files, ulimit -n, may allow more connections)"
            )
            if not self._make_room():
                accepted.close()
                return
        connection = self._make(self._connections.discard)
        connection.address = address
        self._connections.add(connection)
        task = self._loop.create_task(self._connect(connection, accepted))
        self._beginning[connection] = task, accepted
        task.add_done_callback(lambda task: self._beginning.pop(connection, None))

    async def _connect(self, connection: Connection, accepted: socket.socket) -> None:
        try:
            accepted.setblocking(False)
            await self._loop.connect_accepted_socket(lambda: connection, accepted)
        except BaseException as error:
            self._connections.discard(connection)
            accepted.close()
            if not isinstance(error, OSError):  # its client closed it at once
                raise

    def _make_room(self) -> bool:
        """Close the connection that is the least loss, if there is one whose client keeps us waiting.

        Idle ones go first; then those of the address that has most, so that no client closes another's. Those that
        are accepted, and not more, count, too: a flood's come together.
        """
        silent = [connection for connection in self._connections if connection.yields or connection.begins]
        if not silent:
            return False
        idle = [connection for connection in silent if connection.phase is Phase.IDLE]
        if not idle:
            crowd = Counter(connection.address for connection in silent).most_common(1)[0][0]
            silent = [connection for connection in silent if connection.address == crowd]
        least = min(idle or silent, key=lambda connection: connection.since)
        if least.begins:
            task, accepted = self._beginning.pop(least)
            task.cancel()
            accepted.close()
            self._connections.discard(least)
        else:
            least.drop()
        return True

    def _tell(self, what: str) -> None:
        if (now := time.monotonic()) - self._told >= TOLD_S:
            self._told = now
            click.echo(f"mpgpt: {what}", err=True)


class Server(uvicorn.Server):
    """uvicorn, with connections that are bounded in number and in time."""

    def __init__(
        self, app: ASGIApp, *, most: int, parting_s: int, patience_s: Mapping[Phase, float] = PATIENCE_S
    ) -> None:
        """``most`` connections at once, each phase of which may last for ``patience_s``; when it ends, answers have
        ``parting_s`` seconds to come to an end."""
        super().__init__(
            uvicorn.Config(
                app, http="h11", ws="none", log_config=None, access_log=False, server_header=False,
                timeout_keep_alive=IDLE_S, timeout_graceful_shutdown=parting_s,
            )
        )  # fmt: skip
        # Requests that are none, and clients that disconnect, are no news: nobody shall fill a log with them.
        for noisy in ("uvicorn", "asyncio"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
        self._most, self._patience_s = most, patience_s
        self._acceptors: list[Acceptor] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._acceptors = [Acceptor(listening, self._connection, self._most) for listening in sockets or []]
        await super().startup(sockets=[])
        for acceptor in self._acceptors:
            acceptor.begin()

    def _connection(self, left: Callable[[Connection], None]) -> Connection:
        return Connection(
            left, self._patience_s, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )

    async def on_tick(self, counter: int) -> bool:
        if counter % 10 == 0:  # once a second
            for acceptor in self._acceptors:
                acceptor.check()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for acceptor in self._acceptors:
            acceptor.close()
        await super().shutdown(sockets)
