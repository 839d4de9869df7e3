"""What fewer bits cost in quality: perplexity on ``bench/text.txt`` for each dtype.

    python bench/perplexity.py [--model FOLDER] [--dtypes float32,int8] [--kv-dtype float16] [--torch]

exp of the mean negative log-likelihood of each token given all those before it, the first left out. The text was
written for this and is in no training set.

Knows: the model's blocks. Must not know: ranks, schedulers.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from mpgpt.core import Row, Span
from mpgpt.model.kernels import DTYPES
from mpgpt.model.linear import NATIVE, Kernels
from mpgpt.model.pull import model_home, pull
from mpgpt.model.slice import Slice
from mpgpt.model.tokenizer import Tokenizer
from mpgpt.model.weights import Checkpoint, model_config

TEXT = Path(__file__).parent / "text.txt"
CHUNK = 96


@torch.inference_mode()
def perplexity(folder: Path, ids: list[int], kernels: Kernels) -> tuple[float, int]:
    """(perplexity, bytes of weights)."""
    config = model_config(folder)
    everything = Span(start=0, stop=config.layers)
    model = Slice(config, everything, Checkpoint(folder), slots=1, context=len(ids), kernels=kernels)
    loss = 0.0
    for start in range(0, len(ids) - 1, CHUNK):
        part = ids[start : start + CHUNK + 1]
        row = Row(slot=0, start=start, ids=tuple(part[:-1]), outputs=len(part) - 1)
        logits_TV = model.forward([row], model.embed([row]))
        loss += torch.nn.functional.cross_entropy(logits_TV, torch.tensor(part[1:]), reduction="sum").item()
    return math.exp(loss / (len(ids) - 1)), model.nbytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--torch", action="store_true", help="by torch's kernels")
    options: Any = parser.parse_args()
    torch.set_num_threads(1)
    folder = options.model or pull("smollm2-135m", home=model_home(), progress=False)
    ids = Tokenizer(folder).encode(" ".join(TEXT.read_text(encoding="utf-8").split()))
    exact = None
    print(f"{folder.name}, {len(ids)} tokens")
    for dtype in options.dtypes.split(","):
        chosen = {} if options.torch else {"": NATIVE}
        value, nbytes = perplexity(folder, ids, Kernels(dtype=dtype, chosen=chosen, kv_dtype=options.kv_dtype))
        exact = exact or value
        print(
            f"{dtype:10} {value:8.3f}  {100 * (value / exact - 1):+6.2f}%  {nbytes / 1e6:7.1f} MB of weights",
            flush=True,
        )


if __name__ == "__main__":
    main()
