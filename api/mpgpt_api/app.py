"""The application: endpoints, errors, guard and page, put together.

Knows: which part stands before which.
Must not know: how any of them works.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpgpt import __version__
from mpgpt.cluster.ring import RankReport
from mpgpt.cluster.session import Session
from mpgpt.engine.engine import Engine
from mpgpt.transport.link import Silence
from mpgpt_api import openai, reference
from mpgpt_api.cors import Cors
from mpgpt_api.guard import API, MOST_REQUESTS, Access, Guard
from mpgpt_api.metrics import Metrics
from mpgpt_api.problems import add_handlers, missing
from mpgpt_api.service import Limits, Service
from mpgpt_api.watch import Watch

PAGE = Path(__file__).parent / "page"
"""The folder of the built page."""
DAY_S = 86400
CHUNK_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """The ring behind the application, and its names."""

    engine: Engine
    session: Session
    reports: tuple[RankReport, ...]
    slots: int
    model: str
    """Its name for clients."""
    dtype: str
    silences: Callable[[], tuple[Silence, ...]] = tuple
    """The ranks that have been silent for some seconds."""


def make_app(
    served: Served, access: Access, limits: Limits, *, started: Callable[[Service], None] = lambda service: None,
    requests: int = MOST_REQUESTS,
) -> ASGIApp:  # fmt: skip
    """The ASGI application, which answers so many ``requests`` at once. ``started`` gets the service once the event
    loop runs."""
    metrics = Metrics()
    watch = Watch(served.engine, served.reports, served.silences)
    service = Service(
        served.engine, served.session, slots=served.slots, limits=limits, on_end=metrics.ended, on_tokens=watch.count
    )
    metrics.watch(service, watch)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.begin()
        started(service)
        yield

    app = FastAPI(
        title="mpgpt", version=__version__, docs_url=None, redoc_url=None, lifespan=life,
        description="One model over the machines you own. OpenAI's endpoints under /v1; beside them the page's own.",
    )  # fmt: skip
    named = {"model": served.model, "dtype": served.dtype}
    app.include_router(openai.routes(service, created=int(time.time()), **named))
    app.include_router(reference.routes(service, watch, metrics, **named))
    add_handlers(app)
    _describe(app)
    page: ASGIApp = Page(directory=PAGE, html=True) if (PAGE / "index.html").is_file() else NO_PAGE
    guarded: ASGIApp = Guard(
        Site(app, page), access, body_bytes=limits.body_bytes, body_s=limits.body_s, requests=requests
    )
    if access.origins:
        guarded = Cors(guarded, access.origins)
    return Methods(Counted(guarded, metrics))


class Page(StaticFiles):
    """The built page. What has a hash in its name never changes; the rest is fetched anew.

    Its few files are held in memory: a client that asks for them and does not read would hold a descriptor each.
    """

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._held: dict[tuple[str, str], bytes] = {}

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        if isinstance(response, FileResponse):
            response = await self._from_memory(response)
        lasting = path.startswith("assets/") and response.status_code == 200
        response.headers["cache-control"] = f"public, max-age={365 * DAY_S}, immutable" if lasting else "no-cache"
        return response

    async def _from_memory(self, response: FileResponse) -> Response:
        name = str(response.path), response.headers["etag"]
        if name not in self._held:
            self._held[name] = await asyncio.to_thread(Path(response.path).read_bytes)
        body = self._held[name]

        async def chunks() -> AsyncIterator[bytes]:
            for start in range(0, len(body), CHUNK_BYTES):
                yield body[start : start + CHUNK_BYTES]

        headers = {key: value for key, value in response.headers.items() if key != "accept-ranges"}
        return StreamingResponse(chunks(), response.status_code, headers | {"content-length": str(len(body))})


NO_PAGE = PlainTextResponse("The API is here; the page is not built: `make page` in mpgpt's checkout builds it.\n")


class Site:
    """The API at its paths, the page at all others."""

    def __init__(self, api: ASGIApp, page: ASGIApp) -> None:
        self._api, self._page = api, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(API):
            await self._api(scope, receive, send)
            return
        try:
            await self._page(scope, receive, send)
        except HTTPException as error:
            await missing(error, scope["method"], scope["path"]).response(scope["path"])(scope, receive, send)


class Methods:
    """HEAD wherever GET is, and OPTIONS: what a path allows. Endpoints know of neither."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope.get("method")
        bare = method == "HEAD"

        async def answer(message: Message) -> None:
            nonlocal bare
            if message["type"] == "http.response.start" and message["status"] == 405:
                message, bare = _allowing(message, method == "OPTIONS"), bare or method == "OPTIONS"
            elif message["type"] == "http.response.body" and bare:
                message = {**message, "body": b""}
            await send(message)

        await self._app({**scope, "method": "GET"} if method == "HEAD" else scope, receive, answer)


def _allowing(start: Message, asked: bool) -> Message:
    """The beginning of an answer to a method that is not for a path, with all that are; if they were ``asked`` for, it
    is what was wanted."""
    start = {**start, "headers": list(start["headers"]), "status": 204 if asked else 405}
    headers = MutableHeaders(scope=start)
    allowed = {name.strip() for name in headers.get("allow", "GET").split(",")}
    headers["allow"] = ", ".join(sorted(allowed | {"OPTIONS"} | ({"HEAD"} if "GET" in allowed else set())))
    if asked:
        for name in ("content-length", "content-type"):
            del headers[name]
    return start


class Counted:
    """Counts requests by endpoint and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Endpoints by their own names alone: a client that makes paths up must not make metrics up.
                route = scope.get("route")
                self._metrics.request(getattr(route, "path", "other"), message["status"])
            await send(message)

        await self._app(scope, receive, count if scope["type"] == "http" else send)


def _describe(app: FastAPI) -> None:
    """The OpenAPI document without FastAPI's own form of errors, which is never sent."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                document.get("components", {}).get("schemas", {}).pop(name, None)
        return app.openapi_schema or {}

    app.openapi = openapi  # type: ignore[method-assign]
