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
MOST_DESCRIPTOR = 1024
"""select() takes descriptors below this."""


class Doorbell:
    """Wakes a sleeping rank. A ring carries no meaning; ring from any thread.

    A lost ring costs one sleep, not a hang: a rank that finds a frame which nothing announced naps (``patience``)
    until something wakes it again.
    """

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="mpgpt-"))  # nobody else may enter it
        self.path = str(self._folder / "bell")
        """Where ranks of this host reach it, until ``seal``."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.setblocking(False)
        self._own = self.reach(self.path)
        self._watched: set[int] = set()
        self._vain: Counter[int] = Counter()
        self.patience = SLEEP_S
        self.alert_until = 0.0
        """Until when naps are taken (``time.monotonic``)."""
        self.unfinished: Callable[[], bool] = lambda: False
        """Whether sends are on their way that only go on when MPI is called."""
        self.missed: Callable[[], None] = lambda: None
        """Told when something came that ended no sleep."""

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
        self._watched = {fd for fd in descriptors if fd < MOST_DESCRIPTOR}
        self._vain.clear()

    def sleep(self, seconds: float) -> bool:
        """Sleep until something wakes this rank (True) or ``seconds`` have passed (False)."""
        try:  # poll() would round to milliseconds
            readable = select.select([self._socket.fileno(), *self._watched], [], [], max(0.0, seconds))[0]
        except (OSError, ValueError):  # one of them was closed meanwhile
            self._watched = {fd for fd in self._watched if _is_open(fd)}
            return True
        if self._socket.fileno() in readable:
            with contextlib.suppress(BlockingIOError):
                while self._socket.recv(64):
                    pass
        self._vain.update(self._watched.intersection(readable))
        self._watched -= {fd for fd, count in self._vain.items() if count > VAIN}
        return bool(readable)

    def alert(self) -> None:
        """Something is under way: nap for a while instead of sleeping."""
        self.alert_until = time.monotonic() + ALERT_S

    def heard(self) -> None:
        """What was waited for is there: nothing woke this rank in vain."""
        self._vain.clear()

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
        bell.sleep(0)  # old rings, for frames that were found without them
        if ready():
            return True
        if bell.sleep(usual - EARLY_S):
            bell.alert()
        spin_until = time.monotonic() + 2 * EARLY_S
    woken = True
    while True:
        while not ready():
            if time.monotonic() >= min(spin_until, deadline):
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


def _is_open(descriptor: int) -> bool:
    try:
        return select.select([descriptor], [], [], 0) is not None
    except (OSError, ValueError):
        return False
