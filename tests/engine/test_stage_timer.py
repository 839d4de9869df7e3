"""The ledger under a clock that a test moves: every second is in exactly one state."""

from __future__ import annotations

import random
from collections.abc import Iterator

import psutil
import pytest

from mpgpt.engine import stage_timer
from mpgpt.engine.stage_timer import COMPUTE, OTHER, SEND, WAIT, StageTimer, peak_rss


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(stage_timer, "perf_counter", clock)
    yield clock


def test_time_belongs_to_the_state_it_was_spent_in(clock: Clock) -> None:
    book = StageTimer(3)
    clock.now += 1  # before anything: other
    for state, seconds in ((COMPUTE, 2.0), (SEND, 4.0), (WAIT, 8.0), (COMPUTE, 16.0), (OTHER, 32.0)):
        book.enter(state)
        clock.now += seconds
    account = book.snapshot()
    assert (account.rank, account.wall_s) == (3, 63.0)
    assert (account.compute_s, account.wait_s, account.send_s, account.other_s) == (18.0, 8.0, 4.0, 33.0)


def test_a_turn_begins_a_new_account_in_the_same_state(clock: Clock) -> None:
    book = StageTimer(0)
    book.enter(WAIT)
    book.count(96)
    book.count(1)
    clock.now += 5
    first = book.snapshot()
    assert (first.steps, first.tokens, first.wait_s, first.wall_s) == (2, 97, 5.0, 5.0)
    clock.now += 7
    second = book.snapshot()
    assert (second.steps, second.tokens, second.wait_s, second.wall_s) == (0, 0, 7.0, 7.0)


def test_whatever_is_entered_the_parts_are_the_whole(clock: Clock) -> None:
    dice, book = random.Random(1), StageTimer(0)
    begun = clock.now
    for _ in range(1000):
        book.enter(dice.randrange(4))
        clock.now += dice.random()
    account = book.snapshot()
    assert account.wall_s == pytest.approx(clock.now - begun)
    parts = account.compute_s + account.wait_s + account.send_s + account.other_s
    assert parts == pytest.approx(account.wall_s)


def test_peak_memory_is_in_bytes() -> None:
    """It only grows, and is no less than what the process has now."""
    ballast = bytearray(b"x") * (64 << 20)
    assert psutil.Process().memory_info().rss * 0.95 < peak_rss() < psutil.virtual_memory().total
    assert len(ballast) < peak_rss()
