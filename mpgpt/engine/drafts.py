"""Drafts by prompt lookup: what stood in a text before may come again.

Knows: the ids of one text, where its last tokens stood before, and how often what followed there followed again.
Must not know: models, steps, slots, time.

A draft is right or wrong; it costs a row more in a step, and if it is right it saves a step. Whether to make one is a
bet, so the odds are counted: every token of the text, the prompt's as well, is first foretold and then looked at,
drafted or not, and the share of hits is kept for each length of match. Foretelling costs nothing, so a text that does
not repeat itself is hardly ever drafted for, and one that begins to is noticed without a trial.

(Prompt lookup: Saxena 2023. Checking drafts in one pass: Leviathan et al. 2023, Stern et al. 2018. A pointer that
follows a match, and odds by its length, are the match model of context-mixing compressors: Mahoney, lpaq, 2007.)
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence

LONGEST = 16
"""The longest match that counts, tokens; a longer one is no better."""
DOUBT = 6
"""The prior: a match of this many tokens is taken to be right with probability one half."""
MEMORY = 8
"""The odds are a moving average over about this many tokens."""
ROW_COST = 0.1
"""What a further row costs, of a step of one row, where nobody measured it. Too low, and wrong drafts cost time."""


class Lookup:
    """One text as it grows, and a pointer to where its end stood before, as long as that foretells it.

    The pointer is set to the last place where the newest two tokens stood, and then follows its match. Indexing
    three or four tokens as well gave no more on real texts: what matters is known from the length of the match.
    """

    __slots__ = ("_at", "_matched", "_odds", "_pairs", "_tokens")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._pairs: dict[tuple[int, int], int] = {}  # the position after the last place of each pair
        self._at, self._matched = 0, 0  # what is foretold, and of how many tokens before it the same is true; 0: none
        self._odds = [n / (n + DOUBT) for n in range(LONGEST + 1)]
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The next token of the text. Takes the same time however long the text is."""
        tokens = self._tokens
        if matched := self._matched:
            hit = tokens[self._at] == token
            self._odds[matched] += (hit - self._odds[matched]) / MEMORY
            self._at, self._matched = self._at + 1, min(matched + 1, LONGEST) if hit else 0
        before = tokens[-2:]
        tokens.append(token)
        if len(before) == 2:  # only now, when something follows it: the newest pair is not its own last place
            self._pairs[before[0], before[1]] = len(tokens) - 1
        if before and not self._matched and (at := self._pairs.get((before[-1], token))):
            self._at, self._matched = at, self._overlap(at)

    def _overlap(self, at: int) -> int:
        """How many tokens before ``at`` are the last ones of the text."""
        tokens, n = self._tokens, 2
        while n < min(at, LONGEST) and tokens[at - n - 1] == tokens[-n - 1]:
            n += 1
        return n

    def chance(self, ahead: int) -> float:
        """How likely the draft after ``ahead`` others is right when they are; 0 where nothing is foretold."""
        return self._odds[min(self._matched + ahead, LONGEST)] if self._matched else 0.0

    def take(self, count: int) -> tuple[int, ...]:
        """The next ``count`` tokens as they went on before; past the end, as the drafts themselves go on."""
        assert self._matched or not count
        drafts = self._tokens[self._at : self._at + count]
        period = len(self._tokens) - self._at
        while len(drafts) < count:
            drafts.append(drafts[-period])
        return tuple(drafts)


def allot(lookups: Sequence[Lookup], limits: Sequence[int], room: int, row_cost: float = ROW_COST) -> list[int]:
    """How many drafts each row of a step gets: the likeliest first, while they make tokens cheaper.

    ``limits`` are the most for each row, ``room`` for all together, ``row_cost`` is what a further row costs, of a
    step of one row. A draft is worth making if the tokens that the step may be expected to give then cost less
    each. So with one row nearly all are worth it, with sixteen only the certain.
    """
    counts = [0] * len(lookups)
    expected, cost = float(len(lookups)), 1 + row_cost * (len(lookups) - 1)
    heap = [(-lookup.chance(0), i) for i, lookup in enumerate(lookups) if limits[i] > 0]
    heapq.heapify(heap)
    while heap and room > 0:
        odds, i = -heap[0][0], heap[0][1]
        if odds * cost <= row_cost * expected:
            break
        expected, cost, room = expected + odds, cost + row_cost, room - 1
        counts[i] += 1
        if counts[i] < limits[i]:
            heapq.heapreplace(heap, (-odds * lookups[i].chance(counts[i]), i))
        else:
            heapq.heappop(heap)
    return counts
