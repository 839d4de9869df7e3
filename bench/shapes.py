"""What a step with a number of rows that was not there before costs, once: milliseconds, and memory that stays.

    python bench/shapes.py [--model smollm2-135m] [--layers 10-19] [--dtype float32]

One rank's layers, one thread. First come some numbers of tokens, the first time and again; then every number up to
that of the largest step is computed, several passes, and the memory after each is printed.

Knows: a stage. Must not know: how weights are held.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path

import psutil
import torch

from mpgpt.config import parse_layers
from mpgpt.core import Row, Step
from mpgpt.engine.scheduler import CHUNK
from mpgpt.engine.stage import TorchStage
from mpgpt.model.autotune import tune
from mpgpt.model.footprint import HIDDEN_BYTES
from mpgpt.model.pull import find, model_home
from mpgpt.model.sampler import Sampler
from mpgpt.model.slice import Slice, weights_of
from mpgpt.model.weights import Checkpoint, lean_heap, model_config

SLOTS, CONTEXT, PASSES = 16, 4096, 4
SHOWN = (1, 2, 4, 8, 16, 17, 31, 32, 48, 64, 80, 96)


def memory() -> float:
    """Resident, MB."""
    return float(psutil.Process().memory_info().rss) / 1e6


def rows_of(tokens: int, rows: int) -> tuple[Row, ...]:
    """So many tokens in so many rows."""
    cuts = [0, *sorted(random.sample(range(1, tokens), rows - 1)), tokens]
    return tuple(
        Row(slot=slot, start=random.randrange(40), ids=(0,) * (cuts[slot + 1] - cuts[slot])) for slot in range(rows)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--layers", default="10-19", help="neither the first nor the last")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = find(options.model, model_home()) or Path(options.model)
    config, (span,) = model_config(folder), parse_layers(options.layers)
    assert span is not None
    kernels, _ = tune(options.dtype, weights_of(config), pinned="auto", memory=model_home().parent / "kernels.json")
    with lean_heap():
        model = Slice(config, span, Checkpoint(folder), slots=SLOTS, context=CONTEXT, kernels=kernels)
    stage = TorchStage(model, Sampler(slots=SLOTS, context=CONTEXT, vocab=config.vocab), lambda: None)

    def run(rows: tuple[Row, ...]) -> float:
        tokens = sum(len(row.ids) for row in rows)
        hidden = bytearray(tokens * config.embed * HIDDEN_BYTES)
        begun = time.perf_counter()
        stage.forward(Step(epoch=0, number=0, rows=rows, hidden=hidden))
        return 1000 * (time.perf_counter() - begun)

    print(f"loaded: {memory():.0f} MB")
    for tokens in SHOWN:
        row = rows_of(tokens, 1)
        before, first = memory(), run(row)
        print(f"{tokens} tokens: first {first:.1f} ms and {memory() - before:.1f} MB, then {run(row):.1f} ms")
    for count in range(PASSES):
        for tokens in range(1, SLOTS + CHUNK + 1):
            for rows in sorted({1, min(tokens, 4), min(tokens, SLOTS)}):
                run(rows_of(tokens, rows))
        print(f"after pass {count + 1} over all numbers of tokens: {memory():.0f} MB")


if __name__ == "__main__":
    main()
