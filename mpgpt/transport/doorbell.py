"""How a rank waits: a short spin, then sleep on whatever may wake it.

Knows: datagrams within one host, descriptors of connections that somebody else reads, seconds.
Must not know: MPI, frames, what is waited for.

MPI has no way to sleep. A rank therefore sleeps on two things at once. Ranks of its own host and its own threads
ring a ``Doorbell``, because what comes through shared memory has no descriptor. What comes from another host wakes
it by itself: the doorbell ``watch``es the sockets that MPI reads. Nobody on the network can ring.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import shutil
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

SPIN_S = 0.0005
"""How long a rank spins before it sleeps: longer than a busy ring's gaps, shorter than anyone would notice."""
LOOKS = 10
"""How often at least a rank looks before it sleeps: the first look may take a frame from its socket, which then wakes
nobody any more, and only another hand it over."""
EARLY_S = 0.0008
"""How long before the usual time a rank wakes up: waking takes 0.1 to 0.4 ms, and waits are not all alike."""
USUAL_MOST_S = 0.1
SLEEP_S = 0.25
"""The longest sleep where something is sure to end it."""
NAP_S = 0.002
"""The longest sleep where it is not: after a ring, which may overtake its frame, and after a send, which MPI may call
complete before it has given all of it to the network."""
ALERT_S = 0.05
"""For how long after a ring or a send naps are taken instead of sleeps."""
VAIN = 2000
"""After so many wake-ups in a row with nothing to show for it, a descriptor is not watched any more."""
GROWTH = 1.05
"""By how much each nap of a rank that does not know what will wake it is longer than the one before: what comes
unannounced is late by a twentieth of the wait, and an idle rank sleeps again after some seconds."""
MOST_DESCRIPTOR = 1024
"""select() takes descriptors below this."""
NAME = "bell"


class Doorbell:
    """Wakes a sleeping rank. A ring carries no meaning; ring from any thread.

    A lost ring costs one sleep, not a hang: a rank that finds a frame which nothing announced naps (``patience``)
    until something wakes it again.
    """

    def __init__(self) -> None:
        self._folder, self._socket = _listen()
        self.path = str(self._folder / NAME)
        """Where ranks of this host reach it, until ``seal``."""
        self._own = self.reach(self.path)
        self.watched: set[int] = set()
        """The descriptors that wake this rank besides."""
        self._vain: Counter[int] = Counter()
        self.patience = SLEEP_S
        self.alert_until = 0.0
        """Until when naps are taken (``time.monotonic``)."""
        self.unfinished: Callable[[], bool] = lambda: False
        """Whether sends are on their way that only go on when MPI is called."""
        self.missed: Callable[[], None] = lambda: None
        """Called when something came that ended no sleep."""

    @staticmethod
    def reach(path: str) -> socket.socket:
        """What rings the doorbell at ``path``. Raises ``OSError`` when it is not on this host."""
        ringer = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            ringer.connect(path)
        except OSError:
            ringer.close()
            raise
        ringer.setblocking(False)
        return ringer

    def seal(self) -> None:
        """Take the path away once all who should have reached it: nobody else does, and nothing is left behind."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def ring(self) -> None:
        """Wake this rank."""
        ring(self._own)

    def watch(self, descriptors: Iterable[int]) -> None:
        """Wake up also when one of these can be read; they stay somebody else's, who reads them when called."""
        self.watched = set(descriptors)
        self._vain.clear()

    def sleep(self, seconds: float) -> bool:
        """Sleep until something wakes this rank (True) or ``seconds`` have passed (False)."""
        try:
            readable = _readable([self._socket.fileno(), *self.watched], seconds)
        except (OSError, ValueError):  # one of them was closed meanwhile
            self.watched = {fd for fd in self.watched if _is_open(fd)}
            return True
        if self._socket.fileno() in readable:
            with contextlib.suppress(BlockingIOError):
                while self._socket.recv(64):
                    pass
        self._vain.update(self.watched.intersection(readable))
        self.watched -= {fd for fd, count in self._vain.items() if count > VAIN}
        return bool(readable)

    def alert(self) -> None:
        """Something is under way: nap for a while instead of sleeping."""
        self.alert_until = time.monotonic() + ALERT_S

    def heard(self) -> None:
        """What was waited for is there. Whatever woke this rank several times, and can be read even now, may have done
        so in vain all the same: another thread's connection, or one that has ended, among frames that do come."""
        often = [fd for fd, count in self._vain.items() if count > 1]
        still = _readable_now(often) if often else []
        self._vain = Counter({fd: self._vain[fd] for fd in still})

    def close(self) -> None:
        self.seal()
        self._own.close()
        self._socket.close()


def ring(ringer: socket.socket) -> None:
    """Ring at what ``Doorbell.reach`` gave. A bell that cannot be rung, or is full of rings, is no trouble."""
    with contextlib.suppress(OSError):
        ringer.send(b"!")


def wait(ready: Callable[[], object], bell: Doorbell, timeout: float | None = None, usual: float = 0.0) -> bool:
    """Wait until ``ready()`` is true (True) or ``timeout`` seconds have passed (False). The one way to wait.

    Spins for ``SPIN_S``, then sleeps on the doorbell. Whatever wakes it may be ahead of the frame, or be its first
    part only: it spins again, and naps for a while before it goes back to long sleeps. Where a wait ``usual``ly takes
    some milliseconds, as in a ring that is busy, it sleeps until shortly before, so that the frame finds it awake.
    ``ready`` is not called again once it was true. ``bench/LOG.md`` has what other ways cost.
    """
    now = time.monotonic()
    deadline = math.inf if timeout is None else now + timeout
    spin_until = now + SPIN_S
    if EARLY_S < usual < USUAL_MOST_S and (timeout is None or timeout > usual):
        rung = bell.sleep(0)  # for a frame that was found without it, or one of which only a part is there
        if ready():
            bell.heard()
            return True
        if bell.sleep(usual - EARLY_S) or rung:
            bell.alert()
        spin_until = time.monotonic() + 2 * EARLY_S
    woken = True
    while True:
        looks = 0
        while not ready():
            looks += 1
            if looks >= LOOKS and time.monotonic() >= min(spin_until, deadline):
                break
        else:
            bell.heard()
            if not woken:
                bell.patience = NAP_S
                bell.missed()
            return True
        now = time.monotonic()
        if now >= deadline:
            return False
        napping = now < bell.alert_until or bell.unfinished()
        if bell.sleep(min(deadline - now, NAP_S if napping else bell.patience)):
            bell.alert()
            bell.patience = SLEEP_S
            woken, spin_until = True, time.monotonic() + SPIN_S
        else:
            woken, spin_until = napping, 0.0
            if not napping:
                bell.patience = min(GROWTH * bell.patience, SLEEP_S)


def _listen() -> tuple[Path, socket.socket]:
    """A folder that nobody else may enter, and a socket in it. Raises ``OSError``."""
    try:
        return _listen_in(None)
    except OSError:  # TMPDIR may be too long for a socket's path (104 bytes on macOS), or on a disk without sockets
        return _listen_in("/tmp")


def _listen_in(parent: str | None) -> tuple[Path, socket.socket]:
    folder = Path(tempfile.mkdtemp(prefix="mpgpt-", dir=parent))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        listener.bind(str(folder / NAME))
    except OSError:
        listener.close()
        shutil.rmtree(folder, ignore_errors=True)
        raise
    listener.setblocking(False)
    return folder, listener


def _readable(descriptors: list[int], seconds: float) -> list[int]:
    """Those that can be read, within so many seconds. Raises ``OSError`` or ``ValueError`` when one is closed."""
    seconds = max(0.0, seconds)
    if max(descriptors) < MOST_DESCRIPTOR:  # poll() rounds to milliseconds
        return select.select(descriptors, [], [], seconds)[0]
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    found = poll.poll(1000 * seconds)
    if any(event & select.POLLNVAL for _, event in found):
        raise OSError("a descriptor is closed")
    return [descriptor for descriptor, _ in found]


def _readable_now(descriptors: list[int]) -> list[int]:
    try:
        return _readable(descriptors, 0)
    except (OSError, ValueError):  # the next sleep finds out which one is closed
        return []


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True
