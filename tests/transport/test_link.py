"""Links: the contract inside one process (`tests/mpi/test_link.py` has MPI's), and addresses."""

from __future__ import annotations

import pytest

from mpgpt.transport.addresses import named_apart, nearest
from mpgpt.transport.link import SoloWorld
from tests.support.links import CASES


@pytest.mark.parametrize("name", CASES)
def test_queue_link_keeps_the_contract(name: str) -> None:
    world = SoloWorld()
    link = world.connect(0, 0, 0)
    source, target = CASES[name]
    source(link)
    target(link)
    world.close()


def test_a_solo_world_is_a_world_of_one() -> None:
    world = SoloWorld()
    assert world.gather(b"x") == [b"x"] and world.broadcast(b"y") == b"y"
    assert (world.rank, world.size, len(world.hosts)) == (0, 1, 1)
    world.close()


@pytest.mark.parametrize(
    ("theirs", "ours", "best"),
    [
        (["10.0.0.2/24"], ["10.0.0.1/24"], ["10.0.0.2"]),
        (["192.168.1.5/24", "10.0.0.2/24"], ["10.0.0.1/24"], ["10.0.0.2", "192.168.1.5"]),
        (["172.17.0.1/16", "10.0.0.2/24"], ["172.17.0.1/16", "10.0.0.1/24"], ["10.0.0.2"]),
        (["192.168.1.5/24"], ["10.0.0.1/24"], ["192.168.1.5"]),
        (["172.17.0.1/16"], ["172.17.0.1/16"], ["172.17.0.1"]),
        (["fd00::2/64", "2001:db8::2/64"], ["2001:db8::1/64"], ["2001:db8::2", "fd00::2"]),
        (["192.168.1.5/24", "fd00::2/64"], ["10.0.0.1/24", "fd00::1/64"], ["fd00::2", "192.168.1.5"]),
        (["fd00::2/64"], ["10.0.0.1/24"], ["fd00::2"]),
        ([], ["10.0.0.1/24"], []),
    ],
)
def test_the_nearest_address_is_first(theirs: list[str], ours: list[str], best: list[str]) -> None:
    assert nearest(theirs, ours) == best


@pytest.mark.parametrize(
    ("hosts", "homes", "names"),
    [
        (["a", "b", "a"], [0, 1, 0], ["a", "b", "a"]),
        (["pi", "pi", "pi"], [0, 1, 0], ["pi", "pi (rank 1)", "pi"]),
        (["mini", "pi", "pi", "pi", "pi"], [0, 1, 2, 1, 2], ["mini", "pi", "pi (rank 2)", "pi", "pi (rank 2)"]),
        (["pi"] * 3, [0, 1, 2], ["pi", "pi (rank 1)", "pi (rank 2)"]),
    ],
)
def test_hosts_of_one_name_are_told_apart(hosts: list[str], homes: list[int], names: list[str]) -> None:
    assert named_apart(hosts, homes) == names
