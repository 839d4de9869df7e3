"""Pages of other origins: what their browsers ask before a request, and what lets them read the answer.

Knows: the CORS protocol (WHATWG Fetch, "CORS protocol"), and private network access.
Must not know: endpoints, keys, or why an origin is listed.
"""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpgpt_api.guard import sent_origin

METHODS = "GET, HEAD, POST"
ALWAYS = ("authorization", "content-type")
READABLE = "retry-after, x-should-retry"
"""Of an answer's headers, what a page may read besides those that it always may."""
FRESH_S = 600
"""How long a browser need not ask again."""
TOKEN = re.compile(r"[\w!#$%&'*+.^`|~-]+", re.ASCII)
"""A header's name: RFC 9110, section 5.6.2."""
MOST_NAMES = 100
VARY = "Origin, Access-Control-Request-Headers, Access-Control-Request-Private-Network"


class Cors:
    """ASGI middleware, around the guard: a page of a listed origin may also read why it was refused."""

    def __init__(self, app: ASGIApp, origins: tuple[str, ...]) -> None:
        """``origins`` are in the form that ``read_origin`` gives."""
        self._app, self._origins = app, frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        listed = sent_origin(headers) in self._origins
        if listed and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight(headers)(scope, receive, send)
            return

        async def readable(message: Message) -> None:
            if message["type"] == "http.response.start":
                answer = MutableHeaders(scope=message)
                answer.add_vary_header("Origin")
                if listed:
                    answer["access-control-allow-origin"] = headers["origin"]
                    answer["access-control-expose-headers"] = READABLE
            await send(message)

        await self._app(scope, receive, readable)


def _preflight(headers: Headers) -> Response:
    """May a page of this origin send this request? It may; whatever headers its client sets.

    No list of names would do: OpenAI's clients alone send a dozen of their own, and more with each version. None of
    them is looked at here.
    """
    wanted = ",".join(headers.getlist("access-control-request-headers")).lower().split(",")[:MOST_NAMES]
    names = dict.fromkeys([*ALWAYS, *(name for each in wanted if TOKEN.fullmatch(name := each.strip()))])
    answer = {
        "access-control-allow-origin": headers["origin"], "access-control-allow-methods": METHODS,
        "access-control-allow-headers": ", ".join(names), "access-control-max-age": str(FRESH_S), "vary": VARY,
    }  # fmt: skip
    if headers.get("access-control-request-private-network") == "true":
        answer["access-control-allow-private-network"] = "true"
    return Response(headers=answer)
