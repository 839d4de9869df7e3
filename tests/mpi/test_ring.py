"""Whole runs under a real mpirun, against transformers on the same weights."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launch import mpgpt, records
from tests.support.models import build

NEW = 24
PROMPTS = [
    "Once upon a time",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 6,  # several chunks long
    *(f"Prompt {n}: " + "lorem ipsum dolor sit amet " * (n % 5) for n in range(13)),
]
GREEDY = ("--raw", "--ignore-eos", "--max-new-tokens", str(NEW), "--threads", "1")

LAYERS = {0: "0-4", 1: "0-4", 2: "0-2,3-4", 3: "0-1,2-3,4", 4: "0,1-2,3,4"}
"""For so many ranks; left to itself, so small a model often has a ring of one."""


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"id": n, "prompt": text}) + "\n" for n, text in enumerate(PROMPTS)))
    return path


@cache
def transformers_tokens(name: str) -> dict[int, list[int]]:
    """Every prompt by itself through generate(do_sample=False)."""
    model: Any = build(name)
    said = {}
    for n, text in enumerate(PROMPTS):
        ids = torch.tensor([_byte_ids(text)])
        with torch.inference_mode():
            out = model.generate(ids, do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=0)
        said[n] = out[0, ids.shape[1] :].tolist()
    return said


def _byte_ids(text: str) -> list[int]:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = {token: index for index, token in enumerate(sorted(ByteLevel.alphabet()))}
    encoded = ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    return [alphabet[character] for word, _ in encoded for character in word]


@pytest.mark.parametrize("name", ["gpt2", "llama-biased", "qwen3"])
def test_greedy_is_transformers_on_any_number_of_ranks(
    models: dict[str, Path], prompts: Path, tmp_path: Path, name: str
) -> None:
    """16 prompts of mixed lengths together, and one alone, as one process and on 1 to 4 ranks."""
    theirs = transformers_tokens(name)
    assert len({tuple(ids) for ids in theirs.values()}) > 12, "texts that are all alike would prove little"
    for ranks in (0, 1, 2, 3, 4):
        out = tmp_path / f"{ranks}.jsonl"
        run = mpgpt(
            ranks, "generate", "--model", models[name], "--prompts", prompts, "--out", out, "--layers", LAYERS[ranks],
            *GREEDY,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        got = {n: record["token_ids"] for n, record in records(out).items()}
        assert got == theirs, f"{ranks} ranks"
    alone = tmp_path / "alone.jsonl"
    run = mpgpt(3, "generate", "--model", models[name], "--prompt", PROMPTS[2], "--out", alone, *GREEDY)
    assert run.returncode == 0, run.stderr
    assert records(alone)[1]["token_ids"] == theirs[2]


def test_sampled_tokens_do_not_depend_on_ranks_or_company(
    models: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    sampled = (
        "--strategy",
        "top_p",
        "--top-p",
        "0.95",
        "--temperature",
        "1.3",
        "--repetition-penalty",
        "1.1",
        "--seed",
        "7",
    )
    seen = []
    for ranks, slots in ((0, "16"), (1, "3"), (2, "16"), (3, "5"), (4, "1")):
        out = tmp_path / f"{ranks}.jsonl"
        run = mpgpt(
            ranks, "generate", "--model", models["llama"], "--prompts", prompts, "--out", out, *GREEDY, *sampled,
            "--max-sequences", slots, "--layers", LAYERS[ranks],
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        seen.append({n: record["token_ids"] for n, record in records(out).items()})
    assert all(tokens == seen[0] for tokens in seen)
    assert len({tuple(ids) for ids in seen[0].values()}) == len(PROMPTS)
    other = tmp_path / "other.jsonl"
    sampled = (*sampled[:-1], "8")
    assert (
        mpgpt(
            2, "generate", "--model", models["llama"], "--prompts", prompts, "--out", other, *GREEDY, *sampled
        ).returncode
        == 0
    )
    assert {n: record["token_ids"] for n, record in records(other).items()} != seen[0]


RHYMES = [text * 6 for text in ("Row, row, row your boat. ", "one two three four ", "ababac", "x = x + 1; ")]
SAMPLED = (
    "--strategy", "top_p", "--top-p", "0.9", "--temperature", "0.5", "--repetition-penalty", "1.02", "--seed", "3",
)  # fmt: skip


@pytest.mark.parametrize(("name", "how"), [("gpt2", ()), ("qwen3", SAMPLED)])
def test_drafts_change_no_token(models: dict[str, Path], tmp_path: Path, name: str, how: tuple[str, ...]) -> None:
    """Repetitive prompts, two at a time: some drafts are right, some wrong."""
    source = tmp_path / "rhymes.txt"
    source.write_text("\n".join(RHYMES))
    options = ("--raw", "--ignore-eos", "--max-new-tokens", "120", "--threads", "1", "--max-sequences", "2", *how)
    seen = []
    for ranks, drafts in ((0, "--no-drafts"), (0, "--drafts"), (1, "--drafts"), (2, "--drafts"), (2, "--no-drafts")):
        out = tmp_path / f"{ranks}{drafts}.jsonl"
        run = mpgpt(
            ranks, "generate", "--model", models[name], "--prompts", source, "--out", out, drafts, *options
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        seen.append({n: record["token_ids"] for n, record in records(out).items()})
        told = re.search(r"drafts (\d+) of (\d+) accepted", run.stderr)
        assert (told is not None) == (drafts == "--drafts"), run.stderr
        assert told is None or 0 < int(told[1]) < int(told[2]), "some right, some wrong"
    assert all(tokens == seen[0] for tokens in seen)
    run = mpgpt(0, "generate", "--model", models[name], "--prompt", RHYMES[0], *options)
    assert re.search(r"drafts \d+ of \d+ accepted, \d\.\d tokens a step, layers", run.stderr), "on unless told"


def test_layers_may_be_given(models: dict[str, Path], tmp_path: Path) -> None:
    texts = set()
    for layers in ("0-2,3,4", "0,1,2-4"):
        run = mpgpt(3, "generate", "--model", models["gpt2"], "--prompt", "Once", "--layers", layers, *GREEDY)
        assert run.returncode == 0, run.stderr
        assert f"layers {layers.replace(',', ' | ')}]" in run.stderr
        texts.add(run.stdout)
    assert len(texts) == 1


@pytest.mark.parametrize("layers", ["-,0-4", "0-4,-", "0-1,-,2-4", "-,0-1,2-4,-", "-,-,0-4"])
def test_ranks_without_layers(models: dict[str, Path], prompts: Path, tmp_path: Path, layers: str) -> None:
    """The ring leaves them out, rank 0 passes on what it has nothing to do with; the tokens are the same."""
    out, ranks = tmp_path / "out.jsonl", layers.count(",") + 1
    run = mpgpt(
        ranks, "generate", "--model", models["gpt2"], "--prompts", prompts, "--out", out, "--layers", layers, *GREEDY
    )
    assert run.returncode == 0, run.stderr
    assert {n: record["token_ids"] for n, record in records(out).items()} == transformers_tokens("gpt2")
    run = mpgpt(ranks, "generate", "--model", models["llama"], "--prompt", "Once", "--layers", layers, *GREEDY)
    assert run.returncode == 0, run.stderr
    assert f"layers {layers.replace(',', ' | ')}]" in run.stderr


def test_more_ranks_than_layers_leave_some_without(models: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    run = mpgpt(6, "generate", "--model", models["gpt2"], "--prompts", prompts, "--out", out, *GREEDY)
    assert run.returncode == 0, run.stderr
    assert {n: record["token_ids"] for n, record in records(out).items()} == transformers_tokens("gpt2")
    assert "has no layers: the ring is faster without it" in run.stderr


def test_a_hostfile_brings_its_settings(models: dict[str, Path], tmp_path: Path) -> None:
    """mpirun -hostfile NAME finds NAME.yaml by itself, wherever it is; --config overrides it."""
    hostfile = tmp_path / "mine"
    hostfile.write_text("# three ranks here\nlocalhost slots=3\n")
    layers = "{rank_0: [0, 1, 2], rank_1: [3], rank_2: [4]}"
    settings = f"hf_model_name: {models['gpt2']}\nlayer_distribution: {layers}\nmax_new_tokens: 3\n"
    (tmp_path / "mine.yaml").write_text(settings)
    run = mpgpt(3, "generate", "--prompt", "Once", "--ignore-eos", hostfile=hostfile)
    assert run.returncode == 0, run.stderr
    assert "4 prompt + 3 new tokens" in run.stderr and "layers 0-2 | 3 | 4]" in run.stderr
    other = tmp_path / "other.yaml"
    other.write_text(f"hf_model_name: {models['llama']}\nmax_new_tokens: 5\n")
    run = mpgpt(3, "generate", "--prompt", "Once", "--config", other, hostfile=hostfile)
    assert run.returncode == 0, run.stderr
    assert "5 new tokens" in run.stderr
    run = mpgpt(2, "generate", "--prompt", "Once", hostfile=hostfile)
    assert run.returncode == 2
    assert "layer_distribution" in run.stderr and "3" in run.stderr and "2" in run.stderr


def test_smollm2_answers_on_three_ranks(smollm2: Path) -> None:
    """The one real text: three ranks say what transformers says."""
    run = mpgpt(3, "generate", "--model", smollm2, "--prompt", "What is the capital of France?", "--threads", "1")
    assert run.returncode == 0, run.stderr
    assert run.stdout == "The capital of France is Paris.\n"


def test_smollm2_token_ids_are_transformers(smollm2: Path, tmp_path: Path) -> None:
    import transformers

    auto: Any = transformers.AutoTokenizer
    tokenizer = auto.from_pretrained(smollm2)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    messages = [{"role": "user", "content": "Name three animals that can fly, and say why."}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        theirs = model.generate(**ids, do_sample=False, max_new_tokens=60)[0, ids["input_ids"].shape[1] :].tolist()
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"id": "a", "messages": messages}) + "\n")
    split = ("--layers", "0-14,15-29")
    run = mpgpt(2, "generate", "--model", smollm2, "--prompts", source, "--out", out, "--max-new-tokens", "60", *split)
    assert run.returncode == 0, run.stderr
    record = records(out)["a"]
    assert record["token_ids"] == theirs
    assert record["text"] == tokenizer.decode(theirs, skip_special_tokens=True)
    assert record["prompt_tokens"] == ids["input_ids"].shape[1] and record["completion_tokens"] == len(theirs)
    assert record["error"] is None and 0 < record["ttft_s"] <= record["seconds"]
