"""One product, every way to hold its weight: what ``autotune.py`` chooses from, and why.

    python bench/kernels.py [--dtypes float32,bfloat16,int8,int4] [--shape 768x3072]

On one core, its weight out of the cache (many different ones in turn, as many layers are): microseconds a product for
each number of rows, the least of several passes.

Knows: the kernels. Must not know: models.
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import torch

from mpgpt.model.autotune import microseconds, products
from mpgpt.model.candidates import candidates
from mpgpt.model.kernels import DTYPES, FLOATS

ROWS = (1, 2, 4, 8, 16, 32, 96, 128)
COLD_BYTES = 150 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--shape", default="768x3072", help="inputs x outputs")
    options: Any = parser.parse_args()
    inputs, outputs = (int(size) for size in options.shape.split("x"))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    print(f"{options.shape:22}" + "".join(f"{rows:7}" for rows in ROWS))
    with torch.inference_mode():
        for dtype in options.dtypes.split(","):
            for kernel in candidates(dtype):
                activations = FLOATS.get(dtype, torch.float32)
                held = products(kernel, inputs, outputs, activations, COLD_BYTES)
                times = [microseconds(held, torch.randn(rows, inputs).to(activations), passes=6) for rows in ROWS]
                print(f"{dtype:12}{kernel.name:10}" + "".join(f"{time:7.0f}" for time in times))


if __name__ == "__main__":
    main()
