"""Links: the contract over each kind, the doorbell, and what waiting costs."""

from __future__ import annotations

import subprocess
import threading
import time

import pytest

from mpgpt.doorbell import NAP_S, SLEEP_S, Doorbell, wait
from mpgpt.link import QueueLink, SoloWorld
from mpgpt.mpi import nearest
from tests.launch import ENV, ROOT, mpirun
from tests.links import CASES


@pytest.mark.parametrize("name", CASES)
def test_queue_link_keeps_the_contract(name: str) -> None:
    world = SoloWorld()
    link = world.connect(0, 0, 0)
    source, target = CASES[name]
    source(link)
    target(link)
    world.close()


@pytest.mark.parametrize("ranks", [2, 3])
def test_mpi_link_keeps_the_contract(ranks: int) -> None:
    run = subprocess.run(
        mpirun(ranks, "-m", "tests.mpi.contract"),
        env=ENV,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert [line.removeprefix("kept: ") for line in run.stdout.splitlines()] == list(CASES)


def test_a_solo_world_is_a_world_of_one() -> None:
    world = SoloWorld()
    assert world.gather(b"x") == [b"x"] and world.broadcast(b"y") == b"y"
    assert (world.rank, world.size, len(world.hosts)) == (0, 1, 1)
    world.close()


def test_a_bell_wakes_a_sleeper_from_another_thread() -> None:
    bell = Doorbell()
    threading.Timer(0.2, bell.ring).start()
    begun = time.monotonic()
    assert bell.sleep(30)
    assert 0.1 < time.monotonic() - begun < 5
    assert not bell.sleep(0), "all rings are heard at once"
    bell.close()


def test_a_bell_reaches_a_queue_link_across_threads() -> None:
    bell = Doorbell()
    link = QueueLink(bell)
    threading.Timer(0.3, lambda: link.send(bytearray(b"late"))).start()
    got = link.recv()
    assert got is not None and bytes(got) == b"late"
    assert bell.patience == SLEEP_S
    bell.close()


def test_without_bells_a_rank_naps_instead() -> None:
    """What comes unannounced is found within a long sleep once, and within a nap from then on."""
    bell = Doorbell()
    ready: list[int] = []
    threading.Timer(0.1, lambda: ready.append(1)).start()
    assert wait(lambda: ready, bell)
    assert bell.patience == NAP_S
    bell.ring()
    assert not wait(lambda: False, bell, timeout=0.05)
    assert bell.patience == SLEEP_S, "a bell is heard again"
    bell.close()


def test_waiting_costs_next_to_nothing() -> None:
    bell = Doorbell()
    cpu, begun = time.process_time(), time.monotonic()
    assert not wait(lambda: False, bell, timeout=3)
    assert time.monotonic() - begun >= 3
    assert time.process_time() - cpu < 0.03 * 3
    bell.close()


@pytest.mark.parametrize(
    ("theirs", "ours", "best"),
    [
        (["10.0.0.2/24"], ["10.0.0.1/24"], ["10.0.0.2"]),
        (["192.168.1.5/24", "10.0.0.2/24"], ["10.0.0.1/24"], ["10.0.0.2", "192.168.1.5"]),
        (["172.17.0.1/16", "10.0.0.2/24"], ["172.17.0.1/16", "10.0.0.1/24"], ["10.0.0.2"]),
        (["192.168.1.5/24"], ["10.0.0.1/24"], ["192.168.1.5"]),
        ([], ["10.0.0.1/24"], []),
    ],
)
def test_the_nearest_address_is_first(theirs: list[str], ours: list[str], best: list[str]) -> None:
    assert nearest(theirs, ours) == best
