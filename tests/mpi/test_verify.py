"""`mpgpt verify` on ranks that agree, and on ranks of which one does not."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpgpt.commands.verify import Verification, VerifyOptions
from mpgpt.errors import UsageError
from mpgpt.model.native import library
from mpgpt.transport.link import Link, QueueLink, SoloWorld
from tests.support.launch import mpgpt
from tests.support.models import save_random, save_tokenizer

pytestmark = pytest.mark.skipif(isinstance(library.find(), library.Absent), reason="there are no compiled kernels")


PART = 3
"""What a rank answers of its part: begin, end, digest. The model has more layers than that."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random("qwen3", tmp_path_factory.mktemp("model") / "qwen3")
    save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("ranks", [0, 3])
def test_ranks_that_agree(ranks: int, model: Path) -> None:
    done = mpgpt(ranks, "verify", "--model", model, "--dtype", "int8", "--threads", "2")
    assert done.returncode == 0, done.stderr
    assert ("on the ranks together: the bits of one" in done.stdout) == (ranks > 1)
    assert done.stdout.count("same bits") == max(1, ranks) and "All bits are as they should be." in done.stdout


class Pair(SoloWorld):
    """A world of this rank and of another, whose answers are this one's, changed."""

    size = 2

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        self.hosts, self._change = ["mini1", "pi5"], change

    def connect(self, source: int, target: int, capacity: int) -> Link:
        return QueueLink(self.bell)

    def gather(self, data: bytes) -> list[bytes]:
        other = json.loads(data)
        self._change(other["answer"])
        return [data, json.dumps(other).encode()]


def verified(change: Callable[[Any], None], model: Path) -> tuple[int, str]:
    """The exit status and what is printed."""
    options, out = VerifyOptions(model=str(model)), io.StringIO()
    console = Console(file=out, width=200)
    verification = Verification(options, home=model.parent, console=console, report=lambda line: None)
    world = Pair(change)
    with closing(world.bell):
        return verification.run_rank0(verification.start(world)), out.getvalue()


def test_a_rank_whose_kernels_are_wrong_is_named(model: Path) -> None:
    def change(answer: Any) -> None:
        if isinstance(answer, dict) and "gpt2" in answer:
            answer["gpt2"]["int8"] = answer["qwen3"]["float16"] = "0" * 16

    status, said = verified(change, model)
    assert status == 1 and "All bits" not in said
    assert "mpgpt: rank 1 on pi5 differs in gpt2 int8, qwen3 float16: its kernels do not compute what they" in said


def test_a_rank_that_differs_in_a_model_is_named_with_the_layer(model: Path) -> None:
    def change(answer: Any) -> None:
        if isinstance(answer, list) and len(answer) > PART:
            answer[2:] = ["0" * 16] * len(answer[2:])

    status, said = verified(change, model)
    assert status == 1
    assert f"rank 1 on pi5 differs from rank 0 on mini1 in {model} (float32), from layer 2 on" in said
    assert "parts" not in said


def test_bits_that_change_on_the_way_from_rank_to_rank_are_told(model: Path) -> None:
    def change(answer: Any) -> None:
        if isinstance(answer, list) and len(answer) == PART:
            answer[2] = "0" * 16

    status, said = verified(change, model)
    assert status == 1 and "All bits" not in said
    assert f"{model} (float32) in 2 parts differs from rank 0 alone, from rank 1 on pi5 with layers" in said


def test_a_host_without_kernels_is_named(model: Path) -> None:
    class Bare(Pair):
        def gather(self, data: bytes) -> list[bytes]:
            return [data, json.dumps({"answer": "!no C++ compiler was found"}).encode()]

    verification = Verification(VerifyOptions(), home=model.parent, console=Console(), report=lambda line: None)
    world = Bare(lambda answer: None)
    sentence = r"rank 1 on pi5 has no compiled kernels: no C\+\+ compiler was found"
    with closing(world.bell), pytest.raises(UsageError, match=sentence):
        verification.run_rank0(verification.start(world))


def test_a_host_that_does_without_them(model: Path) -> None:
    """MPGPT_NATIVE=0: torch computes, and the same greedy text comes of it."""
    command = (
        "generate",
        "--model",
        model,
        "--prompt",
        "Once upon a time",
        "--raw",
        "--max-new-tokens",
        "12",
        "--explain",
    )
    without, with_them = (mpgpt(0, *command, env={"MPGPT_NATIVE": value}) for value in ("0", "1"))
    assert without.returncode == with_them.returncode == 0, without.stderr
    assert "torch's kernels, because MPGPT_NATIVE is 0" in without.stderr and "compiled kernels for" in with_them.stderr
    assert without.stdout == with_them.stdout != ""
    refused = mpgpt(0, *command[:-1], "--kernel", "nosuch")
    assert refused.returncode == 2 and "there are native, native-float32, " in refused.stderr
