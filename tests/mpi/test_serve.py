"""`mpirun -n 3 mpgpt serve` with a real model, as OpenAI's client sees it; and what it answers against what
`mpgpt generate` says."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from soak import ranks_of, served, soak
from tests.support.launch import mpgpt, records

THREE = ("--layers", "0-9,10-19,20-29", "--threads", "1")
QUESTIONS = ["What is the capital of France?", "Name three animals that can fly."]


@pytest.fixture(scope="module")
def server(smollm2: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with served(3, "--model", str(smollm2), *THREE) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: tuple[str, subprocess.Popen[bytes]]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0, timeout=60)


def ask(question: str, **more: Any) -> Any:
    return {"model": "smollm2-135m", "messages": [{"role": "user", "content": question}], **more}


def test_answers_are_those_of_the_command_line(client: openai.OpenAI, smollm2: Path, tmp_path: Path) -> None:
    """Greedy, and sampled with the same seed: on other ranks, alone and together, streamed and not."""
    sampled = {"temperature": 0.8, "top_p": 0.9, "seed": 11}
    lines = [{"id": f"{question}/{n}", "prompt": question, **more} for question in QUESTIONS
             for n, more in enumerate(({}, sampled))]  # fmt: skip
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = mpgpt(0, "generate", "--model", smollm2, "--prompts", source, "--out", out, "--max-new-tokens", "24")
    assert run.returncode == 0, run.stderr
    told = records(out)
    for question in QUESTIONS:
        for n, more in enumerate(({}, sampled)):
            wanted = told[f"{question}/{n}"]
            answer = client.chat.completions.create(**ask(question, max_tokens=24, **more))
            assert answer.choices[0].message.content == wanted["text"]
            assert answer.choices[0].finish_reason == wanted["finish_reason"]
            assert answer.usage and answer.usage.completion_tokens == wanted["completion_tokens"]
            chunks = client.chat.completions.create(**ask(question, max_tokens=24, **more), stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted["text"]
    assert told[f"{QUESTIONS[0]}/0"]["text"] == "The capital of France is Paris."


def test_choices_stops_and_logprobs(client: openai.OpenAI) -> None:
    both = client.chat.completions.create(**ask(QUESTIONS[1], max_tokens=16, temperature=1.0, seed=3, n=2))
    assert both.choices[0].message.content != both.choices[1].message.content
    again = client.chat.completions.create(**ask(QUESTIONS[1], max_tokens=16, temperature=1.0, seed=4))
    assert again.choices[0].message.content == both.choices[1].message.content
    stopped = client.chat.completions.create(**ask(QUESTIONS[0], max_tokens=16, stop=["Paris"]))
    assert stopped.choices[0].message.content == "The capital of France is "
    assert stopped.choices[0].finish_reason == "stop"
    sure = client.chat.completions.create(**ask(QUESTIONS[0], max_tokens=16, logprobs=True, top_logprobs=3))
    content = sure.choices[0].logprobs and sure.choices[0].logprobs.content
    assert content and [token.token for token in content] == ["The", " capital", " of", " France", " is", " Paris", "."]
    assert all(token.top_logprobs[0].token == token.token for token in content), "greedy takes the likeliest"
    assert all(-5 < token.logprob <= 0 and len(token.top_logprobs) == 3 for token in content)
    raw = client.completions.create(model="smollm2-135m", prompt="One, two, three,", max_tokens=4)
    assert raw.choices[0].text.startswith(" four")


def test_errors_and_a_stream_that_is_left(client: openai.OpenAI, server: tuple[str, subprocess.Popen[bytes]]) -> None:
    with pytest.raises(openai.BadRequestError, match=r"has \d+ tokens; with a context of 4096 it may have 4095"):
        client.chat.completions.create(**ask("word " * 5000))
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**ask("Hello") | {"model": "gpt-9"})
    with client.chat.completions.create(**ask("Tell me a long story.", max_tokens=2000), stream=True) as stream:
        for _, _ in zip(stream, range(5), strict=False):
            pass
    left = time.monotonic()
    while httpx.get(f"{server[0]}/cluster").json()["running"]:
        assert time.monotonic() - left < 10, "the slot should be free at the next step"
        time.sleep(0.05)


def test_the_cluster_has_three_ranks(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    url = server[0]
    httpx.get(f"{url}/cluster")
    time.sleep(1.05)
    httpx.post(f"{url}/query", json={"text": "Hello", "max_tokens": 8}, timeout=30)
    told = httpx.get(f"{url}/cluster").json()
    assert [rank["layers"] for rank in told["ranks"]] == [[0, 9], [10, 19], [20, 29]]
    assert all(rank["tokens"] > 0 and rank["state"] == "ok" for rank in told["ranks"])
    health = httpx.get(f"{url}/health").json()
    assert health["healthy"] and [rank["rank"] for rank in health["ranks"]] == [0, 1, 2]
    assert httpx.post(f"{url}/reconnect").json()["success"]


def test_many_clients_at_once(server: tuple[str, subprocess.Popen[bytes]]) -> None:
    """A short soak; the long one, and what it took, is in bench/LOG.md. Each answer is what it was alone."""
    url, process = server
    found = asyncio.run(soak(url, clients=32, seconds=8, processes=ranks_of(process)))
    assert not found.wrong and not found.running
    assert found.answers > 5 and found.left > 1
    assert max(found.health_s) < 5, "other requests are served meanwhile"


def test_it_ends_when_told_to(models: dict[str, Path]) -> None:
    """Whoever is being answered hears of it, and the port is free."""
    with served(2, "--model", str(models["gpt2"]), "--layers", "0-2,3-4", "--raw", "--ignore-eos") as (url, process):
        (rank_0,) = [p for p in ranks_of(process) if p.environ()["OMPI_COMM_WORLD_RANK"] == "0"]
        body = {"text": "Once", "max_tokens": 500, "temperature": 1.0}
        with httpx.stream("POST", f"{url}/chat", json=body, timeout=30) as answer:
            lines = answer.iter_lines()
            next(lines)
            rank_0.send_signal(signal.SIGTERM)
            told = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert told[-1].get("error") == "the server is stopping" or told[-1]["finish_reason"] == "length"
        assert process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_no_rank_outlives_mpirun(models: dict[str, Path]) -> None:
    """Killed so that it can end nothing: an idle server must not keep its port, nor its memory."""
    with served(2, "--model", str(models["gpt2"]), "--layers", "0-2,3-4") as (_, process):
        ranks = ranks_of(process)
        assert len(ranks) == 2
        process.kill()
        _, alive = psutil.wait_procs(ranks, timeout=15)
        for rank in alive:
            rank.kill()
        assert not alive, "they live on"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--host", "0.0.0.0"), "--api-key-file FILE, or --insecure"),
        (("--insecure", "--host", "no.such.host.invalid"), "no address of this machine"),
        (("--api-key-file", "/nowhere/keys"), "/nowhere/keys cannot be read"),
        (("--origin", "localhost:3000"), "the origin localhost:3000 is none"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(
    models: dict[str, Path], arguments: tuple[str, ...], said: str
) -> None:
    run = mpgpt(0, "serve", "--model", models["gpt2"], *arguments)
    assert run.returncode == 2 and said in run.stderr and run.stderr.count("mpgpt: ") == 1


def test_a_port_that_is_taken(models: dict[str, Path]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = mpgpt(2, "serve", "--model", models["gpt2"], "--port", port)
    assert run.returncode == 2 and f"cannot listen on 127.0.0.1:{port}: Address already in use" in run.stderr
