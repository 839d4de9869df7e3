"""What waiting costs: the doorbell of ``doorbell.wait`` against the ways around it.

    python bench/wait.py [--rounds 3]

Two ranks, each on its own core, pass a frame of 3 KB back and forth. For every way: the processor time of a rank that
waits for 3 s (percent of a core), a hand-over when both are busy, and one to a rank that has slept for 20 ms, one way,
microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

WAYS = ("usual", "doorbell", "naps", "spin")
FRAME = 3072


def measure(way: str) -> dict[str, float]:
    """This rank's part; the figures on rank 0."""
    from mpgpt.transport import doorbell, mpi

    world = mpi.MPIWorld()
    if way != "usual":  # "usual" is what the ring does: wake up shortly before a message usually comes
        doorbell.USUAL_MOST_S = 0.0
    if way == "spin":
        doorbell.SPIN_S = 1e9
    if way == "naps":  # as where bells do not get through
        doorbell.SLEEP_S = world.bell.patience = doorbell.NAP_S
        doorbell.ring = lambda ringer: None
    there = world.connect(0, 1, FRAME) if world.rank in (0, 1) else None
    back = world.connect(1, 0, FRAME)
    assert there is not None
    first = world.rank == 0
    out, into = (there, back) if first else (back, there)

    def turn() -> None:
        if first:
            out.send(bytearray(FRAME))
            into.recv()
        else:
            into.recv()
            out.send(bytearray(FRAME))

    for _ in range(200):
        turn()
    busy = []
    for _ in range(2000):
        begun = time.perf_counter()
        turn()
        busy.append((time.perf_counter() - begun) / 2)
    cold = []
    for _ in range(60):
        if first:
            time.sleep(0.02)
        begun = time.perf_counter()
        turn()
        cold.append(time.perf_counter() - begun)
    idle = 0.0
    if first:
        time.sleep(3.0)
        out.send(bytearray(1))
    else:
        cpu, begun = time.process_time(), time.perf_counter()
        into.recv()
        idle = 100 * (time.process_time() - cpu) / (time.perf_counter() - begun)
    idle = max(json.loads(data) for data in world.gather(json.dumps(idle).encode()))
    there.close()
    back.close()
    world.close()
    # The answer of a cold turn finds rank 0 spinning: what is left is the way to a sleeper.
    figures = {"busy_us": statistics.median(busy), "cold_us": statistics.median(cold) - statistics.median(busy)}
    return {key: round(1e6 * value, 1) for key, value in figures.items()} | {"idle_percent": round(idle, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        figures = measure(options.way)
        if os.environ.get("OMPI_COMM_WORLD_RANK") == "0":
            print(json.dumps(figures))
        return
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp"}
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            command = [mpirun, "--bind-to", "core", "-n", "2", sys.executable, __file__, "--way", way]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
            rounds[way].append(json.loads(done.stdout))
    for way, results in rounds.items():
        for key in results[0]:
            values = [result[key] for result in results]
            print(
                f"{way:9} {key:13} median {statistics.median(values):8.2f}   {min(values):8.2f} to {max(values):8.2f}"
            )


if __name__ == "__main__":
    main()
