"""Whether measured placement keeps its promise: two ranks, one of which has a third of its core.

    python bench/placement.py [--rounds 5] [--objective throughput]

Each rank is pinned to a core of its own, and the second rank has a quota of a third of its core, dealt out every 3 ms
(Linux control groups, version 1, as root). In one run of mpirun the ranks are measured and the layers placed; then the
even split and the chosen spans run in turn. Printed are the factors by which the chosen spans beat the even split,
each taken within a round, beside what the plan predicts for them (aim: within 15%).

Knows: how to slow a rank and time an engine. Must not know: how ranks are measured or layers placed.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from even_split import divide
from mpgpt.cluster.bootstrap import negotiate, probe_cluster
from mpgpt.cluster.ring import Ring
from mpgpt.cluster.ring_config import RingConfig, RingOptions
from mpgpt.core import Request, Span
from mpgpt.engine.engine import Engine, IdsOnly, Stream
from mpgpt.machines import Workload
from mpgpt.model.linear import Kernels
from mpgpt.model.weights import model_config
from mpgpt.placement.plan import Objective, place, predict
from mpgpt.transport.mpi import MPIWorld
from ring import FOLDER, make_model, prompt

WORK = Workload(sequences=8, prompt_tokens=128, new_tokens=64)
GROUP = Path("/sys/fs/cgroup/cpu/mpgpt-bench")
REQUESTS = 4
"""Requests for each of the workload's sequences."""


@contextmanager
def quota() -> Iterator[None]:
    """A control group whose processes together have a third of a core."""
    GROUP.mkdir(exist_ok=True)
    (GROUP / "cpu.cfs_period_us").write_text("3000")
    (GROUP / "cpu.cfs_quota_us").write_text("1000")
    try:
        yield
    finally:
        GROUP.rmdir()


def request(n: int) -> Request:
    return Request(ids=prompt(WORK.prompt_tokens, n), max_new_tokens=WORK.new_tokens)


def alone(engine: Engine) -> float:
    """Tokens a second of one sequence once its prompt is through."""
    stream = engine.submit(request(0), IdsOnly(), lambda stream, piece: None)
    engine.drain()
    return (len(stream.ids) - 1) / (stream.seconds - (stream.ttft_s or 0.0))


def whole(engine: Engine) -> float:
    """New tokens a second, prompts included, where a request that is done is followed by the next at once: from the
    end of the first ``sequences`` of them to that of the last that has as many beside it."""
    ends: list[float] = []

    def on_event(stream: Stream, piece: str) -> None:
        if stream.finish_reason:
            ends.append(time.perf_counter())

    for n in range(REQUESTS * WORK.sequences):
        engine.submit(request(n), IdsOnly(), on_event)
    engine.drain()
    first, last = WORK.sequences - 1, (REQUESTS - 1) * WORK.sequences - 1
    return (last - first) * WORK.new_tokens / (ends[last] - ends[first])


def run_spans(world: MPIWorld, settings: RingConfig, spans: Sequence[Span | None]) -> dict[str, float] | None:
    """Tokens/s of one sequence and of many with these spans; on rank 0."""
    pairs = [(span.start, span.stop) if span else None for span in spans]
    ring = Ring(world, replace(settings, spans=pairs), FOLDER)
    if world.rank:
        ring.serve()
        return None
    engine = ring.engine()
    alone(engine)
    result = {"one": alone(engine), "whole": whole(engine)}
    engine.stop()
    return result


def measure_rank(rounds: int, objective: Objective) -> None:
    """What every rank does: be measured, then run both splits in turn; rank 0 prints a line of JSON."""
    world = MPIWorld()
    os.sched_setaffinity(0, {world.rank})
    if world.rank == 1:
        (GROUP / "cgroup.procs").write_text(str(os.getpid()))
    kernels = Kernels(dtype="float32")
    profile = probe_cluster(world, model_config(FOLDER), kernels, slots=WORK.sequences, context=256, threads=1)
    options = RingOptions(
        dtype="float32",
        slots=WORK.sequences,
        context=256,
        threads=1,
        spans=lambda config: divide(config.layers, world.size),
    )
    settings = negotiate(world, FOLDER, options)
    splits: dict[str, Sequence[Span | None]] = {"even": divide(profile.shape.layers, world.size)}
    plan = place(profile, WORK, objective)
    # The plan is rank 0's, whatever another rank's arithmetic says.
    pairs = json.loads(world.broadcast(json.dumps([s and [s.start, s.stop] for s in plan.spans]).encode()))
    splits["chosen"] = [pair and Span(start=pair[0], stop=pair[1]) for pair in pairs]
    predicted = {name: predict(spans, profile, WORK, objective) for name, spans in splits.items()}
    measured = [{name: run_spans(world, settings, spans) for name, spans in splits.items()} for _ in range(rounds)]
    if world.rank == 0:
        result = {
            "spans": {name: [str(span or "-") for span in spans] for name, spans in splits.items()},
            "predicted": {name: {"one": p.single_rate, "whole": p.overall_rate} for name, p in predicted.items()},
            "measured": measured,
        }
        print(json.dumps(result))
    world.close()


def start(options: Any) -> dict[str, Any]:
    """One mpirun of this file."""
    mpirun = shutil.which("mpirun", path=os.path.dirname(sys.executable)) or "mpirun"
    command = [
        mpirun, "--bind-to", "none", "-n", "2", sys.executable, __file__, "--rank", "--rounds", str(options.rounds),
        "--objective", options.objective,
    ]  # fmt: skip
    env = os.environ | {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    env |= {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": "self,sm,tcp"}
    with quota():
        done = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, check=True, timeout=900
        )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def report(result: dict[str, Any]) -> None:
    for name, spans in result["spans"].items():
        print(f"{name:7} layers {' | '.join(spans)}")
    for key in ("one", "whole"):
        for name in result["spans"]:
            values = [round_[name][key] for round_ in result["measured"]]
            print(
                f"{key:5} {name:7} measured {statistics.median(values):7.1f} tokens/s "
                f"({min(values):.1f} to {max(values):.1f}), predicted {result['predicted'][name][key]:7.1f}"
            )
        factors = [round_["chosen"][key] / round_["even"][key] for round_ in result["measured"]]
        found = statistics.median(factors)
        predicted = result["predicted"]["chosen"][key] / result["predicted"]["even"][key]
        print(
            f"{key:5} chosen / even: measured {found:.2f} ({min(factors):.2f} to {max(factors):.2f}), "
            f"predicted {predicted:.2f}: off by {100 * abs(predicted / found - 1):.0f}%"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--objective", default="throughput", choices=["throughput", "latency"])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.rank:
        measure_rank(options.rounds, options.objective)
        return
    make_model()
    report(start(options))


if __name__ == "__main__":
    main()
