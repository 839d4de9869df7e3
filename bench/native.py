"""The compiled kernels against torch's and against llama.cpp: one core, one process, in turn, several rounds.

    python bench/native.py [--model NAME] [--dtypes float32,int8] [--llama-bin DIR] [--rounds 3]

Decoding: a step of 1, 8 and 16 sequences behind 128 positions each; prompt: 512 tokens, in our chunks of 96. Tokens a
second, the median over rounds, and the ratio to each of the others; GB/s are bytes of weights x steps a second.
llama.cpp runs the same weights in the type of equal bits (Q8_0, Q4_0) by `llama-batched-bench`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mpgpt.bench.gguf_export import gguf_file
from mpgpt.bench.measure import read_bandwidth
from mpgpt.core import Row, Span
from mpgpt.engine.scheduler import CHUNK
from mpgpt.model.autotune import TORCH, tune
from mpgpt.model.kernel_timings import processor_name
from mpgpt.model.linear import NATIVE, Kernels
from mpgpt.model.pull import find, model_home
from mpgpt.model.slice import Slice, weights_of
from mpgpt.model.weights import Checkpoint, lean_heap, model_config

ROWS = (1, 8, 16)
BEFORE, NEW, PROMPT = 128, 16, 512


@torch.inference_mode()
def ours(folder: Path, kernels: Kernels) -> tuple[dict[str, float], int]:
    """Tokens a second by number of sequences, and of a prompt; the bytes of weights."""
    config = model_config(folder)
    with lean_heap():
        model = Slice(
            config, Span(start=0, stop=config.layers), Checkpoint(folder), slots=max(ROWS), context=PROMPT + CHUNK,
            kernels=kernels,
        )  # fmt: skip
    ids = tuple(range(7, 7 + BEFORE))

    def step(rows: Sequence[Row]) -> None:
        model.forward(rows, model.embed(rows))

    for slot in range(max(ROWS)):
        step([Row(slot=slot, start=0, ids=ids[:CHUNK], outputs=0)])
        step([Row(slot=slot, start=CHUNK, ids=ids[CHUNK:], outputs=0)])
    speeds = {}
    for count in ROWS:
        times = []
        for position in range(BEFORE, BEFORE + NEW + 2):
            begun = time.perf_counter()
            step([Row(slot=slot, start=position, ids=(7,), outputs=1) for slot in range(count)])
            times.append(time.perf_counter() - begun)
        speeds[str(count)] = count * NEW / sum(times[2:])
    begun = time.perf_counter()
    for start in range(0, PROMPT, CHUNK):
        part = min(CHUNK, PROMPT - start)
        step([Row(slot=0, start=start, ids=(7,) * part, outputs=int(start + part == PROMPT))])
    return speeds | {"prompt": PROMPT / (time.perf_counter() - begun)}, model.nbytes


def llama(program: Path, file: Path) -> dict[str, float]:
    """The same of llama.cpp."""

    def run(prompt: int, new: int, parallel: str) -> list[dict[str, float]]:
        sizes = ["-c", "4096", "-npp", str(prompt), "-ntg", str(new), "-npl", parallel]
        command: list[str | Path] = [program, "-m", file, "-t", "1", "-ngl", "0", *sizes, "--output-format", "jsonl"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    decoded = run(BEFORE, NEW, ",".join(map(str, ROWS)))
    return {str(one["pl"]): one["speed_tg"] for one in decoded} | {"prompt": run(PROMPT, 1, "1")[0]["speed_pp"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="a name or a folder")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16,int8,int4")
    parser.add_argument("--llama-bin", type=Path, help="the folder of llama-batched-bench")
    parser.add_argument("--no-torch", action="store_true", help="leave torch's kernels out")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0)
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
    torch.set_num_threads(1)
    folder = find(options.model, model_home()) or Path(options.model)
    print(f"{options.model}, one core of {processor_name()}; reads {read_bandwidth()[0]:.1f} GB/s", flush=True)
    for dtype in options.dtypes.split(","):
        compare(folder, dtype, options)


def compare(folder: Path, dtype: str, options: argparse.Namespace) -> None:
    """One dtype's lines."""
    players = {NATIVE: Kernels(dtype=dtype, chosen={"": NATIVE})}
    if not options.no_torch:
        players["torch"], _ = tune(dtype, weights_of(model_config(folder)), pinned=TORCH)
    found: dict[str, list[dict[str, float]]] = {}
    nbytes = 0
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(options.rounds):
            for name, kernels in players.items():
                speeds, size = ours(folder, kernels)
                found.setdefault(name, []).append(speeds)
                nbytes = size if name == NATIVE else nbytes
            if options.llama_bin:
                file = gguf_file(folder, dtype, Path(scratch))
                found.setdefault("llama.cpp", []).append(llama(options.llama_bin / "llama-batched-bench", file))
    mean = {name: {key: statistics.median(one[key] for one in runs) for key in runs[0]} for name, runs in found.items()}
    bandwidth = max(one["1"] for one in found[NATIVE]) * nbytes / 1e9
    for key in (*map(str, ROWS), "prompt"):
        words = [f"{name} {speeds[key]:7.1f}" for name, speeds in mean.items()]
        words += [f"x {mean[NATIVE][key] / mean[name][key]:.2f} of {name}" for name in mean if name != NATIVE]
        print(f"{dtype:9} {key:>6}: {', '.join(words)}" + (f"; {bandwidth:.1f} GB/s" if key == "1" else ""), flush=True)


if __name__ == "__main__":
    main()
