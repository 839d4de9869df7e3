"""The lookup against scans of the whole text, and the bet against every other bet."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpgpt.engine.drafts import DOUBT, LONGEST, MEMORY, ROW_COST, Lookup, allot

repetitive = st.lists(st.integers(0, 2), max_size=60) | st.lists(st.integers(0, 9), max_size=8).map(lambda t: t * 8)


@dataclass
class Scan:
    """The same by looking through the whole text again and again."""

    tokens: list[int] = field(default_factory=list)
    source: int | None = None
    odds: dict[int, float] = field(default_factory=dict)

    def push(self, token: int) -> None:
        hit = False
        if self.source is not None:
            n, hit = self.matched(), self.tokens[self.source] == token
            self.odds[n] = self.chance(n) + (hit - self.chance(n)) / MEMORY
        self.tokens.append(token)
        self.source = self.source + 1 if hit and self.source is not None else self.last_place()

    def last_place(self) -> int | None:
        places = [p for p in range(2, len(self.tokens)) if self.tokens[p - 2 : p] == self.tokens[-2:]]
        return places[-1] if places else None

    def matched(self) -> int:
        assert self.source is not None
        before = self.tokens[: self.source]
        pairs = zip(reversed(self.tokens), reversed(before), strict=False)
        return min(sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)), LONGEST)

    def chance(self, matched: int) -> float:
        return self.odds.get(matched, matched / (matched + DOUBT))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(repetitive, st.integers(0, 10))
def test_the_lookup_is_a_scan_of_the_text(tokens: list[int], count: int) -> None:
    lookup, scan = Lookup(), Scan()
    for token in tokens:
        lookup.push(token)
        scan.push(token)
        if scan.source is None:
            assert (lookup.chance(0), lookup.take(0)) == (0, ())
            continue
        text = list(scan.tokens)
        for i in range(count):
            text.append(text[scan.source + i])  # beyond the end it copies what it has just drafted
        assert lookup.take(count) == tuple(text[len(scan.tokens) :])
        expected = [scan.chance(min(scan.matched() + i, LONGEST)) for i in range(3)]
        assert [lookup.chance(i) for i in range(3)] == pytest.approx(expected)


def test_a_lookup_of_a_text_is_that_of_its_tokens_one_by_one() -> None:
    tokens = [1, 2, 3, 1, 2, 4, 1, 2, 3, 1, 2]
    whole, grown = Lookup(tokens), Lookup(tokens[:4])
    for token in tokens[4:]:
        grown.push(token)
    assert whole.take(8) == grown.take(8)
    assert whole.chance(0) == grown.chance(0) > 0


@pytest.mark.parametrize(
    ("tokens", "drafts"),
    [
        ([], ()),
        ([5], ()),
        ([5, 5], ()),
        ([1, 2, 3, 4, 5], ()),
        ([5, 5, 5], (5, 5, 5, 5)),
        ([1, 2, 3, 9, 1, 2], (3, 9, 1, 2)),
        ([1, 2, 3, 1, 2, 4, 1, 2], (4, 1, 2, 4)),  # the last place counts
        ([1, 2, 3, 7, 2, 3, 8, 1, 2, 3], (7, 2, 3, 8)),  # but one that is being followed is followed on
        ([7, 8, 7, 8], (7, 8, 7, 8)),
    ],
)
def test_what_is_drafted(tokens: list[int], drafts: tuple[int, ...]) -> None:
    lookup = Lookup(tokens)
    assert lookup.take(4 if lookup.chance(0) else 0) == drafts


def lengths(tokens: list[int], company: int = 1, room: int = 15) -> list[int]:
    """How many drafts the text would get after each of its tokens, with others in the step that get none."""
    lookup, found = Lookup(), []
    for token in tokens:
        lookup.push(token)
        others = [Lookup()] * (company - 1)
        found.append(allot([lookup, *others], [room] * company, room)[0])
    return found


def test_a_text_that_repeats_itself_gets_more_and_more_until_the_step_is_full() -> None:
    found = lengths(list(range(20)) * 4)
    assert found[:21] == [0] * 21, "nothing has come twice yet"
    assert 1 <= found[21] < 15
    assert found[-1] == 15
    assert found[22:] == sorted(found[22:])


def test_a_text_that_breaks_off_what_it_repeats_gets_less_and_less() -> None:
    """Every pair comes again and something else follows: wrong every time."""
    tokens: list[int] = []
    for n in range(60):
        tokens += [1, 2, 100 + n]
    found = lengths(tokens)
    after = found[4::3]  # behind "1 2", where there is something to foretell
    assert after[0] > 0
    assert after[20:] == [0] * len(after[20:])
    assert sum(after) <= 30, "three steps lost"


def test_a_text_without_rhyme_hardly_pays_for_drafts() -> None:
    """256 tokens at random: pairs recur, what follows them does not."""
    draw = random.Random(0)
    tokens = [draw.randrange(24) for _ in range(3000)]
    found = lengths(tokens)
    assert sum(found[500:]) * ROW_COST < 0.05 * len(found[500:])
    hits = [n for n in range(2, len(tokens)) if found[n - 1]]
    assert hits[0] < 500, "it has been tried"


def test_company_asks_for_surer_drafts() -> None:
    alone, some, many = (lengths(list(range(20)) * 2, company)[22] for company in (1, 3, 15))
    assert alone > some > 0
    assert many == 0


@dataclass(frozen=True)
class Odds(Lookup):
    """A lookup with given odds."""

    odds: tuple[float, ...]

    def chance(self, ahead: int) -> float:
        return self.odds[ahead] if ahead < len(self.odds) else 0.0


def speed(rows: list[tuple[float, ...]], counts: tuple[int, ...], row_cost: float) -> float:
    """Tokens that may be expected of a step, by what it costs."""
    expected = sum(1 + sum(math.prod(odds[: n + 1]) for n in range(k)) for odds, k in zip(rows, counts, strict=True))
    return expected / (1 + row_cost * (len(rows) - 1 + sum(counts)))


odds = st.lists(st.floats(0.01, 1), max_size=3).map(tuple)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.lists(odds, min_size=1, max_size=4),
    st.lists(st.integers(0, 3), min_size=4, max_size=4),
    st.integers(0, 6),
    st.floats(0.01, 1),
)
def test_no_other_bet_is_better(rows: list[tuple[float, ...]], most: list[int], room: int, row_cost: float) -> None:
    limits = most[: len(rows)]
    counts = allot([Odds(each) for each in rows], limits, room, row_cost)
    assert all(0 <= count <= limit for count, limit in zip(counts, limits, strict=True)) and sum(counts) <= room
    possible = itertools.product(*(range(limit + 1) for limit in limits))
    padded = [(*each, 0.0, 0.0, 0.0) for each in rows]
    best = max(speed(padded, chosen, row_cost) for chosen in possible if sum(chosen) <= room)
    assert speed(padded, tuple(counts), row_cost) == pytest.approx(best, rel=1e-9)


def test_rows_that_are_alike_share_alike() -> None:
    lookups = [Lookup(list(range(20)) * 3) for _ in range(3)]
    assert allot(lookups, [15] * 3, room=12) == [4, 4, 4]
    assert allot(lookups, [15, 1, 15], room=12, row_cost=0.01) == [6, 1, 5]
    assert allot([], [], room=12) == []
