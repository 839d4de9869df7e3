"""One rank of a preflight: it meets the others as in a run, and rank 0 prints what the links between them give.

Knows: MPI's ranks, frames to and fro, JSON on standard output.
Must not know: hosts' names in a hostfile, models, what is made of the figures.
"""

from __future__ import annotations

import json
import sys

from mpgpt.cluster.link_probe import measure_links
from mpgpt.errors import MpgptError
from mpgpt.transport.mpi import MPIWorld

LARGE = 1 << 20
"""A frame that is long enough to measure the bandwidth, bytes."""


def main() -> None:
    """Exit status 0, or 1 with a sentence of rank 0."""
    world: MPIWorld | None = None
    try:
        world = MPIWorld()
        links = measure_links(world, LARGE)
    except MpgptError as error:
        if world is None or world.rank == 0:
            print(f"mpgpt: {error}", file=sys.stderr, flush=True)
        if world is not None:
            world.abort(1)
        sys.exit(1)
    if world.rank == 0:
        edges = [[a, b, edge.latency_s, edge.bytes_per_s] for (a, b), edge in links.items()]
        print(json.dumps({"hosts": world.hosts, "edges": edges}), flush=True)
    world.close()


if __name__ == "__main__":
    main()
