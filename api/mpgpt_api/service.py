"""Between the API's event loop and the engine's thread: jobs in, pieces of answers out.

Knows: how many answers may be under way, how long one may take, whose slot is to be freed.
Must not know: HTTP, JSON, or MPI.

The event loop calls ``open``; the engine calls back on its own thread, which only puts a piece into the loop's queue.
A job is closed by whoever opened it, whatever happened: what of it still runs is cancelled then, and its slot is free
at the next step.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from mpgpt.cluster.session import Session
from mpgpt.core import Request, Sampling, TokenLogprob
from mpgpt.engine.engine import Engine, Stream
from mpgpt.errors import RequestError
from mpgpt.model.tokenizer import Message, TextStream
from mpgpt_api.problems import Problem

MOST_WAIT_S = 60
"""The longest ``Retry-After``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    queue: int = 64
    """Answers that may wait for a slot."""
    time_s: float = 600.0
    """How long an answer may take, waiting included."""
    body_bytes: int = 1 << 20
    body_s: float = 30.0
    """How long a request's body may take to arrive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRequest:
    """One answer, as a client wants it."""

    ids: tuple[int, ...]
    sampling: Sampling
    max_new_tokens: int | None = None
    stops: tuple[str, ...] = ()
    logprobs: int = 0
    continues: bool = False
    """Whether the answer is the rest of a text that ``ids`` begin, and not a text of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """The new part of an answer: text that is certain, and the tokens that came since the piece before."""

    choice: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[tuple[TokenLogprob, ...], ...]
    """With each of ``ids``."""
    starts: tuple[int, ...]
    """The offset of each of ``ids`` in the answer's text, in characters."""
    finish_reason: str
    """Empty but in the last piece of each choice."""
    error: str = ""
    """A sentence, where ``finish_reason`` is "error"."""


class Job:
    """The answers to one request, piece by piece as they come. To be closed."""

    def __init__(self, loop: asyncio.AbstractEventLoop, deadline: float, cancel: Callable[[Stream], None]) -> None:
        self.streams: list[Stream] = []
        self._loop, self._deadline, self._cancel = loop, deadline, cancel
        self._queue: asyncio.Queue[Piece | Problem] = asyncio.Queue()

    def listener(self, choice: int, answer: TextStream) -> Callable[[Stream, str], None]:
        """A function for the engine to call, on its thread. A token is sent once the text before it is."""
        sent = shown = 0

        def on_text(stream: Stream, text: str) -> None:
            nonlocal sent, shown
            shown += len(text)
            upto = len(answer.starts)  # a stop id is not among them
            if not stream.finish_reason:
                upto = bisect_right(answer.starts, shown, sent)
            new, sent = range(sent, upto), upto
            piece = Piece(
                choice=choice, text=text, ids=tuple(stream.ids[at] for at in new),
                logprobs=tuple(stream.logprobs[at] for at in new),
                starts=tuple(min(answer.starts[at], shown) for at in new), finish_reason=stream.finish_reason,
                error=stream.error,
            )  # fmt: skip
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)

        return on_text

    async def pieces(self, tick_s: float | None = None) -> AsyncIterator[Piece | None]:
        """Until every choice is finished; None whenever ``tick_s`` have passed without a piece.

        Raises ``Problem`` when it takes too long, the server stops, or a choice ends by an error.
        """
        left = len(self.streams)
        while left:
            remaining = self._deadline - self._loop.time()
            try:
                async with asyncio.timeout(max(0.0, min(remaining, tick_s or remaining))):
                    piece = await self._queue.get()
            except TimeoutError:
                if self._loop.time() >= self._deadline:
                    raise Problem(
                        504, "the answer took longer than this server allows", code="timeout",
                        headers={"x-should-retry": "false"},
                    ) from None  # fmt: skip
                yield None
                continue
            if isinstance(piece, Problem):
                raise piece
            if piece.error:
                raise Problem(500, piece.error)
            left -= bool(piece.finish_reason)
            yield piece

    async def whole(self) -> list[list[Piece]]:
        """All pieces of every choice."""
        pieces: list[list[Piece]] = [[] for _ in self.streams]
        async for piece in self.pieces():
            if piece:
                pieces[piece.choice].append(piece)
        return pieces

    def fail(self, problem: Problem) -> None:
        self._queue.put_nowait(problem)

    def close(self) -> None:
        for stream in self.streams:
            if not stream.finish_reason:
                self._cancel(stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Service:
    """The endpoints' way to the engine. Belongs to one event loop."""

    def __init__(
        self, engine: Engine, session: Session, *, slots: int, limits: Limits, on_end: Callable[[Stream], None],
        on_tokens: Callable[[int], None],
    ) -> None:  # fmt: skip
        """``on_end`` gets every answer that is over, on the event loop; ``on_tokens`` the number of tokens that came,
        on the engine's thread."""
        self.engine, self.session, self.slots, self.limits = engine, session, slots, limits
        self._on_end, self._on_tokens = on_end, on_tokens
        self._loop: asyncio.AbstractEventLoop | None = None
        self._jobs: set[Job] = set()
        self.streams: set[Stream] = set()
        """The answers that are not over."""
        self._usual_s = 1.0
        self.stopping = False
        self._why = ""
        # One thread: a tokenizer is not made for two at once, and the loop has others to serve meanwhile.
        self._tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    @property
    def context(self) -> int:
        return self.engine.context

    @property
    def room(self) -> int:
        """The number of answers that may still come in."""
        return self.slots + self.limits.queue - len(self.streams)

    async def encode(self, prompt: str) -> tuple[int, ...]:
        """A prompt as it stands."""
        return await self._apart(lambda: self.session.tokenizer.encode(prompt))

    async def encode_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """A conversation; with the run's own system message, if it has none."""
        own = [] if any(message["role"] == "system" for message in messages) else self.session.opening
        return await self._apart(lambda: self.session.tokenizer.encode_chat([*own, *messages]))

    async def _apart(self, encode: Callable[[], list[int]]) -> tuple[int, ...]:
        return tuple(await asyncio.get_running_loop().run_in_executor(self._tokenizing, encode))

    def open(self, wanted: Sequence[AnswerRequest]) -> Job:
        """Hand answers to the engine. Raises ``Problem`` when there is no room, or one of them cannot be."""
        if self.stopping:
            raise Problem(503, self._why)
        if len(wanted) > self.slots + self.limits.queue:
            raise Problem(400, f"{len(wanted)} answers are more than this server has slots and places in the queue")
        requests = [self._request(one) for one in wanted]
        if len(wanted) > self.room:
            raise Problem(429, "the queue is full; try again later", headers={"Retry-After": str(self._patience())})
        loop = asyncio.get_running_loop()
        job = Job(loop, loop.time() + self.limits.time_s, self.engine.cancel)
        self._jobs.add(job)
        for choice, (one, request) in enumerate(zip(wanted, requests, strict=True)):
            text = self.session.tokenizer.stream(one.stops, after=one.ids if one.continues else ())
            stream = self.engine.submit(request, text, self._and_then(loop, job, job.listener(choice, text)))
            self.streams.add(stream)
            job.streams.append(stream)
        return job

    def _request(self, wanted: AnswerRequest) -> Request:
        request = self.session.request(
            wanted.ids, wanted.sampling, max_new_tokens=wanted.max_new_tokens, logprobs=wanted.logprobs
        )
        try:
            self.engine.check(request.ids)
        except RequestError as error:
            too_long = len(wanted.ids) >= self.context
            raise Problem(400, str(error), code="context_length_exceeded" if too_long else None) from None
        return request

    def _and_then(
        self, loop: asyncio.AbstractEventLoop, job: Job, on_text: Callable[[Stream, str], None]
    ) -> Callable[[Stream, str], None]:
        """A listener that calls ``on_text``, counts tokens, and books the end."""
        counted = 0

        def listen(stream: Stream, text: str) -> None:
            nonlocal counted
            on_text(stream, text)
            self._on_tokens(len(stream.ids) - counted)
            counted = len(stream.ids)
            if stream.finish_reason:
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(self._end, job, stream)

        return listen

    def _end(self, job: Job, stream: Stream) -> None:
        self.streams.discard(stream)
        if all(each.finish_reason for each in job.streams):
            self._jobs.discard(job)
        if stream.finish_reason != "cancelled":
            self._usual_s += 0.2 * (stream.seconds - self._usual_s)
        self._on_end(stream)

    def _patience(self) -> int:
        """Seconds until there may be room: until one of those that run is done, if they come evenly."""
        return max(1, min(MOST_WAIT_S, math.ceil(self._usual_s / self.slots)))

    def begin(self) -> None:
        """Called on the event loop, before all else."""
        self._loop = asyncio.get_running_loop()

    def run_in_loop(self, call: Callable[[], None]) -> None:
        """From any thread."""
        if self._loop:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._loop.call_soon_threadsafe(call)

    def stop(self) -> None:
        """Take nothing in any more; answers that wait or run end with an error."""
        self.fail("the server is stopping")

    def fail(self, sentence: str) -> None:
        """The same, for a reason of its own. The first reason stands."""
        if self.stopping:
            return
        self.stopping, self._why = True, sentence
        for job in self._jobs:
            job.fail(Problem(503, sentence))
            job.close()
