"""A decoding step of the whole model on one core, by number of rows; alone, and with the same on another core.

    python bench/steps.py

What bounds a pipeline: with R ranks, n sequences go round in R steps of n / R rows, each of which reads every weight.
GPT-2 124M with random weights, float32; milliseconds, medians. Needs two cores.

Knows: the model's blocks. Must not know: links, schedulers.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

import torch

from mpgpt.core import Row, Span
from mpgpt.model.linear import Kernels
from mpgpt.model.slice import Slice
from mpgpt.model.weights import Checkpoint, model_config
from ring import FOLDER, make_model

ROWS = (1, 2, 4, 8, 16, 32)


def measure(core: int) -> None:
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    config = model_config(FOLDER)
    everything = Span(start=0, stop=config.layers)
    model = Slice(
        config, everything, Checkpoint(FOLDER), slots=max(ROWS), context=256, kernels=Kernels(dtype="float32")
    )
    print(" ".join(f"{rows:2} rows {1000 * step(model, rows):6.1f}" for rows in ROWS), flush=True)


@torch.inference_mode()
def step(model: Slice, count: int) -> float:
    times = []
    for position in range(64, 84):
        rows = [Row(slot=slot, start=position, ids=(7,), outputs=1) for slot in range(count)]
        begun = time.perf_counter()
        model.forward(rows, model.embed(rows)).argmax(-1)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("core", nargs="?", type=int, help=argparse.SUPPRESS)
    if (core := parser.parse_args().core) is not None:
        measure(core)
        return
    make_model()
    for cores in ((1,), (0, 1)):
        print(f"on {len(cores)} of the cores at once:", flush=True)
        started = [subprocess.Popen([sys.executable, __file__, str(core)]) for core in cores]
        for process in started:
            process.wait()


if __name__ == "__main__":
    main()
