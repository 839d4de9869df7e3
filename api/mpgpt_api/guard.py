"""Who may come in, and with how much: keys, origins, host names, the size of a body, the number of requests at once;
and what a browser may do with it.

Knows: HTTP headers, and ASGI.
Must not know: endpoints, except which paths need no key.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpgpt.config import read_origin
from mpgpt.errors import UsageError
from mpgpt_api.problems import Problem

MOST_REQUESTS = 1000
SHORTEST_KEY = 16
OPEN = ("/health",)
"""The paths that need no key, for monitors."""
API = ("/chat", "/query", "/config", "/health", "/reconnect", "/cluster", "/metrics", "/openapi.json", "/v1/")
"""All else is the page, which holds no secrets and must load before anybody can give a key."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "manifest-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """The clients that may use the API."""

    keys: tuple[bytes, ...] = ()
    """Any of them opens it; none: it is open."""
    origins: tuple[str, ...] = ()
    """Pages of other origins that may use it, such as http://localhost:3000, in the form that ``read_origin`` gives."""
    local: bool = True
    """Whether only this host reaches it. Then its name must be this host's: a page from elsewhere could have its own
    name lead here."""


def read_keys(path: Path) -> tuple[bytes, ...]:
    """The keys in a file, one a line; blank lines and lines that begin with # are passed over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UsageError(f"--api-key-file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"--api-key-file {path} is not UTF-8") from None
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if not keys:
        raise UsageError(f"--api-key-file {path} holds no key; write one a line")
    if short := [at for at, key in enumerate(keys, 1) if len(key) < SHORTEST_KEY]:
        raise UsageError(f"--api-key-file {path}: key {short[0]} has fewer than {SHORTEST_KEY} characters")
    return tuple(key.encode() for key in keys)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def check_origin(origin: str) -> str:
    """As a browser sends it. ``UsageError`` for what is no origin."""
    try:
        return read_origin(origin)
    except ValueError as error:
        raise UsageError(f"the origin {origin} is none: {error}") from None


def sent_origin(headers: Headers) -> str:
    """The origin of the page that sends a request, in the form of those that are listed; empty where none is named."""
    origin = headers.get("origin", "")
    try:
        return origin and read_origin(origin)
    except ValueError:
        return origin  # of no such form, hence none of those listed


class Guard:
    """ASGI middleware, the outermost."""

    def __init__(
        self, app: ASGIApp, access: Access, *, body_bytes: int, body_s: float, requests: int = MOST_REQUESTS
    ) -> None:
        """``requests`` may be answered at once; whoever asks for the server's health comes in all the same. A body has
        at most ``body_bytes``, and arrives within ``body_s`` seconds."""
        self._app, self._access, self._requests = app, access, requests
        self._most, self._body_s = body_bytes, body_s
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        try:
            self._admit(scope, headers)
            receive = await self._body(headers, receive) if scope["method"] == "POST" else receive
            if self._inside >= self._requests and scope["path"] not in OPEN:
                raise Problem(503, "too many requests at once; try again later", headers={"Retry-After": "1"})
        except Problem as problem:
            await problem.response(scope["path"])(scope, receive, answer)
            return
        self._inside += 1
        try:
            await self._app(scope, receive, answer)
        finally:
            self._inside -= 1

    def _admit(self, scope: Scope, headers: Headers) -> None:
        access, host = self._access, headers.get("host", "")
        if access.local and not is_loopback(_name(host)) and not _nameless(scope, headers):
            raise Problem(403, f"this server is for this machine only, and {host or 'no name'} is not its name")
        origin = sent_origin(headers)
        if origin and origin not in access.origins and not _same(origin, host):
            raise Problem(403, f"pages of {origin} may not use this server; start it with --origin {origin}")
        path, method = scope["path"], scope["method"]
        if not access.keys or not path.startswith(API) or path in OPEN or (method == "OPTIONS" and origin):
            return
        given = headers.get("authorization", "")
        kind, _, key = given.partition(" ")
        # All keys are compared, and each in constant time: how long it takes tells nothing.
        raw = key.strip().encode("latin-1")  # as it came
        if kind.lower() != "bearer" or not any([hmac.compare_digest(raw, own) for own in access.keys]):
            message = "the API key is wrong" if given else "this server wants an API key: Authorization: Bearer KEY"
            raise Problem(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    async def _body(self, headers: Headers, receive: Receive) -> Receive:
        """Read the body, which is to be bounded; what is received after it is whatever comes then."""
        announced = headers.get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._most:
            raise self._too_long()
        taken = bytearray()  # and no list of messages: of a body that comes byte by byte it would be huge
        left: list[Message] = []
        try:
            async with asyncio.timeout(self._body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        left.append(message)
                        break
                    taken += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(taken) > self._most:
                        raise self._too_long()
        except TimeoutError:
            raise Problem(
                408, f"the body did not arrive within {self._body_s:.0f} s", headers={"Connection": "close"}
            ) from None
        whole: Message = {"type": "http.request", "body": bytes(taken), "more_body": bool(left)}
        messages = [*left, whole]

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return again

    def _too_long(self) -> Problem:
        return Problem(413, f"the body has more than {self._most} bytes", headers={"Connection": "close"})


def _name(host: str) -> str:
    """A Host header without its port."""
    return host[: host.rindex("]") + 1] if "]" in host else host.partition(":")[0]


def _same(origin: str, host: str) -> bool:
    """Whether a page comes from this server itself. Behind a proxy its scheme may be another than ours."""
    scheme = origin.partition("://")[0]
    if scheme not in ("http", "https"):
        return False
    try:
        return read_origin(f"{scheme}://{host}") == origin
    except ValueError:
        return False


def _nameless(scope: Scope, headers: Headers) -> bool:
    """Whether it is HTTP/1.0 without a Host header, from this machine: a probe, for browsers always send one."""
    address, _ = scope.get("client") or ("", 0)
    return "host" not in headers and scope["http_version"] == "1.0" and is_loopback(address)


def origins(given: Sequence[str]) -> tuple[str, ...]:
    return tuple(check_origin(origin) for origin in given)
