"""Requests in, streams of tokens and text out: rank 0's loop around the scheduler and the pipeline.

Knows: when to push, when to pop, how long things took, which listener to call.
Must not know: MPI, torch, models; nor who asks (a command line, an API).

``submit`` and ``cancel`` may be called from any thread. All else happens on the one thread that calls ``step``,
``drain`` or ``run``, which is the only one that touches links; listeners are called on it.
"""

from __future__ import annotations

import contextlib
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Protocol

from mpgpt.core import NO_TOKEN, Request, Result, StageStats, StatsRound, Step, TokenLogprob
from mpgpt.core import Sequence as Running
from mpgpt.engine.scheduler import Scheduler
from mpgpt.errors import MpgptError, RequestError

NOT_FINITE = (
    "the model's logits for token {token} of the answer are NaN or infinite: its weights are damaged, or the "
    "activation dtype overflows on this prompt (bfloat16 and float32 reach further than float16)"
)


class IncrementalDetokenizer(Protocol):
    """Ids to text, one by one (``tokenizer.TextStream``)."""

    stopped: bool

    @property
    def text(self) -> str: ...
    def push(self, token: int) -> str: ...
    def finish(self) -> str: ...


class IdsOnly:
    """The text of whoever wants ids and no text."""

    stopped = False
    text = ""

    def push(self, token: int) -> str:
        return ""

    def finish(self) -> str:
        return ""


class StepPipeline(Protocol):
    """Steps in, results out, in order (``pipeline.Pipeline``)."""

    def push(self, step: Step) -> None: ...
    def pop(self, timeout: float | None = None) -> Result | StatsRound | None: ...
    def request_stats(self, epoch: int, *, redial: bool = False) -> None: ...
    def stop(self, epoch: int) -> None: ...
    def stats_round(self, epoch: int) -> tuple[StageStats, ...]: ...


class Stream:
    """One request's way through the engine. ``text``, ``ids`` and the rest may be read from any thread."""

    def __init__(self, request: Request, text: IncrementalDetokenizer, listener: Callable[[Stream, str], None]) -> None:
        self.request = request
        self._text, self._listener = text, listener
        self.ids: list[int] = []
        self.logprobs: list[tuple[TokenLogprob, ...]] = []
        """With each of ``ids``, if the request wants any."""
        self.finish_reason = ""
        self.error: str = ""
        """Why it ended early, a sentence; ``finish_reason`` is "error" then."""
        self.submitted = time.monotonic()
        self.started = self.first_token = self.finished = 0.0
        self.sequence: Running | None = None

    @property
    def text(self) -> str:
        return self._text.text

    @property
    def ttft_s(self) -> float | None:
        """Seconds from entering the ring to the first token."""
        return self.first_token - self.started if self.first_token else None

    @property
    def seconds(self) -> float:
        """Seconds from entering the ring to the end, or to now."""
        return (self.finished or time.monotonic()) - self.started if self.started else 0.0

    @property
    def drafted(self) -> int:
        """Tokens that were drafted for it."""
        return self.sequence.drafted if self.sequence else 0

    @property
    def accepted(self) -> int:
        """How many drafts were right; each of them saved a step."""
        return self.sequence.accepted if self.sequence else 0

    @property
    def decode_steps(self) -> int:
        """Steps that it took after its first token."""
        return max(0, len(self.sequence.new_ids) - 1) - self.accepted if self.sequence else 0

    def start(self) -> None:
        self.started = self.started or time.monotonic()

    def push(self, token: int, logprobs: tuple[TokenLogprob, ...] = ()) -> bool:
        """Take a token in and pass the text it makes certain to the listener; True if a stop is complete."""
        self.first_token = self.first_token or time.monotonic()
        self.ids.append(token)
        self.logprobs.append(logprobs)
        if token not in self.request.stop_ids and (piece := self._text.push(token)):
            self._listener(self, piece)
        return self._text.stopped

    def finish(self, reason: str) -> None:
        """The end; the listener is called once more, with what was held back (it may be empty)."""
        rest = self._text.finish()
        if self._text.stopped and reason == "length":  # a stop that what was held back completes
            reason = "stop"
        self.finished, self.finish_reason = time.monotonic(), reason
        self._listener(self, rest)

    def fail(self, sentence: str) -> None:
        """The end by an error. The listener is called once more, even where it was what failed: somebody waits."""
        self.error = sentence
        self.finished, self.finish_reason = time.monotonic(), "error"
        with contextlib.suppress(Exception):
            self._listener(self, "")


@dataclass(slots=True)
class StatsWaiter:
    """Who wants the accounts of all stages."""

    listener: Callable[[tuple[StageStats, ...]], None]
    redial: bool


class Engine:
    """Keeps the ring full."""

    def __init__(
        self,
        ring: StepPipeline,
        scheduler: Scheduler,
        *,
        vocab: int,
        depth: int,
        wake: Callable[[], None],
        sleep: Callable[[], object],
    ) -> None:
        """``depth`` steps at most are in the ring at once. ``wake`` ends a ``sleep`` that goes on in ``run``."""
        self._ring, self._scheduler = ring, scheduler
        self._vocab, self._depth, self._wake, self._sleep = vocab, depth, wake, sleep
        self._submitted: deque[Stream] = deque()
        self._cancelled: deque[Stream] = deque()
        self._streams: dict[int, Stream] = {}
        self._asking: deque[StatsWaiter] = deque()
        self._waiters: list[StatsWaiter] = []
        """Whose tally is on its way."""
        self._heard = 0.0
        self._closing = False
        self.drafted = self.accepted = self.decode_steps = 0
        """As in ``Stream``, of all streams that are finished."""

    @property
    def context(self) -> int:
        return self._scheduler.context

    def submit(self, request: Request, text: IncrementalDetokenizer, listener: Callable[[Stream, str], None]) -> Stream:
        """Queue a request. ``listener(stream, piece)`` gets every piece of text; at the last of them
        ``stream.finish_reason`` is set.

        Raises ``RequestError`` for a prompt that is empty, too long, or not of this model.
        """
        self.check(request.ids)
        stream = Stream(request, text, listener)
        self._submitted.append(stream)
        self._wake()
        return stream

    def check(self, ids: Sequence[int]) -> None:
        """Raises ``RequestError`` when a prompt of these ids cannot be served."""
        if not ids:
            raise RequestError("the prompt is empty")
        if len(ids) >= self.context:
            raise RequestError(
                f"the prompt has {len(ids)} tokens; with a context of {self.context} it may have {self.context - 1}"
            )
        if max(ids) >= self._vocab:
            raise RequestError(f"the tokenizer makes id {max(ids)}, but the model knows {self._vocab} only")

    def cancel(self, stream: Stream) -> None:
        """End a stream early; its slot is free at the next step."""
        self._cancelled.append(stream)
        self._wake()

    def request_stats(self, listener: Callable[[tuple[StageStats, ...]], None], *, redial: bool = False) -> None:
        """Where every stage's time went since the last time that somebody asked, in the ring's order; ``listener`` is
        called on the engine's thread. With ``redial`` ranks try at once to reach what is away behind them.

        From any thread, at any time: the question travels behind the steps that are out.
        """
        self._asking.append(StatsWaiter(listener, redial))
        self._wake()

    @property
    def running(self) -> int:
        """Sequences in the ring."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Sequences that wait for a slot."""
        return self._scheduler.waiting + len(self._submitted)

    @property
    def silent_s(self) -> float:
        """For how long nothing has come out of a ring that has something in it; seconds."""
        return time.monotonic() - self._heard if self._out else 0.0

    @property
    def _out(self) -> bool:
        return bool(self._scheduler.in_flight or self._waiters)

    def close(self) -> None:
        """Let ``run`` return once all that was submitted is done."""
        self._closing = True
        self._wake()

    @property
    def busy(self) -> bool:
        return bool(self._submitted or self._cancelled or self._asking or self._waiters or self._scheduler.busy)

    def drain(self) -> None:
        """Step until all that was submitted is done."""
        while self.busy:
            self.step()

    def run(self) -> None:
        """Serve until ``close``; asleep while there is nothing to do."""
        while self.busy or not self._closing:
            if self.busy:
                self.step()
            else:
                self._sleep()

    def step(self) -> None:
        """Take in what is new, then either send a step into the ring or wait for a result out of it."""
        self._take_in()
        if not self._out:
            self._heard = time.monotonic()
        self._send_stats_request()
        flight = self._scheduler.next() if self._scheduler.in_flight < self._depth else None
        if flight:
            for sequence in flight.sequences:
                self._streams[id(sequence)].start()
            self._ring.push(flight.step)
        # After a push only what is there already, so that the next step goes out at once if there is one.
        if self._out and (message := self._ring.pop(0 if flight else None)):
            self._heard = time.monotonic()
            if isinstance(message, StatsRound):
                self._tell(message)
            else:
                self._commit(message)

    def stats_round(self) -> tuple[StageStats, ...]:
        """Where every stage's time went since the last call, in the ring's order; nothing may be under way."""
        assert not self.busy, "a tally goes round an empty ring"
        return self._ring.stats_round(self._scheduler.epoch)

    def stop(self) -> None:
        """End the ring: every rank's relay returns."""
        self._ring.stop(self._scheduler.epoch)

    def _take_in(self) -> None:
        # Those that are cancelled now were submitted before; one that comes in from here on waits for its turn.
        cancelled = [self._cancelled.popleft() for _ in range(len(self._cancelled))]
        while self._submitted:
            stream = self._submitted.popleft()
            stream.sequence = self._scheduler.add(stream.request)
            self._streams[id(stream.sequence)] = stream
        for stream in cancelled:
            if stream.sequence and not stream.finish_reason:
                self._scheduler.finish(stream.sequence, "cancelled")
                self._finish(stream.sequence, "cancelled")

    def _send_stats_request(self) -> None:
        """One tally for all who ask; those who come while it is under way have the next one."""
        if self._asking and not self._waiters:
            self._waiters = [self._asking.popleft() for _ in range(len(self._asking))]
            self._ring.request_stats(self._scheduler.epoch, redial=any(waiter.redial for waiter in self._waiters))

    def _tell(self, stats_round: StatsRound) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            waiter.listener(stats_round.accounts)

    def _commit(self, result: Result) -> None:
        for sequence, news in groupby(self._scheduler.commit(result), key=itemgetter(0)):
            stream = self._streams[id(sequence)]
            # A stop ends the text; what drafts gave behind it in the same step was never output.
            try:
                stopped = any(stream.push(token, logprobs) for _, token, logprobs in news if token != NO_TOKEN)
            except Exception as error:  # of one request's text or listener: the other requests go on
                self._fail(sequence, _sentence(error))
                continue
            if stopped:
                self._scheduler.finish(sequence, "stop")
            if sequence.finish_reason == "error" and not stopped:
                self._fail(sequence, NOT_FINITE.format(token=len(stream.ids) + 1))
            elif sequence.finish_reason:  # a stop that the last token completes is a stop all the same
                self._finish(sequence, "stop" if stopped else sequence.finish_reason)

    def _finish(self, sequence: Running, reason: str) -> None:
        """Take leave of a stream whose sequence the scheduler has finished."""
        try:
            self._streams[id(sequence)].finish(reason)
        except Exception as error:
            self._fail(sequence, _sentence(error))
        else:
            self._pop(sequence)

    def _fail(self, sequence: Running, sentence: str) -> None:
        """End one stream by an error, whether its sequence still runs or not; its slot becomes free."""
        self._scheduler.finish(sequence, "error")
        self._pop(sequence).fail(sentence)

    def _pop(self, sequence: Running) -> Stream:
        stream = self._streams.pop(id(sequence))
        self.drafted += stream.drafted
        self.accepted += stream.accepted
        self.decode_steps += stream.decode_steps
        return stream


def _sentence(error: Exception) -> str:
    """An error of the user's names what is wrong; one of ours is printed on standard error, and not sent to clients."""
    if isinstance(error, MpgptError):
        return str(error)
    traceback.print_exception(error, file=sys.stderr)
    return f"internal error in this request's text ({type(error).__name__})"
