"""Baselines for a bench, and the first of them: transformers' ``generate`` in a process of its own.

Knows: what a baseline measures, how its process is started, how fast ``generate`` is.
Must not know: our own rings, how figures are put together or shown.

``python -m mpgpt.bench.baselines`` is the process: it loads the model once and prints a JSON object for every
concurrency. What is measured is what ``measure.py`` measures of us: prompts of equal length from the same ids, greedy,
never ended early, warmed up, the median of as many repeats.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from mpgpt.cluster.processes import environment, listen

WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BaselineSettings:
    """The settings that are the same for every baseline and every round."""

    folder: Path
    """The model that our own rings load."""
    layers: int
    concurrency: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    repeats: int
    threads: int | None
    """A rank; None for all cores, shared by the ranks."""
    pin: bool
    env: Mapping[str, str]
    limit_s: float = 3600.0
    """The time after which a baseline counts as hanging."""
    start_s: float = 20.0
    """The time that a baseline's servers have to start."""

    def cores(self, rank: int) -> tuple[int, ...] | None:
        """The cores to which rank ``rank`` of this host is bound; None if unbound. Ranks may share cores."""
        if not self.pin:
            return None
        cores, threads = sorted(os.sched_getaffinity(0)), self.threads or 1
        return tuple(cores[(rank * threads + n) % len(cores)] for n in range(min(threads, len(cores))))

    def threads_of(self, ranks: int) -> int:
        """The threads of each of ``ranks`` ranks on this host."""
        return self.threads or max(1, (os.cpu_count() or 1) // ranks)


class Baseline(Protocol):
    """Another program for the same workload."""

    name: str

    def compared(self, dtype: str, ranks: int) -> tuple[str, int]:
        """The baseline's dtype and number of processes to compare with our ring of ``dtype`` and ``ranks``."""

    def run(self, dtype: str, ranks: int, on_run: Callable[[dict[str, Any]], None]) -> None:
        """Measure once, for every concurrency; ``on_run`` gets each run's figures, as ``report.py`` names them.

        Raises ``MpgptError`` with the program's last output when it fails, and leaves no process behind.
        """


class Transformers:
    """One process, which runs the whole model; in float32 where we have fewer bits than it can run."""

    name = "transformers"

    def __init__(self, settings: BaselineSettings) -> None:
        self._settings = settings

    def compared(self, dtype: str, ranks: int) -> tuple[str, int]:
        return ("float32" if dtype in ("int8", "int4") else dtype), 1

    def run(self, dtype: str, ranks: int, on_run: Callable[[dict[str, Any]], None]) -> None:
        settings = self._settings
        given = {
            "model": settings.folder, "dtype": dtype, "concurrency": ",".join(map(str, settings.concurrency)),
            "prompt-tokens": settings.prompt_tokens, "new-tokens": settings.new_tokens, "repeats": settings.repeats,
            "threads": settings.threads_of(1),
        }  # fmt: skip
        words = [f"--{name}={value}" for name, value in given.items()]
        who = {"peer": self.name, "version": version("transformers"), "dtype": dtype, "ranks": ranks}
        listen(
            [sys.executable, "-m", "mpgpt.bench.baselines", *words], environment(settings.env),
            lambda figures: on_run(who | figures), cores=settings.cores(0), limit_s=settings.limit_s,
        )  # fmt: skip


# -- in the process


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "dtype", "concurrency"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("prompt-tokens", "new-tokens", "repeats", "threads"):
        parser.add_argument(f"--{name}", required=True, type=int)
    options = parser.parse_args()
    model = load(Path(options.model), options.dtype, options.threads)
    for concurrency in map(int, options.concurrency.split(",")):
        figures = measure(model, concurrency, options.prompt_tokens, options.new_tokens, options.repeats)
        print(json.dumps({"concurrency": concurrency, **figures}), flush=True)


def load(folder: Path, dtype: str, threads: int) -> Any:
    """The model as transformers loads it by itself, but for an end-of-text token: nothing ends early."""
    import torch

    transformers: Any = importlib.import_module("transformers")  # untyped
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, use_cache=True, pad_token_id=0)
    return model


def measure(model: Any, concurrency: int, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, float]:
    """``decode_tokens_per_s`` from the time that all new tokens take beyond the first, and ``prompt_tokens_per_s``
    from the time that the first takes; medians of the repeats. The ids are those that ``measure.py`` takes."""
    _generate(model, concurrency, prompt_tokens, min(new_tokens, WARM_UP_TOKENS), seed=0)
    decode, prompt = [], []
    for seed in range(1, repeats + 1):
        first_s, all_s = (_generate(model, concurrency, prompt_tokens, count, seed) for count in (1, new_tokens))
        decode.append(concurrency * (new_tokens - 1) / (all_s - first_s))
        prompt.append(concurrency * prompt_tokens / first_s)
    return {"decode_tokens_per_s": statistics.median(decode), "prompt_tokens_per_s": statistics.median(prompt)}


def _generate(model: Any, concurrency: int, prompt_tokens: int, new_tokens: int, seed: int) -> float:
    """Seconds that it takes."""
    import torch

    dice = random.Random(seed)
    vocab = range(model.config.vocab_size)
    ids = torch.tensor([dice.choices(vocab, k=prompt_tokens) for _ in range(concurrency)])
    begun = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)
    taken = time.perf_counter() - begun
    assert out.shape == (concurrency, prompt_tokens + new_tokens), "it ended early"
    return taken


if __name__ == "__main__":
    main()
