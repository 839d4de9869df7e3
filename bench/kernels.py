"""One product, three layouts: what ``kernels.Linear`` chooses from, and why.

    python bench/kernels.py [--dtype float32]

A [768 -> 3072] product on one core, its weight out of the cache (twelve different ones in turn, as twelve layers are):
microseconds a product for each number of rows, the least of several passes.

Knows: torch's products. Must not know: models.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mpgpt.kernels import Linear, can_pack

INPUTS, OUTPUTS, LAYERS = 768, 3072, 12
ROWS = (1, 2, 4, 8, 16, 32, 96, 128)


def ways(dtype: torch.dtype) -> dict[str, list[Callable[[Tensor], Tensor]]]:
    """Twelve products of each layout."""
    found: dict[str, list[Callable[[Tensor], Tensor]]] = {"F.linear": [], "x @ W[in, out]": []}
    for _ in range(LAYERS):
        weight, bias = torch.randn(OUTPUTS, INPUTS).to(dtype), torch.randn(OUTPUTS).to(dtype)
        turned = weight.t().contiguous()
        found["F.linear"].append(lambda x, w=weight, b=bias: F.linear(x, w, b))  # type: ignore[misc]
        found["x @ W[in, out]"].append(lambda x, w=turned, b=bias: torch.addmm(b, x, w))  # type: ignore[misc]
        found.setdefault(f"Linear, {'packed' if can_pack(dtype) else 'plain'}", []).append(
            Linear([weight], bias, dtype)
        )
    return found


def microseconds(products: list[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    passes = []
    for _ in range(6):
        begun = time.perf_counter()
        for product in products:
            product(x)
        passes.append((time.perf_counter() - begun) / len(products))
    return 1e6 * min(passes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    dtype = getattr(torch, parser.parse_args().dtype)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    print(f"{'rows':18}" + "".join(f"{rows:7}" for rows in ROWS))
    with torch.inference_mode():
        for name, products in ways(dtype).items():
            times = [microseconds(products, torch.randn(rows, INPUTS).to(dtype)) for rows in ROWS]
            print(f"{name:18}" + "".join(f"{time:7.0f}" for time in times))


if __name__ == "__main__":
    main()
