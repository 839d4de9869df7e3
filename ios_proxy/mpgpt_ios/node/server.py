"""The TCP server of a node, the Python stand-in for the iPad: it receives a package, runs it, and returns results.

Knows: sockets, threads, which proxy is served, what each command does.
Must not know: bytes on the wire (``node_session.py``), how a package is loaded (``compute_thread.py``), run
(``executor.py``) or kept (``bundle_store.py``).

Each connection has a thread, which alone touches its session; one more thread computes, so that a PING is answered
meanwhile. There is one cache, so one proxy is served: one that authenticates takes over from the one before, whose
connection may have been dead for long without a sign.
"""

from __future__ import annotations

import contextlib
import os
import platform
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import psutil

from mpgpt import __version__
from mpgpt.errors import ModelError, MpgptError, UsageError, WireError
from mpgpt_ios.bundle import Bundle
from mpgpt_ios.executor import BadPosition, Executor
from mpgpt_ios.node.bundle_store import NoRoom, PartialBundle, Store
from mpgpt_ios.node.compute_thread import ComputeThread
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import SessionError
from mpgpt_ios.protocol.frames import VERSION
from mpgpt_ios.protocol.node_session import Command, NodeSession

TICK_S = 0.2
RECEIVE = 256 << 10
LOADING_S = 5.0
"""LOADING is sent this often while a package loads."""
LINGER_S = 1.0
"""The time for the other end to read an ERROR and close."""
MAX_UNAUTHENTICATED = 8
"""Connections at once before authentication."""


class NodeServer:
    """One listening node."""

    def __init__(
        self, host: str, port: int, token: bytes, store: Store, *, open_: Callable[[Bundle], tuple[Executor, str]],
        say: Callable[[str], None], package: Bundle | None = None,
    ) -> None:  # fmt: skip
        """Listen; ``serve`` does the rest. Port 0 takes any. Raises ``UsageError`` when it cannot listen there.

        ``open_`` makes a bundle ready to run, and names its compute unit; ``package`` is one that need not be sent.
        """
        self._token, self._store, self._say, self._package = token, store, say, package
        self.compute_thread = ComputeThread(open_)
        try:
            self._listener = socket.create_server((host, port), reuse_port=False)
        except (OSError, OverflowError) as error:
            reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
            raise UsageError(f"cannot listen on {host}:{port}: {reason}") from None
        self.port: int = self._listener.getsockname()[1]
        self.served: Connection | None = None
        self._connections: set[Connection] = set()
        self._closing = threading.Event()

    def serve(self) -> None:
        """Compute on the calling thread, and listen on another, until ``close``."""
        listening = threading.Thread(target=self._listen, name="listen", daemon=True)
        listening.start()
        self.compute_thread.run()
        self._listener.close()
        for connection in list(self._connections):
            connection.disconnect()
        listening.join(5.0)

    def close(self) -> None:
        """Let ``serve`` return. May be called from any thread, and from a signal's handler."""
        self._closing.set()
        self.compute_thread.close()

    def _listen(self) -> None:
        self._listener.settimeout(TICK_S)
        while not self._closing.is_set():
            try:
                accepted, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if sum(not connection.authenticated for connection in self._connections) >= MAX_UNAUTHENTICATED:
                accepted.close()
                continue
            connection = Connection(self, accepted, f"{address[0]}:{address[1]}")
            self._connections.add(connection)
            threading.Thread(target=self._run, args=(connection,), name="connection", daemon=True).start()

    def _run(self, connection: Connection) -> None:
        try:
            connection.run()
        except (OSError, WireError, SessionError) as error:
            if connection.authenticated:
                self._say(f"the proxy at {connection.name} has gone: {error}")
        finally:
            self._connections.discard(connection)
            if self.served is connection:
                self.served = None
            connection.close()

    def session(self) -> NodeSession:
        facts = {
            "name": socket.gethostname(), "system": platform.platform(terse=True), "app": f"mpgpt {__version__}",
            "protocol": VERSION, "memory": psutil.virtual_memory().total, "bundles": self._store.hashes(),
        }  # fmt: skip
        return NodeSession(self._token, os.urandom(32), time.monotonic(), facts=facts, health=health)

    def take_over(self, connection: Connection) -> None:
        """Serve a proxy that has authenticated, and disconnect the one before."""
        before, self.served = self.served, connection
        self._say(f"the proxy at {connection.name} is here")
        if before:
            before.disconnect()

    def find(self, digest: bytes) -> Bundle | None:
        if self._package and self._package.hash == digest:
            return self._package
        return self._store.find(digest)

    def receive(self, offer: m.Offer) -> PartialBundle:
        return self._store.receive(offer)


class Connection:
    """The connection of one proxy, with its session."""

    def __init__(self, node: NodeServer, accepted: socket.socket, name: str) -> None:
        self._node, self._socket, self.name = node, accepted, name
        self._session = node.session()
        self._arrival: PartialBundle | None = None
        self._bundle: Bundle | None = None
        self._posted: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._loading_since = 0.0
        self._disconnected = False
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for each in (accepted, self._wake_read, self._wake_write):
            each.setblocking(False)

    @property
    def authenticated(self) -> bool:
        return self._session.authenticated

    def run(self) -> None:
        """Run the session until either end ends it; raises the reason."""
        taken_over = False
        try:
            while not self._disconnected:
                self._exchange()
                if not taken_over and self.authenticated:
                    taken_over = True
                    self._node.take_over(self)
                if self._session.late(time.monotonic()):
                    raise SessionError("it did not prove itself in time")
        finally:
            if self._session.out:
                with contextlib.suppress(OSError):
                    self._linger()

    def _linger(self) -> None:
        """Send what is left, and read until the other end closes, or for a while.

        A connection that is closed over unread bytes is reset, and the ERROR may be lost with it.
        """
        self._socket.settimeout(TICK_S)
        self._socket.sendall(self._session.out)
        self._socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LINGER_S
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            if not self._socket.recv(RECEIVE):
                break

    def disconnect(self) -> None:
        """End the connection, from another thread."""
        self._disconnected = True
        self._wake()

    def close(self) -> None:
        if self._arrival:
            self._arrival.close()
        for each in (self._socket, self._wake_read, self._wake_write):
            each.close()

    def _exchange(self) -> None:
        writers = [self._socket] if self._session.out else []
        readable, writable, _ = select.select([self._socket, self._wake_read], writers, [], TICK_S)
        if self._wake_read in readable:
            with contextlib.suppress(BlockingIOError):
                while self._wake_read.recv(1024):
                    pass
        while self._posted:
            self._posted.popleft()()
        if writable:
            del self._session.out[: self._socket.send(self._session.out[:RECEIVE])]
        if self._socket in readable:
            data = self._socket.recv(RECEIVE)
            if not data:
                raise SessionError("it closed the connection")
            for command in self._session.receive(data, time.monotonic()):
                self._execute(command)
        if self._loading_since and time.monotonic() - self._loading_since > LOADING_S:
            self._loading_since = time.monotonic()
            self._session.loading("loading its package")

    def _execute(self, command: Command) -> None:
        match command:
            case m.Offer():
                self._take_offer(command)
            case m.Data():
                self._store(command.piece)
            case m.Load():
                assert self._bundle
                self._loading_since = time.monotonic()
                self._node.compute_thread.submit(partial(self._load, self._bundle))
            case m.Reset():
                self._node.compute_thread.submit(self._if_served(lambda: self._node.compute_thread.executor.reset()))
            case m.Prefill() | m.Decode():
                self._node.compute_thread.submit(self._if_served(partial(self._compute, command)))

    def _take_offer(self, offer: m.Offer) -> None:
        self._bundle = self._node.find(offer.bundle)
        if self._bundle:
            self._session.want(self._bundle.length)
            self._session.stored()
            return
        try:
            arrival = self._arrival = self._node.receive(offer)
        except ModelError as error:
            self._refuse(error)
        self._session.want(arrival.have)
        if arrival.have == arrival.total:
            self._store(b"")

    def _store(self, piece: bytes) -> None:
        assert self._arrival
        try:
            self._arrival.write(piece)
            if self._arrival.have == self._arrival.total:
                self._bundle = self._arrival.finish()
                self._session.stored()
        except ModelError as error:
            self._refuse(error)

    def _refuse(self, error: MpgptError, code: m.Code = "BAD_BUNDLE") -> NoReturn:
        code = "NO_SPACE" if isinstance(error, NoRoom) else code
        self._session.error(code, str(error))
        raise SessionError(str(error), code)

    # -- on the compute thread, which posts to the connection's thread whatever touches the session

    def _if_served(self, work: Callable[[], None]) -> Callable[[], None]:
        """The same work, skipped once another proxy is served."""

        def job() -> None:
            if self._node.served is self:
                work()

        return job

    def _load(self, bundle: Bundle) -> None:
        if self._node.served is not self:
            return
        try:
            loaded = self._node.compute_thread.load(bundle)
        except MpgptError as error:
            self._post(partial(self._refuse, error, "LOAD_FAILED"))
            return

        def ready() -> None:
            self._loading_since = 0.0
            self._session.ready(loaded.facts)

        self._post(ready)

    def _compute(self, request: m.Request) -> None:
        begun = time.perf_counter()
        slots, positions = [slot for slot, _ in request.positions], [position for _, position in request.positions]
        try:
            executor = self._node.compute_thread.executor
            if isinstance(request, m.Prefill):
                y = executor.prefill(slots[0], positions[0], request.x)
            else:
                y = executor.decode(slots, positions, request.x)
        except BadPosition as error:
            self._post(partial(self._session.error, "BAD_POS", str(error), request))
        except MpgptError as error:
            self._post(partial(self._session.error, "COMPUTE_FAILED", str(error), request))
        else:
            self._post(partial(self._session.result, request, y, time.perf_counter() - begun))

    def _post(self, work: Callable[[], None]) -> None:
        self._posted.append(work)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_write.send(b"!")


def health() -> dict[str, Any]:
    """PONG's facts of this machine; ``unknown`` or null where the system does not report them."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return {
        "thermal": "unknown",
        "battery": round(battery.percent / 100, 2) if battery else None,
        "charging": battery.power_plugged if battery else None,
        "free": psutil.virtual_memory().available,
    }
