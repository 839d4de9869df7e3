"""Links between ranks: what they promise, and those of one process alone.

Knows: frames as bytes, and in which order they come.
Must not know: MPI (``mpi.py``), or what is in a frame.

A ``World`` is all the ranks; a ``Link`` is one directed edge. ``MPIWorld`` and ``MPILink`` are the real ones.
``SoloWorld`` and ``QueueLink`` serve one process alone, and the tests.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mpgpt.transport.doorbell import Doorbell, wait


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """How long a rank has sent nothing."""

    rank: int
    host: str
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Loss:
    """Why the ring cannot go on."""

    sentence: str
    said: bool
    """Whether the rank that failed sent the reason itself."""
    by_signal: bool = False
    """Whether its last message named a signal and nothing else; mpirun sent it if this rank receives one, too."""


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
    """Every rank's host by name; two hosts are told apart even if they have the same one."""
    bell: Doorbell

    def connect(self, source: int, target: int, capacity: int) -> Link:
        """This rank's end of the edge; frames of up to ``capacity`` bytes. Both ends must call it."""

    def gather(self, data: bytes) -> list[bytes]:
        """Every rank's ``data``, on every rank. All ranks must call it."""

    def broadcast(self, data: bytes) -> bytes:
        """Rank 0's ``data``, on every rank. All ranks must call it."""

    @property
    def loss(self) -> Loss | None:
        """Why the ring cannot go on, if a rank was lost."""

    def check(self) -> None:
        """Raises ``LinkError`` if a rank was lost."""

    def lost_soon(self) -> bool:
        """Whether a rank was lost, without having been told to end; waits a moment for the news of it.

        mpirun's signal, which follows a rank's death by a quarter of a second, may be here first.
        """

    def told_to_end(self) -> None:
        """A signal has told this rank to end; it may take a moment."""

    def silences(self) -> tuple[Silence, ...]:
        """The ranks that have sent nothing for some seconds."""

    def heed(self, interval_s: float, timeout_s: float) -> None:
        """How often ranks send heartbeats, and after how long a silence one is lost; the same on every rank."""

    def part(self, sentence: str) -> None:
        """Send every other rank the reason for this one's failure."""

    def abort(self, status: int) -> None:
        """End every rank now."""

    def close(self) -> None:
        """The orderly end: all ranks must call it."""


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
        self.bell.seal()  # its own threads reach it
        self.hosts = [socket.gethostname()]

    def connect(self, source: int, target: int, capacity: int) -> Link:
        assert source == target == 0, "one process has only itself to talk to"
        return QueueLink(self.bell)

    def gather(self, data: bytes) -> list[bytes]:
        return [data]

    def broadcast(self, data: bytes) -> bytes:
        return data

    loss: Loss | None = None

    def check(self) -> None:
        """There is nobody else to lose."""

    def lost_soon(self) -> bool:
        return False

    def told_to_end(self) -> None:
        """There is no other rank that should know."""

    def silences(self) -> tuple[Silence, ...]:
        return ()

    def heed(self, interval_s: float, timeout_s: float) -> None:
        """There is no other rank."""

    def part(self, sentence: str) -> None:
        """There is no other rank to send it to."""

    def abort(self, status: int) -> None:
        """There is nobody else to end."""

    def close(self) -> None:
        self.bell.close()
