"""How near `mpgpt simulate` is to real rings: GPT-2 124M with random weights on 1, 2 and 3 ranks of this machine.

    python bench/simulated.py [--rounds 3] [--ranks 1,2,3]

In each run of mpirun the ranks and links are measured, the layers placed or shared evenly, and the same requests are
served by the ring and by the simulation of it. One thread a rank; more ranks than cores share them. Printed are tokens
a second while all decode, tokens a second with prompts, and seconds to the first token, both ways, and how far the
simulation is off (aim: within 15%); medians over the rounds.

Knows: rings, the simulation. Must not know: how either works.
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
from typing import Any

from even_split import divide
from mpgpt.bench.measure import TokenTimes
from mpgpt.cluster.bootstrap import negotiate, probe_cluster
from mpgpt.cluster.ring import Ring
from mpgpt.cluster.ring_config import RingOptions
from mpgpt.core import Request
from mpgpt.engine.engine import IdsOnly
from mpgpt.machines import Workload
from mpgpt.model.linear import Kernels
from mpgpt.model.weights import model_config
from mpgpt.placement.simulator import Traffic, run
from mpgpt.transport.mpi import MPIWorld
from ring import FOLDER, make_model, prompt

CONTEXT = 512
WORKS = (
    Workload(sequences=1, prompt_tokens=64, new_tokens=64),
    Workload(sequences=8, prompt_tokens=64, new_tokens=64),
    Workload(sequences=8, prompt_tokens=256, new_tokens=64),
)
FIGURES = ("decode tokens/s", "tokens/s with prompts", "first token, s")


def real(ring: Ring, engine: Any, work: Workload) -> list[float]:
    """What the ring does."""
    texts = [TokenTimes() for _ in range(work.sequences)]
    begun = time.perf_counter()
    streams = [
        engine.submit(
            Request(ids=prompt(work.prompt_tokens, n), max_new_tokens=work.new_tokens), text, lambda stream, piece: None
        )
        for n, text in enumerate(texts)
    ]
    engine.drain()
    ended = time.perf_counter()
    first, last = max(text.at[0] for text in texts), min(text.at[-1] for text in texts)
    decoded = sum(first < at <= last for text in texts for at in text.at)
    total = work.sequences * (work.prompt_tokens + work.new_tokens)
    ttft = statistics.median(stream.ttft_s or 0.0 for stream in streams)
    return [decoded / (last - first) if last > first else 0.0, total / (ended - begun), ttft]


def measure_rank() -> None:
    """What every rank does; rank 0 prints a line of JSON."""
    world = MPIWorld()
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[world.rank % len(cores)]} if world.size <= len(cores) else cores)
    slots = max(work.sequences for work in WORKS)
    config = model_config(FOLDER)
    profile = probe_cluster(world, config, Kernels(dtype="float32"), slots=slots, context=CONTEXT, threads=1)
    spans = divide(config.layers, world.size)
    options = RingOptions(dtype="float32", slots=slots, context=CONTEXT, threads=1, spans=lambda config: spans)
    settings = negotiate(world, FOLDER, options)
    ring = Ring(world, settings, FOLDER)
    if world.rank:
        ring.serve()
        world.close()
        return
    engine = ring.engine()
    engine.submit(Request(ids=prompt(64, 0), max_new_tokens=8), IdsOnly(), lambda stream, piece: None)
    engine.drain()
    found = []
    for work in WORKS:
        ours = real(ring, engine, work)
        simulated = run(spans, profile, Traffic(workload=work), slots=slots, context=CONTEXT)
        rates = [simulated.decode_tokens_per_s or 0.0, simulated.tokens_per_s]
        found.append([ours, [*rates, simulated.ttft_s[0]]])
    engine.stop()
    print(json.dumps(found))
    world.close()


def start(ranks: int) -> list[list[list[float]]]:
    """One mpirun of this file."""
    mpirun = shutil.which("mpirun", path=os.path.dirname(sys.executable)) or "mpirun"
    command = [mpirun, "--bind-to", "none", "-n", str(ranks), sys.executable, __file__, "--rank"]
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp"}
    env |= {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    done = subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True, timeout=600
    )
    result: list[list[list[float]]] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", default="1,2,3")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.rank:
        measure_rank()
        return
    make_model()
    counts = [int(count) for count in options.ranks.split(",")]
    rounds = [{count: start(count) for count in counts} for _ in range(options.rounds)]
    print("| ranks | sequences | prompt + new | figure | ring | simulated | off |\n|---|---|---|---|---|---|---|")
    for count in counts:
        for at, work in enumerate(WORKS):
            for which, name in enumerate(FIGURES):
                pairs = [(r[count][at][0][which], r[count][at][1][which]) for r in rounds]
                ours, simulated = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
                off = statistics.median(b / a - 1 for a, b in pairs if a and b) if ours and simulated else 0.0
                sizes = f"{work.prompt_tokens} + {work.new_tokens}"
                print(f"| {count} | {work.sequences} | {sizes} | {name} | {ours:.3g} | {simulated:.3g} | {off:+.0%} |")


if __name__ == "__main__":
    main()
