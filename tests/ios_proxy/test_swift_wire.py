"""The Swift session against the Python one: the same walks, the same frames out, the same commands, the same end.

Skipped where nobody has built it: `swift build --package-path ios_proxy/GPT2Node`. MPGPT_WALKS is how many walks.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests.ios_proxy.test_vectors import GOLDEN
from tests.ios_proxy.walks import Script, play, walk, without_texts
from tests.support.swift import built

WALKS = int(os.environ.get("MPGPT_WALKS", "2000"))
TOGETHER = 500


@pytest.fixture(scope="module")
def probe() -> Path:
    return built("mpgpt-wire-probe")


def swift(probe: Path, scripts: Iterable[Script]) -> list[dict[str, Any]]:
    """What comes of the scripts in Swift, in the words of ``walks.play``."""
    lines = "".join(json.dumps(script | {"steps": [*map(_step, script["steps"])]}) + "\n" for script in scripts)
    done = subprocess.run([probe], input=lines, capture_output=True, text=True, timeout=300, check=True)
    return [_outcome(json.loads(line)) for line in done.stdout.splitlines()]


def _step(step: dict[str, Any]) -> dict[str, Any]:
    return step | {"do": "error"} if step.get("do") == "failed" else step


def _outcome(answer: dict[str, Any]) -> dict[str, Any]:
    assert "problem" not in answer, answer
    closed = answer["closed"] and {"code": answer["closed"]["code"] if answer["closed"]["by"] == "node" else None}
    return {
        "commands": [*map(_command, answer["commands"])], "out": without_texts(bytes.fromhex(answer["out"])),
        "closed": closed,
    }  # fmt: skip


def _command(command: dict[str, Any]) -> dict[str, Any]:
    plain: dict[str, Any] = {key: int(value) if key in ("offset", "epoch") else value for key, value in command.items()}
    plain["name"] = plain.pop("command").upper()
    if "x" in plain:
        plain |= {"width": plain.pop("embed"), "values": plain.pop("x")}
        del plain["tokens"]
    for file in plain.get("files", ()):
        file["length"] = int(file["length"])
    return plain


def _without_proof(outcome: dict[str, Any]) -> dict[str, Any]:
    """The proof has been checked, and Swift keeps nothing of it."""
    commands = [{"name": "PROOF"} if each["name"] == "PROOF" else each for each in outcome["commands"]]
    return json.loads(json.dumps(outcome | {"commands": commands}))  # type: ignore[no-any-return]


def same(scripts: Sequence[Script], probe: Path) -> None:
    got = swift(probe, scripts)
    assert len(got) == len(scripts)
    for script, outcome in zip(scripts, got, strict=True):
        assert outcome == _without_proof(play(script)), json.dumps(script)


def test_the_golden_sessions(probe: Path) -> None:
    same([session["script"] for session in GOLDEN["sessions"]], probe)


def test_walks(probe: Path) -> None:
    def batches() -> Iterator[list[Script]]:
        seeds = iter(range(1000, 1000 + WALKS))
        while batch := [walk(seed) for seed in islice(seeds, TOGETHER)]:
            yield batch

    for batch in batches():
        same(batch, probe)
