"""The doorbell: what wakes a sleeper, what does not keep it awake, and what waiting costs."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpgpt.transport.doorbell import ALERT_S, NAP_S, SLEEP_S, VAIN, Doorbell, ring, wait
from mpgpt.transport.link import QueueLink, SoloWorld
from tests.support.launch import ENV, ROOT


@pytest.fixture
def bell() -> Iterator[Doorbell]:
    bell = Doorbell()
    yield bell
    bell.close()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection such as MPI's: what the second end sends makes the first one readable."""
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def elapsed(work: Callable[[], object]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


class Sleeps:
    """Stands in for the doorbell's sleep: notes how long each would be, and wakes when told."""

    def __init__(self, bell: Doorbell, monkeypatch: pytest.MonkeyPatch, *woken: bool) -> None:
        self.asked: list[float] = []
        self._woken = list(woken)
        monkeypatch.setattr(bell, "sleep", self)

    def __call__(self, seconds: float) -> bool:
        self.asked.append(seconds)
        return self._woken.pop(0) if self._woken else False


# -- who rings


def test_a_ring_from_another_thread(bell: Doorbell) -> None:
    threading.Timer(0.2, bell.ring).start()
    assert 0.1 < elapsed(lambda: bell.sleep(30)) < 10
    assert not bell.sleep(0), "all rings are heard at once"


def test_a_ring_from_another_process_of_the_host(bell: Doorbell) -> None:
    code = f"from mpgpt.transport.doorbell import Doorbell, ring; ring(Doorbell.reach({bell.path!r}))"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=ENV) as process:
        assert bell.sleep(60)
        assert process.wait(60) == 0


def test_a_ring_reaches_a_queue_link_across_threads(bell: Doorbell) -> None:
    link = QueueLink(bell)
    threading.Timer(0.3, lambda: link.send(bytearray(b"late"))).start()
    got = link.recv()
    assert got is not None and bytes(got) == b"late"
    assert bell.patience == SLEEP_S


def test_more_rings_than_a_socket_holds_are_heard_as_one(bell: Doorbell) -> None:
    for _ in range(5000):
        bell.ring()
    assert bell.sleep(30) and not bell.sleep(0)


def test_nobody_is_reached_after_the_seal(bell: Doorbell) -> None:
    """Whoever had reached it before still rings."""
    early = Doorbell.reach(bell.path)
    bell.seal()
    with pytest.raises(OSError):
        Doorbell.reach(bell.path)
    ring(early)
    assert bell.sleep(30)
    bell.ring()
    assert bell.sleep(30)
    early.close()


def test_what_rings_a_closed_bell_does_not_care(bell: Doorbell) -> None:
    early = Doorbell.reach(bell.path)
    bell.close()
    ring(early)
    bell.ring()
    early.close()


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    sealed, closed = Doorbell(), Doorbell()
    folders = list(tmp_path.iterdir())
    assert len(folders) == 2 and all(folder.stat().st_mode & 0o077 == 0 for folder in folders)
    sealed.seal()
    closed.close()
    world = SoloWorld()
    assert not list(tmp_path.iterdir()), "one process alone needs no path, and may be killed"
    sealed.close()
    closed.close()
    world.close()


def test_a_temporary_folder_of_a_long_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A socket's path has 104 bytes on macOS, 108 on Linux."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    bell = Doorbell()
    Doorbell.reach(bell.path).close()
    bell.close()
    assert not list(long.iterdir()) and not os.path.exists(bell.path)


# -- descriptors


def test_a_watched_descriptor_wakes(bell: Doorbell, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    bell.watch([ours.fileno()])
    assert not bell.sleep(0.01)
    threading.Timer(0.2, lambda: theirs.send(b"x")).start()
    assert 0.1 < elapsed(lambda: bell.sleep(30)) < 10
    bell.watch([])
    assert not bell.sleep(0.01)


def test_a_watched_descriptor_that_is_closed(bell: Doorbell, pair: tuple[socket.socket, socket.socket]) -> None:
    ours, _ = pair
    other, far = socket.socketpair()
    bell.watch([ours.fileno(), other.fileno()])
    ours.close()
    assert bell.sleep(30), "to look is better than to sleep"
    assert elapsed(lambda: bell.sleep(0.1)) >= 0.09, "it is watched no more"
    far.send(b"x")
    assert bell.sleep(30), "the other one is"
    other.close()
    far.close()


def test_a_descriptor_that_is_readable_for_ever_costs_no_core(
    bell: Doorbell, pair: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = pair
    theirs.close()  # what is left of a connection
    bell.watch([ours.fileno()])
    assert all(bell.sleep(30) for _ in range(VAIN + 1))
    assert not bell.sleep(0.01), "dropped"
    bell.watch([ours.fileno()])
    assert bell.sleep(30), "watched anew"
    assert not wait(lambda: False, bell, timeout=10)
    cpu = time.process_time()
    assert not wait(lambda: False, bell, timeout=2)
    assert time.process_time() - cpu < 0.1


def test_a_descriptor_that_is_readable_for_ever_among_frames(
    bell: Doorbell, pair: tuple[socket.socket, socket.socket]
) -> None:
    """Frames that come meanwhile excuse the descriptors that brought them, not this one."""
    ours, theirs = pair
    theirs.close()
    busy, far = socket.socketpair()
    bell.watch([ours.fileno(), busy.fileno()])
    for _ in range(VAIN // 10 + 1):
        far.send(b"x")
        for _ in range(10):
            bell.sleep(1)
        busy.recv(1)
        bell.heard()
    far.send(b"x")
    assert bell.sleep(30)
    busy.recv(1)
    assert not bell.sleep(0.01)
    far.send(b"x")
    assert bell.sleep(30), "the one that brings frames is still watched"
    busy.close()
    far.close()


def test_more_descriptors_than_select_takes() -> None:
    """A doorbell of a process with more than 1024 open files, and a connection above them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 1200:
        pytest.skip("this machine allows no more than 1200 open files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (1200, hard))
    null = os.open(os.devnull, os.O_RDONLY)
    high = [os.dup(null) for _ in range(1050)]
    try:
        bell = Doorbell()
        ours, theirs = socket.socketpair()
        assert ours.fileno() > 1024
        bell.watch([ours.fileno()])
        assert elapsed(lambda: bell.sleep(0.2)) >= 0.19, "it sleeps, and does not spin"
        threading.Timer(0.2, bell.ring).start()
        assert bell.sleep(30) and not bell.sleep(0)
        theirs.send(b"x")
        assert bell.sleep(30)
        ours.close()
        assert bell.sleep(30)
        assert elapsed(lambda: bell.sleep(0.2)) >= 0.19
        theirs.close()
        bell.close()
    finally:
        for descriptor in (null, *high):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# -- waiting


def test_what_comes_unannounced_is_late_once(bell: Doorbell) -> None:
    """It is found within a long sleep, and within a nap from then on; a rank to which nothing comes sleeps again."""
    missed: list[int] = []
    bell.missed = lambda: missed.append(1)
    ready: list[int] = []
    threading.Timer(0.1, lambda: ready.append(1)).start()
    assert wait(lambda: ready, bell)
    assert bell.patience == NAP_S and missed
    assert not wait(lambda: False, bell, timeout=1)
    assert NAP_S < bell.patience < 0.1 * 1
    bell.ring()
    assert not wait(lambda: False, bell, timeout=0.05)
    assert bell.patience == SLEEP_S, "a bell is heard again"


def test_patience_returns_without_any_bell(bell: Doorbell, monkeypatch: pytest.MonkeyPatch) -> None:
    sleeps = Sleeps(bell, monkeypatch)
    bell.patience = NAP_S
    begun = time.monotonic()
    assert not wait(lambda: len(sleeps.asked) > 150 and time.monotonic() > begun + 1, bell, timeout=0.5)
    assert sleeps.asked[0] == pytest.approx(NAP_S) and bell.patience == SLEEP_S
    assert all(later <= 1.06 * earlier for earlier, later in zip(sleeps.asked[:100], sleeps.asked[1:100], strict=False))


@pytest.mark.parametrize("why", ["a ring", "a send", "something under way"])
def test_naps_while_something_is_under_way(bell: Doorbell, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """A ring may overtake its frame, and what is sent may need this rank to go on."""
    sleeps = Sleeps(bell, monkeypatch, why == "a ring")
    if why == "a send":
        bell.alert()
    if why == "something under way":
        bell.unfinished = lambda: True
    assert wait(lambda: len(sleeps.asked) == 3, bell, timeout=60)
    naps = sleeps.asked[1:] if why == "a ring" else sleeps.asked
    assert all(seconds <= NAP_S for seconds in naps)
    if why != "something under way":
        time.sleep(ALERT_S)
        assert wait(lambda: len(sleeps.asked) == 4, bell, timeout=60)
        assert sleeps.asked[-1] > NAP_S, "for a while only"


@pytest.mark.parametrize("usual", [0.001, 0.01, 0.09])
def test_a_usual_wait_is_slept_until_shortly_before(
    bell: Doorbell, monkeypatch: pytest.MonkeyPatch, usual: float
) -> None:
    sleeps = Sleeps(bell, monkeypatch)
    assert wait(lambda: len(sleeps.asked) == 2, bell, usual=usual)
    assert sleeps.asked[0] == 0 and 0 < sleeps.asked[1] < usual


@pytest.mark.parametrize("usual", [0.0, 0.0005, 0.5])
def test_no_early_sleep_where_it_is_of_no_use(bell: Doorbell, monkeypatch: pytest.MonkeyPatch, usual: float) -> None:
    sleeps = Sleeps(bell, monkeypatch)
    assert wait(lambda: sleeps.asked, bell, usual=usual)
    assert sleeps.asked == [SLEEP_S]


@pytest.mark.parametrize("when", ["before", "early"])
@pytest.mark.parametrize("late", [0.001, 0.005, 0.02])
def test_a_ring_ahead_of_its_frame_leads_to_no_long_sleep(
    bell: Doorbell, monkeypatch: pytest.MonkeyPatch, when: str, late: float
) -> None:
    """Whether it was there before the wait, or came in the early sleep: the frame may be some milliseconds late."""
    sleeps = Sleeps(bell, monkeypatch, when == "before", when == "early")
    woken = time.monotonic()
    assert wait(lambda: time.monotonic() > woken + late and len(sleeps.asked) > 3, bell, usual=0.01)
    assert len(sleeps.asked) > 3 and all(seconds <= NAP_S for seconds in sleeps.asked[2:])


def test_a_frame_of_which_parts_come_late(bell: Doorbell, pair: tuple[socket.socket, socket.socket]) -> None:
    """Each part wakes; the frame is there with the last one, and no long sleep lies between."""
    ours, theirs = pair
    ours.setblocking(False)
    bell.watch([ours.fileno()])
    parts = 40
    got = 0

    def ready() -> bool:
        nonlocal got
        with contextlib.suppress(BlockingIOError):
            got += len(ours.recv(1))
        return got == parts

    def send() -> None:
        for _ in range(parts):
            time.sleep(0.002)
            theirs.send(b"x")

    sender = threading.Thread(target=send)
    sender.start()
    asked: list[float] = []
    sleep = bell.sleep
    bell.sleep = lambda seconds: asked.append(seconds) or sleep(seconds)  # type: ignore[func-returns-value,method-assign]
    assert wait(ready, bell, timeout=60, usual=0.01)
    sender.join()
    assert bell.patience == SLEEP_S and not bell.sleep(0)
    assert all(seconds <= NAP_S for seconds in asked[4:])


@pytest.mark.parametrize("usual", [0.0, 0.01])
def test_a_wait_ends_at_its_timeout(bell: Doorbell, usual: float) -> None:
    assert 0.3 <= elapsed(lambda: wait(lambda: False, bell, timeout=0.3, usual=usual)) < 10
    assert not wait(lambda: False, bell, timeout=0, usual=usual)
    assert wait(lambda: True, bell, timeout=0, usual=usual)


def test_ready_is_not_called_again_once_it_was_true(bell: Doorbell) -> None:
    for usual in (0.0, 0.01):
        bell.ring()
        said = iter([False, False, True])
        assert wait(lambda: next(said), bell, usual=usual)  # noqa: B023
        with pytest.raises(StopIteration):
            next(said)


def test_an_idle_rank_takes_less_than_a_hundredth_of_a_core(bell: Doorbell) -> None:
    wait(lambda: False, bell, timeout=0.1)
    cpu, begun = time.process_time(), time.monotonic()
    assert not wait(lambda: False, bell, timeout=4)
    assert time.process_time() - cpu < 0.01 * (time.monotonic() - begun)


def test_a_frame_that_one_look_does_not_hand_over_is_found_without_a_sleep(bell: Doorbell) -> None:
    """MPI reads what has come when it is called, and delivers it at a later call: no descriptor tells of it then."""
    said = iter([False, False, False, True])
    assert wait(lambda: next(said), bell, timeout=0)


def test_every_sleep_is_preceded_by_several_looks(bell: Doorbell, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a nap too, when there is no time to spin."""
    sleeps, looks = Sleeps(bell, monkeypatch), [0]
    bell.alert()

    def ready() -> bool:
        looks[-1] += 1
        if len(looks) <= len(sleeps.asked):
            looks.append(1)
        return len(looks) > 60

    assert wait(ready, bell)
    assert min(looks[:-1]) >= 9
