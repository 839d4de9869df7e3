"""The Link contract over MPI: run under mpirun on two ranks or more; the last rank receives from the first.

With ``--sockets`` no rank rings another's doorbell, as if each were on a host of its own: MPI's own connections must
wake them.
"""

from __future__ import annotations

import sys

from mpgpt.transport.mpi import MPIWorld
from tests.support.links import CAPACITY, CASES


def main() -> None:
    world = MPIWorld()
    last = world.size - 1
    assert world.broadcast(b"zero" if world.rank == 0 else b"") == b"zero"
    said = [f"rank {rank}".encode() * rank for rank in range(world.size)]
    assert world.gather(said[world.rank]) == said
    assert len(world.hosts) == world.size
    missed: list[str] = []
    if "--sockets" in sys.argv:
        world.ringers = {world.rank: world.ringers[world.rank]}
        world.bell.missed = lambda: missed.append(name)
    link = world.connect(0, last, CAPACITY) if world.rank in (0, last) else None
    for name, (source, target) in CASES.items():
        if link:
            (source if world.rank == 0 else target)(link)
            if "--sockets" in sys.argv and world.rank:
                assert world.bell.watched or "closed" in name, "MPI's connection is not watched"
                unwoken = [case for case in missed if "called away" not in case]  # there a clock calls, not a bell
                assert len(unwoken) < 2, f"found without being woken: {unwoken}"
        world.gather(b"")
        if world.rank == 0:
            print("kept:", name, flush=True)
    world.close()


if __name__ == "__main__":
    main()
