"""`mpgpt bench` with MPI: starting rings by itself, and within one that somebody started."""

from __future__ import annotations

import json
import signal
from pathlib import Path

from tests.bench.test_runner import SMALL, check_document, check_interrupt
from tests.support.launch import mpgpt


def test_one_rank_and_two(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    run = mpgpt(
        0, "bench", "--model", models["llama"], "--ranks", "1,2", "--concurrency", "1,4", "--rounds", "1", "--json",
        out, *SMALL,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    document = json.loads(out.read_text())
    assert [(r["ranks"], r["concurrency"]) for r in document["runs"]] == [(1, 1), (1, 4), (2, 1), (2, 4)]
    check_document(document, work=20 + 5)
    assert "tokens/s on 1, 2 ranks" in run.stdout
    waits = [stage["wait_s"] / stage["wall_s"] for stage in document["runs"][2]["stages"]]
    assert min(waits) > 0.2, "one sequence is in one stage at a time, so both wait"


def test_in_a_ring_that_is_there(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    arguments = ("--random", models["gpt2"], "--concurrency", "2", "--rounds", "2", "--layers", "0-2,3,4", *SMALL)
    run = mpgpt(3, "bench", "--json", out, *arguments, env={"MPGPT_HOME": str(tmp_path)})
    assert run.returncode == 0, run.stderr
    document = json.loads(out.read_text())
    check_document(document, work=20 + 5)
    (found,) = document["runs"]
    assert document["complete"] and (found["ranks"], found["rounds"]) == (3, 2)
    assert [stage["layers"] for stage in found["stages"]] == [[0, 3], [3, 4], [4, 5]]
    assert document["model"]["random"] and "float32" in run.stdout


def test_an_interrupt_ends_all_ranks(models: dict[str, Path], tmp_path: Path) -> None:
    check_interrupt(models["gpt2"], tmp_path / "out.json", 2, signal.SIGINT, 130)


def test_a_ring_of_another_size_is_refused(models: dict[str, Path]) -> None:
    run = mpgpt(2, "bench", "--model", models["gpt2"], "--ranks", "3", *SMALL)
    assert run.returncode == 2 and "mpirun started 2" in run.stderr and "Traceback" not in run.stderr
