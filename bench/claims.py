"""The figures of README's performance section: SmolLM2-135M in every dtype on one rank and on two, and transformers.

    python bench/claims.py [--rounds 3] [--dtypes float32,bfloat16,float16,int8,int4] [--json bench/out/claims.json]

One thread a rank, each pinned to a core, layers placed by measurement, no drafts. Everything runs in turn, several
rounds; a ratio is taken within a round, and its median printed with the least and the greatest. Beside it GPT-2 124M
with random weights on one rank: weights read a second against what the memory gives in the same process.

Knows: the command `mpgpt bench` and its JSON. Must not know: how anything is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from mpgpt.config import DtypeName
from mpgpt.display import counted
from mpgpt.model.pull import model_home, pull

SEQUENCES = (1, 8, 16)
TOKENS = 48
"""Of each prompt, and new ones."""
Round = dict[tuple[str, int, int], dict[str, Any]]


def bench(dtype: str, ranks: int, concurrency: Sequence[int], model: Sequence[str]) -> Round:
    """One `mpgpt bench` of one round: its runs by (dtype, ranks, sequences)."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        command = [
            sys.executable, "-m", "mpgpt", "bench", *model, f"--ranks={ranks}", f"--dtype={dtype}", "--threads=1",
            "--pin", "--rounds=1", f"--prompt-tokens={TOKENS}", f"--new-tokens={TOKENS}", f"--json={out}",
            f"--concurrency={','.join(map(str, concurrency))}",
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL, timeout=900)
        runs = json.loads(out.read_text())["runs"]
    return {(run["dtype"], run["ranks"], run["concurrency"]): run for run in runs}


def measure_transformers(folder: Path) -> float:
    """Decoding tokens/s of ``generate`` for one sequence, float32, one thread on core 0."""
    import torch
    import transformers

    os.sched_setaffinity(0, {0})
    torch.set_num_threads(1)
    auto: Any = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([[(7919 * (i + 1)) % 49152 for i in range(TOKENS)]])

    def timed(new: int) -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0)
        return time.perf_counter() - begun

    timed(4)
    return (TOKENS - 1) / (timed(TOKENS) - timed(1))


def transformers_run(folder: Path) -> float:
    command = [sys.executable, __file__, "--peer", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=900)
    return float(done.stdout.strip().splitlines()[-1])


def one_round(dtypes: Sequence[str], folder: Path) -> tuple[Round, float]:
    found: Round = {}
    for dtype in dtypes:
        for ranks in (1, 2):
            found |= bench(dtype, ranks, SEQUENCES, ["--model", str(folder)])
            speeds = {n: round(found[dtype, ranks, n]["decode_tokens_per_s"], 1) for n in SEQUENCES}
            print(f"{dtype}, {counted(ranks, 'rank')}: {speeds}", file=sys.stderr, flush=True)
    return found, transformers_run(folder)


def spread(values: Sequence[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def report(rounds: Sequence[tuple[Round, float]], dtypes: Sequence[str]) -> None:
    def speed(found: Round, dtype: str, ranks: int, sequences: int) -> float:
        return float(found[dtype, ranks, sequences]["decode_tokens_per_s"])

    def ratio(dtype: str, ranks: int, sequences: int) -> str:
        return spread([speed(f, dtype, ranks, sequences) / speed(f, dtype, 1, sequences) for f, _ in rounds], 2)

    print("| dtype | ranks | 1 sequence | 8 | 16 | 1 against transformers' float32 |\n|---|---|---|---|---|---|")
    for dtype in dtypes:
        for ranks in (1, 2):
            cells = [spread([speed(f, dtype, ranks, n) for f, _ in rounds], 0) for n in SEQUENCES]
            against = spread([speed(f, dtype, ranks, 1) / theirs for f, theirs in rounds], 2)
            print(f"| {dtype} | {ranks} | {' | '.join(cells)} | {against} |")
    print(f"\ntransformers, float32, one sequence: {spread([theirs for _, theirs in rounds], 1)} tokens/s\n")
    print("| dtype | 2 ranks / 1, 1 sequence | 8 | 16 | 1 rank, 8 sequences / 1 |\n|---|---|---|---|---|")
    for dtype in dtypes:
        many = spread([speed(f, dtype, 1, 8) / speed(f, dtype, 1, 1) for f, _ in rounds], 2)
        print(f"| {dtype} | {' | '.join(ratio(dtype, 2, n) for n in SEQUENCES)} | {many} |")


def report_bandwidth(rounds: Sequence[Round]) -> None:
    print("\n| GPT-2 124M, one rank, one sequence | tokens/s | weights read, GB/s | memory, GB/s | share |")
    print("|---|---|---|---|---|")
    for dtype in ("float32", "int8"):
        runs = [found[dtype, 1, 1] for found in rounds]
        shares = [run["decode_tokens_per_s"] / run["floor_tokens_per_s"] for run in runs]
        read = [run["decode_tokens_per_s"] * run["stages"][0]["slice_mb"] / 1000 for run in runs]
        speeds = [run["decode_tokens_per_s"] for run in runs]
        memory = [run["read_bandwidth_gb_s"] for run in runs]
        print(f"| {dtype} | {spread(speeds, 0)} | {spread(read, 1)} | {spread(memory, 1)} | {spread(shares, 2)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtypes", default=",".join(get_args(DtypeName)))
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "out" / "claims.json")
    parser.add_argument("--peer", type=Path, help=argparse.SUPPRESS)
    options: Any = parser.parse_args()
    if options.peer:
        print(measure_transformers(options.peer))
        return
    folder, dtypes = pull("smollm2-135m", home=model_home(), progress=False), options.dtypes.split(",")
    rounds, gpt2 = [], []
    for n in range(options.rounds):
        rounds.append(one_round(dtypes, folder))
        gpt2.append({k: run for d in ("float32", "int8") for k, run in bench(d, 1, [1], ["--random", "gpt2"]).items()})
        print(f"round {n + 1} of {options.rounds} done", file=sys.stderr, flush=True)
        options.json.parent.mkdir(exist_ok=True)
        plain = [{" ".join(map(str, k)): run for k, run in found.items()} for found, _ in rounds]
        options.json.write_text(json.dumps({"rounds": plain, "transformers": [theirs for _, theirs in rounds]}))
    report(rounds, dtypes)
    report_bandwidth(gpt2)


if __name__ == "__main__":
    main()
