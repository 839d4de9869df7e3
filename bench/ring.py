"""What a second rank gives: GPT-2 124M with random weights, float32, one thread a rank, each on its own core.

    python bench/ring.py [--rounds 5] [--transformers]

Starts mpirun on one rank and on two (and transformers' ``generate`` on the same weights, thread and core) in
turn, several rounds, and prints the medians and the ratios, each ratio taken within a round.

Knows: how to start ranks and time an engine. Must not know: how a ring is formed or run.
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
from typing import Any

FOLDER = Path(__file__).parent / "out" / "gpt2-random"
PROMPT = 768
NEW = 64


def make_model() -> None:
    """GPT-2 124M as transformers initialises it, from a fixed seed."""
    if (FOLDER / "config.json").exists():
        return
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config())
    model.save_pretrained(FOLDER)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    return tuple((7919 * (seed + 1) * (i + 1)) % 50257 for i in range(length))


def measure_transformers() -> dict[str, float]:
    """One sequence by ``generate``: tokens/s of decoding."""
    import torch
    from transformers import GPT2LMHeadModel

    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    model: Any = GPT2LMHeadModel.from_pretrained(FOLDER)
    ids = torch.tensor([prompt(16, 0)])

    def timed(new: int) -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=50256)
        return time.perf_counter() - begun

    timed(4)
    return {"one": (NEW - 1) / (timed(NEW) - timed(1))}


def measure_ring(layers: str) -> dict[str, float] | None:
    """Decoding tokens/s of 1 and more sequences, and seconds to the first token of a long prompt; on rank 0."""
    from mpgpt.cluster.bootstrap import negotiate
    from mpgpt.cluster.ring import Ring
    from mpgpt.cluster.ring_config import RingOptions
    from mpgpt.config import parse_layers
    from mpgpt.core import Request
    from mpgpt.engine.engine import IdsOnly
    from mpgpt.transport.mpi import MPIWorld

    world = MPIWorld()
    options = RingOptions(
        dtype="float32",
        slots=64,
        context=1024,
        threads=1,
        spans=lambda config: parse_layers(layers) if layers else None,
    )
    settings = negotiate(world, FOLDER, options)
    ring = Ring(world, settings, FOLDER)
    if world.rank:
        ring.serve()
        world.close()
        return None
    engine = ring.engine()

    def decode(sequences: int, length: int = 16, new: int = NEW) -> tuple[float, float]:
        """(tokens/s from when all decode until the first is done, tokens/s of prompts and all)."""
        requests = [Request(ids=prompt(length, i), max_new_tokens=new) for i in range(sequences)]
        begun = time.perf_counter()
        streams = [engine.submit(request, IdsOnly(), lambda stream, piece: None) for request in requests]
        while not all(stream.ids for stream in streams):
            engine.step()
        before, at = sum(len(stream.ids) for stream in streams), time.perf_counter()
        while not any(stream.finish_reason for stream in streams):
            engine.step()
        speed = (sum(len(stream.ids) for stream in streams) - before) / (time.perf_counter() - at)
        engine.drain()
        return speed, sequences * (length + new) / (time.perf_counter() - begun)

    def first(length: int) -> float:
        stream = engine.submit(Request(ids=prompt(length, 0), max_new_tokens=1), IdsOnly(), lambda s, piece: None)
        engine.drain()
        return stream.ttft_s or 0.0

    decode(2)
    results = {
        "one": decode(1)[0],
        "eight": decode(8)[0],
        "thirty_two": decode(32)[0],
        "sixty_four": decode(64)[0],
        "first_token": first(PROMPT),
        "requests": decode(8, 512, 32)[1],
    }
    engine.stop()
    world.close()
    return results


def run(ranks: int, layers: str = "") -> dict[str, float]:
    """One mpirun of this file, bound to cores."""
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    command = [
        mpirun, "--bind-to", "core", "--map-by", "core", "-n", str(ranks), sys.executable, __file__, "--rank",
        f"--layers={layers}",
    ]  # fmt: skip
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp"}
    return last_line(command, env)


def last_line(command: list[str], env: dict[str, str] | None = None) -> dict[str, float]:
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True, timeout=600)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def ratio(rounds: list[dict[str, dict[str, float]]], a: str, b: str, key: str) -> str:
    each = [r[a][key] / r[b][key] for r in rounds]
    return f"{statistics.median(each):.3f}  (rounds {min(each):.3f} to {max(each):.3f})"


def report(rounds: list[dict[str, dict[str, float]]], transformers: bool) -> None:
    for name in rounds[0]:
        for key in rounds[0][name]:
            values = [r[name][key] for r in rounds]
            print(
                f"{name:14} {key:12} median {statistics.median(values):9.3f}  {min(values):9.3f} to {max(values):9.3f}"
            )
    for other in [name for name in rounds[0] if name.startswith("2 ranks")]:
        for key in rounds[0][other]:
            print(f"{other} / 1 rank, {key}: {ratio(rounds, other, '1 rank', key)}")
    if transformers:
        print(f"1 rank / transformers, one: {ratio(rounds, '1 rank', 'transformers', 'one')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--splits", default=",0-8/9-11", help="splits for two ranks, between commas; empty is auto")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--layers", default="", help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.rank or options.peer:
        result = measure_transformers() if options.peer else measure_ring(options.layers)
        if result:
            print(json.dumps(result))
        return
    make_model()
    rounds = []
    for n in range(options.rounds):
        one = {"1 rank": run(1)}
        for split in options.splits.split(","):
            one[f"2 ranks {split or 'auto'}"] = run(2, split.replace("/", ","))
        if options.transformers:
            one["transformers"] = last_line([sys.executable, __file__, "--peer"])
        rounds.append(one)
        print(f"round {n + 1} of {options.rounds}: {json.dumps(one)}", file=sys.stderr)
    report(rounds, options.transformers)


if __name__ == "__main__":
    main()
