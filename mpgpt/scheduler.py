"""Rank 0's policy: which rows go into the next step, and which sequence has which slot.

Knows: sequences, slots, how many stages there are to keep busy, and what is in flight.
Must not know: torch, MPI, text, time.

Steps come back in the order in which they went out. A sequence's prompt goes out in chunks that end at
places that depend on its length alone, whatever its company, one behind the other without waiting; then one
token at a time, each after the one before has come back. Sequences that decode are spread over as many steps as
there are stages: fewer would leave a stage without work, and more would read every weight more often than needed.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass

from mpgpt.core import Request, Result, Row, Sequence, Step

CHUNK = 96
"""Tokens of a prompt that go out together at most: enough to multiply well, few enough to fill a pipeline early."""
LEAST_CHUNK = 48
"""And at least. The chunks get smaller towards the end, because the last one passes through the stages alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Flight:
    """A step that is out, and whose rows they are."""

    step: Step
    sequences: tuple[Sequence, ...]
    decodes: bool
    """Whether sequences that decode are among them."""


class Scheduler:
    """Sequences wait, then run in a slot of every stage's cache, then finish."""

    def __init__(self, *, slots: int, context: int, stages: int, chunk: int = CHUNK, epoch: int = 0) -> None:
        """``slots`` sequences at a time, each of at most ``context`` tokens, prompt and new ones together."""
        self.context, self.epoch = context, epoch
        self._stages, self._chunk, self._least, self._number = stages, chunk, min(chunk, LEAST_CHUNK), 0
        self._free = list(range(slots))
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        self._flights: deque[Flight] = deque()

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting or self._flights)

    def add(self, request: Request) -> Sequence:
        """Queue a request, whose prompt must be shorter than the context."""
        assert 0 < len(request.ids) < self.context and request.max_new_tokens > 0
        sequence = Sequence(request=request)
        self._waiting.append(sequence)
        return sequence

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence, wherever it is; its slot is free once none of its rows is out."""
        if sequence.finish_reason:
            return
        sequence.finish_reason = reason
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._release(sequence)

    def next(self) -> Flight | None:
        """The next step, now in flight; None while everything waits for what is out."""
        self._admit()
        decodes = self._decodes()
        chosen = decodes + self._prompts()
        if not chosen:
            return None
        rows = tuple(self._row(sequence) for sequence in chosen)
        step = Step(epoch=self.epoch, number=self._number, rows=rows)
        for sequence, row in zip(chosen, rows, strict=True):
            sequence.sent = row.stop
            sequence.in_flight += 1
        self._number += 1
        self._flights.append(Flight(step=step, sequences=tuple(chosen), decodes=bool(decodes)))
        return self._flights[-1]

    def commit(self, result: Result) -> list[tuple[Sequence, int]]:
        """Take a result in: the new token of each sequence that got one and still runs."""
        flight = self._flights.popleft()
        assert (result.epoch, result.number) == (flight.step.epoch, flight.step.number), "a result out of order"
        ids, news = iter(result.ids), []
        for sequence, row in zip(flight.sequences, flight.step.rows, strict=True):
            sequence.in_flight -= 1
            tokens = [next(ids) for _ in range(row.outputs)]
            if sequence.finish_reason:
                self._release(sequence)
                continue
            for token in tokens:
                sequence.tokens.append(token)
                news.append((sequence, token))
                self._judge(sequence, token)
        assert next(ids, None) is None, "a result with more ids than were asked for"
        return news

    def _judge(self, sequence: Sequence, token: int) -> None:
        request, new = sequence.request, len(sequence.tokens) - len(sequence.request.ids)
        if token in request.stop_ids:
            self.finish(sequence, "stop")
        elif new >= request.max_new_tokens or len(sequence.tokens) >= self.context:
            self.finish(sequence, "length")

    def _admit(self) -> None:
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            self._running.append(sequence)

    def _release(self, sequence: Sequence) -> None:
        if sequence.in_flight == 0 and sequence in self._running:
            self._running.remove(sequence)
            heapq.heappush(self._free, sequence.slot)

    def _decodes(self) -> list[Sequence]:
        """Those whose last token came back: an even share of all that decode, if a stage wants work."""
        if sum(flight.decodes for flight in self._flights) >= self._stages:
            return []
        live = [s for s in self._running if not s.finish_reason and s.sent and s.sent >= len(s.tokens) - 1]
        share = -(-len(live) // self._stages)
        return [s for s in live if s.sent < len(s.tokens)][:share]

    def _prompts(self) -> list[Sequence]:
        """Those with more than a token to go, oldest first, while their chunks fit into one chunk's budget."""
        chosen: list[Sequence] = []
        budget = self._chunk
        for s in self._running:
            if s.finish_reason or (s.sent and s.sent >= len(s.tokens) - 1):
                continue
            tokens = self._until(s) - s.sent
            if tokens <= budget:
                chosen.append(s)
                budget -= tokens
        return chosen

    def _until(self, sequence: Sequence) -> int:
        """Where the sequence's next row ends: half of what is left, but not under or over a chunk's bounds."""
        left = len(sequence.tokens) - sequence.sent
        return sequence.sent + min(left, self._chunk, max(self._least, -(-left // 2)))

    def _row(self, sequence: Sequence) -> Row:
        start, stop = sequence.sent, self._until(sequence)
        return Row(
            slot=sequence.slot,
            start=start,
            ids=tuple(sequence.tokens[start:stop]),
            outputs=1 if stop == len(sequence.tokens) else 0,
            sampling=sequence.request.sampling,
        )
