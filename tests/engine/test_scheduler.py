"""Rank 0's policy, step by step, and then against a simulated ring whose KV cache notices every mistake."""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpgpt.core import NO_TOKEN, Request, Result, Sampling, Sequence
from mpgpt.engine.drafts import Lookup
from mpgpt.engine.scheduler import CHUNK, InFlight, Scheduler

CHUNK_SIZE = 4


def prompt(length: int, first: int = 1) -> tuple[int, ...]:
    return tuple(range(first, first + length))


def ask(length: int = 3, new: int = 5, stops: frozenset[int] = frozenset(), first: int = 1) -> Request:
    return Request(ids=prompt(length, first), max_new_tokens=new, stop_ids=stops)


def make(
    slots: int = 4, context: int = 100, stages: int = 1, chunk: int = CHUNK_SIZE, drafts: bool = False
) -> Scheduler:
    return Scheduler(slots=slots, context=context, stages=stages, chunk=chunk, drafts=drafts)


def push(scheduler: Scheduler) -> InFlight:
    flight = scheduler.next()
    assert flight is not None, "there is something to do"
    return flight


def answer(scheduler: Scheduler, flight: InFlight, token: int = 7) -> list[tuple[Sequence, int]]:
    step = flight.step
    news = scheduler.commit(Result(epoch=step.epoch, number=step.number, ids=(token,) * step.outputs))
    return [(sequence, token) for sequence, token, _ in news]


def reply(scheduler: Scheduler, flight: InFlight, ids: tuple[int, ...]) -> list[int]:
    """The tokens that are taken of a result of these ids."""
    step = flight.step
    return [token for _, token, _ in scheduler.commit(Result(epoch=step.epoch, number=step.number, ids=ids))]


def shape(flight: InFlight) -> list[tuple[int, int, int, int]]:
    """(slot, start, tokens, outputs) of each row."""
    return [(row.slot, row.start, len(row.ids), row.outputs) for row in flight.step.rows]


def decoding(scheduler: Scheduler, count: int, new: int = 50) -> list[Sequence]:
    """``count`` sequences whose prompts are through and that have their first token."""
    sequences = [scheduler.add(ask(1, new)) for _ in range(count)]
    answer(scheduler, push(scheduler))
    assert all(sequence.new_ids for sequence in sequences), "all prompts fit into one chunk"
    return sequences


# -- prompts


def test_nothing_to_do_is_no_step() -> None:
    scheduler = make()
    assert scheduler.next() is None
    assert not scheduler.busy
    assert scheduler.in_flight == 0


def test_a_prompts_chunks_go_out_back_to_back_and_end_at_multiples_of_the_chunk() -> None:
    scheduler = make(stages=3)
    sequence = scheduler.add(ask(10))
    flights = [push(scheduler) for _ in range(3)]
    assert [shape(f) for f in flights] == [[(0, 0, 4, 0)], [(0, 4, 4, 0)], [(0, 8, 2, 1)]]
    assert sum((f.step.rows[0].ids for f in flights), ()) == prompt(10)
    assert scheduler.next() is None, "its first token has to come back before it goes on"
    assert (scheduler.in_flight, sequence.in_flight) == (3, 3)
    assert [answer(scheduler, f) for f in flights] == [[], [], [(sequence, 7)]]
    assert shape(push(scheduler)) == [(0, 10, 1, 1)]


@pytest.mark.parametrize("length", [4, 8])
def test_a_prompt_that_fills_its_chunks_gets_its_token_from_the_last_one(length: int) -> None:
    scheduler = make()
    scheduler.add(ask(length))
    flights = [push(scheduler) for _ in range(length // 4)]
    assert [row[3] for f in flights for row in shape(f)] == [0] * (length // 4 - 1) + [1]
    assert scheduler.next() is None


def test_short_prompts_share_a_step_while_they_fit_into_a_chunk() -> None:
    scheduler = make()
    for length in (1, 2, 3, 1):
        scheduler.add(ask(length))
    assert shape(push(scheduler)) == [(0, 0, 1, 1), (1, 0, 2, 1), (3, 0, 1, 1)]
    assert shape(push(scheduler)) == [(2, 0, 3, 1)]


def cuts_of(scheduler: Scheduler, sequence: Sequence) -> list[int]:
    """The positions at which the prompt of ``sequence`` is cut."""
    found = []
    while not sequence.new_ids:
        flight = push(scheduler)
        found += [row.stop for s, row in zip(flight.sequences, flight.step.rows, strict=True) if s is sequence]
        answer(scheduler, flight)
    return found


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(1, 700), st.lists(st.integers(1, 300), max_size=5), st.sampled_from([5, 32, CHUNK, 128]))
def test_where_a_prompt_is_cut_depends_on_itself_alone(length: int, company: list[int], chunk: int) -> None:
    """Otherwise the arithmetic, and in the end a token, might depend on who else is there."""
    alone = make(slots=1, context=1000, chunk=chunk)
    expected = cuts_of(alone, alone.add(ask(length)))
    scheduler = make(slots=8, context=1000, stages=3, chunk=chunk)
    for other in company:
        scheduler.add(ask(other))
    assert cuts_of(scheduler, scheduler.add(ask(length))) == expected
    sizes = [stop - start for start, stop in zip([0, *expected], expected, strict=False)]
    assert 1 <= min(sizes) <= max(sizes) <= chunk
    assert expected[-1] == length


def test_a_new_prompt_does_not_wait_for_those_that_decode() -> None:
    scheduler = make(slots=3)
    decoding(scheduler, 2)
    scheduler.add(ask(9))
    assert shape(push(scheduler)) == [(0, 1, 1, 1), (1, 1, 1, 1), (2, 0, 4, 0)]


# -- slots


def test_at_most_as_many_run_as_there_are_slots_and_the_rest_wait_in_order() -> None:
    scheduler = make(slots=2)
    a, b, c, d = (scheduler.add(ask(1, new=1, first=i)) for i in range(4))
    flight = push(scheduler)
    assert flight.sequences == (a, b)
    assert scheduler.next() is None
    assert [s.slot for s in (a, b, c, d)] == [0, 1, -1, -1]
    answer(scheduler, flight)
    assert (a.finish_reason, b.finish_reason) == ("length", "length")
    flight = push(scheduler)
    assert flight.sequences == (c, d)
    assert shape(flight) == [(0, 0, 1, 1), (1, 0, 1, 1)], "a slot's next sequence starts at position 0"
    answer(scheduler, flight)
    assert not scheduler.busy


def test_a_slot_is_free_only_when_none_of_its_rows_is_out() -> None:
    scheduler = make(slots=1, stages=2)
    first = scheduler.add(ask(8))
    flights = [push(scheduler), push(scheduler)]
    scheduler.finish(first, "cancelled")
    second = scheduler.add(ask(2))
    assert scheduler.next() is None
    assert answer(scheduler, flights[0]) == []
    assert scheduler.next() is None
    assert second.slot == -1
    assert answer(scheduler, flights[1]) == []
    assert shape(push(scheduler)) == [(0, 0, 2, 1)]
    assert second.slot == 0


# -- decoding


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_those_that_decode_are_spread_over_as_many_steps_as_there_are_stages(stages: int, count: int) -> None:
    scheduler = make(slots=count, chunk=count, stages=stages)
    everyone = decoding(scheduler, count)
    share = -(-count // stages)
    out: deque[InFlight] = deque()
    while (flight := scheduler.next()) is not None:
        out.append(flight)
    sizes = [len(flight.sequences) for flight in out]
    assert len(out) == -(-count // share), "as many steps as stages, or a step for each where there are fewer"
    assert sizes[:-1] == [share] * (len(out) - 1)
    assert {id(s) for flight in out for s in flight.sequences} == {id(s) for s in everyone}
    assert sum(sizes) == count, "disjoint"
    for _ in range(3 * len(out)):  # and it stays so while results come back one by one
        back = out.popleft()
        answer(scheduler, back)
        out.append(push(scheduler))
        assert out[-1].sequences == back.sequences
        assert scheduler.next() is None


def test_a_sequence_never_has_two_decode_rows_out() -> None:
    scheduler = make(stages=4)
    (sequence,) = decoding(scheduler, 1)
    flight = push(scheduler)
    assert sequence.in_flight == 1
    assert scheduler.next() is None
    answer(scheduler, flight, 8)
    step = push(scheduler).step
    assert (step.rows[0].ids, step.rows[0].start) == ((8,), 2)


def test_no_more_steps_decode_at_once_than_there_are_stages() -> None:
    """A step more would read every weight once more, for tokens that can as well come along with others."""
    scheduler = make(stages=1)
    (a,) = decoding(scheduler, 1)
    first = push(scheduler)
    b = scheduler.add(ask(2))
    prompts = push(scheduler)
    assert prompts.sequences == (b,)
    answer(scheduler, first)
    second = push(scheduler)
    assert second.sequences == (a,)
    answer(scheduler, prompts)
    assert scheduler.next() is None, "the one stage has its decode step: b waits for a"
    answer(scheduler, second)
    assert push(scheduler).sequences == (b, a), "in the order in which their tokens came back"


def test_rows_carry_the_requests_sampling_and_steps_their_number_and_epoch() -> None:
    scheduler = Scheduler(slots=1, context=10, stages=1, epoch=6)
    sampling = Sampling(temperature=1.0, seed=5)
    scheduler.add(Request(ids=(1,), max_new_tokens=3, sampling=sampling))
    for number in range(3):
        flight = push(scheduler)
        assert (flight.step.epoch, flight.step.number, flight.step.rows[0].sampling) == (6, number, sampling)
        answer(scheduler, flight)
    assert not scheduler.busy


# -- drafts


PERIOD = (1, 2, 3, 4)


def repeating(
    count: int = 1, *, new: int = 50, context: int = 200, slots: int = 4, stages: int = 1, stops: tuple[int, ...] = ()
) -> tuple[Scheduler, list[Sequence]]:
    """``count`` sequences whose prompts, 1 2 3 4 over and over, are through, and which have said 1."""
    scheduler = make(slots=slots, context=context, stages=stages, chunk=32 * count, drafts=True)
    request = Request(ids=PERIOD * 8, max_new_tokens=new, stop_ids=frozenset(stops))
    sequences = [scheduler.add(request) for _ in range(count)]
    answer(scheduler, push(scheduler), 1)
    assert [s.new_ids for s in sequences] == [[1]] * count
    return scheduler, sequences


def test_a_row_carries_its_token_and_what_followed_it_before() -> None:
    scheduler, (sequence,) = repeating()
    step = push(scheduler).step
    (row,) = step.rows
    assert (row.start, row.ids) == (32, (1, 2, 3, 4) * 4), "a step of 16 tokens and no more"
    assert row.outputs == len(row.ids)
    assert sequence.sent == row.stop
    assert scheduler.next() is None, "one row of a sequence at a time"


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ((2, 3, 4, 1) * 4, 16),  # all of them, and the one after
        ((2, 3, 4, 1, 2, 9, 4) + (0,) * 9, 6),  # the first that is not as drafted is right itself
        ((9,) + (3, 4, 1) * 5, 1),  # what was said after a wrong draft counts for nothing
    ],
)
def test_what_was_drafted_rightly_is_kept_and_the_rest_written_over(said: tuple[int, ...], kept: int) -> None:
    scheduler, (sequence,) = repeating()
    assert reply(scheduler, push(scheduler), said) == list(said[:kept])
    assert sequence.new_ids == [1, *said[:kept]]
    assert (sequence.drafted, sequence.accepted) == (15, kept - 1)
    (row,) = push(scheduler).step.rows
    assert (row.start, row.ids[0]) == (32 + kept, said[kept - 1])
    assert sequence.tokens[: row.start + 1] == [*PERIOD * 8, 1, *said[:kept]]


def test_without_drafts_every_row_has_one_token() -> None:
    scheduler = make(chunk=32)
    sequence = scheduler.add(Request(ids=PERIOD * 8, max_new_tokens=5))
    while flight := scheduler.next():
        assert len(flight.step.rows[0].ids) in (32, 1)
        answer(scheduler, flight)
    assert (sequence.drafted, sequence.accepted) == (0, 0)


@pytest.mark.parametrize(("new", "drafts"), [(2, 0), (3, 1), (9, 7), (17, 15), (18, 15)])
def test_nothing_is_drafted_beyond_the_tokens_that_are_wanted(new: int, drafts: int) -> None:
    scheduler, (sequence,) = repeating(new=new)
    flight = push(scheduler)
    assert len(flight.step.rows[0].ids) == 1 + drafts
    assert len(reply(scheduler, flight, ((2, 3, 4, 1) * 4)[: drafts + 1])) == drafts + 1
    assert sequence.finish_reason == ("length" if new <= 17 else "")


@pytest.mark.parametrize("context", [34, 35, 40, 48, 49, 60])
def test_nothing_is_drafted_beyond_the_context(context: int) -> None:
    scheduler, (sequence,) = repeating(context=context)
    flight = push(scheduler)
    (row,) = flight.step.rows
    assert len(row.ids) == min(16, context - 33) and row.stop < context
    reply(scheduler, flight, ((2, 3, 4, 1) * 4)[: len(row.ids)])
    assert sequence.finish_reason == ("length" if context <= 49 else "")
    assert len(sequence.tokens) <= context


def test_a_stop_in_the_middle_of_what_was_accepted_ends_the_sequence_there() -> None:
    scheduler, (sequence,) = repeating(stops=(4,))
    assert reply(scheduler, push(scheduler), (2, 3, 4, 1) * 4) == [2, 3, 4]
    assert (sequence.new_ids, sequence.finish_reason) == ([1, 2, 3, 4], "stop")
    assert sequence.accepted == 2
    assert not scheduler.busy


@pytest.mark.parametrize(
    ("said", "taken", "accepted"),
    [
        ((NO_TOKEN,) * 8, (), 0),
        ((2, *(NO_TOKEN,) * 7), (2,), 0),
        ((2, 3, 4, NO_TOKEN, 1, 1, 1, 1), (2, 3, 4), 2),
        ((2, 3, 4, 1, 2, 3, 4, NO_TOKEN), (2, 3, 4, 1, 2, 3, 4), 6),
    ],
)
def test_an_output_that_failed_ends_the_sequence_behind_what_was_right(
    said: tuple[int, ...], taken: tuple[int, ...], accepted: int
) -> None:
    scheduler, (sequence, other) = repeating(2, slots=2)
    flight = push(scheduler)
    assert [row.outputs for row in flight.step.rows] == [8, 8]
    assert reply(scheduler, flight, said + (9,) * 8) == [*taken, NO_TOKEN, 9]
    assert (sequence.new_ids, sequence.finish_reason, sequence.accepted) == ([1, *taken], "error", accepted)
    assert (other.new_ids, other.finish_reason) == ([1, 9], "")
    third = scheduler.add(ask(2))
    assert push(scheduler).sequences == (other, third) and third.slot == sequence.slot


def test_an_output_that_failed_behind_a_wrong_draft_or_an_end_is_nobodys() -> None:
    scheduler, (sequence,) = repeating()
    assert reply(scheduler, push(scheduler), (2, 9) + (NO_TOKEN,) * 14) == [2, 9]
    assert sequence.finish_reason == "" and scheduler.busy
    for options, reason in (({"stops": (3,)}, "stop"), ({"new": 4}, "length")):
        scheduler, (sequence,) = repeating(**options)
        flight = push(scheduler)
        said = (2, 3, 4)[: flight.step.outputs] + (NO_TOKEN,) * (flight.step.outputs - 3)
        assert reply(scheduler, flight, said) == [2, 3, 4][: 2 if reason == "stop" else 3]
        assert sequence.finish_reason == reason


def test_cancelled_with_drafts_out() -> None:
    scheduler, (a, b) = repeating(2, slots=2)
    flight = push(scheduler)
    scheduler.finish(a, "cancelled")
    assert scheduler.busy
    outputs = [row.outputs for row in flight.step.rows]
    kept = reply(scheduler, flight, tuple((2, 3, 4, 1)[i % 4] for n in outputs for i in range(n)))
    assert len(kept) == outputs[1] > 1, "the tokens of a cancelled one are nobody's"
    assert (a.new_ids, a.drafted) == ([1], 0)
    c = scheduler.add(ask(2))
    assert push(scheduler).sequences == (b, c)
    assert c.slot == a.slot


@pytest.mark.parametrize("count", [1, 2, 3, 5, 15, 16, 20])
def test_a_step_has_few_drafts_and_they_are_shared(count: int) -> None:
    scheduler, _ = repeating(count, slots=count)
    sizes = [len(row.ids) for row in push(scheduler).step.rows]
    assert len(sizes) == count and sum(sizes) == max(16, count)
    assert max(sizes) - min(sizes) <= 1


def test_a_step_keeps_to_the_bounds_of_a_frame_when_a_prompt_comes_along() -> None:
    scheduler, _ = repeating(1, slots=3)
    scheduler.add(ask(64))
    step = push(scheduler).step
    assert [len(row.ids) for row in step.rows] == [3, 32], "3 slots and a chunk of 32"


# -- ends


@pytest.mark.parametrize(
    ("request_", "context", "tokens", "reason"),
    [
        (ask(2, 3), 100, [7, 7, 7], "length"),
        (ask(2, 1), 100, [7], "length"),
        (ask(2, 3, frozenset({7})), 100, [7], "stop"),
        (ask(2, 1, frozenset({7})), 100, [7], "stop"),  # both at once: it is a stop
        (ask(2, 99, frozenset({1, 2})), 6, [7, 7, 7, 7], "length"),  # the context is full; a prompt stops nothing
        (ask(5, 99), 6, [7], "length"),
    ],
)
def test_why_a_sequence_ends(request_: Request, context: int, tokens: list[int], reason: str) -> None:
    scheduler = make(context=context, chunk=8)
    sequence = scheduler.add(request_)
    got = []
    while (flight := scheduler.next()) is not None:
        got += answer(scheduler, flight)
    assert (sequence.new_ids, sequence.finish_reason) == (tokens, reason)
    assert got == [(sequence, token) for token in tokens]
    assert not scheduler.busy


def test_an_impossible_request_is_our_own_mistake() -> None:
    for request in (ask(0), ask(10), ask(3, new=0)):
        with pytest.raises(AssertionError):
            make(context=10).add(request)


def test_cancelled_while_it_waits() -> None:
    scheduler = make(slots=1)
    first, second, third = (scheduler.add(ask(1, new=1)) for _ in range(3))
    flight = push(scheduler)
    scheduler.finish(second, "cancelled")
    answer(scheduler, flight)
    flight = push(scheduler)
    assert flight.sequences == (third,)
    answer(scheduler, flight)
    assert not scheduler.busy
    assert [s.finish_reason for s in (first, second, third)] == ["length", "cancelled", "length"]


def test_cancelled_while_its_chunks_are_out() -> None:
    scheduler = make(slots=2, stages=2)
    long, short = scheduler.add(ask(12)), scheduler.add(ask(4))
    first = push(scheduler)
    scheduler.finish(long, "cancelled")
    second = push(scheduler)
    assert (first.sequences, second.sequences) == ((long,), (short,)), "its other chunks stay at home"
    assert answer(scheduler, first) == []
    assert answer(scheduler, second) == [(short, 7)]
    assert long.new_ids == []


def test_cancelled_while_it_decodes() -> None:
    scheduler = make(slots=2)
    a, b = decoding(scheduler, 2)
    flight = push(scheduler)
    scheduler.finish(a, "cancelled")
    assert scheduler.busy
    assert answer(scheduler, flight) == [(b, 7)], "the token of a cancelled one is nobody's"
    assert (a.new_ids, b.new_ids) == ([7], [7, 7])
    assert push(scheduler).sequences == (b,)


def test_an_end_is_final() -> None:
    scheduler = make(slots=1)
    sequence = scheduler.add(ask(1, new=1))
    answer(scheduler, push(scheduler))
    scheduler.finish(sequence, "cancelled")
    assert sequence.finish_reason == "length"
    a, b = scheduler.add(ask(1)), scheduler.add(ask(1))
    assert push(scheduler).sequences == (a,), "its slot was freed once, not twice"
    assert (a.slot, b.slot) == (0, -1)


@pytest.mark.parametrize(("epoch", "number"), [(0, 1), (1, 0)])
def test_a_result_out_of_order_is_noticed(epoch: int, number: int) -> None:
    scheduler = make(stages=2)
    scheduler.add(ask(8))
    push(scheduler)
    push(scheduler)
    with pytest.raises(AssertionError, match="order"):
        scheduler.commit(Result(epoch=epoch, number=number, ids=()))


def test_a_result_with_too_many_ids_is_noticed() -> None:
    scheduler = make()
    scheduler.add(ask(1))
    step = push(scheduler).step
    with pytest.raises(AssertionError, match="more than"):
        scheduler.commit(Result(epoch=step.epoch, number=step.number, ids=(1, 2)))


def test_logprobs_go_to_the_tokens_that_they_belong_to() -> None:
    scheduler = make(chunk=6)
    quiet, curious, other = (scheduler.add(replace(ask(2, 9), logprobs=n)) for n in (0, 2, 1))
    step = push(scheduler).step
    assert [(row.prompt, row.logprobs) for row in step.rows] == [(2, 0), (2, 2), (2, 1)]
    logprobs = ((5, -0.5), (6, -1.0), (7, -0.25))
    result = Result(epoch=step.epoch, number=step.number, ids=(4, 5, 7), logprobs=logprobs)
    assert scheduler.commit(result) == [(quiet, 4, ()), (curious, 5, logprobs[:2]), (other, 7, logprobs[2:])]
    step = push(scheduler).step
    assert [(row.start, row.prompt, row.logprobs) for row in step.rows] == [(2, 2, 0), (2, 2, 2), (2, 2, 1)]
    with pytest.raises(AssertionError, match="more than"):
        scheduler.commit(Result(epoch=step.epoch, number=step.number, ids=(1, 2, 3), logprobs=(*logprobs, (1, -1.0))))


def test_logprobs_of_a_draft_that_was_wrong_are_dropped() -> None:
    """As are those of one that was right behind it."""
    scheduler = make(drafts=True, chunk=8)
    sequence = scheduler.add(Request(ids=(1, 2, 3, 1, 2), max_new_tokens=20, logprobs=1))
    step = push(scheduler).step
    scheduler.commit(Result(epoch=step.epoch, number=step.number, ids=(3,), logprobs=((3, -0.5),)))
    step = push(scheduler).step
    (row,) = step.rows
    assert row.ids[:3] == (3, 1, 2)
    ids = (1, 9, *row.ids[3:], 0)[: row.outputs]
    logprobs = tuple((token, -float(n)) for n, token in enumerate(ids))
    news = scheduler.commit(Result(epoch=step.epoch, number=step.number, ids=ids, logprobs=logprobs))
    assert news == [(sequence, 1, ((1, -0.0),)), (sequence, 9, ((9, -1.0),))]


def test_who_runs_and_who_waits_is_counted() -> None:
    scheduler = make(slots=2)
    sequences = [scheduler.add(ask(1, 3)) for _ in range(3)]
    assert (scheduler.running, scheduler.waiting) == (0, 3)
    push(scheduler)
    assert (scheduler.running, scheduler.waiting) == (2, 1)
    scheduler.finish(sequences[2], "cancelled")
    assert (scheduler.running, scheduler.waiting) == (2, 0)


# -- a simulated ring


def fake_token(tokens: list[int]) -> int:
    """A model whose next token depends on every token before it: 16 different ones, so that stops happen."""
    return zlib.crc32(b"".join(t.to_bytes(4, "little") for t in tokens)) % 16


def fake_rhyme(tokens: list[int]) -> int:
    """One whose next token depends on the last two and seldom on more, so that it repeats itself with variations."""
    return fake_token(tokens[-2:] if fake_token(tokens) else tokens) % 5


def fake_fault(tokens: list[int]) -> int:
    """One that cannot go on after some tokens, given or said; it repeats itself as well."""
    return NO_TOKEN if {77, 3} & set(tokens) else (fake_token(tokens[-2:]) + len(tokens) // 9) % 6


def alone(request: Request, context: int, model: Callable[[list[int]], int]) -> tuple[list[int], str]:
    """What the fake model gives a request that has it for itself."""
    tokens = list(request.ids)
    while True:
        token, new = model(tokens), tokens[len(request.ids) :]
        if token == NO_TOKEN:
            return new, "error"
        tokens.append(token)
        new.append(token)
        if new[-1] in request.stop_ids:
            return new, "stop"
        if len(new) >= request.max_new_tokens or len(tokens) >= context:
            return new, "length"


@dataclass(slots=True)
class FakeRing:
    """Every slot's cache, and the results that are on their way. Runs steps in the order of their going out."""

    slots: int
    context: int
    model: Callable[[list[int]], int]
    caches: dict[int, list[int]] = field(default_factory=dict)
    owners: dict[int, Sequence] = field(default_factory=dict)
    results: deque[Result] = field(default_factory=deque)

    def push(self, flight: InFlight) -> None:
        ids = []
        rows = flight.step.rows
        assert len({row.slot for row in rows}) == len(rows), "a slot has one row in a step"
        for sequence, row in zip(flight.sequences, rows, strict=True):
            assert 0 <= row.slot < self.slots and row.stop <= self.context and row.ids
            if row.start == 0:
                self.owners[row.slot] = sequence
                self.caches[row.slot] = []
            assert self.owners[row.slot] is sequence, "all below a row's start is the same sequence's"
            cache = self.caches[row.slot]
            assert row.start <= len(cache), "no position is left out"
            cache[row.start :] = row.ids
            ids += [self.model(cache[:stop]) for stop in range(row.stop - row.outputs + 1, row.stop + 1)]
        self.results.append(Result(epoch=flight.step.epoch, number=flight.step.number, ids=tuple(ids)))


@st.composite
def requests(draw: st.DrawFn, context: int) -> Request:
    ids = draw(st.lists(st.integers(0, 99), min_size=1, max_size=context - 1))
    stops = draw(st.frozensets(st.integers(0, 15), max_size=2))
    return Request(ids=tuple(ids), max_new_tokens=draw(st.integers(1, 30)), stop_ids=stops)


class Guess(Lookup):
    """Drafts that are now right and now wrong, and anything from none to all that may be."""

    model: Callable[[list[int]], int]
    dice: random.Random

    def chance(self, ahead: int) -> float:
        return self.dice.choice((0.0, 1.0, 1.0))

    def take(self, count: int) -> tuple[int, ...]:
        tokens = list(self._tokens)
        for _ in range(count):
            tokens.append(self.dice.randrange(16) if self.dice.random() < 0.3 else max(0, self.model(tokens)))
        return tuple(tokens[len(self._tokens) :])


@pytest.mark.parametrize("drafts", ["none", "lookup", "guess"])
@pytest.mark.parametrize("model", [fake_token, fake_rhyme, fake_fault])
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_in_any_company_every_sequence_gets_what_it_would_get_alone(
    model: Callable[[list[int]], int], drafts: str, data: st.DataObject
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if drafts == "guess":
            dice = random.Random(data.draw(st.integers(0, 1000), "dice"))
            patch.setattr(Guess, "model", staticmethod(model), raising=False)
            patch.setattr(Guess, "dice", dice, raising=False)
            patch.setattr("mpgpt.engine.scheduler.Lookup", Guess)
        check_company(model, drafts != "none", data)


def check_company(model: Callable[[list[int]], int], drafts: bool, data: st.DataObject) -> None:
    context = data.draw(st.integers(2, 40), "context")
    slots, stages = data.draw(st.integers(1, 4), "slots"), data.draw(st.integers(1, 4), "stages")
    chunk, depth = data.draw(st.integers(1, 12), "chunk"), data.draw(st.integers(1, 6), "depth")
    todo = deque(data.draw(st.lists(requests(context), min_size=1, max_size=7), "requests"))
    scheduler, ring = make(slots, context, stages, chunk, drafts), FakeRing(slots, context, model)
    sequences: list[Sequence] = []
    actions = st.sampled_from(["add", "push", "push", "push", "pop", "pop", "cancel"])
    told: dict[int, list[int]] = {}

    def commit() -> None:
        for sequence, token, _ in scheduler.commit(ring.results.popleft()):
            if token == NO_TOKEN:
                assert sequence.finish_reason == "error"
            else:
                told.setdefault(id(sequence), []).append(token)

    for action in data.draw(st.lists(actions, max_size=60), "actions"):
        if action == "add" and todo:
            sequences.append(scheduler.add(todo.popleft()))
        elif action == "push" and scheduler.in_flight < depth and (flight := scheduler.next()):
            assert flight.step.tokens <= slots + chunk, "the frames of a ring are built for no more"
            ring.push(flight)
        elif action == "pop" and ring.results:
            commit()
        elif action == "cancel" and sequences:
            scheduler.finish(data.draw(st.sampled_from(sequences), "whom"), "cancelled")
        assert scheduler.in_flight == len(ring.results)
    sequences += [scheduler.add(request) for request in todo]
    for _ in range(2000):
        if scheduler.in_flight < depth and (flight := scheduler.next()):
            ring.push(flight)
        elif ring.results:
            commit()
        else:
            break
    assert not scheduler.busy, "all comes to an end"
    for sequence in sequences:
        tokens, reason = alone(sequence.request, context, model)
        assert told.get(id(sequence), []) == sequence.new_ids
        if sequence.finish_reason == "cancelled":
            assert sequence.new_ids == tokens[: len(sequence.new_ids)]
        else:
            assert (sequence.new_ids, sequence.finish_reason) == (tokens, reason)
