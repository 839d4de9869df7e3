"""The hybrid ring: SmolLM2 on three ranks, the middle one before a node that executes the saved package: the iPad's
stand-in in Python, which may do so in float32, and the iPad's own in Swift, where it is built."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from mpgpt.core import Span
from soak import served
from tests.support.launch import ENV, ROOT, mpgpt, records
from tests.support.swift import built

pytest.importorskip("coremltools")

SPAN = Span(start=14, stop=17)
LAYERS = {"rank_0": list(range(14)), "rank_1": [14, 15, 16], "rank_2": list(range(17, 30))}
PROMPTS = [
    "What is the capital of France?", "Name three colours.", "Write a line about the sea.", "What is 2 + 2?",
    "Who wrote Hamlet?", "Say hello in Spanish.", "Name a planet.", "What do bees make?",
]  # fmt: skip
BATCH = ("--max-new-tokens", "16", "--threads", "1", "--strategy", "greedy", "--no-drafts", "--context", "256")


@pytest.fixture(scope="module")
def place(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, the token, the prompts, and the all-torch ring's records."""
    from mpgpt_ios.convert.package import PackageOptions, convert

    folder = tmp_path_factory.mktemp("ipad")
    convert(smollm2, SPAN, folder / "smol.mlpackage", PackageOptions(slots=4, context=256))
    (folder / "token").write_text("a token for this test\n")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (folder / "plain.yaml").write_text(yaml.safe_dump({"layer_distribution": LAYERS, "max_sequences": 4}))
    run = generate(folder, "plain.yaml", "truth.jsonl")
    assert run.returncode == 0, run.stderr
    return folder


def generate(place: Path, config: str, out: str) -> subprocess.CompletedProcess[str]:
    return mpgpt(
        3, "generate", "--model", "smollm2-135m", "--config", with_model(place / config), "--prompts",
        place / "prompts.txt", "--out", place / out, *BATCH, timeout=180,
    )  # fmt: skip


def with_model(config: Path) -> Path:
    """Layers count only where the file names the model itself."""
    tree = yaml.safe_load(config.read_text()) | {"hf_model_name": "smollm2-135m"}
    config.write_text(yaml.safe_dump(tree))
    return config


def settings(place: Path, port: int, **more: Any) -> str:
    """The name of a settings file with the iPad at ``port``."""
    ipad = {
        "rank": 1, "address": f"127.0.0.1:{port}", "token_file": str(place / "token"),
        "package": str(place / "smol.mlpackage"), **more,
    }  # fmt: skip
    name = f"{port}.yaml"
    (place / name).write_text(yaml.safe_dump({"layer_distribution": LAYERS, "ipad": ipad, "use_coreml_rank1": True}))
    return name


PYTHON = (sys.executable, "-m", "mpgpt", "ipad-node", "--precision", "float32")


@pytest.fixture(params=["python", "swift"])
def program(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """How a node's command line begins."""
    return PYTHON if request.param == "python" else (str(built("mpgpt-node")), "--python", sys.executable)


@contextlib.contextmanager
def node(
    place: Path, *options: str, program: tuple[str, ...] = PYTHON, port: int = 0
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A node as a process of its own, and the port on which it listens."""
    command = [*program, "--port", str(port), "--token-file", str(place / "token"), *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV, cwd=ROOT)
    try:
        assert process.stdout
        line = process.stdout.readline()
        assert line.startswith("listening on 127.0.0.1:"), line
        yield process, int(line.rpartition(":")[2])
    finally:
        process.terminate()
        process.communicate(timeout=30)


def texts(place: Path, out: str) -> dict[Any, list[int]]:
    return {key: record["token_ids"] for key, record in records(place / out).items()}


def test_eight_sequences_through_four_slots_give_the_same_tokens(
    place: Path, tmp_path: Path, program: tuple[str, ...]
) -> None:
    """With the package sent over the wire."""
    with node(place, "--store", str(tmp_path), program=program) as (process, port):
        run = generate(place, settings(place, port), "ipad.jsonl")
        assert run.returncode == 0, run.stderr
        precision = "float32" if program == PYTHON else "declared"
        assert "sending its package" in run.stderr and f"is ready: evaluator, {precision}" in run.stderr
        assert "room for 4 sequences of 256 tokens" in run.stderr
        (line,) = [line for line in run.stderr.splitlines() if line.startswith("[iPad of rank 1: ")]
        assert "ms computing and" in line and "ms network" in line and line.endswith("never away]")
        process.terminate()
        assert process.wait(30) == 0
    assert texts(place, "ipad.jsonl") == texts(place, "truth.jsonl")


def test_a_node_that_is_killed_in_the_middle_changes_nothing(place: Path, program: tuple[str, ...]) -> None:
    out = place / "killed.jsonl"
    out.unlink(missing_ok=True)
    with node(place, "--package", str(place / "smol.mlpackage"), program=program) as (process, port):

        def kill_when_it_computes() -> None:
            assert process.stdout
            process.stdout.readline()  # the proxy is here
            end = time.monotonic() + 120
            while not out.exists() and time.monotonic() < end:
                time.sleep(0.02)
            while not out.read_bytes() and time.monotonic() < end:  # the first of twice as many as there are slots
                time.sleep(0.02)
            process.kill()

        thread = threading.Thread(target=kill_when_it_computes)
        thread.start()
        run = generate(place, settings(place, port), "killed.jsonl")
        thread.join()
    assert run.returncode == 0, run.stderr
    assert texts(place, "killed.jsonl") == texts(place, "truth.jsonl")
    assert run.stderr.count("went away") == 1, run.stderr


def test_without_an_ipad_the_rank_computes_or_the_run_ends(place: Path) -> None:
    run = generate(place, settings(place, 9), "absent.jsonl")
    assert run.returncode == 0 and texts(place, "absent.jsonl") == texts(place, "truth.jsonl")
    assert "the iPad at 127.0.0.1:9 cannot be used: Connection refused" in run.stderr
    run = generate(place, settings(place, 9, fallback="none"), "none.jsonl")
    assert run.returncode == 1 and "Traceback" not in run.stderr
    assert "cannot be used: Connection refused; `fallback: none` lets nobody compute its layers" in run.stderr


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        ({"package": "absent.mlpackage"}, 1, "`mpgpt convert coreml` writes it"),
        ({"token_file": "absent"}, 2, "there is no token file absent; make one with"),
        ({"rank": 7}, 2, "use_coreml_rank1 needs an iPad behind rank 1"),
    ],
)
def test_what_cannot_be_is_said(place: Path, more: dict[str, Any], status: int, words: str) -> None:
    run = generate(place, settings(place, 9, **more), "bad.jsonl")
    assert run.returncode == status and words in run.stderr and "Traceback" not in run.stderr


def test_layers_that_are_not_the_packages(place: Path) -> None:
    name = settings(place, 9)
    tree = yaml.safe_load((place / name).read_text())
    tree["layer_distribution"] = {"rank_0": list(range(15)), "rank_1": [15, 16], "rank_2": list(range(17, 30))}
    (place / name).write_text(yaml.safe_dump(tree))
    run = generate(place, name, "bad.jsonl")
    assert run.returncode == 2
    assert "holds layers 14-16, but the rank is to have 15-16" in run.stderr


def test_a_server_says_that_its_ipad_is_away_and_fetches_it_back(place: Path) -> None:
    package = ("--package", str(place / "smol.mlpackage"))
    body = {"text": PROMPTS[2], "max_tokens": 16}
    with contextlib.ExitStack() as nodes:
        process, port = nodes.enter_context(node(place, *package))
        config = str(with_model(place / settings(place, port)))
        with served(3, "--config", config, "--threads", "1", "--no-drafts", "--context", "256") as (url, _):
            truth = httpx.post(f"{url}/query", json=body, timeout=60).json()["generated_text"]
            told = httpx.get(f"{url}/cluster").json()["ranks"][1]
            assert (told["kind"], told["layers"], told["state"]) == ("ipad", [14, 16], "ok")
            assert told["device"]["requests"] >= 16 and told["device"]["sent"] > 0 and told["device"]["falls"] == 0
            process.kill()
            process.wait(30)
            assert httpx.post(f"{url}/query", json=body, timeout=60).json()["generated_text"] == truth
            time.sleep(1.05)
            told = httpx.get(f"{url}/cluster").json()["ranks"][1]
            assert told["state"] == "away" and told["device"]["falls"] == 1
            assert httpx.get(f"{url}/health").json()["status"] == "degraded"
            assert 'mpgpt_ipad_fallbacks_total{rank="1"} 1.0' in httpx.get(f"{url}/metrics").text
            told = httpx.post(f"{url}/reconnect", timeout=30).json()
            assert told["success"] is False and "dialled rank 1's iPad again" in told["did"]
            nodes.enter_context(node(place, *package, port=port))
            told = httpx.post(f"{url}/reconnect", timeout=30).json()
            assert told["success"] is True, told
            assert httpx.post(f"{url}/query", json=body, timeout=60).json()["generated_text"] == truth
            assert httpx.get(f"{url}/health").json()["status"] == "ok"


def test_bench_and_plan_know_the_ipad(place: Path, tmp_path: Path) -> None:
    with node(place, "--package", str(place / "smol.mlpackage")) as (_, port):
        config = with_model(place / settings(place, port))
        run = mpgpt(
            3, "bench", "--model", "smollm2-135m", "--config", config, "--layers", "0-13,14-16,17-29", "--threads", "1",
            "--concurrency", "2", "--rounds", "1", "--prompt-tokens", "40", "--new-tokens", "6", "--json",
            tmp_path / "out.json", timeout=180,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        (result,) = json.loads((tmp_path / "out.json").read_text())["runs"]
        devices = [stage["device"] for stage in result["stages"]]
        assert devices[0] is devices[2] is None
        assert devices[1]["requests"] >= 6 and devices[1]["compute_s"] > 0 and devices[1]["falls"] == 0
        for stage in result["stages"]:
            parts = sum(stage[part] for part in ("compute_s", "wait_s", "send_s", "other_s"))
            assert parts == pytest.approx(stage["wall_s"], rel=0.02)
        run = mpgpt(
            3, "plan", "--model", "smollm2-135m", "--config", config, "--threads", "1", "--json",
            tmp_path / "plan.json", timeout=180,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        plan = json.loads((tmp_path / "plan.json").read_text())
        assert plan["ranks"][1]["kind"] == "ipad" and plan["ranks"][1]["layers"] == [14, 17]
