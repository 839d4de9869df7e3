"""The hybrid ring against the all-torch ring: is what an iPad's package computes right, and what does it cost?

    python bench/ipad.py [--model smollm2-135m] [--layers 10-19] [--weights float16] [--precision declared]
    python bench/ipad.py --random gpt2 --layers 4-7
    python bench/ipad.py --node ios_proxy/GPT2Node/.build/debug/mpgpt-node
    python bench/ipad.py --random gpt2 --layers 4-7 --one-token 8x1024,4x512

Converts the layers (kept in bench/out/), starts `mpgpt ipad-node` on this machine, or the node in Swift, and three
ranks, the middle one before it, and generates from ten prompts greedily, all of them at once through the package's four
slots. Printed are the largest difference of hidden states from float32 (of a token's largest element), for each prompt
how many tokens agree with the all-torch ring before the first that does not, and the time of a call, computing and
network. A random model speaks with SmolLM2's tokenizer.

``--one-token`` starts no ring: for packages of these slots and contexts it prints the time of one token of one sequence
in the evaluator, through ``step`` and through ``decode`` in turn, and the bytes of cache that each writes for it.

Knows: the commands. Must not know: how a package is made, run, or reached.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from mpgpt.bench.random_model import random_model
from mpgpt.config import parse_layers
from mpgpt.core import Span
from mpgpt.model.pull import model_home, pull
from mpgpt.model.weights import model_config
from mpgpt_ios.convert.package import PackageOptions, convert
from mpgpt_ios.executor import EvaluatorBackend
from mpgpt_ios.mil.package_file import Package

OUT = Path(__file__).parent / "out"
NEW = 40
ROUNDS, CALLS = 7, 20
PROMPTS = [
    "What is the capital of France, and what is it known for?", "Explain in two sentences why the sky is blue.",
    "Write a short poem about a lighthouse.", "How do I boil an egg?", "List five animals that live in the sea.",
    "What is the difference between a violin and a cello?", "Tell me a story about a fox.", "Who was Ada Lovelace?",
    "Write a Python function that adds two numbers.", "What should I pack for a week in the mountains?",
]  # fmt: skip
ENV = os.environ | {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}  # fmt: skip


def ring(folder: Path, model: Path, settings: dict[str, Any], name: str) -> tuple[dict[int, list[int]], str]:
    """Every prompt's tokens on three ranks, and the output on standard error."""
    config, out = folder / f"{name}.yaml", folder / f"{name}.jsonl"
    config.write_text(yaml.safe_dump(settings | {"hf_model_name": str(model)}))
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    command = [
        mpirun, "-n", "3", sys.executable, "-m", "mpgpt", "generate", "--config", str(config), "--model", str(model),
        "--prompts", str(folder / "prompts.jsonl"), "--out", str(out), "--max-new-tokens", str(NEW), "--ignore-eos",
        "--strategy", "greedy", "--threads", "1", "--no-drafts", "--context", "256",
    ]  # fmt: skip
    done = subprocess.run(command, env=ENV, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise SystemExit(done.stderr)
    records = [json.loads(line) for line in out.read_text().splitlines()]
    return {record["id"]: record["token_ids"] for record in records}, done.stderr


def agreement(a: list[int], b: list[int]) -> int:
    """How many tokens are the same before the first that is not."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def with_words(model: Path, words: Path) -> Path:
    """A random model's folder with the tokenizer of another."""
    folder = OUT / f"{model.name}-words"
    folder.mkdir(parents=True, exist_ok=True)
    for path in (*model.glob("*.json"), *model.glob("*.safetensors"), *words.glob("tokenizer*")):
        link = folder / path.name
        link.unlink(missing_ok=True)
        link.symlink_to(path.resolve())
    return folder


def run(options: Any, model: Path, span: Span, folder: Path) -> None:
    package = OUT / f"{model.name}-{span}-{options.weights}.mlpackage"
    OUT.mkdir(exist_ok=True)
    bundle, difference = convert(model, span, package, PackageOptions(weights=options.weights, context=256))
    print(f"{package.name}: {bundle.length / 1e6:.0f} MB, hidden states within {difference:.4f} of float32")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    (folder / "token").write_text(secrets.token_urlsafe())
    layers = model_config(model).layers
    spans = {"rank_0": range(span.start), "rank_1": range(span.start, span.stop), "rank_2": range(span.stop, layers)}
    plain = {"layer_distribution": {rank: list(part) for rank, part in spans.items()}, "max_sequences": 4}
    truth, _ = ring(folder, model, plain, "torch")
    python = [sys.executable, "-m", "mpgpt", "ipad-node", "--precision", options.precision]
    node_command = [options.node, "--python", sys.executable] if options.node else python
    command = [*node_command, "--port", "0", "--token-file", str(folder / "token"), "--package", str(package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as node:
        assert node.stdout
        port = int(node.stdout.readline().rpartition(":")[2])
        ipad = {
            "rank": 1, "address": f"127.0.0.1:{port}", "token_file": str(folder / "token"), "package": str(package)
        }  # fmt: skip
        found, errors = ring(folder, model, plain | {"ipad": ipad}, "ipad")
        node.terminate()
    agreed = {key: agreement(found[key], ids) for key, ids in truth.items()}
    for key, count in sorted(agreed.items()):
        print(f"prompt {key:2}: {count} of {len(truth[key])} tokens" + (" and then another" * (count < NEW)))
    print(f"in all {sum(agreed.values()) / sum(map(len, truth.values())):.1%}")
    print(next(line for line in errors.splitlines() if line.startswith("[iPad")))


def one_token(model: Path, span: Span, slots: int, context: int) -> None:
    """One token through ``step`` and through ``decode``, in turn."""
    package = OUT / f"{model.name}-{span}-{slots}x{context}.mlpackage"
    OUT.mkdir(exist_ok=True)
    convert(model, span, package, PackageOptions(slots=slots, context=context))
    backend, inputs = EvaluatorBackend(package), dict[str, dict[str, Any]]()
    for name in ("step", "decode"):  # values do not matter to the time, but there is one position to write
        declared = backend.program.functions[name].inputs
        inputs[name] = {what: np.zeros(shape, dtype) for what, (shape, dtype) in declared.items()}
        backend.run(name, inputs[name])
    inputs["decode"]["wmask"][0, 0, context // 2] = 1
    ms: dict[str, list[float]] = {name: [] for name in inputs}
    for _ in range(ROUNDS):
        for name, given in inputs.items():
            begun = time.perf_counter()
            for _ in range(CALLS):
                backend.run(name, given)
            ms[name].append((time.perf_counter() - begun) / CALLS * 1e3)
    ratios = sorted(decode / step for step, decode in zip(ms["step"], ms["decode"], strict=True))
    print(f"{slots} slots of {context}: decode / step {ratios[ROUNDS // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    for name, rounds in ms.items():
        print(f"  {name:6}: {np.median(rounds):.2f} ms a token, {written(package, name):,} bytes of cache written")


def written(package: Path, function: str) -> int:
    """The bytes that one call puts into the cache, as the program declares them."""
    declared = Package(package, torch.float16).spec.mlProgram.functions[function]
    operations = declared.block_specializations[declared.opset].operations
    types = {output.name: output.type.tensorType for op in operations for output in op.outputs}
    updates = [op.inputs["update"].arguments[0].name for op in operations if op.type == "slice_update"]
    return sum(2 * int(np.prod([d.constant.size for d in types[name].dimensions])) for name in updates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--random", help="a shape with random weights instead, such as gpt2")
    parser.add_argument("--layers", default="10-19")
    parser.add_argument("--weights", default="float16", choices=["float16", "int8"])
    parser.add_argument("--precision", default="declared", choices=["declared", "float32"])
    parser.add_argument("--node", metavar="PATH", help="the mpgpt-node that was built, instead of the one in Python")
    parser.add_argument("--one-token", metavar="SLOTSxCONTEXT,...", help="time one token in the evaluator instead")
    options: Any = parser.parse_args()
    home = model_home()
    model = pull(options.model, home=home, progress=False)
    if options.random:
        model = with_words(random_model(options.random, home), model)
    (span,) = parse_layers(options.layers)
    assert span
    if options.one_token:
        torch.set_num_threads(1)
        for sizes in options.one_token.split(","):
            one_token(model, span, *map(int, sizes.split("x")))
        return
    with tempfile.TemporaryDirectory() as folder:
        run(options, model, span, Path(folder))


if __name__ == "__main__":
    main()
