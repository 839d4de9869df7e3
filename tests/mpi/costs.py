"""A ring that reports what it costs: memory to load and run a model, processor time to wait for ten seconds.

Run under mpirun with a model folder; rank 0 prints a line of JSON.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
import time
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F

from mpgpt.cluster.bootstrap import negotiate
from mpgpt.cluster.ring import Ring
from mpgpt.cluster.ring_config import RingOptions
from mpgpt.config import parse_layers
from mpgpt.core import Request
from mpgpt.engine.engine import IdsOnly
from mpgpt.model.linear import Kernels
from mpgpt.transport.mpi import MPIWorld

IDLE_S = 10.0
STANDARD = "0-4,5-9,10-11"
"""The layers of hostfiles/standard.yaml."""


def peak() -> int:
    """The most memory this process ever had, bytes."""
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def touch_libraries() -> None:
    """The rest of importing: a library's code comes into memory when it is first called, some 14 MB of it."""
    x = torch.ones(1, 2, 4, 64)
    with torch.inference_mode():
        Kernels(dtype="float32").linear([torch.ones(64, 64)], None, 64, 64)(x[0, 0])
        F.gelu(F.layer_norm(F.scaled_dot_product_attention(x, x, x), (64,)) @ torch.ones(64, 4))


def main() -> None:
    world = MPIWorld()
    touch_libraries()
    before = psutil.Process().memory_info().rss
    folder = Path(sys.argv[1])
    options = RingOptions(dtype="float32", slots=2, context=256, threads=1, spans=lambda config: parse_layers(STANDARD))
    settings = negotiate(world, folder, options)
    ring = Ring(world, settings, folder)
    cpu = idle(ring)
    report = {"grown": peak() - before, "cpu": cpu}
    reports = [json.loads(data) for data in world.gather(json.dumps(report).encode())]
    if world.rank == 0:
        slices = [{"slice": rank.slice_bytes, "kv": rank.kv_bytes} for rank in ring.reports]
        print(json.dumps([one | slice for one, slice in zip(reports, slices, strict=True)]))
    world.close()


def idle(ring: Ring) -> float:
    """Some work, ten seconds of nothing, the end; the processor seconds that the nothing took on this rank."""
    spent: list[float] = []

    def watch() -> None:
        time.sleep(4)  # the work is over by then on every rank, or the seconds below say so
        begun = time.process_time()
        time.sleep(IDLE_S)
        spent.append(time.process_time() - begun)

    watcher = threading.Thread(target=watch)
    if ring.world.rank:
        watcher.start()
        ring.serve()
    else:
        engine = ring.engine()
        for n in range(3):
            request = Request(ids=tuple(range(n, n + 150)), max_new_tokens=8)
            engine.submit(request, IdsOnly(), lambda stream, piece: None)
        engine.drain()
        watcher.start()
        threading.Timer(IDLE_S + 6, engine.close).start()
        engine.run()
        engine.stop()
    watcher.join()
    return spent[0]


if __name__ == "__main__":
    main()
