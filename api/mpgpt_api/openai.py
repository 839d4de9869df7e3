"""OpenAI's endpoints: models, completions, chat completions.

Knows: how a request in OpenAI's form becomes jobs, and their pieces an answer or a stream in OpenAI's form.
Must not know: engines, threads, MPI.
"""

from __future__ import annotations

import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mpgpt import __version__
from mpgpt.core import SEEDS
from mpgpt_api.events import ALIVE, STREAM, TICK_S, Events, event, unless_gone
from mpgpt_api.problems import Problem, documented
from mpgpt_api.service import AnswerRequest, Job, Piece, Service
from mpgpt_api.shapes import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatRequest,
    Choice,
    Completion,
    CompletionRequest,
    Likely,
    Logprobs,
    Model,
    Models,
    OpenAIRequest,
    Said,
    TokenLogprob,
    Usage,
)  # fmt: skip

CHAT, COMPLETIONS, MODELS = "/v1/chat/completions", "/v1/completions", "/v1/models"
REFUSALS = (400, 401, 403, 404, 408, 413, 429, 500, 503, 504)


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The first fields of an answer, and of every chunk of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def routes(service: Service, *, model: str, dtype: str, created: int) -> APIRouter:
    router = APIRouter()
    fingerprint = "fp_" + hashlib.sha256(f"{__version__} {model} {dtype}".encode()).hexdigest()[:12]
    served = Model(id=model, created=created, context_length=service.context)

    def header(kind: str) -> Header:
        return Header(
            id=f"{kind}-{uuid.uuid4().hex}", created=int(time.time()), model=model, system_fingerprint=fingerprint
        )

    def known(name: str | None) -> None:
        if name is not None and name != model:
            raise Problem(
                404, f"the model {name} is not here; this server runs {model}", param="model", code="model_not_found"
            )

    @router.get(MODELS, responses=documented(MODELS, 401, 403))
    async def models() -> Models:
        """The one model that this cluster runs."""
        return Models(data=[served])

    @router.get(MODELS + "/{name:path}", responses=documented(MODELS, 401, 403, 404))
    async def one_model(name: str) -> Model:
        """The same by its name."""
        known(name)
        return served

    @router.post(CHAT, response_model=ChatCompletion, responses=documented(CHAT, *REFUSALS) | {200: STREAM})
    async def chat(body: ChatRequest, request: Request) -> Response:
        """The next message of a conversation, through the model's chat template."""
        known(body.model)
        ids = await service.encode_chat([message.plain for message in body.messages])
        job = service.open(_wanted(service, body, [ids], body.most_tokens, body.logprob_count))
        head = header("chatcmpl")
        if body.stream:
            return Events(job, _chat_events(service, job, head, body))
        with job:
            pieces = await unless_gone(request, job.whole())
            choices = [_chat_choice(service, index, parts, body) for index, parts in enumerate(pieces)]
            answer = ChatCompletion(**_fields(head), choices=choices, usage=_usage(job, body.choices))
        return JSONResponse(answer.model_dump())

    @router.post(COMPLETIONS, response_model=Completion, responses=documented(COMPLETIONS, *REFUSALS) | {200: STREAM})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """The continuation of a prompt, or of several, as they stand."""
        known(body.model)
        prompts = [tuple(one) if isinstance(one, list) else await service.encode(one) for one in body.prompts]
        job = service.open(_wanted(service, body, prompts, body.max_tokens, body.logprob_count, continues=True))
        head = header("cmpl")
        if body.stream:
            return Events(job, _completion_events(service, job, head, body))
        with job:
            pieces = await unless_gone(request, job.whole())
            choices = [_choice(service, index, parts, body) for index, parts in enumerate(pieces)]
            answer = Completion(**_fields(head), choices=choices, usage=_usage(job, body.choices))
        return JSONResponse(answer.model_dump())

    return router


def _wanted(
    service: Service, body: OpenAIRequest, prompts: Sequence[tuple[int, ...]], most: int | None, logprobs: int, *,
    continues: bool = False,
) -> list[AnswerRequest]:  # fmt: skip
    """``n`` answers to each prompt. Each has a seed of its own, counted up from the one that was given."""
    first = service.session.sampling(body.overrides, body.seed)
    samplings = [replace(first, seed=(first.seed + n) % SEEDS) for n in range(body.choices)]
    return [
        AnswerRequest(
            ids=ids, sampling=sampling, max_new_tokens=most, stops=body.stops, logprobs=logprobs, continues=continues
        )
        for ids in prompts
        for sampling in samplings
    ]


def _fields(head: Header) -> dict[str, Any]:
    return {
        "id": head.id, "created": head.created, "model": head.model, "system_fingerprint": head.system_fingerprint,
    }  # fmt: skip


def _usage(job: Job, choices: int) -> Usage:
    """A prompt counts once, however many answers it has."""
    prompt = sum(len(stream.request.ids) for stream in job.streams[::choices])
    new = sum(len(stream.ids) for stream in job.streams)
    return Usage(prompt_tokens=prompt, completion_tokens=new, total_tokens=prompt + new)


# -- log probabilities


def _likely(service: Service, token: int, logprob: float) -> Likely:
    raw = service.session.tokenizer.bytes_of(token)
    return Likely(token=raw.decode(errors="replace"), logprob=logprob, bytes=list(raw))


def _chat_logprobs(service: Service, pieces: Sequence[Piece]) -> ChatLogprobs:
    content = [
        TokenLogprob(
            **_likely(service, *own).model_dump(), top_logprobs=[_likely(service, *other) for other in likeliest]
        )
        for piece in pieces
        for own, *likeliest in piece.logprobs
    ]
    return ChatLogprobs(content=content)


def _logprobs(service: Service, pieces: Sequence[Piece], top: int) -> Logprobs:
    logprobs = list(chain.from_iterable(piece.logprobs for piece in pieces))
    # Named together with the token itself, which so has the same name everywhere, and first choice of it.
    labels = [service.session.tokenizer.labels_of([token for token, _ in some]) for some in logprobs]
    likeliest = [
        dict(zip(names[1:], [logprob for _, logprob in some[1:]], strict=True))
        for names, some in zip(labels, logprobs, strict=True)
    ]
    return Logprobs(
        tokens=[own for own, *_ in labels], token_logprobs=[own[1] for own, *_ in logprobs],
        top_logprobs=likeliest if top else None, text_offset=[start for piece in pieces for start in piece.starts],
    )  # fmt: skip


# -- answers


def _text(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def _chat_choice(service: Service, index: int, pieces: Sequence[Piece], body: ChatRequest) -> ChatChoice:
    logprobs = _chat_logprobs(service, pieces) if body.logprobs else None
    reason: Any = pieces[-1].finish_reason
    return ChatChoice(index=index, message=Said(content=_text(pieces)), logprobs=logprobs, finish_reason=reason)


def _choice(service: Service, index: int, pieces: Sequence[Piece], body: CompletionRequest) -> Choice:
    logprobs = _logprobs(service, pieces, body.logprobs or 0) if body.logprob_count else None
    reason: Any = pieces[-1].finish_reason
    return Choice(index=index, text=_text(pieces), logprobs=logprobs, finish_reason=reason)


# -- streams


def _chunks(head: Header, kind: str, usage: bool, choices: list[dict[str, Any]], total: Usage | None) -> str:
    chunk = {**_fields(head), "object": kind, "choices": choices}
    return event(chunk | ({"usage": total and total.model_dump()} if usage else {}))


async def _chat_events(service: Service, job: Job, head: Header, body: ChatRequest) -> AsyncIterator[str]:
    def chunk(index: int, delta: dict[str, str], logprobs: ChatLogprobs | None, reason: str | None) -> str:
        tokens = logprobs and logprobs.model_dump()
        choice = {"index": index, "delta": delta, "logprobs": tokens, "finish_reason": reason}
        return _chunks(head, "chat.completion.chunk", body.wants_usage, [choice], None)

    def chunks(piece: Piece) -> Iterator[str]:
        logprobs = _chat_logprobs(service, [piece]) if body.logprobs and piece.ids else None
        if piece.text or logprobs:
            yield chunk(piece.choice, {"content": piece.text}, logprobs, None)
        if piece.finish_reason:
            yield chunk(piece.choice, {}, None, piece.finish_reason)

    for index in range(len(job.streams)):
        yield chunk(index, {"role": "assistant", "content": ""}, None, None)
    async for text in _events(job, chunks):
        yield text
    if body.wants_usage:
        yield _chunks(head, "chat.completion.chunk", True, [], _usage(job, body.choices))
    yield "data: [DONE]\n\n"


async def _completion_events(service: Service, job: Job, head: Header, body: CompletionRequest) -> AsyncIterator[str]:
    def chunks(piece: Piece) -> Iterator[str]:
        logprobs = _logprobs(service, [piece], body.logprobs or 0) if body.logprob_count and piece.ids else None
        if piece.text or piece.finish_reason or logprobs:
            choice = {
                "index": piece.choice, "text": piece.text, "logprobs": logprobs and logprobs.model_dump(),
                "finish_reason": piece.finish_reason or None,
            }  # fmt: skip
            yield _chunks(head, "text_completion", body.wants_usage, [choice], None)

    async for text in _events(job, chunks):
        yield text
    if body.wants_usage:
        yield _chunks(head, "text_completion", True, [], _usage(job, body.choices))
    yield "data: [DONE]\n\n"


async def _events(job: Job, chunks: Callable[[Piece], Iterator[str]]) -> AsyncIterator[str]:
    """The events of all pieces; of a problem, its sentence in OpenAI's form, and the stream's end."""
    async for piece in job.pieces(TICK_S):
        if piece is None:
            yield ALIVE
            continue
        for text in chunks(piece):
            yield text
