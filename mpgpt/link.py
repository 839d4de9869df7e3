"""Links between ranks, and how a rank waits.

Knows: MPI (the only module that imports mpi4py), buffers and who may touch them when, the doorbell.
Must not know: what is in a frame.

A ``World`` is all the ranks; a ``Link`` is one directed edge. ``MPIWorld`` and ``MPILink`` are the real ones.
``SoloWorld`` and ``QueueLink`` serve one process alone, and the tests.

MPI moves data only while somebody is inside an MPI call. A rank therefore always has its next receive posted,
and calls ``progress`` between layers, so that a send that has begun and the receive that follows both go on
while it computes.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Protocol

import mpi4py
import psutil

from mpgpt.errors import LinkError

mpi4py.rc.initialize = False  # one process alone needs no MPI; MPIWorld starts and ends it
mpi4py.rc.finalize = False
from mpi4py import MPI  # noqa: E402

TAG = 1

SPIN_S = 0.0005
"""How long a rank spins before it sleeps: longer than a busy ring's gaps, shorter than anyone would notice."""
EARLY_S = 0.0008
"""How long before the usual time a rank wakes up: waking takes 0.1 to 0.4 ms, and waits are not all alike."""
USUAL_MOST_S = 0.1
SLEEP_S = 0.25
"""The longest sleep when bells are heard; they wake the rank long before that."""
DEAF_S = 0.002
"""The longest sleep when bells do not get through."""


class Link(Protocol):
    """One directed edge between two ranks. The source sends, the target receives; frames stay in order."""

    def send(self, frame: bytearray) -> None:
        """Begin to send and return. The frame belongs to the link from now on."""

    def recv(self, timeout: float | None = None, until: Callable[[], bool] | None = None) -> memoryview | None:
        """The next frame, valid until the next ``recv``; None when ``timeout`` seconds have passed, or ``until()`` is
        true, which comes first. Whoever makes it true must ring this rank's bell."""

    def progress(self) -> None:
        """Let transfers that have begun go on; cheap enough to call between layers."""

    def close(self) -> None: ...


class World(Protocol):
    """All the ranks of one run."""

    rank: int
    size: int
    launched: bool
    """Whether mpirun started this process; by default it binds each rank to one core."""
    hosts: list[str]
    """Every rank's host name."""
    bell: Doorbell

    def connect(self, source: int, target: int, capacity: int) -> Link:
        """This rank's end of the edge; frames of up to ``capacity`` bytes. Both ends must call it."""

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's ``data``, on every rank. All ranks must call it."""

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's ``data``, on every rank. All ranks must call it."""

    def abort(self, status: int) -> None:
        """End every rank now."""

    def close(self) -> None:
        """The orderly end: all ranks must call it."""


class Doorbell:
    """A UDP socket on which anyone may ring a sleeping rank awake. What is rung carries no meaning.

    Ring from any thread. A lost datagram costs one sleep, not a hang: a rank that finds messages which no bell
    announced stops relying on bells and sleeps in short naps (``patience``) until it hears one again.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("0.0.0.0", 0))
        self._socket.setblocking(False)
        self.port: int = self._socket.getsockname()[1]
        self.patience = SLEEP_S

    def ring(self, address: tuple[str, int] | None = None) -> None:
        """Wake the rank at ``address``, or this one. A bell that cannot be rung is only a slower wake-up."""
        with contextlib.suppress(OSError):
            self._socket.sendto(b"!", address or ("127.0.0.1", self.port))

    def sleep(self, seconds: float) -> bool:
        """Sleep until somebody rings (True) or ``seconds`` have passed (False)."""
        if not select.select([self._socket], [], [], max(0.0, seconds))[0]:  # poll() would round to milliseconds
            return False
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(64):
                pass
        return True

    def close(self) -> None:
        self._socket.close()


def wait(ready: Callable[[], object], bell: Doorbell, timeout: float | None = None, usual: float = 0.0) -> bool:
    """Wait until ``ready()`` is true (True) or ``timeout`` seconds have passed (False). The one way to wait.

    Spins for ``SPIN_S``, then sleeps on the doorbell, and spins again after each ring, because the ring may
    overtake the message. Where a wait ``usual``ly takes some milliseconds, as in a ring that is busy, it sleeps
    until shortly before, so that the message finds it awake. ``ready`` is not called again once it was true.
    ``bench/LOG.md`` has what other ways cost.
    """
    now = time.monotonic()
    deadline = math.inf if timeout is None else now + timeout
    spin_until = now + SPIN_S
    rang = True
    if EARLY_S < usual < USUAL_MOST_S and (timeout is None or timeout > usual):
        bell.sleep(0)  # old rings, for messages that were found without them
        if ready():
            return True
        if not bell.sleep(usual - EARLY_S):
            spin_until = now + usual + EARLY_S
    while True:
        while not ready():
            if time.monotonic() >= min(spin_until, deadline):
                break
        else:
            if not rang:
                bell.patience = DEAF_S
            return True
        left = deadline - time.monotonic()
        if left <= 0:
            return False
        rang = bell.sleep(min(left, bell.patience))
        if rang:
            bell.patience = SLEEP_S
        spin_until = time.monotonic() + SPIN_S if rang else 0.0


class QueueLink:
    """A link inside one process: frames wait in a queue."""

    def __init__(self, bell: Doorbell) -> None:
        self._frames: deque[bytearray] = deque()
        self._bell = bell

    def send(self, frame: bytearray) -> None:
        self._frames.append(frame)
        self._bell.ring()

    def recv(self, timeout: float | None = None, until: Callable[[], bool] | None = None) -> memoryview | None:
        if until and until():
            return None
        if not self._frames and not wait(lambda: self._frames or (until and until()), self._bell, timeout):
            return None
        return memoryview(self._frames.popleft()) if self._frames else None

    def progress(self) -> None:
        """Nothing to do: a frame is there as soon as it is sent."""

    def close(self) -> None:
        self._frames.clear()


class SoloWorld:
    """One process alone: its own ring of one."""

    rank = 0
    size = 1
    launched = False

    def __init__(self) -> None:
        self.bell = Doorbell()
        self.hosts = [socket.gethostname()]

    def connect(self, source: int, target: int, capacity: int) -> Link:
        assert source == target == 0, "one process has only itself to talk to"
        return QueueLink(self.bell)

    def gather(self, data: bytes) -> list[bytes]:
        return [data]

    def broadcast(self, data: bytes) -> bytes:
        return data

    def abort(self, status: int) -> None:
        """There is nobody else to end."""

    def close(self) -> None:
        self.bell.close()


class MPILink:
    """A link over MPI: one message a frame, two receive buffers so that the next one is always posted."""

    def __init__(
        self, comm: MPI.Intracomm, source: int, target: int, capacity: int, bell: Doorbell, peer: tuple[str, int]
    ) -> None:
        self._comm, self._bell, self._peer = comm, bell, peer
        self._source, self._target = source, target
        self._sends: deque[tuple[MPI.Request, bytearray]] = deque()
        self._buffers = [bytearray(capacity), bytearray(capacity)] if comm.rank == target else []
        self._status = MPI.Status()
        self._posted: MPI.Request | None = None
        self._usual = 0.0
        if self._buffers:
            self._post()

    def _post(self) -> None:
        self._posted = self._comm.Irecv([self._buffers[0], MPI.BYTE], self._source, TAG)

    def send(self, frame: bytearray) -> None:
        assert self._comm.rank == self._source, "only the source of a link sends"
        self.progress()
        self._sends.append((self._comm.Isend([frame, MPI.BYTE], self._target, TAG), frame))
        self._bell.ring(self._peer)

    def recv(self, timeout: float | None = None, until: Callable[[], bool] | None = None) -> memoryview | None:
        assert self._posted is not None, "only the target of a link receives"
        begun = time.monotonic()
        ready, interrupted = self._arrived, False
        if until:

            def ready() -> bool:
                nonlocal interrupted
                interrupted = until()
                return interrupted or self._arrived()

        if not wait(ready, self._bell, timeout, 0.0 if until else self._usual) or interrupted:
            return None
        waited = time.monotonic() - begun
        # Down at once and up slowly: to wake too early costs some spinning, too late costs everyone.
        self._usual = waited if waited < self._usual else self._usual + 0.2 * (min(waited, USUAL_MOST_S) - self._usual)
        count = self._status.Get_count(MPI.BYTE)
        full, free = self._buffers
        self._buffers = [free, full]
        self._post()
        return memoryview(full)[:count]

    def _arrived(self) -> bool:
        assert self._posted is not None
        try:
            return self._posted.Test(self._status)
        except MPI.Exception as error:
            raise LinkError(f"cannot receive from rank {self._source}: {error}") from error

    def progress(self) -> None:
        while self._sends and self._sends[0][0].Test():
            self._sends.popleft()

    def _all_sent(self) -> bool:
        self.progress()
        return not self._sends

    def close(self) -> None:
        """Wait until all that was sent has left, and take the posted receive back."""
        wait(self._all_sent, self._bell, timeout=5.0)
        if self._posted is not None:
            self._posted.Cancel()
            self._posted.Wait()
            self._posted = None


class MPIWorld:
    """The ranks that one ``mpirun`` started."""

    launched = True

    def __init__(self) -> None:
        MPI.Init_thread(MPI.THREAD_SERIALIZED)
        self._comm: MPI.Intracomm = MPI.COMM_WORLD
        self.rank, self.size = self._comm.rank, self._comm.size
        self.bell = Doorbell()
        mine = f"{socket.gethostname()} {self.bell.port} {' '.join(_addresses())}"
        self._peers = [text.decode().split(" ") for text in self.gather(mine.encode())]
        self.hosts = [peer[0] for peer in self._peers]

    def connect(self, source: int, target: int, capacity: int) -> Link:
        assert self.rank in (source, target), "this rank is at neither end"
        if source == target:
            return QueueLink(self.bell)
        peer = self._bell_of(target if self.rank == source else source)
        return MPILink(self._comm, source, target, capacity, self.bell, peer)

    def _bell_of(self, rank: int) -> tuple[str, int]:
        host, port, *addresses = self._peers[rank]
        if host == self._peers[self.rank][0]:
            return "127.0.0.1", int(port)
        return nearest(addresses, self._peers[self.rank][2:]), int(port)

    def gather(self, data: bytes) -> list[bytes]:
        length = memoryview(bytearray(len(data).to_bytes(8, "little")))
        lengths = bytearray(8 * self.size)
        self._finish(self._comm.Iallgather([length, MPI.BYTE], [lengths, MPI.BYTE]))
        counts = [int.from_bytes(lengths[8 * r : 8 * r + 8], "little") for r in range(self.size)]
        everything = bytearray(sum(counts))
        self._finish(self._comm.Iallgatherv([data, MPI.BYTE], [everything, (counts, None), MPI.BYTE]))
        starts = [sum(counts[:r]) for r in range(self.size)]
        return [bytes(everything[a : a + n]) for a, n in zip(starts, counts, strict=True)]

    def broadcast(self, data: bytes) -> bytes:
        return self.gather(data if self.rank == 0 else b"")[0]

    def _finish(self, request: MPI.Request) -> None:
        """Wait for a collective without burning a core: nobody rings for it, so nap."""
        nap = 0.0001
        while not request.Test():
            time.sleep(nap)
            nap = min(1.5 * nap, 0.005)

    def abort(self, status: int) -> None:
        self._comm.Abort(status)

    def close(self) -> None:
        self.gather(b"")
        self.bell.close()
        MPI.Finalize()


def nearest(theirs: list[str], ours: list[str]) -> str:
    """Of another host's ``theirs`` the address in a network of ``ours`` ("10.0.0.2/24"); else its first.

    An address that both hosts have (the bridge of a container engine) leads nowhere and is passed over.
    """
    own = [ipaddress.IPv4Interface(text) for text in ours]
    candidates = [c for c in map(ipaddress.IPv4Interface, theirs) if c.ip not in {o.ip for o in own}]
    shared = [c for c in candidates if any(c.ip in o.network for o in own)]
    return str((shared or candidates or [ipaddress.IPv4Interface("127.0.0.1/8")])[0].ip)


def _addresses() -> list[str]:
    """This host's IPv4 addresses with their networks, loopback left out."""
    found = [a for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET]
    return [f"{a.address}/{a.netmask or '255.255.255.255'}" for a in found if not a.address.startswith("127.")]
