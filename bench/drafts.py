"""What drafts give: SmolLM2-135M-Instruct, greedy, one sequence, one thread on one core.

    python bench/drafts.py [--rounds 5] [--core 0] [--dtype float32]

Two kinds of text, each asked of the model's chat. Repetitive: the first paragraph of Lewis Carroll's "Alice's
Adventures in Wonderland" is to be repeated word for word; and a Python function (``bench/steps.py``'s own) is to be
printed again with one name changed. Ordinary: a story, an essay and a letter. Each is generated with and without
drafts in turn, several rounds; prints decoding tokens/s, the ratio within a round, and how many drafts were right.
Stops with an error if drafts ever changed a token.

An ordinary text of a small model may still run into a loop and repeat itself, where drafts help: so the last
ordinary one is sampled, at temperature 1.

Knows: how to time an engine. Must not know: how drafts are made.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from mpgpt.cluster.bootstrap import negotiate
from mpgpt.cluster.ring import Ring
from mpgpt.cluster.ring_config import RingOptions
from mpgpt.config import DtypeName
from mpgpt.core import GREEDY, Request, Sampling
from mpgpt.engine.engine import Engine, IdsOnly, Stream
from mpgpt.model.pull import find, model_home
from mpgpt.model.tokenizer import Tokenizer
from mpgpt.transport.link import SoloWorld

ALICE = (
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do: once or "
    "twice she had peeped into the book her sister was reading, but it had no pictures or conversations in it, “and "
    "what is the use of a book,” thought Alice “without pictures or conversations?”"
)
CODE = Path(__file__).with_name("steps.py").read_text().split("@torch.inference_mode()\n")[1].split("\n\n\n")[0]
TEXTS: dict[str, tuple[str, Sampling]] = {
    "repetitive, a paragraph": (f"Repeat the following paragraph exactly, word for word:\n\n{ALICE}", GREEDY),
    "repetitive, code": (f"Print this Python function again, with `count` renamed to `rows`:\n\n{CODE}", GREEDY),
    "ordinary, a story": ("Tell me a story about a lighthouse keeper who finds a letter in a bottle.", GREEDY),
    "ordinary, an essay": ("Write a short essay about the history of the bicycle.", GREEDY),
    "ordinary, a letter": ("Write a letter to a friend about a journey by train through the Alps.", GREEDY),
    "ordinary, sampled": ("Tell me a story about a fox and a clockmaker.", Sampling(temperature=1.0, seed=1)),
}
NEW = 160


def start(folder: Path, dtype: DtypeName) -> Ring:
    world = SoloWorld()
    settings = negotiate(world, folder, RingOptions(dtype=dtype, slots=1, context=1024, threads=1))
    return Ring(world, settings, folder)


def decode(engine: Engine, request: Request) -> tuple[float, Stream]:
    """Tokens/s after the first token."""
    stream = engine.submit(request, IdsOnly(), lambda stream, piece: None)
    while not stream.ids:
        engine.step()
    begun = time.perf_counter()
    engine.drain()
    return (len(stream.ids) - 1) / (time.perf_counter() - begun), stream


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    options: Any = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {options.core})
    torch.set_num_threads(1)
    folder = find("smollm2-135m", model_home())
    if folder is None:
        sys.exit("bench/drafts.py needs the model: run `mpgpt pull smollm2-135m` first")
    tokenizer, ring = Tokenizer(folder), start(folder, options.dtype)
    engines = {drafts: ring.engine(drafts=drafts) for drafts in (False, True)}
    for text, (prompt, sampling) in TEXTS.items():
        ids = tuple(tokenizer.encode_chat([{"role": "user", "content": prompt}]))
        request = Request(ids=ids, max_new_tokens=NEW, sampling=sampling, stop_ids=tokenizer.stop_ids)
        speeds: dict[bool, list[float]] = {False: [], True: []}
        for n in range(options.rounds):
            streams = {}
            for drafts in (False, True) if n % 2 else (True, False):
                speed, streams[drafts] = decode(engines[drafts], request)
                speeds[drafts].append(speed)
            assert streams[True].ids == streams[False].ids, f"drafts changed the text of {text!r}"
        report(text, speeds, streams[True])


def report(text: str, speeds: dict[bool, list[float]], drafted: Stream) -> None:
    ratios = [with_ / without for with_, without in zip(speeds[True], speeds[False], strict=True)]
    print(
        f"{text:24} {len(drafted.ids):4} tokens  without {statistics.median(speeds[False]):6.1f} tokens/s  "
        f"with {statistics.median(speeds[True]):6.1f}  ratio {statistics.median(ratios):.3f} "
        f"({min(ratios):.3f} to {max(ratios):.3f})  accepted {drafted.accepted} of {drafted.drafted}, "
        f"{(drafted.decode_steps + drafted.accepted) / drafted.decode_steps:.2f} tokens a step",
        flush=True,
    )


if __name__ == "__main__":
    main()
