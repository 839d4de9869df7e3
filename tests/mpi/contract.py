"""The Link contract over MPI: run under mpirun on two ranks or more; the last rank receives from the first."""

from __future__ import annotations

from mpgpt.mpi import MPIWorld
from tests.links import CAPACITY, CASES


def main() -> None:
    world = MPIWorld()
    last = world.size - 1
    assert world.broadcast(b"zero" if world.rank == 0 else b"") == b"zero"
    said = [f"rank {rank}".encode() * rank for rank in range(world.size)]
    assert world.gather(said[world.rank]) == said
    assert len(world.hosts) == world.size
    link = world.connect(0, last, CAPACITY) if world.rank in (0, last) else None
    for name, (source, target) in CASES.items():
        if link:
            (source if world.rank == 0 else target)(link)
        world.gather(b"")
        if world.rank == 0:
            print("kept:", name, flush=True)
    world.close()


if __name__ == "__main__":
    main()
