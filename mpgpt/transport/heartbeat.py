"""Heartbeats: each rank and rank 0, and neighbours around the ring, send one another a beat every second.

Knows: TCP, the run's secret, seconds, who has been silent for how long.
Must not know: MPI, what a rank does, how a run is ended.

A thread of its own sends and listens, so that a rank that computes for minutes is not accused. A rank that was killed
closes its connections, and is lost at once; one that is stopped, off, or behind a cut cable is lost when it has been
silent for ``timeout_s``. Rank 0 judges: the others report to it which neighbours are silent. A rank to which rank 0
is silent is alone. Who dials must prove with the run's secret who it is, and so must who answers; a stranger's
connection is closed.
"""

from __future__ import annotations

import contextlib
import hmac
import math
import selectors
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

from mpgpt.transport.heartbeat_connection import (
    BEAT,
    FAREWELL,
    GREETING,
    MAGIC,
    MOST_BODY,
    PROOF_BYTES,
    Connection,
    Peer,
    encoded,
    family,
    listen,
    prove,
)
from mpgpt.transport.link import Loss, Silence

SILENT = struct.Struct("<If")
INTERVAL_S = 1.0
TIMEOUT_S = 10.0
NOTICE_S = 3.0
"""A silence as long as this is shown to whoever looks; it may still end. Sooner where the time-out is short."""
NOTICE_SHARE = 0.3
"""How much of the time-out that is at most."""
NOTICE_BEATS = 2.5
"""How many beats it is at least: one that is late is no silence."""
LATE_S = 0.5
"""A wake-up as late as this means that this rank was away, and what others reported before is old."""
DIAL_S = 2.0
PROVE_S = 5.0
"""How long the other end of a connection may take to prove who it is."""
MOST_ADDRESSES = 8
"""Of a peer, that are dialled."""
STRANGERS = 32
"""Connections at once, beside those of the peers, that dialled in and have proved nothing yet."""
LATER_S = 2.0
"""How much longer the others wait for rank 0 than it for them: it is the one that can name what happened."""


class Heartbeat:
    """This rank's end of all its heartbeats. ``loss`` is None as long as no rank is lost."""

    def __init__(self, rank: int, *, prove_s: float = PROVE_S) -> None:
        """``prove_s``: how long the other end of a connection may take to prove who it is, in seconds."""
        self._rank, self._prove_s = rank, prove_s
        self._listener = listen()
        self.port: int = self._listener.getsockname()[1]
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._interval, self._timeout = INTERVAL_S, TIMEOUT_S
        self._lenient = (-math.inf, 0.0)
        """Until when another time-out, in seconds, counts if it is longer."""
        self._answering = False
        self._pulse: Callable[[float], None] = lambda patience_s: None
        self._hosts: dict[int, Peer] = {}
        self._peers: dict[int, Peer] = {}
        self._secret = b""
        self._alarm: Callable[[], None] = lambda: None
        self._thread: threading.Thread | None = None
        self._connections: dict[int, Connection] = {}
        self._strangers: set[Connection] = set()
        self._heard: dict[int, float] = {}
        self._dialled: dict[int, float] = {}
        self._unheard: dict[tuple[int, int], float] = {}
        self._gone: set[int] = set()
        self._closing: bytes | None = None
        self.loss: Loss | None = None
        self.signal: int | None = None
        """The signal that ended this rank's process, if one did."""

    @property
    def wakeup(self) -> int:
        """A descriptor for ``signal.set_wakeup_fd``: whatever signal is written to it ends this rank in order."""
        return self._wake.fileno()

    def start(self, peers: Sequence[Peer], secret: bytes, alarm: Callable[[], None]) -> None:
        """Begin. ``peers`` are all other ranks; ``alarm`` is called, on the heartbeat's own thread, when ``loss`` or
        ``signal`` is there."""
        size = len(peers) + 1
        mine = {0, (self._rank - 1) % size, (self._rank + 1) % size}
        self._peers = {peer.rank: peer for peer in peers if not self._rank or peer.rank in mine}
        self._hosts = {peer.rank: peer for peer in peers}
        self._secret, self._alarm = secret, alarm
        self._heard = dict.fromkeys(self._peers, time.monotonic())
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def configure(self, interval_s: float, timeout_s: float) -> None:
        """How often to beat, and how long a silence is a loss; seconds, the same on every rank. Ranks that still beat
        as before are not accused."""
        if self._thread:
            self._lenient = (time.monotonic() + self._interval + NOTICE_S, self._timeout)
        self._interval, self._timeout = interval_s, timeout_s
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")

    def on_pulse(self, pulse: Callable[[float], None]) -> None:
        """Call ``pulse`` at every beat, on the heartbeat's own thread, with the seconds after which its silence is a
        loss; at the end infinitely many."""
        self._pulse = pulse

    @property
    def watched(self) -> frozenset[int]:
        """The ranks whose silence this rank notices: all for rank 0, else rank 0 and the neighbours."""
        return frozenset(self._peers)

    @property
    def connected(self) -> frozenset[int]:
        """The ranks that have proved who they are on a connection that is open."""
        return frozenset(self._connections)

    @property
    def strangers(self) -> int:
        """The number of open connections on which nobody has proved anything yet."""
        return len(self._strangers)

    def silences(self, longer_than_s: float | None = None) -> tuple[Silence, ...]:
        """The ranks that have been silent for longer than that; by default for long enough to be noticed."""
        now, least = time.monotonic(), self._notice if longer_than_s is None else longer_than_s
        return tuple(
            Silence(rank=peer.rank, host=peer.host, seconds=now - self._heard[peer.rank])
            for peer in self._peers.values()
            if now - self._heard[peer.rank] > least and peer.rank not in self._gone
        )

    @property
    def _notice(self) -> float:
        return min(max(NOTICE_BEATS * self._interval, min(NOTICE_S, NOTICE_SHARE * self._timeout)), self._timeout)

    def close(self, sentence: str | None = None) -> None:
        """Send a farewell to all, with the ``sentence`` why if this rank failed, and end."""
        if self._closing is not None and threading.current_thread() is not self._thread:
            return
        self._closing = b"\0" if sentence is None else b"\1" + encoded(sentence)
        if self._thread is None or threading.current_thread() is self._thread:
            self._end(stays=self._thread is not None)
            return
        with contextlib.suppress(OSError):
            self._wake.send(b"\0")
        self._thread.join(1.0)

    # -- the heartbeat's thread

    def _run(self) -> None:
        self._selector.register(self._woken, selectors.EVENT_READ)
        self._answer(True)
        due = time.monotonic()
        while self._closing is None:
            due = min(due, time.monotonic() + self._interval)  # it may be another by now
            events = self._selector.select(max(0.0, due - time.monotonic()))
            self._forgive(time.monotonic() - due)
            for key, _ in events:
                self._serve(key.fileobj)
            now = time.monotonic()
            if now >= due and self._closing is None:
                due = now + self._interval
                self._tick(now)
        self._end()

    def _forgive(self, away: float) -> None:
        """While this rank was away (stopped, asleep), it received nothing: that is nobody's silence."""
        if away > 0.0:
            self._heard = {rank: heard + away for rank, heard in self._heard.items()}
        if away > LATE_S:
            self._unheard.clear()

    def _serve(self, what: object) -> None:
        if self._closing is not None:
            return
        if what is self._listener:
            self._accept()
        elif what is self._woken:
            signums = self._woken.recv(64).strip(b"\0")
            if signums:
                self.signal = signums[0]
                self._alarm()
            return
        for connection in (*self._strangers, *self._connections.values()):
            if connection.socket is what:  # else it was dropped just now
                self._receive(connection)
                return

    def _tick(self, now: float) -> None:
        self._answer(True)
        for rank, peer in self._peers.items():
            if rank < self._rank and rank not in self._connections and rank not in self._gone:
                self._dial(peer, now)
        for stranger in [c for c in self._strangers if now - c.begun > self._probation(c)]:
            self._drop(stranger)
        for connection in list(self._connections.values()):
            self._beat(connection, now)
        self._pulse(self._timeout)
        self._judge(now)

    def _beat(self, connection: Connection, now: float) -> None:
        silent = [(rank, now - heard) for rank, heard in self._heard.items() if now - heard > self._notice]
        beat = b"".join(SILENT.pack(rank, seconds) for rank, seconds in silent[: MOST_BODY // SILENT.size])
        connection.send(BEAT, beat)

    def _judge(self, now: float) -> None:
        timeout = max(self._timeout, self._lenient[1]) if now < self._lenient[0] else self._timeout
        patience = timeout + (LATER_S if self._rank else 0.0)
        for rank, heard in self._heard.items():
            if rank in self._gone or now - heard <= patience or (self._rank and rank):
                continue
            self._lose(
                f"{self._peers[rank].name} has been silent for {now - heard:.0f} s: its host is off or stopped, or "
                "the network to it is cut"
            )
        for (teller, rank), seconds in self._unheard.items() if not self._rank else ():
            heard_here = all(now - self._heard[other] <= self._notice for other in (teller, rank))
            if seconds > timeout and heard_here and not {teller, rank} & self._gone:
                self._lose(
                    f"{self._hosts[teller].name} has not heard {self._hosts[rank].name} for {seconds:.0f} s: the "
                    "network between them is cut"
                )

    def _lose(self, sentence: str, *, said: bool = False, by_signal: bool = False) -> None:
        if self.loss is None:
            self.loss = Loss(sentence=sentence, said=said, by_signal=by_signal)
            self._alarm()

    # -- connections

    def _dial(self, peer: Peer, now: float) -> None:
        """Dial all its addresses at once; the first that answers is taken (``_introduced``)."""
        if now - self._dialled.get(peer.rank, -math.inf) < DIAL_S or any(
            stranger.dialled == peer.rank and stranger.theirs for stranger in self._strangers
        ):
            return
        self._dialled[peer.rank] = now
        for address in peer.addresses[:MOST_ADDRESSES]:
            with contextlib.suppress(OSError):  # such as too many open files: later
                dialling = socket.socket(family(address), socket.SOCK_STREAM)
                dialling.setblocking(False)
                dialling.connect_ex((address, peer.port))
                self._add(Connection(dialling, now, dialled=peer.rank))

    def _probation(self, stranger: Connection) -> float:
        """How long a stranger may remain one, in seconds."""
        return self._prove_s if stranger.dialled is None or stranger.theirs else DIAL_S

    def _answer(self, calls: bool) -> None:
        if calls != self._answering:
            self._answering = calls
            if calls:
                self._selector.register(self._listener, selectors.EVENT_READ)
            else:
                self._selector.unregister(self._listener)

    def _accept(self) -> None:
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it has gone again
            return
        except OSError:  # too many open files: whoever dials waits until the next beat
            self._answer(False)
            return
        accepted.setblocking(False)
        connection = Connection(accepted, time.monotonic())
        self._add(connection)
        callers = [stranger for stranger in self._strangers if stranger.dialled is None]
        if len(callers) > STRANGERS + MOST_ADDRESSES * len(self._peers):  # the oldest has had its time
            self._drop(min(callers, key=lambda stranger: stranger.begun))
        connection.write(GREETING.pack(MAGIC, self._rank, connection.nonce))

    def _add(self, connection: Connection) -> None:
        with contextlib.suppress(OSError):
            connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._strangers.add(connection)
        self._selector.register(connection.socket, selectors.EVENT_READ)

    def _drop(self, connection: Connection) -> None:
        self._strangers.discard(connection)
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(connection.socket)
        connection.socket.close()

    def _receive(self, connection: Connection) -> None:
        try:
            data = connection.socket.recv(65536)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        except OSError:  # the network's trouble, and nobody's end: the silence is judged
            self._drop(connection)
            if connection.rank is not None and self._connections.get(connection.rank) is connection:
                del self._connections[connection.rank]
            return
        if not data:
            self._ended(connection)
            return
        connection.received += data
        if connection.rank is None and not self._introduced(connection):
            return
        self._frames(connection)

    def _introduced(self, connection: Connection) -> bool:
        """Whether the other end has proved who it is; greets and proves back on the way."""
        received = connection.received
        if not connection.theirs and len(received) >= GREETING.size:
            magic, connection.claims, connection.theirs = GREETING.unpack_from(received)
            del received[: GREETING.size]
            above = {rank for rank in self._peers if rank > self._rank}
            expected = above if connection.dialled is None else {connection.dialled}
            if magic != MAGIC or connection.claims not in expected:
                self._drop(connection)
                return False
            if connection.dialled is not None:
                connection.begun = time.monotonic()
                for other in [c for c in self._strangers if c.dialled == connection.dialled and c is not connection]:
                    self._drop(other)
                connection.write(GREETING.pack(MAGIC, self._rank, connection.nonce))
                connection.write(prove(self._secret, connection.theirs, self._rank))
        if not connection.theirs or len(received) < PROOF_BYTES:
            return False
        assert connection.claims is not None
        proof = bytes(received[:PROOF_BYTES])
        del received[:PROOF_BYTES]
        if not hmac.compare_digest(proof, prove(self._secret, connection.nonce, connection.claims)):
            self._drop(connection)
            return False
        connection.rank = connection.claims
        self._strangers.discard(connection)
        if old := self._connections.pop(connection.rank, None):
            self._drop(old)
        self._connections[connection.rank] = connection
        self._heard[connection.rank] = now = time.monotonic()
        if connection.dialled is None:
            connection.write(prove(self._secret, connection.theirs, self._rank))
        else:
            connection.mutual = True
            self._beat(connection, now)  # and so it is for the other end
        return True

    def _frames(self, connection: Connection) -> None:
        assert connection.rank is not None
        try:
            for kind, body in connection.frames():
                connection.mutual = True
                self._heard[connection.rank] = time.monotonic()
                if kind == BEAT:
                    self._told(connection.rank, body)
                elif kind == FAREWELL:
                    self._left(connection.rank, body)
        except ValueError:
            self._ended(connection)

    def _told(self, teller: int, beat: bytes) -> None:
        """Take what a neighbour reports of its own neighbours."""
        for key in [key for key in self._unheard if key[0] == teller]:
            del self._unheard[key]
        if not len(beat) % SILENT.size:
            told = [pair for pair in SILENT.iter_unpack(beat) if pair[0] in self._hosts]
            self._unheard.update({(teller, rank): seconds for rank, seconds in told})

    def _left(self, rank: int, body: bytes) -> None:
        self._gone.add(rank)
        if body[:1] == b"\1":
            cause = body[1:].decode(errors="replace")
            self._lose(cause or f"{self._hosts[rank].name} was ended", said=True, by_signal=not cause)

    def _ended(self, connection: Connection) -> None:
        """The other end closed, or sent what no rank sends."""
        self._drop(connection)
        rank = connection.rank
        if rank is None or self._connections.get(rank) is not connection:
            return
        del self._connections[rank]
        if connection.mutual and rank not in self._gone and (not self._rank or not rank):
            self._gone.add(rank)
            self._lose(f"{self._hosts[rank].name} ended without a word: it was killed, or its host went down")

    def _end(self, *, stays: bool = False) -> None:
        """``stays``: the process ends next, and until then a signal may still be written to ``wakeup``."""
        assert self._closing is not None
        self._pulse(math.inf)
        for connection in self._connections.values():
            connection.send(FAREWELL, self._closing)
            with contextlib.suppress(OSError):  # what lies there unread would have the farewell thrown away
                while connection.socket.recv(65536):
                    pass
        for connection in (*self._strangers, *self._connections.values()):
            connection.socket.close()
        for own in (self._selector, self._listener, *(() if stays else (self._wake, self._woken))):
            own.close()
