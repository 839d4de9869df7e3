"""Requests that the model makes no numbers of, among others: each is its own client's error, and no other notices."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.api.rig import Server, events, save_model, serving
from tests.support.models import break_embedding

SENTENCE = "the model's logits for token 1 of the answer are NaN or infinite"
GOOD = ("Once upon a time", "a", "lorem ipsum dolor sit amet " * 5, "Row, row, row your boat. " * 4)
BAD = ("~", "Once ~ upon a time", "lorem ipsum dolor sit amet " * 5 + "~", "~" + "Row, row, row your boat. " * 4)
NEW = 10


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With fewer slots than requests, so that a bad one's is taken over at once; ~ has an embedding of NaN."""
    folder = break_embedding(save_model("llama-biased", tmp_path_factory.mktemp("broken") / "tiny"), "~")
    with serving(folder, max_sequences=3) as running:
        yield running


def body_of(path: str, text: str, stream: bool, seed: int) -> dict[str, Any]:
    """Sampled, so that texts differ; with log probabilities where there are any."""
    body: dict[str, Any] = {"temperature": 0.7, "seed": seed, "max_tokens": NEW}
    if path == "/v1/completions":
        return body | {"prompt": text, "stream": stream, "logprobs": 2, "n": 1 + seed % 2}
    if path == "/v1/chat/completions":
        messages = [{"role": "user", "content": text}]
        return body | {"messages": messages, "stream": stream, "logprobs": True, "top_logprobs": 2}
    return body | {"text": text}


PATHS = (
    ("/v1/completions", False), ("/v1/completions", True), ("/v1/chat/completions", False),
    ("/v1/chat/completions", True), ("/chat", True), ("/query", False),
)  # fmt: skip


def strict(text: str) -> Any:
    """JSON as it is defined: without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def said(stream: bool, answer: httpx.Response) -> dict[int, list[Any]]:
    """What an answer says, by choice: its text, log probabilities, and how it ends. Where a stream is cut into pieces
    depends on the company."""
    parts = events(answer) if stream else [strict(answer.text)]
    told: dict[int, list[Any]] = {}
    for part in parts:
        if part == "[DONE]":
            continue
        for choice in part.get("choices", [part]):
            one = told.setdefault(choice.get("index", 0), ["", [], None, None])
            message = choice.get("message") or choice.get("delta") or choice
            texts = (message.get("content"), *(choice.get(key) for key in ("text", "token", "generated_text")))
            one[0] += next((text for text in texts if text), "")
            logprobs = choice.get("logprobs") or {}
            for key in ("content", "token_logprobs", "top_logprobs"):
                one[1] += logprobs.get(key, [])
            one[2] = choice.get("finish_reason")
            one[3] = part.get("error")  # of a good one that says ~ itself, alone and in company
    return told


def refused(path: str, stream: bool, answer: httpx.Response) -> None:
    """A status and a sentence in the path's form, or an event with it, the stream's last."""
    if stream:
        assert answer.status_code == 200
        *before, last = events(answer)
        assert not any(isinstance(part, str) or part.get("token") or "error" in part for part in before)
    else:
        assert answer.status_code == 500
        last = strict(answer.text)
    if path.startswith("/v1"):
        assert last["error"]["message"].startswith(SENTENCE) and last["error"]["type"] == "server_error"
    else:
        assert last["error"].startswith(SENTENCE) and (last["done"] is True if stream else last["success"] is False)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_the_others_say_what_they_would_have_said(server: Server, seed: int) -> None:
    """Which requests are bad, how they are asked for, and when they come is random."""
    dice = random.Random(seed)
    requests = []
    for _ in range(14):
        bad = dice.random() < 0.4
        text = dice.choice(BAD if bad else GOOD)
        path, stream = dice.choice(PATHS)
        requests.append((bad, path, stream, body_of(path, text, stream, dice.randrange(4))))
    with ThreadPoolExecutor(len(requests)) as clients:
        answers = list(clients.map(lambda one: server.post(one[1], one[3]), requests))
    for (bad, path, stream, body), answer in zip(requests, answers, strict=True):
        if bad:
            refused(path, stream, answer)
        else:
            assert said(stream, answer) == alone(server, path, stream, body)
    assert any(one[0] and one[3] is None for told in KNOWN.values() for one in told.values())
    server.idle()
    assert server.get("/health").json()["status"] == "ok"


KNOWN: dict[str, dict[int, list[Any]]] = {}


def alone(server: Server, path: str, stream: bool, body: dict[str, Any]) -> dict[int, list[Any]]:
    """What is said to the only client."""
    key = json.dumps([path, stream, body])
    if key not in KNOWN:
        server.idle()
        KNOWN[key] = said(stream, server.post(path, body))
    return KNOWN[key]


def test_openais_client_sees_a_server_error(server: Server) -> None:
    client = server.client()
    with pytest.raises(openai.InternalServerError, match=SENTENCE):
        client.completions.create(model="tiny", prompt=BAD[1], max_tokens=NEW)
    with pytest.raises(openai.APIError, match=SENTENCE):
        list(client.completions.create(model="tiny", prompt=BAD[1], max_tokens=NEW, stream=True))
    with pytest.raises(openai.InternalServerError, match=SENTENCE):  # one of several prompts
        client.completions.create(model="tiny", prompt=[GOOD[0], BAD[0]], max_tokens=NEW)
    assert client.completions.create(model="tiny", prompt=GOOD[0], max_tokens=NEW).choices[0].text
    server.idle()


def test_failed_answers_are_counted(server: Server) -> None:
    def count() -> float:
        lines = server.get("/metrics").text.splitlines()
        found = [line for line in lines if line.startswith('mpgpt_answers_total{finish_reason="error"}')]
        return float(found[0].split()[-1]) if found else 0.0

    before = count()
    assert server.post("/query", {"text": "~", "max_tokens": 3}).status_code == 500
    server.idle()
    assert count() == before + 1
