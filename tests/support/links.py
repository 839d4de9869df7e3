"""What every Link promises, written once for both ends, to be run over every kind of link.

A case is what the source does and what the target does. The source never waits for the target, so that over a
queue the two may run one after the other on one thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from mpgpt.transport.link import Link

CAPACITY = 1 << 20
End = Callable[[Link], None]


def frame(n: int, length: int) -> bytearray:
    return bytearray((n * 31 + i) % 251 for i in range(length))


def received(link: Link, timeout: float | None = None) -> bytes:
    got = link.recv(timeout)
    assert got is not None, "nothing came"
    return bytes(got)


def send_some(link: Link) -> None:
    for n in range(20):
        link.send(frame(n, 100 + n))


def expect_some(link: Link) -> None:
    for n in range(20):
        assert received(link) == frame(n, 100 + n), "out of order, or not what was sent"


SIZES = (0, 1, 31, 4095, 4096, 4097, 65536, CAPACITY)


def send_sizes(link: Link) -> None:
    for n, size in enumerate(SIZES):
        link.send(frame(n, size))
        link.progress()


def expect_sizes(link: Link) -> None:
    for n, size in enumerate(SIZES):
        assert received(link) == frame(n, size)


def send_after_a_while(link: Link) -> None:
    time.sleep(1.0)
    link.send(frame(1, 10))


def expect_asleep(link: Link) -> None:
    """A receive without a time-out waits however long it takes."""
    assert received(link) == frame(1, 10)


def send_one(link: Link) -> None:
    link.send(frame(7, 50))


def expect_one_and_silence(link: Link) -> None:
    """A time-out gives None, and loses nothing: neither before a frame nor after it."""
    assert received(link, timeout=10) == frame(7, 50)
    begun = time.monotonic()
    assert link.recv(timeout=0.2) is None
    assert 0.15 < time.monotonic() - begun < 2
    assert link.recv(timeout=0) is None


def expect_to_be_called_away(link: Link) -> None:
    """What ``until`` says comes first, and loses no frame."""
    assert link.recv(until=lambda: True) is None
    for n in range(20):
        got = link.recv(until=lambda: False)
        assert got is not None and bytes(got) == frame(n, 100 + n)
        assert link.recv(until=lambda: True) is None
    later = time.monotonic() + 0.1
    assert link.recv(timeout=20, until=lambda: time.monotonic() > later) is None
    assert time.monotonic() < later + 10


def expect_a_view_that_lasts(link: Link) -> None:
    """A frame may be read until the next receive, even when more frames have come."""
    first = link.recv()
    assert first is not None
    time.sleep(0.2)
    link.progress()
    assert bytes(first) == frame(0, 100)
    for n in range(1, 20):
        assert received(link) == frame(n, 100 + n)


def close(link: Link) -> None:
    link.close()


CASES: dict[str, tuple[End, End]] = {
    "frames stay whole and in order": (send_some, expect_some),
    "frames of any size": (send_sizes, expect_sizes),
    "a receive waits": (send_after_a_while, expect_asleep),
    "a time-out": (send_one, expect_one_and_silence),
    "a receive that is called away": (send_some, expect_to_be_called_away),
    "a view lasts until the next receive": (send_some, expect_a_view_that_lasts),
    "an end that is closed": (close, close),
}
