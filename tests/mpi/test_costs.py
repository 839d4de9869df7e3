"""No rank ever holds more than its slice, and a rank that waits costs nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.mpi.costs import IDLE_S
from tests.support.launch import ENV, ROOT, mpirun

PANEL = 16
"""Outputs of a weight are filled up to whole panels of so many."""
OF_EVERY_MODEL = 24 << 20
"""Bytes that do not grow with the slice: libraries' code as it is first called, a chunk's intermediate results."""


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 124M with random weights, as transformers makes it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config())
    model.save_pretrained(folder)
    return folder


def test_memory_and_idling(gpt2: Path) -> None:
    run = subprocess.run(
        mpirun(3, "-m", "tests.mpi.costs", gpt2),
        env=ENV,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    ranks = json.loads(run.stdout)
    print(ranks)
    vocab = -(-50257 // PANEL) * PANEL
    assert sum(rank["slice"] for rank in ranks) == 4 * (12 * 12 * 768 * 768 + vocab * 768), "the slices are the model"
    ranks[0]["slice"] += 4 * (50257 + 1024) * 768  # the embeddings, which are looked up and never multiplied
    for n, rank in enumerate(ranks):
        most = 1.05 * rank["slice"] + rank["kv"] + OF_EVERY_MODEL
        assert rank["grown"] < most, f"rank {n} held more than its slice: {rank}"
        assert rank["cpu"] < 0.03 * IDLE_S, f"rank {n} burned {rank['cpu']} s in {IDLE_S} s of waiting"
