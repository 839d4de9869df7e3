"""What goes wrong under mpirun ends within seconds, with one message, a status that is not 0, and nobody left."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.launch import ENV, ROOT, mpgpt, mpirun, records
from tests.support.models import save_random

LONG = ("--raw", "--ignore-eos", "--max-new-tokens", "400", "--threads", "1")
TWO, THREE = ("--layers", "0-2,3-4"), ("--layers", "0-1,2-3,4")


def assert_one_message(run: subprocess.CompletedProcess[str], *said: str) -> None:
    """Exactly one sentence of ours, no traceback, a status that is not 0."""
    assert run.returncode not in (0, None)
    assert "Traceback" not in run.stderr, run.stderr
    ours = [line for line in run.stderr.splitlines() if line.startswith("mpgpt: ")]
    assert len(ours) == 1, run.stderr
    for text in said:
        assert text in ours[0], run.stderr


@contextmanager
def started(ranks: int, *arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """A run in the background; whatever it leaves is found and fails the test."""
    process = subprocess.Popen(
        mpirun(ranks, "-m", "mpgpt", *arguments), env=ENV, cwd=ROOT, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    family: list[psutil.Process] = []
    try:
        yield process
        family = [p for p in psutil.process_iter() if _session(p) == process.pid and p.pid != process.pid]
        _, alive = psutil.wait_procs(family, timeout=5)
        assert not alive, f"left behind: {[p.cmdline() for p in alive]}"
    finally:
        for p in [p for p in psutil.process_iter() if _session(p) == process.pid]:
            p.kill()
        process.communicate()


def _session(process: psutil.Process) -> int:
    try:
        return os.getsid(process.pid)
    except OSError:
        return -1


def ranks_of(process: subprocess.Popen[str], count: int) -> list[psutil.Process]:
    """The rank processes, in order of their ranks."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found: dict[int, psutil.Process] = {}
        for p in psutil.Process(process.pid).children(recursive=True):
            try:
                rank = p.environ().get("OMPI_COMM_WORLD_RANK")
            except psutil.Error:
                continue
            if rank is not None:
                found[int(rank)] = p
        if len(found) == count:
            return [found[rank] for rank in range(count)]
        time.sleep(0.05)
    raise AssertionError("the ranks did not start")


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


@pytest.fixture
def long_batch(tmp_path: Path) -> tuple[Path, Path]:
    source = tmp_path / "in.jsonl"
    lines = [{"id": n, "prompt": f"prompt {n}", "max_new_tokens": 4 if n < 3 else 500} for n in range(40)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return source, tmp_path / "out.jsonl"


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_rank_killed_while_decoding(models: dict[str, Path], long_batch: tuple[Path, Path], victim: int) -> None:
    """Until there is recovery: a clean end, and the finished records are kept and not done again."""
    source, out = long_batch
    arguments = ("generate", "--model", models["gpt2"], "--prompts", source, "--out", out, *THREE, *LONG)
    with started(3, *arguments) as process:
        ranks = ranks_of(process, 3)
        wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3)
        ranks[victim].kill()
        _, errors = process.communicate(timeout=20)
        assert process.returncode != 0
        assert f"rank {victim}" in errors and socket.gethostname() in errors and "it was killed" in errors
    kept = records(out)
    assert {0, 1, 2} <= set(kept) and all(record["error"] is None for record in kept.values())


def test_a_rank_killed_while_loading(models: dict[str, Path]) -> None:
    with started(3, "generate", "--model", models["gpt2"], "--prompt", "x", *LONG) as process:
        ranks_of(process, 3)[1].kill()
        _, errors = process.communicate(timeout=20)
        assert process.returncode != 0
        # Before the ranks have met there is only mpirun to say it.
        assert "rank 1" in errors and "killed" in errors.lower()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_taken_up_again(
    models: dict[str, Path], long_batch: tuple[Path, Path], number: signal.Signals
) -> None:
    """Ctrl-C or SIGTERM to mpirun: finished records are kept; the same command then does only the rest."""
    source, out = long_batch
    arguments = ("generate", "--model", models["gpt2"], "--prompts", source, "--out", out, *TWO, *LONG)
    with started(2, *arguments) as process:
        ranks_of(process, 2)
        wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3)
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode != 0
        assert "Traceback" not in errors
    before = out.read_bytes()
    assert before.endswith(b"\n")
    run = mpgpt(2, *arguments)
    assert run.returncode == 0, run.stderr
    assert out.read_bytes().startswith(before)
    assert set(records(out)) == set(range(40))


def test_a_ring_whose_text_nobody_reads(models: dict[str, Path]) -> None:
    """Rank 0's own pipe, and mpirun's: the ring ends in order, with nothing to say of it."""
    arguments = ("-m", "mpgpt", "generate", "--model", str(models["gpt2"]), "--prompt", "x", *TWO, *LONG)
    launched = [*mpirun(2, *arguments)]
    program = launched.index(sys.executable)
    inside = [*launched[:program], "bash", "-c", 'set -o pipefail; "$@" | head -c 5', "bash", *launched[program:]]
    outside = ["bash", "-c", 'set -o pipefail; "$@" | head -c 5', "bash", *launched]
    for command in (inside, outside):
        run = subprocess.run(command, capture_output=True, env=ENV, cwd=ROOT, timeout=120, check=False)
        assert (run.returncode, len(run.stdout)) == (0, 5), run.stderr
        assert b"mpgpt: " not in run.stderr and b"Traceback" not in run.stderr and b"prterun" not in run.stderr
        assert command is outside or run.stderr == b""


def test_a_ring_whose_records_find_no_room(models: dict[str, Path], long_batch: tuple[Path, Path]) -> None:
    source, _ = long_batch
    arguments = ("generate", "--model", models["gpt2"], "--prompts", source, "--out", "/dev/full", *TWO, *LONG)
    assert_one_message(mpgpt(2, *arguments), "--out /dev/full cannot be written: No space left on device")


def test_weights_that_are_not_numbers(tmp_path: Path) -> None:
    """They show on the last rank, in the middle of a run; the ring ends in order."""
    folder = save_random("gpt2", tmp_path / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["transformer.h.4.mlp.c_proj.bias"] = torch.full((64,), float("nan"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run = mpgpt(3, "generate", "--model", folder, "--prompt", "hello", *THREE, *LONG, timeout=60)
    assert run.returncode == 1
    assert_one_message(run, "logits for token 1", "weights are damaged")


def test_an_error_while_loading_on_a_far_rank_names_it(tmp_path: Path) -> None:
    """A layer that only the second rank reads is missing from the file."""
    folder = save_random("gpt2", tmp_path / "lacking")
    weights = load_file(folder / "model.safetensors")
    del weights["transformer.h.2.ln_1.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    run = mpgpt(2, "generate", "--model", folder, "--prompt", "x", "--layers", "0-1,2-4", *LONG)
    assert_one_message(run, "rank 1", socket.gethostname(), "h.2.ln_1.weight")


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--layers", "0-1,2-3"), 2, "--layers"),
        (("--layers", "0-2,2-4"), 2, "2"),
        (("--layers", "0-1,3-4"), 2, "2"),
        (("--layers", "0-4"), 2, "rank"),
        (("--temperature", "-1"), 2, "temperature"),
        (("--context", "100000"), 2, "512"),
        (("--prompt", ""), 1, "empty"),
    ],
)
def test_what_cannot_be_is_said_once(
    models: dict[str, Path], arguments: tuple[str, ...], status: int, said: str
) -> None:
    prompt = () if "--prompt" in arguments else ("--prompt", "x")
    run = mpgpt(2, "generate", "--model", models["gpt2"], *prompt, *arguments)
    assert_one_message(run, said)
    assert run.returncode == status


@pytest.mark.parametrize("how", ["killed", "interrupted"])
def test_the_end_of_a_ring_with_a_rank_outside_it(
    models: dict[str, Path], long_batch: tuple[Path, Path], how: str
) -> None:
    """A rank without layers ends with the others, and they with it."""
    source, out = long_batch
    arguments = ("--prompts", source, "--out", out, "--layers", "0-1,-,2-4", *LONG)
    with started(3, "generate", "--model", models["gpt2"], *arguments) as process:
        ranks = ranks_of(process, 3)
        wait_for(lambda: out.exists() and out.read_bytes().count(b"\n") >= 3)
        if how == "killed":
            ranks[1].kill()
        else:
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode != 0
        assert "Traceback" not in errors
    assert {0, 1, 2} <= set(records(out))
