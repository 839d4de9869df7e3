"""Links: the contract over each kind."""

from __future__ import annotations

import subprocess

import pytest

from mpgpt.transport.addresses import named_apart, nearest
from mpgpt.transport.link import SoloWorld
from tests.support.launch import ENV, ROOT, mpirun
from tests.support.links import CASES


@pytest.mark.parametrize("name", CASES)
def test_queue_link_keeps_the_contract(name: str) -> None:
    world = SoloWorld()
    link = world.connect(0, 0, 0)
    source, target = CASES[name]
    source(link)
    target(link)
    world.close()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("transport", ["shared memory", "sockets", "sockets alone"])
def test_mpi_link_keeps_the_contract(ranks: int, transport: str) -> None:
    """Through shared memory; through sockets with doorbells; and as between hosts, where nobody rings."""
    btl = "self,sm" if transport == "shared memory" else "self,tcp"
    alone = ["--sockets"] if transport == "sockets alone" else []
    for _ in range(2):
        run = subprocess.run(
            mpirun(ranks, "-m", "tests.mpi.contract", *alone), cwd=ROOT, capture_output=True, text=True, timeout=120,
            env=ENV | {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": btl}, check=False,
        )  # fmt: skip
        if "found without being woken" not in run.stderr:
            break  # on a busy machine a frame may come just as a sleep ends; where nothing wakes ranks, twice
    assert run.returncode == 0, run.stderr
    assert [line.removeprefix("kept: ") for line in run.stdout.splitlines()] == list(CASES)


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
