"""The proxy rank's TCP client: it dials the iPad, sends its package and its calls, and dials again.

Knows: sockets, a thread, back-off, when the iPad counts as gone.
Must not know: bytes on the wire (``proxy_session.py``), steps, rows, what is done while it is away (``stage.py``).

One thread does all that touches the network; the ring's thread submits calls and takes results, and never waits for a
network. An epoch begins when the iPad is ready, or with ``renew``, and ends at the latest when the iPad is lost;
results of an epoch that is over are dropped.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import get_args

from mpgpt.core import DeviceAccount, Thermal
from mpgpt.errors import MpgptError
from mpgpt.transport.doorbell import Doorbell
from mpgpt_ios.hang_up import RECEIVE, hang_up
from mpgpt_ios.protocol.auth import SessionError, fingerprint
from mpgpt_ios.protocol.proxy_session import (
    Authenticated,
    BundleReader,
    Event,
    Health,
    Progress,
    ProxySession,
    Ready,
    Reply,
)
from mpgpt_ios.proxy.stage import Call, Values

DIAL_S = 5.0
"""A connection must be made within this time."""
BACK_OFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)
BUSY_S = 30.0
"""An iPad that serves another proxy is not dialled again before this long."""
STEADY_S = 30.0
"""After the iPad was ready for this long, back-off begins anew."""
TICK_S = 0.2
THERMALS = get_args(Thermal)


class Client:
    """A ``stage.DeviceConnection`` over TCP."""

    def __init__(
        self, address: tuple[str, int], token: bytes, bundle: BundleReader, bell: Doorbell, *, timeout_s: float,
        report: Callable[[str], None], back_off_s: Sequence[float] = BACK_OFF_S, busy_s: float = BUSY_S,
    ) -> None:  # fmt: skip
        """Begin to dial. ``bell`` rings when a result has arrived, and when the iPad is ready or was lost; ``report``
        is called on the client's own thread with sentences for a person. ``back_off_s`` are the pauses before dialling
        again, in seconds; the last one is repeated. ``busy_s`` is the least pause where another is served."""
        self._address, self._token, self._bundle, self._bell = address, token, bundle, bell
        self._timeout, self._report, self._back_off_s, self._busy_s = timeout_s, report, back_off_s, busy_s
        self.name = f"the iPad at {address[0]}:{address[1]}"
        self.trouble = f"{self.name} was not reached yet"
        self.facts: dict[str, object] = {}
        """The last READY's."""
        self._lock = threading.Lock()
        self._epoch: int | None = None
        self._last_epoch = 0
        self._outbox: deque[Call | int] = deque()
        """Calls, and among them the epochs that begin there on the same connection."""
        self._results: deque[Values] = deque()
        self._begin_account(time.monotonic())
        self._away_since: float | None = None
        self._falls = 0
        self._thermal: Thermal = "unknown"
        self._closing = threading.Event()
        self._redial_now = threading.Event()
        self._first_attempt_over = threading.Event()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="iPad", daemon=True)
        self._thread.start()

    # -- for the ring's thread

    @property
    def epoch(self) -> int | None:
        return self._epoch

    def submit(self, epoch: int, call: Call) -> None:
        with self._lock:
            if epoch == self._epoch:
                self._outbox.append(call)
        self._wake()

    def take(self, epoch: int) -> Values | None:
        with self._lock:
            return self._results.popleft() if epoch == self._epoch and self._results else None

    def renew(self, epoch: int) -> int | None:
        with self._lock:
            if epoch != self._epoch:
                return None
            self._last_epoch += 1
            self._epoch = self._last_epoch
            self._outbox.append(self._last_epoch)
        self._wake()
        return self._last_epoch

    def wait_until_ready(self) -> bool:
        """Wait until the first attempt has succeeded or failed, loading included; whether the iPad is ready."""
        self._first_attempt_over.wait()
        return self._epoch is not None

    def account(self) -> DeviceAccount:
        with self._lock:
            now = time.monotonic()
            away_s = self._away_s + (now - self._away_since if self._away_since is not None else 0.0)
            account = DeviceAccount(
                requests=self._requests,
                compute_s=self._compute_s,
                network_s=self._network_s,
                sent=self._sent,
                received=self._received,
                falls=self._falls,
                away_s=away_s,
                thermal=self._thermal,
                away=self._epoch is None,
            )
            self._begin_account(now)
            if self._away_since is not None:
                self._away_since = now
            return account

    def _begin_account(self, now: float) -> None:
        self._requests = self._sent = self._received = self._falls = 0
        self._compute_s = self._network_s = self._away_s = 0.0

    def redial(self) -> None:
        self._redial_now.set()

    def close(self) -> None:
        """Hang up, and end the thread."""
        self._closing.set()
        self._redial_now.set()
        self._wake()
        self._thread.join(5.0)
        self._wake_read.close()
        self._wake_write.close()

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # full: it is awake then
            self._wake_write.send(b"!")

    # -- the client's own thread

    def _run(self) -> None:
        failures = 0
        while not self._closing.is_set():
            ready_at: float | None = None
            pause = 0.0
            with contextlib.ExitStack() as connected:
                try:
                    connection = connected.enter_context(socket.create_connection(self._address, DIAL_S))
                    self._serve(connection, connected)
                    return
                except (OSError, MpgptError) as error:
                    ready_at = self._began_at if self._epoch is not None else None
                    pause = self._busy_s if isinstance(error, SessionError) and error.code == "BUSY" else 0.0
                    self._lose(_sentence(error, self._token))
            failures = 0 if ready_at is not None and time.monotonic() - ready_at > STEADY_S else failures + 1
            self._redial_now.wait(max(pause, self._back_off_s[max(0, min(failures, len(self._back_off_s)) - 1)]))
            self._redial_now.clear()

    def _serve(self, connection: socket.socket, connected: contextlib.ExitStack) -> None:
        """Run one session until ``close``; raises when the iPad is lost. What it should still be told is sent when
        ``connected`` ends, after the loss has been noted."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setblocking(False)
        self._redial_now.clear()  # a request to redial that came while it was here
        session = ProxySession(
            self._token, self._bundle, os.urandom(32), time.monotonic(), epoch=self._last_epoch + 1,
            timeout_s=self._timeout,
        )  # fmt: skip
        connected.callback(lambda: hang_up(connection, session.out) if session.out else None)
        while not self._closing.is_set():
            self._send_calls(session)
            if not session.out:
                session.fill()
            self._exchange(connection, session)
            session.tick(time.monotonic())
        session.bye()

    def _send_calls(self, session: ProxySession) -> None:
        while session.ready and self._outbox and session.open < session.queue:
            item = self._outbox.popleft()
            if isinstance(item, int):
                session.renew(item)
            else:
                positions = tuple(zip(item.slots, item.positions, strict=True))
                session.call(positions, item.x, time.monotonic())

    def _exchange(self, connection: socket.socket, session: ProxySession) -> None:
        writers = [connection] if session.out else []
        readable, writable, _ = select.select([connection, self._wake_read], writers, [], TICK_S)
        if self._wake_read in readable:
            with contextlib.suppress(BlockingIOError):
                while self._wake_read.recv(1024):
                    pass
        if writable:
            count = connection.send(session.out[:RECEIVE])
            del session.out[:count]
            self._sent += count
        if connection in readable:
            data = connection.recv(RECEIVE)
            if not data:
                raise SessionError("it closed the connection")
            self._received += len(data)
            for event in session.receive(data, time.monotonic()):
                self._on_event(event)

    def _on_event(self, event: Event) -> None:
        match event:
            case Reply():
                with self._lock:
                    self._requests += 1
                    self._compute_s += event.compute_s
                    self._network_s += max(0.0, event.seconds - event.compute_s)
                    self._results.append(event.y)
                self._bell.ring()
            case Ready():
                self._on_ready(dict(event.facts))
            case Progress():
                self._report(f"{self.name}: {event.text}")
            case Health():
                thermal = event.facts.get("thermal")
                self._thermal = thermal if thermal in THERMALS else "unknown"  # type: ignore[assignment]
            case Authenticated():
                pass

    def _on_ready(self, facts: dict[str, object]) -> None:
        with self._lock:
            now = time.monotonic()
            self._last_epoch += 1
            self._epoch, self._began_at, self.facts = self._last_epoch, now, facts
            if self._away_since is not None:
                self._away_s += now - self._away_since
            self._away_since = None
            again = self._last_epoch > 1 or self._first_attempt_over.is_set()
        self._report(f"{self.name} is {'back' if again else 'ready'}: {facts.get('unit', 'unknown')}")
        self._first_attempt_over.set()
        self._bell.ring()

    def _lose(self, why: str) -> None:
        """Note that the iPad is away; reported once, and not again at every attempt to reach it."""
        with self._lock:
            was, self._epoch = self._epoch, None
            self._outbox.clear()
            self._results.clear()
            first = was is not None or not self._first_attempt_over.is_set()
            if first:
                self._falls += 1
            if self._away_since is None:
                self._away_since = time.monotonic()
            self.trouble = f"{self.name} {'went away' if was is not None else 'cannot be used'}: {why}"
        if first:
            self._report(self.trouble)
        self._first_attempt_over.set()
        self._bell.ring()


def _sentence(error: Exception, token: bytes) -> str:
    if isinstance(error, SessionError) and error.code == "BAD_TOKEN":
        return f"{error}; this end's has the fingerprint {fingerprint(token)}, and `mpgpt ipad-token --qr` shows it"
    if isinstance(error, TimeoutError):
        return f"it did not answer within {DIAL_S:.0f} s"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error)
