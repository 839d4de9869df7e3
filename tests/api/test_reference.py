"""The reference API, by plain httpx; and the ring as it is."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from mpgpt.core import DeviceAccount, StageStats
from mpgpt.transport.link import Silence
from tests.api.rig import Server, events, save_model, serving, until

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Hello?"}]


def test_chat_streams_what_query_answers(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 12, "temperature": 0.9, "seed": 4, "session_id": "mine"}
    answer = server.post("/query", body).json()
    told = events(server.post("/chat", body))
    last = told.pop()
    assert all(set(one) == {"token", "done"} and one["done"] is False for one in told)
    assert "".join(one["token"] for one in told) == answer["generated_text"] == last["full_text"]
    assert last["done"] is True and answer["success"] is True
    for one in (last, answer):
        assert (one["num_tokens"], one["seed"], one["session_id"], one["finish_reason"]) == (12, 4, "mine", "length")
        assert 0 < one["time_to_first_token_ms"] <= one["total_time_ms"] and one["tokens_per_second"] > 0
        assert one["prompt_tokens"] == len("[user]Hello?\n[answer]")
    openai = server.post(
        "/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 12, "temperature": 0.9, "seed": 4}
    )
    assert openai.json()["choices"][0]["message"]["content"] == answer["generated_text"]


def test_text_is_a_message_or_stands_as_it_is(server: Server) -> None:
    def said(path: str, body: Any) -> Any:
        answer = server.post(path, body | {"max_tokens": 8}).json()
        return answer["generated_text"] if "generated_text" in answer else answer["choices"][0]["text"]

    assert said("/query", {"text": "Hello?"}) == said("/query", {"messages": MESSAGES})
    raw = said("/query", {"text": PROMPT, "raw": True})
    assert raw == said("/v1/completions", {"prompt": PROMPT}) != said("/query", {"text": PROMPT})


def test_the_strategy_of_a_request(server: Server) -> None:
    """Greedy stays greedy whatever temperature a page sends with it."""
    body: dict[str, Any] = {"text": PROMPT, "max_tokens": 16, "temperature": 1.3, "seed": 9}
    texts = {
        name: server.post("/query", body | {"decoding_strategy": name}).json()["generated_text"]
        for name in ("greedy", "sampling", "top_k", "top_p")
    }
    plain = server.post("/query", {"text": PROMPT, "max_tokens": 16}).json()["generated_text"]
    assert texts["greedy"] == plain != texts["sampling"]
    wide = server.post("/query", body | {"decoding_strategy": "top_k", "top_k": 300}).json()["generated_text"]
    assert wide == texts["sampling"]


def test_config_says_what_the_server_was_started_with(server: Server, folder: Path) -> None:
    told = server.get("/config").json()
    assert told["parameters"] == {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
    wanted = {"model": "tiny", "strategy": "greedy", "max_new_tokens": 256, "context": 512, "chat": True, "nodes": 1}
    assert {key: told[key] for key in wanted} == wanted and told["system"] is None and told["dtype"] == "float32"
    options: dict[str, Any] = {
        "strategy": "top_p",
        "temperature": 0.5,
        "top_p": 0.8,
        "max_new_tokens": 7,
        "system": "Be brief.",
    }
    with serving(folder, **options) as other:
        told = other.get("/config").json()
        assert (told["strategy"], told["max_new_tokens"], told["system"]) == ("top_p", 7, "Be brief.")
        assert told["parameters"]["temperature"] == 0.5 and told["parameters"]["top_p"] == 0.8
        told = other.post("/query", {"text": "Hello?", "seed": 1}).json()
        assert told["num_tokens"] == 7
        assert told["prompt_tokens"] == len("[system]Be brief.\n[user]Hello?\n[answer]"), "the server's system message"
        own = [{"role": "system", "content": "No."}, *MESSAGES]
        assert other.post("/query", {"messages": own}).json()["prompt_tokens"] == len(
            "[system]No.\n[user]Hello?\n[answer]"
        )


def test_a_model_without_a_template_completes(tmp_path: Path) -> None:
    with serving(save_model("gpt2", tmp_path / "plain", chat=False)) as server:
        assert server.get("/config").json()["chat"] is False
        told = server.post("/query", {"text": PROMPT, "max_tokens": 5}).json()
        assert told["prompt_tokens"] == len(PROMPT)
        for path in ("/query", "/chat"):
            refused = server.post(path, {"messages": MESSAGES})
            assert refused.status_code == 400 and "no chat template" in refused.json()["error"]
        refused = server.post("/v1/chat/completions", {"messages": MESSAGES})
        assert refused.status_code == 400 and "no chat template" in refused.json()["error"]["message"]


BAD: dict[str, Any] = {
    "neither": {},
    "both": {"text": "a", "messages": MESSAGES},
    "raw messages": {"messages": MESSAGES, "raw": True},
    "an empty text": {"text": "", "raw": True},
    "no text": {"text": 5},
    "a strategy that is none": {"text": "a", "decoding_strategy": "beam"},
    "tokens 0": {"text": "a", "max_tokens": 0},
    "temperature -1": {"text": "a", "temperature": -1},
    "a long session": {"text": "a", "session_id": "x" * 201},
    "too long": {"text": "x" * 600},
}


@pytest.mark.parametrize("path", ["/chat", "/query"])
@pytest.mark.parametrize("body", BAD.values(), ids=BAD.keys())
def test_bad_input_is_a_sentence(server: Server, path: str, body: Any) -> None:
    answer = server.post(path, body)
    assert answer.status_code == 400
    told = answer.json()
    assert set(told) == {"error", "success"} and told["success"] is False and len(told["error"]) > 10


def test_a_client_that_leaves_a_chat_frees_its_slot(server: Server) -> None:
    with server.slow():
        with httpx.stream("POST", server.url + "/chat", json={"text": PROMPT, "max_tokens": 400}) as answer:
            next(answer.iter_bytes())
            assert server.engine.running == 1
        until(lambda: not server.engine.running, 5.0)
    server.idle()


@pytest.mark.parametrize("path", ["/chat", "/v1/completions"])
def test_a_stream_that_waits_shows_that_it_lives(server: Server, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    """Comments, which mean nothing: between the events, and while no token has come."""
    for module in ("reference", "openai"):
        monkeypatch.setattr(f"mpgpt_api.{module}.TICK_S", 0.05)
    body = {"text": PROMPT, "prompt": PROMPT, "max_tokens": 3, "stream": True}
    with server.slow(0.3):
        answer = server.post(path, body)
    assert answer.text.startswith(": waiting\n\n") and answer.text.count(": waiting\n\n") > 3
    last = events(answer)[-1]
    assert last == "[DONE]" or last["done"] is True


# -- the ring as it is


def test_the_cluster_as_it_is(server: Server) -> None:
    server.get("/cluster")
    server.post("/query", {"text": PROMPT, "max_tokens": 20})
    time.sleep(1.05)
    told = server.get("/cluster").json()
    assert (told["model"], told["layers"], told["slots"], told["queue"]) == ("tiny", 5, 4, 64)
    (rank,) = told["ranks"]
    assert (rank["rank"], rank["kind"], rank["layers"], rank["state"]) == (0, "cpu", [0, 4], "ok")
    assert rank["device"] is None and rank["slice_bytes"] > 0 and rank["kv_bytes"] > 0 and rank["peak_rss"] > 1e7
    assert rank["steps"] >= 20 and rank["tokens"] >= 20
    shares = [rank[name] for name in ("compute", "wait", "send", "other")]
    assert sum(shares) == pytest.approx(1, abs=1e-6) and rank["compute"] > 0
    assert rank["wait"] > 0.2, "for a second there was nothing to do"
    assert told["window_s"] > 1 and told["tokens_per_second"] == pytest.approx(20 / told["window_s"], rel=0.2)


def test_the_cluster_is_seen_while_it_is_busy(server: Server) -> None:
    with server.slow(0.1):
        with httpx.stream("POST", server.url + "/chat", json={"text": PROMPT, "max_tokens": 400}) as answer:
            pieces = answer.iter_bytes()  # held: the connection goes with it
            next(pieces)
            time.sleep(1.05)
            told = server.get("/cluster").json()
            assert told["running"] == 1 and told["ranks"][0]["steps"] > 5 and told["tokens_per_second"] > 5
            assert server.get("/health").json()["status"] == "ok"
        until(lambda: not server.engine.running, 5.0)


def test_metrics_are_prometheus(server: Server) -> None:
    from prometheus_client.parser import text_string_to_metric_families as parse

    def samples() -> dict[tuple[str, ...], float]:
        answer = server.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        return {
            (sample.name, *(f"{key}={value}" for key, value in sorted(sample.labels.items()))): sample.value
            for family in parse(answer.text)
            for sample in family.samples
        }

    server.idle()
    before = samples()
    server.post("/query", {"text": PROMPT, "max_tokens": 11})
    server.post("/query", {"text": "", "raw": True})
    server.get("/made/up")
    time.sleep(1.05)
    after = samples()

    def grown(*key: str) -> float:
        return after[key] - before.get(key, 0.0)

    assert grown("mpgpt_requests_total", "path=/query", "status=200") == 1
    assert grown("mpgpt_requests_total", "path=/query", "status=400") == 1
    assert grown("mpgpt_requests_total", "path=other", "status=404") == 1
    assert grown("mpgpt_tokens_total", "kind=generated") >= 11
    assert grown("mpgpt_stage_steps_total", "rank=0") >= 11
    assert grown("mpgpt_stage_seconds_total", "rank=0", "what=compute") > 0
    assert grown("mpgpt_time_to_first_token_seconds_count") == 1
    assert after["mpgpt_running",] == 0 and after["mpgpt_slots",] == 4


def test_reconnect_says_what_it_did(server: Server) -> None:
    told = server.post("/reconnect", None).json()
    assert told["success"] is True and told["message"] == "the ring is whole"
    assert len(told["did"]) == 2 and "every rank" in told["did"][1]


def test_an_ipad_that_is_away_is_said_to_be(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The accounts are the pipeline's tests' and the iPad's; here is what is made of them."""
    asked: list[bool] = []
    away = [True]

    def ask(listener: Any, *, redial: bool = False) -> None:
        asked.append(redial)
        if redial and len(asked) > 2:
            away[0] = False
        device = DeviceAccount(
            requests=3, compute_s=0.5, network_s=0.25, sent=10, received=20, falls=1, away_s=0.5, thermal="fair",
            away=away[0],
        )  # fmt: skip
        account = StageStats(
            rank=0, steps=4, tokens=5, wall_s=2.0, compute_s=1.0, wait_s=0.5, send_s=0.25, other_s=0.25, peak_rss=7,
            device=device,
        )  # fmt: skip
        threading.Timer(0.01, listener, ((account,),)).start()

    monkeypatch.setattr(server.engine, "request_stats", ask)
    monkeypatch.setattr("mpgpt_api.reference.BACK_S", 0.5)
    time.sleep(1.0)
    (rank,) = server.get("/cluster").json()["ranks"]
    assert (rank["state"], rank["compute"], rank["wait"]) == ("away", 0.5, 0.25)
    assert rank["device"] == {
        "requests": 3, "compute_s": 0.5, "network_s": 0.25, "sent": 10, "received": 20, "falls": 1, "away_s": 0.5,
        "thermal": "fair",
    }  # fmt: skip
    health = server.get("/health").json()
    assert (health["status"], health["healthy"]) == ("degraded", True)
    (rank,) = health["ranks"]
    assert {"rank": 0, "kind": "cpu", "state": "away", "silent_s": 0.0}.items() <= rank.items() and rank["host"]
    told = server.post("/reconnect", None).json()
    assert told["success"] is False and "does not answer" in told["message"] and asked.count(True) == 1
    told = server.post("/reconnect", None).json()
    assert told["success"] is True, told
    assert server.get("/health").json()["status"] == "ok"


def test_a_stalled_ring_is_said_to_be(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpgpt_api.watch.STALLED_S", 0.2)
    monkeypatch.setattr("mpgpt_api.reference.RECONNECT_S", 0.3)
    body = {"text": PROMPT, "max_tokens": 3}
    with server.slow(1.0), httpx.stream("POST", server.url + "/chat", json=body, timeout=9) as answer:
        until(lambda: server.engine.silent_s > 0.2)
        answered = httpx.get(server.url + "/health")
        health = answered.json()
        assert answered.status_code == 503
        assert (health["status"], health["healthy"], health["ranks"][0]["state"]) == ("stalled", False, "stalled")
        told = server.post("/reconnect", None).json()
        assert told["success"] is False and "has not answered" in told["message"]
        server.nap_s[0] = 0.0
        answer.read()
    assert server.post("/reconnect", None).json()["success"] is True
    assert server.get("/health").json()["status"] == "ok"


def test_a_silent_rank_is_blamed_and_no_other(server: Server) -> None:
    """Before a silence counts as a loss, whoever watches the server can see it, and whose it is."""
    server.silences.append(Silence(rank=0, host="mini2", seconds=4.25))
    answered = httpx.get(server.url + "/health")
    assert answered.status_code == 503
    health = answered.json()
    (rank,) = health["ranks"]
    assert (health["status"], rank["state"], rank["silent_s"]) == ("stalled", "stalled", 4.2)
    server.silences[:] = [Silence(rank=1, host="elsewhere", seconds=4.0)]
    health = httpx.get(server.url + "/health").json()
    assert (health["status"], health["ranks"][0]["state"]) == ("stalled", "ok")
    server.silences.clear()
    assert server.get("/health").json()["status"] == "ok"


def test_a_lost_ring_is_said_to_every_stream(folder: Path) -> None:
    with serving(folder) as server:
        with (
            server.slow(),
            httpx.stream("POST", server.url + "/chat", json={"text": PROMPT, "max_tokens": 400}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            server.service.run_in_loop(partial(server.service.fail, "rank 1 on mini2 has been silent for 10 s"))
            assert "rank 1 on mini2 has been silent for 10 s" in "".join(lines)
        refused = httpx.post(server.url + "/chat", json={"text": PROMPT})
        assert refused.status_code == 503 and "rank 1 on mini2" in refused.json()["error"]


def test_a_server_that_stops_says_so(folder: Path) -> None:
    with serving(folder) as server:
        with (
            server.slow(),
            httpx.stream("POST", server.url + "/chat", json={"text": PROMPT, "max_tokens": 400}) as answer,
        ):
            lines = answer.iter_lines()
            next(lines)
            server.service.run_in_loop(server.service.stop)
            told = [json.loads(line.removeprefix("data: ")) for line in lines if line]
        assert told[-1] == {"error": "the server is stopping", "done": True}
        until(lambda: not server.engine.running, 5.0)
        refused = server.post("/query", {"text": "a"})
        assert refused.status_code == 503 and refused.json()["error"] == "the server is stopping"
        assert server.get("/health").json()["status"] == "stopping"
