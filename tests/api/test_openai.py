"""OpenAI's endpoints, as OpenAI's own client sees them; what is true of tokens and logprobs, transformers says."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
import transformers

from mpgpt.errors import RequestError
from tests.api.rig import TEMPLATE, Server, events, serving, until
from tests.support import vocabularies
from tests.support.models import save_random

PROMPT = "Once upon a time"
MESSAGES: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello?"}]


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def truth(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def theirs(truth: Any, ids: list[int], new: int) -> list[int]:
    """transformers' greedy tokens."""
    given = torch.tensor([ids])
    made = truth.generate(given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=new)
    tokens: list[int] = made[0, len(ids) :].tolist()
    return tokens


def text_of(server: Server, ids: list[int]) -> str:
    stream = server.session.tokenizer.stream()
    for token in ids:
        stream.push(token)
    stream.finish()
    return stream.text


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.owned_by) == ("tiny", "mpgpt")
    assert client.models.retrieve("tiny") == model


def test_a_completion_is_what_transformers_says(server: Server, client: openai.OpenAI, truth: Any) -> None:
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12)
    ids = theirs(truth, server.session.tokenizer.encode(PROMPT), 12)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index) == (text_of(server, ids), "length", 0)
    assert answer.usage and answer.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": len(PROMPT), "completion_tokens": 12, "total_tokens": len(PROMPT) + 12,
    }  # fmt: skip
    assert answer.model == "tiny" and answer.id.startswith("cmpl-") and answer.system_fingerprint


def test_a_chat_goes_through_the_template(server: Server, client: openai.OpenAI, truth: Any) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=9)
    rendered = "[system]Be kind.\n[user]Hello?\n[answer]"
    assert TEMPLATE.count("[answer]") == 1
    ids = theirs(truth, server.session.tokenizer.encode(rendered), 9)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", text_of(server, ids))
    assert choice.logprobs is None and choice.finish_reason == "length"
    parts: Any = [
        {"role": "developer", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        {"role": "user", "content": "Hello?"},
    ]
    same = client.chat.completions.create(model="tiny", messages=parts, max_tokens=9)
    assert same.choices[0].message.content == choice.message.content


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30, temperature=0.9, seed=5)
    chunks = list(
        client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=30, temperature=0.9, seed=5, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    told = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.delta.content or "" for choice in told) == whole.choices[0].message.content
    assert [choice.finish_reason for choice in told] == [None] * (len(told) - 1) + ["length"]
    assert len(told) > 5 and len({chunk.id for chunk in chunks}) == 1
    pieces = list(client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20, stream=True))
    again = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=20)
    assert "".join(piece.choices[0].text for piece in pieces) == again.choices[0].text
    assert pieces[-1].choices[0].finish_reason == "length" and pieces[0].usage is None


def test_streams_end_as_openais_do(server: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True}
    told = events(server.post("/v1/completions", body))
    assert told[-1] == "[DONE]" and all("usage" not in chunk for chunk in told[:-1])
    told = events(server.post("/v1/completions", body | {"stream_options": {"include_usage": True}}))
    assert all(chunk["usage"] is None for chunk in told[:-2])
    assert told[-2]["usage"]["completion_tokens"] == 3 and told[-2]["choices"] == []


def test_the_same_seed_is_the_same_text_and_choices_differ(client: openai.OpenAI) -> None:
    """Choice n has the seed counted up by n, so that each can be had again alone."""
    more: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 1.2, "top_p": 0.95}
    both = client.chat.completions.create(**more, seed=7, n=2)
    assert [choice.index for choice in both.choices] == [0, 1]
    texts = [choice.message.content for choice in both.choices]
    for n, text in enumerate(texts):
        alone = client.chat.completions.create(**more, seed=7 + n)
        assert alone.choices[0].message.content == text
    assert texts[0] != texts[1]
    assert both.usage and both.usage.completion_tokens == 24
    alone = client.chat.completions.create(**more, seed=7)
    assert alone.usage and both.usage.prompt_tokens == alone.usage.prompt_tokens, "a prompt counts once"
    unseeded = {client.chat.completions.create(**more).choices[0].message.content for _ in range(4)}
    assert len(unseeded) > 1, "without a seed each has its own"


def test_choices_of_a_stream_are_told_apart(client: openai.OpenAI) -> None:
    more: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 12, "temperature": 1.2, "seed": 7, "n": 3}
    whole = [choice.message.content for choice in client.chat.completions.create(**more).choices]
    texts, reasons = ["", "", ""], [0, 0, 0]
    for chunk in client.chat.completions.create(**more, stream=True):
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] += choice.finish_reason is not None
    assert texts == whole and reasons == [1, 1, 1]


def test_several_prompts_of_text_or_ids(server: Server, client: openai.OpenAI) -> None:
    prompts = ["One", "Two two", "Three three three"]
    answer = client.completions.create(model="tiny", prompt=prompts, max_tokens=5, n=2, seed=1)
    assert [choice.index for choice in answer.choices] == list(range(6))
    ids = [server.session.tokenizer.encode(prompt) for prompt in prompts]
    assert client.completions.create(model="tiny", prompt=ids, max_tokens=5, n=2, seed=1).choices == answer.choices
    assert answer.usage and answer.usage.prompt_tokens == sum(map(len, ids))
    for at, one in enumerate(ids):
        alone = client.completions.create(model="tiny", prompt=one, max_tokens=5)
        assert alone.choices[0].text == answer.choices[2 * at].text


@pytest.mark.parametrize("stop", ["x", ["x", "q!"]])
def test_a_stop_ends_the_text_before_it(server: Server, stop: Any) -> None:
    """A stop that is in the text: whatever character comes fifth."""
    plain = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 40}).json()["choices"][0]["text"]
    mark = plain[5]
    stops = mark if isinstance(stop, str) else [mark, *stop[1:]]
    answer = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 40, "stop": stops}).json()
    assert answer["choices"][0]["text"] == plain[: plain.index(mark)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < 40
    told = events(server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 40, "stop": stops, "stream": True}))
    assert "".join(chunk["choices"][0]["text"] for chunk in told[:-1]) == answer["choices"][0]["text"]


def test_an_end_token_ends_the_text(folder: Path) -> None:
    """It is counted, and not said."""
    with serving(folder, ignore_eos=False) as server:
        server.session.tokenizer.stop_ids = frozenset()
        ids = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 9, "logprobs": 0}).json()
        third = server.session.tokenizer
        tokens = ids["choices"][0]["logprobs"]["tokens"]
        wanted = [id for id in range(257) if third.labels_of([id]) == [tokens[2]]]
        server.session.tokenizer.stop_ids = frozenset(wanted)
        ended = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 9, "logprobs": 0}).json()
    (choice,) = ended["choices"]
    first = tokens.index(tokens[2])
    assert choice["finish_reason"] == "stop" and ended["usage"]["completion_tokens"] == first + 1
    assert choice["logprobs"]["tokens"] == tokens[:first]


# -- log probabilities


def test_logprobs_are_transformers_log_softmax(server: Server, client: openai.OpenAI, truth: Any) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=6, logprobs=True, top_logprobs=5, temperature=0.7, seed=3
    )
    content = answer.choices[0].logprobs and answer.choices[0].logprobs.content
    assert content and len(content) == 6
    ids = server.session.tokenizer.encode("[system]Be kind.\n[user]Hello?\n[answer]")
    with torch.inference_mode():
        for token in content:
            logs = truth(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            best = logs.topk(5)
            assert [likely.logprob for likely in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
            named = [server.session.tokenizer.bytes_of(id) for id in best.indices.tolist()]
            assert [bytes(likely.bytes or []) for likely in token.top_logprobs] == named
            (id,) = [id for id in range(300) if logs[id].item() == pytest.approx(token.logprob, abs=1e-4)]
            assert bytes(token.bytes or []) == server.session.tokenizer.bytes_of(id)
            ids.append(id)


def test_a_streams_logprobs_are_the_whole_answers(client: openai.OpenAI, server: Server) -> None:
    more: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**more).choices[0].logprobs
    told = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(**more, stream=True)]
    pieces = [token for logprobs in told if logprobs for token in logprobs.content or []]
    assert whole and pieces == whole.content and len(pieces) == 8
    body = {"prompt": PROMPT, "max_tokens": 8, "logprobs": 2}
    old = server.post("/v1/completions", body).json()["choices"][0]["logprobs"]
    assert [len(old[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [8] * 4
    chunks = events(server.post("/v1/completions", body | {"stream": True}))[:-1]
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for key in old:
        assert [each for part in parts if part for each in part[key]] == old[key]
    assert (
        server.post("/v1/completions", body | {"logprobs": 0}).json()["choices"][0]["logprobs"]["top_logprobs"] is None
    )


# -- penalties and the rest


def test_penalties_keep_from_saying_it_again(server: Server) -> None:
    """What they do to logits is the sampler's test; here they arrive."""
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 60}
    plain = server.post("/v1/completions", body).json()["choices"][0]["text"]
    lowered = server.post("/v1/completions", body | {"frequency_penalty": 2, "presence_penalty": 2}).json()
    assert lowered["choices"][0]["text"] != plain
    assert server.post("/v1/completions", body | {"presence_penalty": 0}).json()["choices"][0]["text"] == plain


def test_keys_that_are_not_known_are_passed_over(server: Server) -> None:
    body = {"prompt": PROMPT, "max_tokens": 3, "user": "me", "store": False, "something": {"new": [1]}, "n": None}
    assert server.post("/v1/completions", body).status_code == 200


NOTHING: dict[str, Any] = {
    "user": None, "n": None, "stop": None, "stream": None, "stream_options": None, "seed": None,
    "temperature": None, "top_p": None, "frequency_penalty": None, "presence_penalty": None, "logit_bias": None,
    "metadata": None, "store": None, "service_tier": None,
}  # fmt: skip
SAME: list[dict[str, Any]] = [
    NOTHING, {"stop": ""}, {"stop": []}, {"stop": ["", ""]}, {"stop": ["\x00" * 9] * 4}, {"n": 1}, {"stream": False},
    {"frequency_penalty": 0, "presence_penalty": 0.0}, {"logit_bias": {}}, {"logit_bias": {"5": 0, "7": 0.0}},
    {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto"}, {"temperature": 0}, {"top_p": 1},
    {"top_p": 0}, {"top_p": 0.0, "temperature": 2}, {"top_p": 0, "temperature": 1, "seed": -1}, {"seed": 2**63 - 1},
    {"seed": -(2**63)}, {"min_p": 0, "top_k": 0, "repetition_penalty": 1},
]  # fmt: skip
"""What asks for nothing else than a greedy server does anyway."""


def test_values_that_ask_for_nothing_change_nothing(server: Server) -> None:
    plain: dict[str, Any] = {"temperature": 0, "max_tokens": 20, "max_completion_tokens": 20}
    completions: list[dict[str, Any]] = [
        {"logprobs": False}, {"logprobs": None}, {"echo": False, "suffix": ""}, {"suffix": None}, {"best_of": 1},
    ]  # fmt: skip
    chats: list[dict[str, Any]] = [
        {"logprobs": False, "top_logprobs": 0}, {"top_logprobs": 0}, {"top_logprobs": None}, {"tools": []},
        {"tools": None, "tool_choice": None, "response_format": None}, {"functions": [], "function_call": "none"},
        {"tool_choice": "none", "parallel_tool_calls": False}, {"response_format": {"type": "text"}},
        {"max_completion_tokens": None}, {"max_tokens": None}, {"modalities": ["text"], "reasoning_effort": None},
    ]  # fmt: skip
    for path, body, key, more in (
        ("/v1/completions", plain | {"prompt": PROMPT}, "text", completions),
        ("/v1/chat/completions", plain | {"messages": MESSAGES}, "message", chats),
    ):
        told = server.post(path, body).json()["choices"][0][key]
        for asked in SAME + more:
            answer = server.post(path, body | asked)
            assert answer.status_code == 200, (asked, answer.text)
            assert answer.json()["choices"][0][key] == told, asked
    body = {"prompt": PROMPT, "max_tokens": 3, "stream": True, "stream_options": {"include_usage": None}}
    assert events(server.post("/v1/completions", body))[-1] == "[DONE]"
    sure = server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "logprobs": 0}).json()["choices"][0]
    assert len(sure["logprobs"]["tokens"]) == 3


def test_openais_ranges_to_their_ends(client: openai.OpenAI) -> None:
    more: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 3}
    for name, ends in (("temperature", (0, 2)), ("top_p", (0, 1)), ("presence_penalty", (-2, 2)), ("n", (1, 16)),
                       ("frequency_penalty", (-2, 2)), ("seed", (-(2**63), 2**63 - 1))):  # fmt: skip
        for end in ends:
            assert client.chat.completions.create(**more | {name: end}).choices
    sure = client.chat.completions.create(**more, logprobs=True, top_logprobs=0).choices[0].logprobs
    assert sure and [token.top_logprobs for token in sure.content or []] == [[]] * 3


def test_a_seed_below_0_is_a_seed_as_any(server: Server, client: openai.OpenAI) -> None:
    """Each gives its own text, again and again, and ``/query`` says which it was."""
    more: Any = {"model": "tiny", "messages": MESSAGES, "max_tokens": 16, "temperature": 1.2}
    texts = {
        seed: client.chat.completions.create(**more, seed=seed).choices[0].message.content
        for seed in (-1, 1, 0, -(2**63), 2**63 - 1, -(2**31))
    }
    assert len(set(texts.values())) == len(texts)
    for seed, text in texts.items():
        assert client.chat.completions.create(**more, seed=seed).choices[0].message.content == text
        asked = {"messages": MESSAGES, "max_tokens": 16, "temperature": 1.2, "seed": seed}
        told = server.post("/query", asked).json()
        assert (told["seed"], told["generated_text"]) == (seed, text)
    both = client.chat.completions.create(**more, seed=-1, n=2)
    assert [choice.message.content for choice in both.choices] == [texts[-1], texts[0]]


# -- errors


def test_errors_are_those_of_openais_client(server: Server, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="the model gpt-9 is not here; this server runs tiny") as missing:
        client.completions.create(model="gpt-9", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match=r"512 tokens.*511") as long:
        client.completions.create(model="tiny", prompt="x" * 512)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools are not supported"):
        tool: Any = {"type": "function", "function": {"name": "f"}}
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[tool])
    with pytest.raises(openai.BadRequestError, match="temperature") as hot:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert hot.value.param == "temperature"


BAD: dict[str, tuple[str, Any]] = {
    "no JSON": ("/v1/completions", b"{"),
    "no object": ("/v1/completions", b"[]"),
    "nothing": ("/v1/completions", b""),
    "no prompt": ("/v1/completions", {}),
    "an empty prompt": ("/v1/completions", {"prompt": ""}),
    "no prompts": ("/v1/completions", {"prompt": []}),
    "an empty list of ids": ("/v1/completions", {"prompt": [[]]}),
    "a negative id": ("/v1/completions", {"prompt": [-1]}),
    "an id that the model lacks": ("/v1/completions", {"prompt": [300]}),
    "text and ids": ("/v1/completions", {"prompt": ["a", 1]}),
    "too many prompts": ("/v1/completions", {"prompt": ["a"] * 17}),
    "half a character": ("/v1/completions", b'{"prompt": "\\ud83d"}'),
    "no tokens": ("/v1/completions", {"prompt": "a", "max_tokens": 0}),
    "half a token": ("/v1/completions", {"prompt": "a", "max_tokens": 1.5}),
    "tokens in words": ("/v1/completions", {"prompt": "a", "max_tokens": "many"}),
    "n 0": ("/v1/completions", {"prompt": "a", "n": 0}),
    "n 17": ("/v1/completions", {"prompt": "a", "n": 17}),
    "five stops": ("/v1/completions", {"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}),
    "a long stop": ("/v1/completions", {"prompt": "a", "stop": "x" * 201}),
    "top_p below 0": ("/v1/completions", {"prompt": "a", "top_p": -0.1}),
    "top_p 2": ("/v1/completions", {"prompt": "a", "top_p": 2}),
    "top_k -1": ("/v1/completions", {"prompt": "a", "top_k": -1}),
    "a temperature that is none": ("/v1/completions", b'{"prompt": "a", "temperature": NaN}'),
    "an endless temperature": ("/v1/completions", b'{"prompt": "a", "temperature": 1e999}'),
    "a seed too small": ("/v1/completions", {"prompt": "a", "seed": -(2**63) - 1}),
    "half a seed": ("/v1/completions", {"prompt": "a", "seed": 1.5}),
    "a seed too large": ("/v1/completions", {"prompt": "a", "seed": 2**63}),
    "frequency_penalty 3": ("/v1/completions", {"prompt": "a", "frequency_penalty": 3}),
    "logprobs 21": ("/v1/completions", {"prompt": "a", "logprobs": 21}),
    "logit_bias": ("/v1/completions", {"prompt": "a", "logit_bias": {"5": 1}}),
    "echo": ("/v1/completions", {"prompt": "a", "echo": True}),
    "suffix": ("/v1/completions", {"prompt": "a", "suffix": "b"}),
    "best_of": ("/v1/completions", {"prompt": "a", "best_of": 3}),
    "stream_options without a stream": ("/v1/completions", {"prompt": "a", "stream_options": {}}),
    "no messages": ("/v1/chat/completions", {"messages": []}),
    "messages of text": ("/v1/chat/completions", {"messages": "hello"}),
    "a strange role": ("/v1/chat/completions", {"messages": [{"role": "king", "content": "a"}]}),
    "no content": ("/v1/chat/completions", {"messages": [{"role": "user"}]}),
    "an image": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    "too many messages": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 1001}),
    "top_logprobs alone": ("/v1/chat/completions", {"messages": MESSAGES, "top_logprobs": 2}),
    "a JSON answer": ("/v1/chat/completions", {"messages": MESSAGES, "response_format": {"type": "json_object"}}),
}


@pytest.mark.parametrize("path, body", BAD.values(), ids=BAD.keys())
def test_bad_input_is_a_sentence(server: Server, path: str, body: Any) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = server.post(path, None, content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    (error,) = answer.json().values()
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert len(error["message"]) > 10 and "Traceback" not in answer.text
    assert not server.service.streams


@pytest.mark.parametrize(
    "body, param, said",
    [
        ({"prompt": [-1]}, "prompt.0", "greater than or equal to 0"),
        ({"prompt": []}, "prompt", "at least 1 item"),
        ({"prompt": ["a"] * 17}, "prompt", "at most 16 items"),
        ({"prompt": {"a": 1}}, "prompt", "should be a valid"),
        ({"prompt": "a", "stop": list("abcde")}, "stop", "at most 4 items"),
        ({"prompt": "a", "stop": ["a", "x" * 201]}, "stop.1", "at most 200 characters"),
        ({"prompt": "a", "stop": 5}, "stop", "should be a valid"),
        ({}, "prompt", "required"),
    ],
)
def test_a_value_of_several_kinds_has_one_sentence(server: Server, body: Any, param: str, said: str) -> None:
    """That of the kind which it is likest."""
    error = server.post("/v1/completions", body).json()["error"]
    assert error["param"] == param and said in error["message"], error


def test_a_message_that_is_no_text_is_named(server: Server) -> None:
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}]}
    error = server.post("/v1/chat/completions", body).json()["error"]
    assert error["param"].startswith("messages.0.content.1") and "'text'" in error["message"]


HALF = b'"\\ud83d"'


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/completions", b'{"prompt": "a", "model": %s}'),
        ("/v1/completions", b'{"prompt": "a", "logit_bias": {%s: "x"}}'),
        ("/v1/completions", b'{"prompt": "a", "stop": %s, "n": 0}'),
        ("/v1/chat/completions", b'{"messages": [{"role": %s, "content": "a"}]}'),
        ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": %s}]}'),
        ("/query", b'{"text": "a", "session_id": %s}'),
        ("/query", b'{"text": %s, "raw": true}'),
    ],
)
def test_half_a_character_breaks_nothing(server: Server, path: str, body: bytes) -> None:
    """Wherever it stands, and whatever is said of it."""
    content = body.replace(b"%s", HALF)
    answer = server.post(path, None, content=content, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500 and answer.json()["error"]


def test_other_methods_and_paths(server: Server) -> None:
    answer = server.get("/v1/completions")
    assert answer.status_code == 405 and answer.json()["error"]["message"] == "GET is not for this path"
    assert server.get("/v1/nothing").json()["error"]["type"] == "not_found_error"


# -- who goes away, and who is too many


def test_a_client_that_goes_away_frees_its_slot(server: Server) -> None:
    body: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 400}
    with server.slow():
        with server.client().completions.create(**body, stream=True) as stream:
            next(iter(stream))
            assert server.engine.running == 1
        until(lambda: not server.engine.running, 5.0)
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=0.3).completions.create(**body)
        until(lambda: not server.engine.running, 5.0)
        with pytest.raises(openai.APITimeoutError):
            server.client(timeout=0.3).completions.create(**body, n=8)
        until(lambda: not server.engine.running and not server.engine.waiting, 5.0)
    server.idle()


def test_a_full_queue_says_when_to_come_back(folder: Path) -> None:
    from mpgpt_api.service import Limits

    with serving(folder, max_sequences=2, limits=Limits(queue=1)) as server:
        body: Any = {"model": "tiny", "prompt": PROMPT, "max_tokens": 60}
        with server.slow():
            texts: list[str] = []

            def ask() -> None:
                texts.append(server.client().completions.create(**body).choices[0].text)

            clients = [threading.Thread(target=ask) for _ in range(3)]
            for thread in clients:
                thread.start()
            until(lambda: server.engine.running == 2 and server.engine.waiting == 1)
            with pytest.raises(openai.RateLimitError, match="the queue is full") as full:
                server.client().completions.create(**body)
            assert 1 <= int(full.value.response.headers["retry-after"]) <= 60
            assert server.get("/health").json() | {"ranks": 0} == {
                "status": "busy", "healthy": True, "model": "tiny", "ranks": 0,
            }  # fmt: skip
        for thread in clients:
            thread.join()
        assert len(texts) == 3 and len(set(texts)) == 1
        server.idle()
        with pytest.raises(openai.BadRequestError, match="4 answers are more than"):
            server.client().completions.create(**body, n=4)


def test_an_answer_that_takes_too_long_is_ended(folder: Path) -> None:
    from mpgpt_api.service import Limits

    with serving(folder, limits=Limits(time_s=0.4)) as server, server.slow():
        body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 400}
        answer = server.post("/v1/completions", body)
        assert answer.status_code == 504 and answer.headers["x-should-retry"] == "false"
        assert answer.json()["error"]["code"] == "timeout"
        told = events(server.post("/v1/completions", body | {"stream": True}))
        assert told[0]["choices"][0]["text"] and told[-1]["error"]["code"] == "timeout"
        told = events(server.post("/chat", {"text": PROMPT, "max_tokens": 400}))
        assert told[-1] == {"error": "the answer took longer than this server allows", "done": True}
        until(lambda: not server.engine.running, 5.0)


# -- text


class Broken:
    """A text that fails at its third token."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.starts: list[int] = []
        self.text, self.stopped = "", False

    def push(self, token: int) -> str:
        self.starts.append(len(self.text))
        if len(self.starts) == 3:
            raise self._error
        self.text += "x"
        return "x"

    def finish(self) -> str:
        return ""


@pytest.fixture
def broken(server: Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """Requests with this stop have a text that fails."""
    tokenizer, stream = server.session.tokenizer, server.session.tokenizer.stream

    def some(stops: Any = (), **more: Any) -> Any:
        sentences = {"BREAK": RequestError("this text cannot be"), "BUG": KeyError("secret")}
        return Broken(sentences[stops[0]]) if stops and stops[0] in sentences else stream(stops, **more)

    monkeypatch.setattr(tokenizer, "stream", some)
    return "BREAK"


def test_a_text_that_fails_is_one_requests_error(server: Server, client: openai.OpenAI, broken: str) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 40}
    alone = server.post("/v1/completions", body).json()["choices"][0]["text"]
    others: list[str] = []
    with server.slow(0.005):
        thread = threading.Thread(
            target=lambda: others.append(server.post("/v1/completions", body).json()["choices"][0]["text"])
        )
        thread.start()
        with pytest.raises(openai.InternalServerError, match="this text cannot be") as told:
            client.completions.create(model="tiny", **body, stop=broken)
        assert told.value.type == "server_error"
        with pytest.raises(openai.InternalServerError, match="this text cannot be"):
            client.chat.completions.create(model="tiny", messages=MESSAGES, stop=broken, n=2, logprobs=True)
        for path in ("/v1/completions", "/v1/chat/completions"):
            asked = {"prompt": PROMPT} if path == "/v1/completions" else {"messages": MESSAGES}
            chunks = events(server.post(path, asked | {"max_tokens": 40, "stream": True, "stop": broken}))
            assert chunks[-1]["error"]["message"] == "this text cannot be", "and no [DONE] behind it"
            assert len(chunks) > 2, "what was said before it stands"
        answer = server.post("/query", {"text": PROMPT, "stop": broken})
        assert (answer.status_code, answer.json()) == (500, {"error": "this text cannot be", "success": False})
        told_events = events(server.post("/chat", {"text": PROMPT, "stop": broken}))
        assert told_events[-1] == {"error": "this text cannot be", "done": True}
        thread.join()
    assert others == [alone]
    server.idle()


def test_an_error_of_ours_is_not_told_to_clients(
    server: Server, broken: str, capfd: pytest.CaptureFixture[str]
) -> None:
    answer = server.post("/v1/completions", {"prompt": PROMPT, "stop": "BUG"})
    assert answer.status_code == 500 and "secret" not in answer.text and "internal error" in answer.text
    assert "secret" in capfd.readouterr().err
    assert server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2}).status_code == 200


def test_every_likely_token_has_a_name(server: Server) -> None:
    """A random model says bytes that are no characters: they print alike, and are not alike."""
    body = {"prompt": PROMPT, "max_tokens": 30, "logprobs": 5, "temperature": 0}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    logprobs = choice["logprobs"]
    for token, top, own in zip(logprobs["tokens"], logprobs["top_logprobs"], logprobs["token_logprobs"], strict=True):
        assert len(top) == 5 and max(top.values()) == top[token] == own
    assert any(token.startswith("bytes:\\x") for token in logprobs["tokens"])


def test_offsets_are_into_the_text(server: Server) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 60, "logprobs": 0, "temperature": 2, "seed": 5}
    (choice,) = server.post("/v1/completions", body).json()["choices"]
    text, tokens, offsets = choice["text"], choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"]
    assert offsets == sorted(offsets) and offsets[0] == 0 and offsets[-1] <= len(text)
    printed = [(token, at) for token, at in zip(tokens, offsets, strict=True) if not token.startswith("bytes:")]
    assert len(printed) > 5 and all(text[at:].startswith(token) for token, at in printed)


@pytest.mark.parametrize("end", [3, 11, 20])
def test_offsets_with_a_stop_are_into_what_is_returned(server: Server, end: int) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 60, "logprobs": 1, "temperature": 2, "seed": 5}
    whole = server.post("/v1/completions", body).json()["choices"][0]["text"]
    stops = [whole[end : end + 3], whole[end - 1 : end + 1] + "not said"]
    (choice,) = server.post("/v1/completions", body | {"stop": stops}).json()["choices"]
    offsets, text = choice["logprobs"]["text_offset"], choice["text"]
    assert choice["finish_reason"] == "stop" and text == whole[: whole.index(stops[0])]
    assert offsets == sorted(offsets) and max(offsets) <= len(text)
    chunks = events(server.post("/v1/completions", body | {"stop": stops, "stream": True}))[:-1]
    shown, parts = "", list[int]()
    for chunk in chunks:
        shown += chunk["choices"][0]["text"]
        if logprobs := chunk["choices"][0]["logprobs"]:
            parts += logprobs["text_offset"]
            assert max(parts) <= len(shown), "no token before the text that it begins at"
    assert (shown, parts) == (text, offsets)


LLAMA_TEMPLATE = "{% for m in messages %}<s>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A server whose tokenizer is of Llama 2's kind, and transformers' reading of it."""
    folder = save_random("llama", tmp_path_factory.mktemp("sentences") / "tiny")
    vocabularies.save(vocabularies.llama("abcdefghijkl"), folder, chat_template=LLAMA_TEMPLATE)
    kind: Any = transformers.PreTrainedTokenizerFast
    with serving(folder, max_sequences=2) as running:
        yield running, kind.from_pretrained(folder)


def test_a_continuation_has_its_first_space(sentences: Any) -> None:
    """The prompt's text and what is returned are the text of all ids, as transformers decodes them."""
    server, theirs = sentences
    prompt = server.session.tokenizer.encode("abc de")
    spaces = 0
    for seed in range(0, 80, 16):
        how: Any = {"max_tokens": 1, "temperature": 4, "seed": seed}
        choices = server.post("/v1/completions", how | {"prompt": "abc de", "logprobs": 0, "n": 16}).json()["choices"]
        for choice in choices:
            (token,) = choice["logprobs"]["tokens"]
            id = next(id for id in range(300) if server.session.tokenizer.labels_of([id]) == [token])
            before, whole = (theirs.decode(ids, skip_special_tokens=True) for ids in (prompt, [*prompt, id]))
            assert before + choice["text"] == whole
            spaces += choice["text"].startswith(" ")
        raw = server.post("/query", how | {"text": "abc de", "raw": True}).json()
        assert raw["generated_text"] == choices[0]["text"]
        chat = how | {"messages": [{"role": "user", "content": "abc de"}], "n": 16}
        for choice in server.post("/v1/chat/completions", chat).json()["choices"]:
            assert not choice["message"]["content"].startswith(" "), "an answer is a text of its own"
    assert spaces > 2


def test_a_random_llama_says_bytes_and_goes_on(sentences: Any) -> None:
    """Five seeds of the kind that ended the server, at once; and after them it answers."""
    server, _ = sentences
    body: Any = {"prompt": "abc", "max_tokens": 300, "temperature": 1}
    for seed in range(5):
        whole = server.post("/v1/completions", body | {"seed": seed}).json()["choices"][0]
        told = events(server.post("/v1/completions", body | {"seed": seed, "stream": True}))[:-1]
        assert "".join(chunk["choices"][0]["text"] for chunk in told) == whole["text"]
        assert whole["finish_reason"] == "length" and "\ufffd" in whole["text"]


def test_a_vocabulary_with_an_entry_of_two_words_has_log_probabilities(tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "tiny")
    vocabularies.save(vocabularies.byte_level(), folder)
    with serving(folder) as server:
        most = server.session.tokenizer.encode("a")
        body: Any = {"prompt": most, "max_tokens": 20, "logprobs": 20, "temperature": 3, "seed": 1}
        (choice,) = server.post("/v1/completions", body).json()["choices"]
        assert all(len(top) == 20 for top in choice["logprobs"]["top_logprobs"])
        assert any("two words" in top for top in choice["logprobs"]["top_logprobs"])
