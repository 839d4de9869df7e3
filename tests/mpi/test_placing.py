"""Ranks that are measured and placed under a real mpirun."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.launch import mpgpt


def test_plan_measures_and_says(models: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "plan.json"
    run = mpgpt(3, "plan", "--model", models["llama"], "--threads", "1", "--json", target, timeout=180)
    assert run.returncode == 0, run.stderr
    assert "rank" in run.stdout and "tokens/s" in run.stdout and not run.stderr
    tree = json.loads(target.read_text())
    layers = [layer for span in tree["layers"] if span for layer in range(*span)]
    assert layers == list(range(5)), "the spans are contiguous, disjoint and complete"
    assert [plan["ranks_with_layers"] for plan in tree["alternatives"]] == [1, 2, 3]
    links = {(link["from"], link["to"]): link for link in tree["measured"]["links"]}
    assert set(links) == {(a, b) for a in range(3) for b in range(3) if a != b}
    assert all(0 <= link["latency_s"] < 1 and link["bytes_per_s"] > 1e6 for link in links.values())
    assert [node["local_rank"] for node in tree["measured"]["nodes"]] == [0, 1, 2]


def test_the_objective_decides(models: dict[str, Path]) -> None:
    """For one sequence alone a second rank on the same host can only cost: the ring is one rank's."""
    run = mpgpt(
        2, "generate", "--model", models["gpt2"], "--prompt", "Once", "--raw", "--ignore-eos", "--max-new-tokens", "3",
        "--threads", "1", "--objective", "latency",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "layers 0-4 | -]" in run.stderr or "layers - | 0-4]" in run.stderr
    assert "has no layers: the ring is faster without it" in run.stderr


def test_what_is_wrong_is_said_once_for_all_ranks(models: dict[str, Path]) -> None:
    run = mpgpt(2, "plan", "--model", models["gpt2"], "--context", "100000")
    ours = [line for line in run.stderr.splitlines() if line.startswith("mpgpt: ")]
    assert run.returncode == 2 and len(ours) == 1 and "512" in ours[0] and "Traceback" not in run.stderr
