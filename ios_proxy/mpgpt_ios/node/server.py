"""The TCP server of a node, the Python stand-in for the iPad: it receives a package, runs it, and returns results.

Knows: sockets, threads, which proxy is served, what each command does.
Must not know: bytes on the wire (``node_session.py``), how a package is loaded (``compute_thread.py``), run
(``executor.py``) or kept (``bundle_store.py``).

Each connection has a thread, which alone touches its session; another thread computes, and one hashes packages, so that
a PING is answered meanwhile. There is one cache, so one proxy is served. Another has to wait until that one has
gone, or has shown no sign of life for so long that it must have: it may have fallen asleep with the connection open.
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
from mpgpt_ios.executor import TROUBLES, BadPosition, Executor
from mpgpt_ios.hang_up import LINGER_S, RECEIVE, hang_up
from mpgpt_ios.node.bundle_store import NoRoom, PartialBundle, Store
from mpgpt_ios.node.compute_thread import ComputeThread
from mpgpt_ios.node.jobs import Jobs
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import SessionError
from mpgpt_ios.protocol.frames import VERSION
from mpgpt_ios.protocol.node_session import Command, NodeSession

TICK_S = 0.2
LOADING_S = 5.0
"""LOADING is sent this often while a package loads."""
DECIDE_S = 5.0
LIFE_S = 3.0
"""A proxy that is there sends something more often than this: a PING every 2 s, if nothing else."""
MAX_UNAUTHENTICATED = 8
"""Connections at once before authentication."""


class NodeServer:
    """One listening node."""

    def __init__(
        self, host: str, port: int, token: bytes, store: Store, *, open_: Callable[[Bundle], tuple[Executor, str]],
        say: Callable[[str], None], package: Bundle | None = None, decide_s: float = DECIDE_S,
    ) -> None:  # fmt: skip
        """Listen; ``serve`` does the rest. Port 0 takes any. Raises ``UsageError`` when it cannot listen there.

        ``open_`` makes a bundle ready to run, and names its compute unit; ``package`` is one that need not be sent.
        A proxy that comes while another is served waits ``decide_s`` for that one to leave.
        """
        self._token, self._store, self._say, self._package = token, store, say, package
        self._decide_s = decide_s
        self.compute_thread, self.store_thread = ComputeThread(open_), Jobs()
        try:
            self._listener = socket.create_server((host, port), reuse_port=False)
        except (OSError, OverflowError) as error:
            reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
            raise UsageError(f"cannot listen on {host}:{port}: {reason}") from None
        self.port: int = self._listener.getsockname()[1]
        self.served: Connection | None = None
        self._serving = threading.Lock()
        self._connections: set[Connection] = set()
        self._closing = threading.Event()

    def serve(self) -> None:
        """Compute on the calling thread, and listen on another, until ``close``."""
        listening = threading.Thread(target=self._listen, name="listen", daemon=True)
        listening.start()
        threading.Thread(target=self.store_thread.run, name="store", daemon=True).start()
        self.compute_thread.run()
        self._listener.close()
        self.store_thread.close()
        listening.join(5.0)
        for connection in list(self._connections):
            connection.leave(lambda session: session.bye())
        deadline = time.monotonic() + 2 * LINGER_S
        while self._connections and time.monotonic() < deadline:
            time.sleep(0.01)

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
            connection.close()
            with self._serving:
                if self.served is connection:
                    self.served = None
            self._connections.discard(connection)

    def session(self) -> NodeSession:
        facts = {
            "name": socket.gethostname(), "system": platform.platform(terse=True), "app": f"mpgpt {__version__}",
            "protocol": VERSION, "memory": psutil.virtual_memory().total, "bundles": self._store.hashes(),
        }  # fmt: skip
        return NodeSession(self._token, os.urandom(32), time.monotonic(), facts=facts, health=health)

    def admit(self, newcomer: Connection) -> bool:
        """Whether a proxy that has authenticated is served from now on; else to be asked again.

        Raises ``SessionError`` when another is served, and is there.
        """
        with self._serving:
            first, waited = self.served, time.monotonic() - newcomer.authenticated_at
            if first is None:
                self.served = newcomer
                self._say(f"the proxy at {newcomer.name} is here")
                return True
        if waited > self._decide_s:
            if time.monotonic() - first.heard_at < LIFE_S:
                self._say(f"the proxy at {newcomer.name} came while the one at {first.name} is served: sent away")
                raise SessionError("another proxy is served", "BUSY")
            first.leave(lambda session: session.error("BUSY", "another proxy took over"))
        return False

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
        self._leaving = False
        self.authenticated_at = time.monotonic()
        """When the proxy had proved itself."""
        self._waiting = False
        """Whether it has proved itself, and another may be served."""
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for each in (accepted, self._wake_read, self._wake_write):
            each.setblocking(False)

    @property
    def authenticated(self) -> bool:
        return self._session.authenticated

    @property
    def heard_at(self) -> float:
        """When the proxy last sent anything."""
        return self._session.heard_at

    def run(self) -> None:
        """Run the session until either end ends it; raises the reason."""
        try:
            while not self._leaving:
                self._exchange()
                if self._waiting:
                    self._ask_to_be_served()
                if why := self._session.late(time.monotonic()):
                    raise SessionError(why)
        finally:
            if self._session.out:
                hang_up(self._socket, self._session.out)

    def _ask_to_be_served(self) -> None:
        try:
            admitted = self._node.admit(self)
        except SessionError as error:
            self._session.error(error.code, str(error))
            raise
        if admitted:
            self._waiting = False
            self._session.admit()

    def leave(self, farewell: Callable[[NodeSession], None]) -> None:
        """End the connection after a ``farewell``, from another thread."""

        def last() -> None:
            farewell(self._session)
            self._leaving = True

        self._post(last)

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
            case m.Proof():
                self._waiting, self.authenticated_at = True, time.monotonic()
            case m.Offer():
                self._node.store_thread.submit(partial(self._take_offer, command))
            case m.Data():
                self._store(command.piece)
            case m.Load():
                assert self._bundle
                self._loading_since = time.monotonic()
                self._node.compute_thread.submit(partial(self._load, self._bundle))
            case m.Reset():
                self._node.compute_thread.submit(self._if_served(self._reset))
            case m.Prefill() | m.Decode():
                self._node.compute_thread.submit(self._if_served(partial(self._compute, command)))

    def _begin_arrival(self, arrival: PartialBundle) -> None:
        self._arrival = arrival
        self._session.want(arrival.have)
        self._store(b"")

    def _store(self, piece: bytes) -> None:
        assert self._arrival
        try:
            self._arrival.write(piece)
        except ModelError as error:
            self._refuse(error)
        if self._arrival.have == self._arrival.total:
            self._node.store_thread.submit(partial(self._finish, self._arrival))

    def _keep(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._session.stored()

    def _refuse(self, error: MpgptError, code: m.Code = "BAD_BUNDLE") -> NoReturn:
        code = "NO_SPACE" if isinstance(error, NoRoom) else code
        self._session.error(code, str(error))
        raise SessionError(str(error), code)

    # -- on the store's thread, which posts to the connection's thread whatever touches the session

    def _take_offer(self, offer: m.Offer) -> None:
        bundle = self._node.find(offer.bundle)
        if bundle:
            self._post(partial(self._session.want, bundle.length))
            self._post(partial(self._keep, bundle))
            return
        try:
            self._post(partial(self._begin_arrival, self._node.receive(offer)))
        except ModelError as error:
            self._post(partial(self._refuse, error))

    def _finish(self, arrival: PartialBundle) -> None:
        try:
            self._post(partial(self._keep, arrival.finish()))
        except ModelError as error:
            self._post(partial(self._refuse, error))

    # -- on the compute thread, which does likewise

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

    def _reset(self) -> None:
        try:
            self._node.compute_thread.executor.reset()
        except TROUBLES as error:
            self._post(partial(self._refuse, ModelError(str(error)), "COMPUTE_FAILED"))

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
            self._post(partial(self._session.failed, request, "BAD_POS", str(error)))
        except TROUBLES as error:
            self._post(partial(self._session.failed, request, "COMPUTE_FAILED", str(error)))
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
