"""What a token costs the sampler, by strategy: microseconds a row, on one core.

    python bench/sampler.py

A vocabulary of 50257, 8 rows a step, 512 ids of history, logits that fall off like Zipf's law.

Knows: the sampler. Must not know: models.
"""

from __future__ import annotations

import argparse
import os
import timeit
from dataclasses import replace

import torch

from mpgpt.core import GREEDY, Row, Sampling
from mpgpt.model.sampler import Sampler

VOCAB, HISTORY, ROWS = 50257, 512, 8
STRATEGIES = {
    "greedy": GREEDY,
    "greedy, penalty 1.1": Sampling(repetition_penalty=1.1),
    "temperature": Sampling(temperature=0.8),
    "top_k 40": Sampling(temperature=0.8, top_k=40),
    "top_p 0.9": Sampling(temperature=0.8, top_p=0.9),
    "min_p 0.05": Sampling(temperature=0.8, min_p=0.05),
    "all of them": Sampling(temperature=0.8, top_k=50, top_p=0.9, min_p=0.05, repetition_penalty=1.1),
}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    logits = torch.stack([-1.3 * torch.log(1 + torch.randperm(VOCAB, generator=generator)) for _ in range(ROWS)])
    sampler = Sampler(slots=ROWS, context=2 * HISTORY, vocab=VOCAB)
    history = torch.randint(0, VOCAB, (ROWS, HISTORY), generator=generator).tolist()
    sampler.observe([Row(slot=slot, start=0, ids=tuple(ids)) for slot, ids in enumerate(history)])
    for name, sampling in STRATEGIES.items():
        rows = [
            Row(slot=n, start=HISTORY - 1, ids=(5,), outputs=1, sampling=replace(sampling, seed=n)) for n in range(ROWS)
        ]
        seconds = min(timeit.repeat(lambda rows=rows: sampler.sample(rows, logits), number=30, repeat=5))  # type: ignore[misc]
        print(f"{name:20} {1e6 * seconds / 30 / ROWS:7.1f} us a row")


if __name__ == "__main__":
    main()
