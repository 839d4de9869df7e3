"""The reference API: chat, query, config, health, reconnect; and the ring as it is, for our page and for Prometheus.

Its endpoints and settings are those of the reference project, whose page and settings files work here.

Knows: their bodies and answers.
Must not know: engines, threads, MPI.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import Response

from mpgpt import __version__
from mpgpt.core import signed_seed
from mpgpt.engine.engine import Stream
from mpgpt_api.events import ALIVE, STREAM, TICK_S, Events, event, unless_gone
from mpgpt_api.metrics import Metrics
from mpgpt_api.problems import documented
from mpgpt_api.service import AnswerRequest, Job, Service
from mpgpt_api.shapes import Answered, QueryBody
from mpgpt_api.watch import Kind, Rank, State, Watch

RECONNECT_S = 5.0
"""How long the ring may take to answer when it is tried."""
BACK_S = 6.0
"""How long an iPad may take to come back: to dial, and to prove that it still has its layers."""
REFUSALS = (400, 401, 403, 408, 413, 429, 500, 503, 504)


class Parameters(BaseModel):
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float


class Config(BaseModel):
    model: str
    strategy: str
    parameters: Parameters
    max_new_tokens: int
    context: int
    chat: bool
    system: str | None
    nodes: int
    version: str
    dtype: str


class RankHealth(BaseModel):
    rank: int
    host: str
    kind: Kind
    state: State
    silent_s: float
    """Seconds since the rank last sent something that was due; else 0."""


class Health(BaseModel):
    status: Literal["ok", "busy", "degraded", "stalled", "stopping"]
    """``busy``: all slots are taken. ``degraded``: an iPad is away, and its rank computes in its stead."""
    healthy: bool
    model: str
    ranks: list[RankHealth]


class Cluster(BaseModel):
    model: str
    dtype: str
    layers: int
    slots: int
    context: int
    running: int
    waiting: int
    queue: int
    tokens_per_second: float
    window_s: float
    ranks: list[Rank]


class Reconnected(BaseModel):
    success: bool
    message: str
    did: list[str]


def routes(service: Service, watch: Watch, metrics: Metrics, *, model: str, dtype: str) -> APIRouter:
    router = APIRouter()

    @router.post("/chat", response_class=Response, responses=documented("/chat", *REFUSALS) | {200: STREAM})
    async def chat(body: QueryBody) -> Response:
        """An answer as it comes: events of tokens, and a last one with the whole and its figures."""
        job = await _submit(service, body)
        return Events(job, _events(job, body))

    @router.post("/query", responses=documented("/query", *REFUSALS))
    async def query(body: QueryBody, request: Request) -> Answered:
        """The same, in one answer."""
        with await _submit(service, body) as job:
            await unless_gone(request, job.whole())
            return _answered(job.streams[0], body)

    @router.get("/config", responses=documented("/config", 401, 403))
    async def config() -> Config:
        """What the server was started with."""
        return _config(service, len(watch.reports), model, dtype)

    @router.get("/health", responses=documented("/health", 403) | {
        503: {"model": Health, "description": "No answers can be expected; the body says why."}
    })  # fmt: skip
    async def health(response: Response) -> Health:
        """Whether answers can be expected: 200, or 503. Needs no key, asks no rank, and is answered at once."""
        status = _status(service, watch)
        healthy = status not in ("stalled", "stopping")
        response.status_code = 200 if healthy else 503
        return Health(status=status, healthy=healthy, model=model, ranks=_rank_health(watch))

    @router.get("/cluster", responses=documented("/cluster", 401, 403))
    async def cluster() -> Cluster:
        """The ring as it is: what each rank has, and what it did since somebody last looked."""
        await watch.look()
        return _cluster(service, watch, model, dtype)

    @router.post("/reconnect", responses=documented("/reconnect", 401, 403, 408, 413))
    async def reconnect() -> Reconnected:
        """Try the ring, and have iPads that are away dialled at once. Says what was done, and what came of it."""
        return await _reconnect(watch)

    @router.get("/metrics", response_class=Response, responses=documented("/metrics", 401, 403) | {
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}}
    })  # fmt: skip
    async def scrape() -> Response:
        """For Prometheus."""
        await watch.look()
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return router


async def _submit(service: Service, body: QueryBody) -> Job:
    continues = False
    if body.messages is not None:
        ids = await service.encode_chat([message.plain for message in body.messages])
    elif continues := bool(body.raw or not service.session.chat):
        ids = await service.encode(body.text or "")
    else:
        ids = await service.encode_chat([{"role": "user", "content": body.text or ""}])
    return service.open([_wanted(service, body, ids, continues)])


def _config(service: Service, nodes: int, model: str, dtype: str) -> Config:
    session = service.session
    sampling = session.sampling({}, 0)
    return Config(
        model=model, strategy=session.strategy, max_new_tokens=session.max_new_tokens, context=service.context,
        chat=session.chat, system=session.system, nodes=nodes, version=__version__, dtype=dtype,
        parameters=Parameters(
            temperature=sampling.temperature, top_k=sampling.top_k, top_p=sampling.top_p, min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
        ),
    )  # fmt: skip


def _rank_health(watch: Watch) -> list[RankHealth]:
    silent = watch.silent()
    return [
        RankHealth(
            rank=rank.rank, host=rank.host, kind=rank.kind, state=rank.state,
            silent_s=round(silent.get(rank.rank, 0.0), 1),
        )
        for rank in watch.ranks()
    ]  # fmt: skip


def _cluster(service: Service, watch: Watch, model: str, dtype: str) -> Cluster:
    engine, spans = service.engine, [place.span for place in watch.reports if place.span]
    return Cluster(
        model=model, dtype=dtype, layers=max(span.stop for span in spans), slots=service.slots,
        context=service.context, running=engine.running, waiting=engine.waiting, queue=service.limits.queue,
        tokens_per_second=watch.rate, window_s=watch.window_s, ranks=watch.ranks(),
    )  # fmt: skip


def _wanted(service: Service, body: QueryBody, ids: tuple[int, ...], continues: bool) -> AnswerRequest:
    sampling = service.session.sampling(body.overrides, body.seed, body.decoding_strategy)
    return AnswerRequest(
        ids=ids, sampling=sampling, max_new_tokens=body.max_tokens, stops=body.stops, continues=continues
    )


def _answered(stream: Stream, body: QueryBody) -> Answered:
    seconds = stream.finished - stream.submitted
    first = (stream.first_token or stream.finished) - stream.submitted
    new = len(stream.ids)
    reason: Any = stream.finish_reason
    return Answered(
        success=True, generated_text=stream.text, finish_reason=reason, total_time_ms=1000 * seconds,
        time_to_first_token_ms=1000 * first, num_tokens=new, prompt_tokens=len(stream.request.ids),
        tokens_per_second=(new - 1) / (seconds - first) if new > 1 and seconds > first else new / max(seconds, 1e-9),
        seed=signed_seed(stream.request.sampling.seed), session_id=body.session_id,
    )  # fmt: skip


async def _events(job: Job, body: QueryBody) -> AsyncIterator[str]:
    async for piece in job.pieces(TICK_S):
        if piece is None:
            yield ALIVE
        elif piece.text:
            yield event({"token": piece.text, "done": False})
    summary = _answered(job.streams[0], body).model_dump(exclude={"success", "generated_text"})
    yield event({"done": True, "full_text": job.streams[0].text} | summary)


def _status(service: Service, watch: Watch) -> Literal["ok", "busy", "degraded", "stalled", "stopping"]:
    if service.stopping:
        return "stopping"
    if watch.stalled:
        return "stalled"
    if watch.away:
        return "degraded"
    return "busy" if service.room <= service.limits.queue else "ok"


async def _reconnect(watch: Watch) -> Reconnected:
    did = ["sent a question round the ring"]
    begun = time.monotonic()
    try:
        await watch.ask(RECONNECT_S, redial=True)
    except TimeoutError:
        message = f"the ring has not answered for {RECONNECT_S:.0f} s: a rank is busy, asleep or gone"
        return Reconnected(success=False, message=message, did=did)
    did.append(f"every rank of it answered within {time.monotonic() - begun:.3f} s")
    if not watch.away:
        return Reconnected(success=True, message="the ring is whole", did=did)
    names = ", ".join(f"rank {r.rank}'s" for r in watch.ranks() if r.state == "away")
    did.append(f"dialled {names} iPad again")
    while watch.away and time.monotonic() - begun < BACK_S:
        await asyncio.sleep(0.3)
        try:
            await watch.ask(RECONNECT_S)
        except TimeoutError:
            break
    if watch.away:
        message = "the ring is whole, but an iPad does not answer; its rank computes its layers"
        return Reconnected(success=False, message=message, did=did)
    return Reconnected(success=True, message="the iPad is back", did=did)
