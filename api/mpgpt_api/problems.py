"""Errors as clients get them.

Knows: statuses, OpenAI's form of an error, and the plain one of all other paths.
Must not know: what any endpoint does.

Nothing of the inside leaves the process: an exception that nobody foresaw is an "internal error" for the client, and a
traceback on standard error.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, Literal

import click
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mpgpt.errors import RequestError, UsageError

TYPES: Mapping[int, str] = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error",
    500: "server_error", 503: "server_error", 504: "server_error",
}  # fmt: skip
"""OpenAI's words; all other statuses are an ``invalid_request_error``."""
OPENAI = "/v1/"


class Problem(Exception):
    """An error of a request: a status, and a sentence for the client's user."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def body(self, path: str) -> dict[str, Any]:
        return {"error": self.error()} if path.startswith(OPENAI) else {"error": self.message, "success": False}

    def event(self, path: str) -> dict[str, Any]:
        """The last event of a stream that it ends."""
        return {"error": self.error()} if path.startswith(OPENAI) else {"error": self.message, "done": True}

    def error(self) -> dict[str, Any]:
        """In OpenAI's form."""
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def response(self, path: str) -> Response:
        # In ASCII: a sentence may quote what somebody sent, half a surrogate pair for example.
        body = json.dumps(self.body(path)).encode()
        return Response(body, self.status, self.headers, media_type="application/json")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OpenAIError(BaseModel):
    """The body of an error under /v1."""

    error: ErrorDetail


class PlainError(BaseModel):
    """The body of an error on all other paths."""

    error: str
    success: Literal[False]


def documented(path: str, *statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of an endpoint, for FastAPI's ``responses``."""
    model = OpenAIError if path.startswith(OPENAI) else PlainError
    return {status: {"model": model, "description": HTTPStatus(status).phrase} for status in statuses}


def add_handlers(app: FastAPI) -> None:
    """Have ``app`` answer every error in these forms."""

    def answer(request: Request, problem: Problem) -> Response:
        return problem.response(request.url.path)

    @app.exception_handler(Problem)
    async def _problem(request: Request, error: Problem) -> Response:
        return answer(request, error)

    @app.exception_handler(RequestError)
    @app.exception_handler(UsageError)
    async def _refused(request: Request, error: RequestError | UsageError) -> Response:
        return answer(request, Problem(400, str(error)))

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        return answer(request, invalid(error.errors(), error.body))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        return answer(request, missing(error, request.method, request.url.path))

    @app.exception_handler(Exception)
    async def _unforeseen(request: Request, error: Exception) -> Response:
        return answer(request, internal(error))


def missing(error: HTTPException, method: str, path: str) -> Problem:
    """The error of a path that is not there, or not for this method."""
    sentences = {404: f"there is nothing at {path}", 405: f"{method} is not for this path"}
    return Problem(
        error.status_code, sentences.get(error.status_code, str(error.detail)), headers=error.headers
    )  # fmt: skip


def internal(error: Exception) -> Problem:
    """The error of an exception that nobody foresaw: a traceback on standard error, nothing of it for the client."""
    click.echo(f"mpgpt: internal error: {type(error).__name__}: {error}", err=True)
    traceback.print_exception(error, file=sys.stderr)
    return Problem(500, "internal error; the server's standard error says more")


def invalid(errors: Sequence[Any], body: Any) -> Problem:
    """The error of a body, with its place in it.

    A value that may be of several kinds has an error for each: the client gets that of the nearest kind, which is wrong
    in something else than its type, or deepest inside.
    """
    nearest = max(errors, key=lambda error: (not error["type"].endswith("_type"), len(_place(error, body))))
    parts = _place(nearest, body)
    if nearest["type"] == "json_invalid":
        return Problem(400, f"the body is no JSON: {nearest.get('ctx', {}).get('error', 'it cannot be read')}")
    if nearest["type"] == "missing" and not parts:
        return Problem(400, "there is no body")
    place = ".".join(map(str, parts))
    message = nearest["msg"].removeprefix("Value error, ").replace(" after validation", "")
    return Problem(400, f"{place}: {message}" if place else message, param=place or None)


def _place(error: Any, body: Any) -> list[str | int]:
    """The keys and indices on the way to an error; pydantic's names of kinds between them are left out."""
    parts: list[str | int] = []
    for part in error["loc"][1:]:
        inside = part in body if isinstance(body, dict) else isinstance(body, list) and isinstance(part, int)
        if inside:
            parts.append(part)
            body = body[part]
    if error["type"] == "missing" and isinstance(body, dict):
        parts.append(error["loc"][-1])
    return parts
