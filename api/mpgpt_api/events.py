"""Server-sent events, and clients that disconnect.

Knows: the form of an event (WHATWG HTML, "Server-sent events"), and when nobody listens any more.
Must not know: what is in an event.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mpgpt_api.problems import Problem, internal
from mpgpt_api.service import Job

T = TypeVar("T")
TICK_S = 15.0
"""After so long a silence something is sent, so that nothing between takes the connection for dead."""
ALIVE = ": waiting\n\n"
EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM: dict[str, Any] = {"content": {"text/event-stream": {"schema": EVENT}}}
"""A stream in an OpenAPI document: the schema is that of an event."""
GONE = 499
"""The response for a client that has disconnected; nobody reads it."""


def event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


class Events(StreamingResponse):
    """A job's events, sent until it is done or the client disconnects. Either way the job is closed."""

    media_type = "text/event-stream"

    def __init__(self, job: Job, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._job, self._events = job, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.body_iterator = self._with_end(scope["path"])
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.close()

    async def _with_end(self, path: str) -> AsyncIterator[str]:
        """A stream that has begun cannot change its status: what goes wrong is an event, and the last."""
        try:
            async for text in self._events:
                yield text
        except Exception as error:
            problem = error if isinstance(error, Problem) else internal(error)
            yield event(problem.event(path))


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; raises when the client closes its connection before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Problem(GONE, "the client went away")
    finally:
        working.cancel()
        leaving.cancel()
