"""The Python stand-in for the iPad: listens, takes a package, runs it, answers.

Knows: sockets, threads, which proxy is being served, what to do for each message.
Must not know: bytes on the wire (``node_session.py``), how a package is loaded (``compute_thread.py``), run
(``executor.py``) or kept (``bundle_store.py``).

Each connection has a thread, which alone touches its session; one more thread computes, so that a PING is answered
while it does. There is one cache, so one proxy is served: one that proves itself takes over from the one before, whose
connection may have been dead for long without anyone noticing.
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
from mpgpt_ios.protocol.auth import SessionError
from mpgpt_ios.protocol.frames import VERSION
from mpgpt_ios.protocol.messages import Code, Data, Load, Offer, Request, Reset
from mpgpt_ios.protocol.node_session import Command, NodeSession

TICK_S = 0.2
RECEIVE = 256 << 10
TOLD_S = 5.0
"""How often a proxy hears that loading goes on."""
LAST_WORDS_S = 1.0
STRANGERS = 8
"""Connections at once that have not proved themselves yet."""


class NodeServer:
    """One listening node."""

    def __init__(
        self, host: str, port: int, token: bytes, store: Store, *, open_: Callable[[Bundle], tuple[Executor, str]],
        say: Callable[[str], None], package: Bundle | None = None,
    ) -> None:  # fmt: skip
        """Listens at once; ``serve`` does the rest. ``open_`` makes a bundle ready to run, and says by what;
        ``package`` is one that needs not be sent. Port 0 takes any. Raises ``UsageError`` when it cannot listen there.
        """
        self._token, self._store, self._say, self._package = token, store, say, package
        self.computing = ComputeThread(open_)
        try:
            self._listener = socket.create_server((host, port), reuse_port=False)
        except (OSError, OverflowError) as error:
            reason = str(getattr(error, "strerror", None) or error).partition(" (while")[0]
            raise UsageError(f"cannot listen on {host}:{port}: {reason}") from None
        self.port: int = self._listener.getsockname()[1]
        self.guest: Connection | None = None
        self._visits: set[Connection] = set()
        self._closing = threading.Event()

    def serve(self) -> None:
        """Until ``close``. Computes on the thread that calls it, and listens on another."""
        listening = threading.Thread(target=self._listen, name="listen", daemon=True)
        listening.start()
        self.computing.run()
        self._listener.close()
        for visit in list(self._visits):
            visit.leave()
        listening.join(5.0)

    def close(self) -> None:
        """Let ``serve`` return. May be called from any thread, and from a signal's handler."""
        self._closing.set()
        self.computing.close()

    def _listen(self) -> None:
        self._listener.settimeout(TICK_S)
        while not self._closing.is_set():
            try:
                connection, address = self._listener.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            if sum(not visit.known for visit in self._visits) >= STRANGERS:
                connection.close()
                continue
            visit = Connection(self, connection, f"{address[0]}:{address[1]}")
            self._visits.add(visit)
            threading.Thread(target=self._host, args=(visit,), name="visit", daemon=True).start()

    def _host(self, visit: Connection) -> None:
        try:
            visit.run()
        except (OSError, WireError, SessionError) as error:
            if visit.known:
                self._say(f"the proxy at {visit.name} has gone: {error}")
        finally:
            self._visits.discard(visit)
            if self.guest is visit:
                self.guest = None
            visit.end()

    def session(self) -> NodeSession:
        facts = {
            "name": socket.gethostname(), "system": platform.platform(terse=True), "app": f"mpgpt {__version__}",
            "protocol": VERSION, "memory": psutil.virtual_memory().total, "bundles": self._store.hashes(),
        }  # fmt: skip
        return NodeSession(self._token, os.urandom(32), time.monotonic(), facts=facts, health=health)

    def welcome(self, visit: Connection) -> None:
        """A proxy has proved itself: it is served from now on, and no other."""
        before, self.guest = self.guest, visit
        self._say(f"the proxy at {visit.name} is here")
        if before:
            before.leave()

    def find(self, digest: bytes) -> Bundle | None:
        if self._package and self._package.hash == digest:
            return self._package
        return self._store.find(digest)

    def receive(self, offer: Offer) -> PartialBundle:
        return self._store.receive(offer)


class Connection:
    """One connection."""

    def __init__(self, node: NodeServer, connection: socket.socket, name: str) -> None:
        self._node, self._socket, self.name = node, connection, name
        self._session = node.session()
        self._arrival: PartialBundle | None = None
        self._bundle: Bundle | None = None
        self._posted: deque[Callable[[], None]] = deque()
        self._wake_read, self._wake_write = socket.socketpair()
        self._loading_since = 0.0
        self._leaving = False
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for each in (connection, self._wake_read, self._wake_write):
            each.setblocking(False)

    @property
    def known(self) -> bool:
        return self._session.known

    def run(self) -> None:
        """Until one end has had enough; raises why."""
        known = False
        try:
            while not self._leaving:
                self._exchange()
                if not known and self.known:
                    known = True
                    self._node.welcome(self)
                if self._session.late(time.monotonic()):
                    raise SessionError("it did not prove itself in time")
        finally:
            if self._session.out:
                with contextlib.suppress(OSError):
                    self._say_why()

    def _say_why(self) -> None:
        """The last words. What is still coming is read until the other end has closed, or for a while: closed over
        unread bytes, a connection is reset, and the words may be lost with it."""
        self._socket.settimeout(TICK_S)
        self._socket.sendall(self._session.out)
        self._socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LAST_WORDS_S
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            if not self._socket.recv(RECEIVE):
                break

    def leave(self) -> None:
        """End it, from another thread."""
        self._leaving = True
        self._wake()

    def end(self) -> None:
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
            for asked in self._session.receive(data, time.monotonic()):
                self._do(asked)
        if self._loading_since and time.monotonic() - self._loading_since > TOLD_S:
            self._loading_since = time.monotonic()
            self._session.loading("loading its package")

    def _do(self, asked: Command) -> None:
        match asked:
            case Offer():
                self._offered(asked)
            case Data():
                self._store(asked.piece)
            case Load():
                assert self._bundle
                self._loading_since = time.monotonic()
                self._node.computing.ask(partial(self._load, self._bundle))
            case Reset():
                self._node.computing.ask(self._mine(lambda: self._node.computing.executor.reset()))
            case Request():
                self._node.computing.ask(self._mine(partial(self._compute, asked)))

    def _offered(self, offer: Offer) -> None:
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

    def _refuse(self, error: MpgptError, code: Code = "BAD_BUNDLE") -> NoReturn:
        code = "NO_SPACE" if isinstance(error, NoRoom) else code
        self._session.trouble(code, str(error))
        raise SessionError(str(error), code)

    # -- on the computing thread; the session is touched by what is posted alone

    def _mine(self, work: Callable[[], None]) -> Callable[[], None]:
        """Do it only as long as this visit is the guest."""

        def job() -> None:
            if self._node.guest is self:
                work()

        return job

    def _load(self, bundle: Bundle) -> None:
        if self._node.guest is not self:
            return
        try:
            loaded = self._node.computing.load(bundle)
        except MpgptError as error:
            self._post(partial(self._refuse, error, "LOAD_FAILED"))
            return

        def tell() -> None:
            self._loading_since = 0.0
            self._session.ready(loaded.facts)

        self._post(tell)

    def _compute(self, ask: Request) -> None:
        begun = time.perf_counter()
        slots, positions = [slot for slot, _ in ask.positions], [position for _, position in ask.positions]
        try:
            executor = self._node.computing.executor
            y = (
                executor.prefill(slots[0], positions[0], ask.x)
                if ask.prefill
                else executor.decode(slots, positions, ask.x)
            )
        except BadPosition as error:
            self._post(partial(self._session.trouble, "BAD_POS", str(error), ask))
        except MpgptError as error:
            self._post(partial(self._session.trouble, "COMPUTE_FAILED", str(error), ask))
        else:
            self._post(partial(self._session.answer, ask, y, time.perf_counter() - begun))

    def _post(self, what: Callable[[], None]) -> None:
        self._posted.append(what)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):
            self._wake_write.send(b"!")


def health() -> dict[str, Any]:
    """What this machine says of itself now; ``unknown`` or null where there is nothing to ask."""
    battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    return {
        "thermal": "unknown",
        "battery": round(battery.percent / 100, 2) if battery else None,
        "charging": battery.power_plugged if battery else None,
        "free": psutil.virtual_memory().available,
    }
