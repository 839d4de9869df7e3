"""Prompts that a model makes no numbers of, in a ring among others: their records say so; the others are as ever."""

from __future__ import annotations

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import mpgpt, records
from tests.support.models import break_embedding, save_random

NEW = 16
GOOD = [
    "Once upon a time",
    "a",
    "The quick brown fox jumps over the lazy dog. " * 6,  # several chunks long
    "Row, row, row your boat. " * 6,  # with drafts
    *(f"Prompt {n}: " + "lorem ipsum dolor sit amet " * (n % 5) for n in range(8)),
]
LONG = "one two three four five six seven. " * 6
BAD = ["~", "~ at the beginning", "at the end ~", LONG + "~" + LONG, "~" + LONG, LONG + "~", "Row, row ~, row, row."]
FAR = {f"bad {n}" for n, text in enumerate(BAD) if text.endswith("~" + LONG)}
"""Of a model that looks back a few positions only, the end of such a prompt sees nothing of its bad token."""
OPTIONS = ("--raw", "--ignore-eos", "--max-new-tokens", str(NEW), "--threads", "1")
SAMPLED = ("--strategy", "top_p", "--temperature", "0.8", "--seed", "7", "--repetition-penalty", "1.1")


def run(
    ranks: int, folder: Path, tmp_path: Path, prompts: dict[str, str], *options: str, status: int
) -> dict[str, dict[str, Any]]:
    source, out = tmp_path / "prompts.jsonl", tmp_path / f"{ranks}-{len(prompts)}-{len(options)}.jsonl"
    source.write_text("".join(json.dumps({"id": id, "prompt": text}) + "\n" for id, text in prompts.items()))
    out.unlink(missing_ok=True)
    done = mpgpt(ranks, "generate", "--model", folder, "--prompts", source, "--out", out, *OPTIONS, *options)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return records(out)


def mixed() -> dict[str, str]:
    """Good ones and bad ones in turn."""
    good = {f"good {n}": text for n, text in enumerate(GOOD)}
    bad = {f"bad {n}": text for n, text in enumerate(BAD)}
    places = {id: n / len(some) for some in (good, bad) for n, id in enumerate(some)}
    both = good | bad
    return {id: both[id] for id in sorted(both, key=lambda id: places[id])}


def check(with_bad: dict[str, dict[str, Any]], without: dict[str, dict[str, Any]], far: Set[str] = frozenset()) -> None:
    """``far`` are prompts that may be fine in spite of their bad token."""
    assert len(with_bad) == len(GOOD) + len(BAD)
    fine = 0
    for id, record in with_bad.items():
        if id in far and record["error"] is None:
            assert record["token_ids"] and record["finish_reason"] == "length"
        elif id.startswith("bad"):
            assert "logits for token 1 of the answer are NaN or infinite" in record["error"]
            assert (record["text"], record["token_ids"], record["finish_reason"]) == ("", [], "error")
        else:  # one that says the bad token itself ends there, with company and without
            assert [record[key] for key in ("token_ids", "text", "finish_reason")] == [
                without[id][key] for key in ("token_ids", "text", "finish_reason")
            ]
            fine += record["error"] is None
    assert fine >= len(GOOD) - 3
    assert len({tuple(record["token_ids"]) for record in without.values()}) > len(GOOD) - 3


@pytest.mark.parametrize("name, how", [("llama-biased", ()), ("mistral", SAMPLED)])
def test_in_a_ring_of_three(tmp_path: Path, name: str, how: tuple[str, ...]) -> None:
    """The truth is a run of the good ones alone, in one process. With few slots, each is a bad one's soon."""
    folder = break_embedding(save_random(name, tmp_path / name), "~")
    prompts = mixed()
    good = {id: text for id, text in prompts.items() if id.startswith("good")}
    truth = run(0, folder, tmp_path, good, "--no-drafts", *how, status=0)
    for slots, drafts in (("3", "--drafts"), ("8", "--no-drafts")):
        layers = ("--layers", "0-1,2-3,4", "--max-sequences", slots, drafts)
        check(run(3, folder, tmp_path, prompts, *layers, *how, status=1), truth, FAR if name == "mistral" else set())


def test_what_float16_cannot_hold(tmp_path: Path) -> None:
    """An embedding of 100000: infinite in the float16 of torch's kernels, a number in float32."""
    folder = break_embedding(save_random("qwen2", tmp_path / "qwen2"), "~", 1e5)
    prompts = mixed()
    good = {id: text for id, text in prompts.items() if id.startswith("good")}
    layers = ("--layers", "0-1,2-3,4", "--max-sequences", "4", "--kernel", "torch", "--dtype")
    truth = run(0, folder, tmp_path, good, "--kernel", "torch", "--dtype", "float16", status=0)
    check(run(3, folder, tmp_path, prompts, *layers, "float16", status=1), truth)
    assert all(not one["error"] for one in run(3, folder, tmp_path, prompts, *layers, "float32", status=0).values())
