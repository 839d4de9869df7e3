"""The engine around a ring that counts on in the alphabet: after "c" comes "d".

Threads here always have something that ends their wait, and tests give up after ``PATIENCE_S``: a wake-up that is
lost fails a test, it does not hang it.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from mpgpt.core import NO_TOKEN, Request, Result, StageStats, StatsRound, Step
from mpgpt.engine.engine import Engine, Stream
from mpgpt.engine.scheduler import Scheduler
from mpgpt.errors import RequestError
from mpgpt.transport.doorbell import Doorbell

LETTERS = 26
PATIENCE_S = 20.0
ENDLESS = 10**9


class AlphabetRing:
    """Results in order; a poll finds one only when ``delay`` more steps have entered behind it."""

    def __init__(self, delay: int = 0, broken: str = "") -> None:
        """A sequence that has one of the letters ``broken`` in it gets no token any more."""
        self._broken = {ord(letter) - ord("a") for letter in broken}
        self.log: list[str] = []
        self.steps: list[Step] = []
        self.stopped: list[int] = []
        self._delay = delay
        self._results: deque[Result | StatsRound] = deque()
        self._caches: dict[int, list[int]] = {}

    def push(self, step: Step) -> None:
        ids = []
        for row in step.rows:
            cache = self._caches.setdefault(row.slot, [])
            if row.start == 0:
                cache.clear()
            assert len(cache) >= row.start
            cache[row.start :] = row.ids
            for stop in range(row.stop - row.outputs + 1, row.stop + 1):
                ids.append(NO_TOKEN if self._broken & set(cache[:stop]) else (cache[stop - 1] + 1) % LETTERS)
        self.log.append("push")
        self.steps.append(step)
        self._results.append(Result(epoch=step.epoch, number=step.number, ids=tuple(ids)))

    def request_stats(self, epoch: int, *, redial: bool = False) -> None:
        self.log.append(f"ask {epoch}{' redial' * redial}")
        self._results.append(StatsRound(epoch=epoch, accounts=(), redial=redial))

    def pop(self, timeout: float | None = None) -> Result | StatsRound | None:
        if timeout == 0 and (not self._results or len(self._results) <= self._delay):
            return None
        assert self._results, "a wait for a result that will never come"
        self.log.append("pop")
        return self._results.popleft()

    def stop(self, epoch: int) -> None:
        self.stopped.append(epoch)

    def stats_round(self, epoch: int) -> tuple[StageStats, ...]:
        self.log.append(f"tally {epoch}")
        return ()


class Letters:
    """Ids to letters. Ends before ``stop``, and holds back what may be its beginning."""

    def __init__(self, stop: str = "") -> None:
        self.stopped = False
        self.text = ""
        self._stop, self._whole = stop, ""

    def push(self, token: int) -> str:
        assert not self.stopped, "there is nothing after a stop"
        self._whole += chr(ord("a") + token)
        if self._stop and self._stop in self._whole:
            self.stopped, self._whole = True, self._whole[: self._whole.index(self._stop)]
            return self._show(len(self._whole))
        held = next((n for n in range(len(self._stop), 0, -1) if self._whole.endswith(self._stop[:n])), 0)
        return self._show(len(self._whole) - held)

    def finish(self) -> str:
        return self._show(len(self._whole))

    def _show(self, upto: int) -> str:
        piece, self.text = self._whole[len(self.text) : upto], self._whole[:upto]
        return piece


class RecordingListener:
    """A listener that writes down (piece, finish reason) of every event, and on which thread it came."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []
        self.threads: set[int] = set()
        self.heard, self.ended = threading.Event(), threading.Event()

    def __call__(self, stream: Stream, piece: str) -> None:
        self.events.append((piece, stream.finish_reason))
        self.threads.add(threading.get_ident())
        self.heard.set()
        if stream.finish_reason:
            self.ended.set()

    def wait(self) -> None:
        assert self.ended.wait(PATIENCE_S), "the stream should have ended"


def ask(text: str = "a", new: int = 3, stop_ids: str = "") -> Request:
    ids = tuple(ord(c) - ord("a") for c in text)
    return Request(ids=ids, max_new_tokens=new, stop_ids=frozenset(ord(c) - ord("a") for c in stop_ids))


def never() -> None:
    raise AssertionError("nothing here should sleep")


def make(
    ring: AlphabetRing, *, slots: int = 2, context: int = 50, stages: int = 1, depth: int = 2, chunk: int = 4,
    wake: Callable[[], None] = lambda: None, sleep: Callable[[], object] = never, drafts: bool = False,
) -> Engine:  # fmt: skip
    scheduler = Scheduler(slots=slots, context=context, stages=stages, chunk=chunk, epoch=3, drafts=drafts)
    return Engine(ring, scheduler, vocab=LETTERS, depth=depth, wake=wake, sleep=sleep)


# -- one thread


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_events_come_in_order_and_the_last_one_says_why(delay: int) -> None:
    engine, ear, other = make(AlphabetRing(delay)), RecordingListener(), RecordingListener()
    stream = engine.submit(ask("abc", 4), Letters(), ear)
    second = engine.submit(ask("x", 3), Letters(), other)
    assert engine.busy
    assert ear.events == [], "nothing happens before the engine's thread steps"
    engine.drain()
    assert ear.events == [("d", ""), ("e", ""), ("f", ""), ("g", ""), ("", "length")]
    assert other.events == [("y", ""), ("z", ""), ("a", ""), ("", "length")]
    assert (stream.ids, stream.text, stream.finish_reason) == ([3, 4, 5, 6], "defg", "length")
    assert (second.text, second.request.ids) == ("yza", (23,))
    assert not engine.busy


def test_a_tally_is_of_this_epoch_and_for_an_empty_ring() -> None:
    ring = AlphabetRing()
    engine = make(ring)
    engine.submit(ask("abc", 4), Letters(), RecordingListener())
    with pytest.raises(AssertionError):
        engine.stats_round()
    engine.drain()
    assert engine.stats_round() == () and ring.log[-1] == "tally 3"


def test_accounts_are_asked_for_while_sequences_run() -> None:
    """One tally at a time: who asks while it is under way has the next one; nobody is forgotten in an idle ring."""
    ring = AlphabetRing(delay=1)
    engine = make(ring)
    ear, told = RecordingListener(), list[str]()
    engine.submit(ask("abc", 4), Letters(), ear)

    def again(accounts: tuple[StageStats, ...]) -> None:
        told.append("first")
        engine.request_stats(lambda accounts: told.append("later"), redial=True)

    engine.request_stats(again)
    engine.request_stats(lambda accounts: told.append("second"))
    assert engine.busy and not told
    engine.drain()
    assert told == ["first", "second", "later"]
    assert [entry for entry in ring.log if entry.startswith("ask")] == ["ask 3", "ask 3 redial"]
    assert ear.events[-1] == ("", "length")
    engine.request_stats(lambda accounts: told.append("idle"))
    engine.drain()
    assert told[-1] == "idle" and not engine.busy


def test_a_ring_that_gives_nothing_back_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    engine = make(AlphabetRing(delay=9), depth=2)
    assert engine.silent_s == 0
    now[0] += 50
    engine.submit(ask("abc", 2), Letters(), RecordingListener())
    assert (engine.running, engine.waiting) == (0, 1)
    engine.step()
    assert (engine.running, engine.waiting) == (1, 0)
    now[0] += 7
    assert engine.silent_s == 7
    engine.step()
    assert engine.silent_s == 0
    engine.drain()
    now[0] += 50
    assert engine.silent_s == 0 and engine.running == 0


def test_logprobs_reach_the_stream() -> None:
    class Sure(AlphabetRing):
        def push(self, step: Step) -> None:
            super().push(step)
            result = self._results.pop()
            assert isinstance(result, Result)
            logprobs = tuple(
                (id, -0.5) for id, row in zip(result.ids, step.rows, strict=True) for _ in range(row.logprobs)
            )
            self._results.append(replace(result, logprobs=logprobs))

    engine = make(Sure())
    sure = engine.submit(replace(ask("abc", 3), logprobs=2), Letters(), RecordingListener())
    plain = engine.submit(ask("x", 2), Letters(), RecordingListener())
    engine.drain()
    assert sure.logprobs == [((3, -0.5),) * 2, ((4, -0.5),) * 2, ((5, -0.5),) * 2]
    assert plain.logprobs == [(), ()]


def test_more_requests_than_slots_are_all_served() -> None:
    engine = make(AlphabetRing(1), slots=2, stages=2, depth=3)
    streams = [engine.submit(ask("abcdefghijkl"[: n + 1], n + 1), Letters(), RecordingListener()) for n in range(12)]
    engine.drain()
    for n, stream in enumerate(streams):
        assert stream.ids == [(n + 1 + k) % LETTERS for k in range(n + 1)]


def test_the_ring_is_filled_before_the_engine_waits() -> None:
    ring = AlphabetRing(delay=9)
    engine = make(ring, stages=2, depth=3, slots=1)
    engine.submit(ask("a" * 20, 1), Letters(), RecordingListener())
    engine.drain()
    assert ring.log == ["push"] * 3 + ["pop", "push"] * 2 + ["pop"] * 3


def test_results_are_taken_in_while_the_ring_is_being_filled() -> None:
    ring = AlphabetRing(delay=0)
    engine = make(ring, depth=3)
    engine.submit(ask("a" * 20, 1), Letters(), RecordingListener())
    engine.drain()
    assert ring.log == ["push", "pop"] * 5


@pytest.mark.parametrize(
    ("stop", "new", "events"),
    [
        ("de", 9, [("b", ""), ("c", ""), ("", "stop")]),
        ("b", 9, [("", "stop")]),
        ("df", 4, [("b", ""), ("c", ""), ("de", ""), ("", "length")]),
        ("ef", 4, [("b", ""), ("c", ""), ("d", ""), ("e", "length")]),  # what was held back is text after all
        ("de", 4, [("b", ""), ("c", ""), ("", "stop")]),  # complete with the last token that there may be
    ],
)
def test_a_stop_string_ends_the_text_before_it(stop: str, new: int, events: list[tuple[str, str]]) -> None:
    engine, ear = make(AlphabetRing()), RecordingListener()
    stream = engine.submit(ask("a", new), Letters(stop), ear)
    engine.drain()
    assert ear.events == events
    assert stream.text == "".join(piece for piece, _ in events)
    assert not engine.busy


def test_a_stop_string_frees_the_slot() -> None:
    ring = AlphabetRing()
    engine = make(ring, slots=1)
    engine.submit(ask("a", 20), Letters("c"), RecordingListener())
    second = engine.submit(ask("p", 2), Letters(), RecordingListener())
    engine.drain()
    assert second.text == "qr"
    assert len(ring.steps) == 2 + 2, "no step more than the tokens that were wanted"


def test_a_stop_id_ends_the_text_and_is_no_part_of_it() -> None:
    engine, ear = make(AlphabetRing()), RecordingListener()
    stream = engine.submit(ask("a", 9, stop_ids="d"), Letters(), ear)
    engine.drain()
    assert ear.events == [("b", ""), ("c", ""), ("", "stop")]
    assert (stream.text, stream.ids) == ("bc", [1, 2, 3]), "it is computed and counted, but not shown"


def test_a_full_context_ends_the_text() -> None:
    engine = make(AlphabetRing(), context=6)
    stream = engine.submit(ask("abc", 99), Letters(), RecordingListener())
    engine.drain()
    assert (stream.text, stream.finish_reason) == ("def", "length")


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        ((), "the prompt is empty"),
        ((1,) * 50, "has 50 tokens; with a context of 50 it may have 49"),
        ((1,) * 99, "has 99 tokens"),
        ((1, LETTERS, 2), "makes id 26, but the model knows 26 only"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused_at_once(ids: tuple[int, ...], sentence: str) -> None:
    engine = make(AlphabetRing())
    for refuse in (
        engine.check,
        lambda ids: engine.submit(Request(ids=ids, max_new_tokens=1), Letters(), RecordingListener()),
    ):
        with pytest.raises(RequestError, match=sentence):
            refuse(ids)
    assert not engine.busy


def test_the_longest_prompt_is_served() -> None:
    engine = make(AlphabetRing())
    assert engine.context == 50
    stream = engine.submit(ask("z" * 49, 5), Letters(), RecordingListener())
    engine.drain()
    assert (stream.text, stream.finish_reason) == ("a", "length")


def test_stop_ends_the_ring_of_this_epoch() -> None:
    ring = AlphabetRing()
    make(ring).stop()
    assert ring.stopped == [3]


# -- drafts


ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize(
    ("stop", "stop_ids", "new", "context", "text", "reason"),
    [
        ("", "", 40, 99, ALPHABET[3:] + ALPHABET[:17], "length"),
        ("kl", "", 40, 99, "defghij", "stop"),  # in the middle of a step's tokens
        ("kl", "n", 40, 99, "defghij", "stop"),  # and a stop id behind it in the same step
        ("kl", "", 12, 99, "defghij", "stop"),  # and the last token that is wanted
        ("", "k", 40, 99, "defghij", "stop"),
        ("xy", "k", 40, 99, "defghij", "stop"),
        ("", "", 40, 39, "defghijklm", "length"),
    ],
)
def test_drafts_change_nothing_but_the_number_of_steps(
    stop: str, stop_ids: str, new: int, context: int, text: str, reason: str
) -> None:
    seen, steps = [], []
    for drafts in (False, True):
        ring, ear = AlphabetRing(), RecordingListener()
        engine = make(ring, slots=1, context=context, chunk=32, drafts=drafts)
        stream = engine.submit(ask(ALPHABET + "abc", new, stop_ids), Letters(stop), ear)
        after = engine.submit(ask("x", 2), Letters(), RecordingListener())
        engine.drain()
        assert (stream.text, stream.finish_reason, after.text) == (text, reason, "yz")
        assert ear.events[-1][1] == reason and [said for _, said in ear.events[:-1]] == [""] * (len(ear.events) - 1)
        seen.append((ear.events, stream.ids))
        steps.append(len(ring.steps) - 2)
        if drafts:
            assert 0 < stream.accepted <= stream.drafted
        else:
            assert (stream.drafted, stream.accepted) == (0, 0)
            assert steps == [len(stream.ids)]
        assert stream.decode_steps == steps[-1] - 1, "all but the prompt's"
        assert engine.decode_steps == stream.decode_steps + after.decode_steps
        assert (engine.drafted, engine.accepted) == (stream.drafted, stream.accepted)
    assert seen[0] == seen[1]
    assert steps[1] < steps[0] / 1.5


def test_cancelled_by_a_listener_with_more_of_its_tokens_at_hand() -> None:
    """The tokens of a result are out of the ring already: they are told, and then it ends."""
    engine = make(AlphabetRing(), slots=1, chunk=32, context=99, drafts=True)
    heard: list[tuple[str, str]] = []

    def hear(stream: Stream, piece: str) -> None:
        heard.append((piece, stream.finish_reason))
        if piece == "f":
            engine.cancel(stream)

    stream = engine.submit(ask(ALPHABET + "abc", 40), Letters(), hear)
    engine.drain()
    assert heard[-1] == ("", "cancelled") and len(heard) < 20
    assert "".join(piece for piece, _ in heard) == stream.text


# -- cancel


def test_cancelled_before_it_enters_the_ring() -> None:
    ring, ear = AlphabetRing(), RecordingListener()
    engine = make(ring)
    stream = engine.submit(ask(), Letters(), ear)
    engine.cancel(stream)
    engine.drain()
    assert (ear.events, ring.steps) == ([("", "cancelled")], [])
    assert (stream.seconds, stream.ttft_s) == (0.0, None)


def test_cancelled_while_its_rows_are_out() -> None:
    engine, ear = make(AlphabetRing(delay=9), slots=1), RecordingListener()
    stream = engine.submit(ask("abcdefghijkl"), Letters(), ear)
    after = engine.submit(ask("x", 2), Letters(), RecordingListener())
    engine.step()
    engine.cancel(stream)
    engine.drain()
    assert ear.events == [("", "cancelled")]
    assert after.text == "yz", "the next one in its slot begins anew"


def test_cancelled_with_text_held_back() -> None:
    engine, ear = make(AlphabetRing(delay=9)), RecordingListener()
    stream = engine.submit(ask("a", 9), Letters("cx"), ear)
    while len(stream.ids) < 2:
        engine.step()
    engine.cancel(stream)
    engine.cancel(stream)
    engine.drain()
    assert ear.events == [("b", ""), ("c", "cancelled")]


def test_cancelling_what_has_ended_changes_nothing() -> None:
    engine, ear = make(AlphabetRing()), RecordingListener()
    stream = engine.submit(ask(), Letters(), ear)
    engine.drain()
    engine.cancel(stream)
    engine.drain()
    assert stream.finish_reason == "length"
    assert len(ear.events) == 4
    assert not engine.busy


def test_a_stream_cancelled_while_cancellations_are_taken_in_is_not_forgotten() -> None:
    """It was submitted too late for this step's intake, and must not lose its cancellation to it."""
    engine, ear = make(AlphabetRing()), RecordingListener()
    late: list[Stream] = []

    def hear(stream: Stream, piece: str) -> None:
        late.append(engine.submit(ask(new=20), Letters(), ear))
        engine.cancel(late[0])

    engine.cancel(engine.submit(ask(), Letters(), hear))
    engine.drain()
    assert ear.events == [("", "cancelled")]


# -- times


def test_times_count_from_entering_the_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100)
    monkeypatch.setattr("mpgpt.engine.engine.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    engine = make(AlphabetRing(delay=9), slots=1)
    ttfts: dict[Stream, list[float | None]] = {}

    def hear(stream: Stream, piece: str) -> None:
        ttfts.setdefault(stream, []).append(stream.ttft_s)

    first, second = (engine.submit(ask("a", 3), Letters(), hear) for _ in range(2))
    assert (first.submitted, second.submitted) == (100, 101)
    assert (second.ttft_s, second.seconds) == (None, 0.0)
    engine.drain()
    for stream in (first, second):
        assert stream.submitted < stream.started < stream.first_token < stream.finished
        assert ttfts[stream] == [stream.first_token - stream.started] * 4, "set once, by the first token"
        assert stream.seconds == stream.finished - stream.started == stream.seconds
    assert second.started > first.finished, "the time in the queue is not counted"


def test_seconds_go_on_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(100)
    monkeypatch.setattr("mpgpt.engine.engine.time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    engine = make(AlphabetRing(delay=9))
    stream = engine.submit(ask("a", 9), Letters(), RecordingListener())
    engine.step()
    assert 0 < stream.seconds < stream.seconds


# -- threads


@contextmanager
def served(ring: AlphabetRing, sleeps: list[None], slots: int = 2) -> Iterator[tuple[Engine, threading.Thread]]:
    """An engine that runs on its own thread, where only the doorbell ends a sleep."""
    bell = Doorbell()

    def sleep() -> None:
        sleeps.append(None)
        assert bell.sleep(PATIENCE_S), "nobody rang"

    engine = make(ring, slots=slots, context=ENDLESS, wake=bell.ring, sleep=sleep)
    failures: list[BaseException] = []

    def run() -> None:
        try:
            engine.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield engine, thread
    finally:
        engine.close()
        thread.join(PATIENCE_S)
        bell.close()
    assert not thread.is_alive(), "close lets run return"
    assert failures == []


def test_submit_wakes_a_sleeping_engine() -> None:
    sleeps: list[None] = []
    with served(AlphabetRing(), sleeps) as (engine, thread):
        for n in range(5):
            ear = RecordingListener()
            stream = engine.submit(ask("a", n + 1), Letters(), ear)
            ear.wait()
            assert stream.text == "bcdef"[: n + 1]
            assert ear.threads == {thread.ident}, "listeners are called on the engine's thread alone"
    assert 1 <= len(sleeps) <= 20, "it sleeps, and not in a loop of short naps"


def test_requests_from_many_threads_are_all_served() -> None:
    heard: dict[int, RecordingListener] = {}
    with served(AlphabetRing(), [], slots=3) as (engine, _):

        def client(k: int) -> None:
            for n in range(10):
                ear = heard[10 * k + n] = RecordingListener()
                engine.submit(ask("abcdefgh"[: n % 5 + 1], n + 1), Letters(), ear)

        clients = [threading.Thread(target=client, args=(k,), daemon=True) for k in range(4)]
        for thread in clients:
            thread.start()
        for thread in clients:
            thread.join(PATIENCE_S)
        for ear in heard.values():
            ear.wait()
    assert len(heard) == 40
    for key, ear in heard.items():
        n = key % 10
        assert "".join(piece for piece, _ in ear.events) == "bcdefghijklmnop"[n % 5 : n % 5 + n + 1]


def test_cancel_from_another_thread_ends_a_stream_and_frees_its_slot() -> None:
    with served(AlphabetRing(), [], slots=1) as (engine, _):
        endless, after = RecordingListener(), RecordingListener()
        stream = engine.submit(ask("a", ENDLESS), Letters(), endless)
        second = engine.submit(ask("x", 2), Letters(), after)
        assert endless.heard.wait(PATIENCE_S)
        assert not after.heard.is_set()
        engine.cancel(stream)
        endless.wait()
        after.wait()
        assert (stream.finish_reason, second.text) == ("cancelled", "yz")


def test_no_cancellation_is_lost_between_threads() -> None:
    """Each of these would run for ever."""
    with served(AlphabetRing(), [], slots=4) as (engine, _):
        ears = [RecordingListener() for _ in range(100)]
        for ear in ears:
            engine.cancel(engine.submit(ask("a", ENDLESS), Letters(), ear))
        for ear in ears:
            ear.wait()
    assert all(ear.events[-1] == ("", "cancelled") for ear in ears)


def test_close_lets_run_finish_what_was_submitted() -> None:
    with served(AlphabetRing(), []) as (engine, thread):
        ear = RecordingListener()
        stream = engine.submit(ask("a", 2000), Letters(), ear)
        engine.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert (len(stream.ids), stream.finish_reason) == (2000, "length")


def test_close_before_run_returns_at_once() -> None:
    engine = make(AlphabetRing())
    engine.close()
    engine.run()
    assert not engine.busy


# -- one request's error


class Failing(Letters):
    """Raises at the text's ``at``-th token, or at its end."""

    def __init__(self, error: Exception, at: int | None) -> None:
        super().__init__()
        self._error, self._at = error, at

    def push(self, token: int) -> str:
        if len(self._whole) == self._at:
            raise self._error
        return super().push(token)

    def finish(self) -> str:
        if self._at is None:
            raise self._error
        return super().finish()


INTERNAL = "internal error in this request's text (KeyError)"


@pytest.mark.parametrize("at", [0, 2, None])
@pytest.mark.parametrize(
    ("error", "sentence"), [(KeyError("x"), INTERNAL), (RequestError("it says why"), "it says why")], ids=repr
)
def test_a_text_that_fails_ends_its_stream_alone(
    at: int | None, error: Exception, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """With one slot: the sequence behind it runs only if the slot becomes free."""
    engine, bad, good = make(AlphabetRing(), slots=1), RecordingListener(), RecordingListener()
    failed = engine.submit(ask("ab", 4), Failing(error, at), bad)
    stream = engine.submit(ask("x", 3), Letters(), good)
    engine.drain()
    assert (failed.finish_reason, failed.error) == ("error", sentence)
    said = "cdef" if at is None else "cdef"[:at]
    assert bad.events == [*((letter, "") for letter in said), ("", "error")]
    assert failed.text == said and failed.finished
    assert (stream.text, stream.finish_reason, stream.error) == ("yza", "length", "")
    assert not engine.busy and engine.running == 0
    assert ("KeyError" in capsys.readouterr().err) == (sentence is INTERNAL), "an error of ours is told at length"


@pytest.mark.parametrize("at", range(4))
def test_a_listener_that_fails_ends_its_stream_alone(at: int) -> None:
    """It is called once more, with the end; and what it raises then is its own affair."""
    engine, good, called = make(AlphabetRing(), slots=1), RecordingListener(), list[tuple[str, str]]()

    def listen(stream: Stream, piece: str) -> None:
        called.append((piece, stream.finish_reason))
        if len(called) > at:
            raise RequestError("nobody listens")

    failed = engine.submit(ask("ab", 3), Letters(), listen)
    stream = engine.submit(ask("x", 3), Letters(), good)
    engine.drain()
    assert (failed.finish_reason, failed.error) == ("error", "nobody listens")
    assert called[-1] == ("", "error") and len(called) == at + 2
    assert stream.text == "yza" and not engine.busy


def test_a_text_that_fails_in_the_middle_of_accepted_drafts_ends_its_stream_alone() -> None:
    engine = make(AlphabetRing(), drafts=True, slots=1)
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    failed = engine.submit(ask(alphabet + "abcde", 12), Failing(RequestError("no more"), 4), RecordingListener())
    good = engine.submit(ask("x", 3), Letters(), RecordingListener())
    engine.drain()
    assert failed.drafted and engine.drafted == failed.drafted + good.drafted
    assert (failed.error, failed.text, good.text) == ("no more", "fghi", "yza")


def test_a_cancelled_stream_whose_text_fails_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    engine, ear = make(AlphabetRing()), RecordingListener()
    stream = engine.submit(ask("ab", 9), Failing(RequestError("no end"), None), ear)
    engine.step()
    engine.cancel(stream)
    engine.drain()
    assert ear.events[-1] == ("", "error") and stream.error == "no end" and not engine.busy


class LateStop(Letters):
    """Finds a stop in what was held back to the end."""

    def finish(self) -> str:
        self.stopped = True
        return super().finish()


def test_a_stop_that_is_found_at_the_end_is_a_stop() -> None:
    engine, ear = make(AlphabetRing()), RecordingListener()
    engine.submit(ask("ab", 2), LateStop(), ear)
    engine.drain()
    assert ear.events[-1] == ("", "stop")


# -- logits that are none


LOGITS = "the model's logits for token {} of the answer are NaN or infinite"


def test_logits_that_are_none_end_their_stream_alone() -> None:
    """In the prompt, and in the answer; with one slot, which the next sequence takes over at once."""
    for slots in (1, 3):
        engine, ears = make(AlphabetRing(broken="q"), slots=slots), [RecordingListener() for _ in range(5)]
        prompts = ("q", "ab", "aqb", "op", "x")
        streams = [engine.submit(ask(text, 4), Letters(), ear) for text, ear in zip(prompts, ears, strict=True)]
        engine.drain()
        assert [stream.text for stream in streams] == ["", "cdef", "", "q", "yzab"]
        assert [stream.finish_reason for stream in streams] == ["error", "length", "error", "error", "length"]
        for at, token in ((0, 1), (2, 1), (3, 2)):
            assert streams[at].error.startswith(LOGITS.format(token)) and ears[at].events[-1] == ("", "error")
            assert "weights" in streams[at].error and "bfloat16" in streams[at].error
        assert not streams[1].error and not engine.busy and engine.running == 0


@pytest.mark.parametrize(
    ("stop", "stop_ids", "new", "text", "reason"),
    [("", "", 30, "defghijklmnopq", "error"), ("pq", "", 30, "defghijklmno", "stop"),
     ("", "q", 30, "defghijklmnop", "stop"), ("", "", 14, "defghijklmnopq", "length")],
)  # fmt: skip
def test_drafts_change_nothing_about_logits_that_are_none(
    stop: str, stop_ids: str, new: int, text: str, reason: str
) -> None:
    """What ends the text before them, in the same step even, ends it as ever."""
    seen = []
    for drafts in (False, True):
        engine, ear = make(AlphabetRing(broken="q"), slots=1, chunk=64, context=99, drafts=drafts), RecordingListener()
        prompt = ALPHABET[:16] + ALPHABET[17:] + "abcdefghijklmnop" + "abc"
        stream = engine.submit(ask(prompt, new, stop_ids), Letters(stop), ear)
        after = engine.submit(ask("x", 2), Letters(), RecordingListener())
        engine.drain()
        assert (stream.text, stream.finish_reason, bool(stream.error)) == (text, reason, reason == "error")
        assert after.text == "yz" and not after.error
        assert (stream.drafted > 0) == drafts and 0 <= stream.accepted <= stream.drafted
        seen.append((ear.events, stream.ids, stream.error))
    assert seen[0] == seen[1]
