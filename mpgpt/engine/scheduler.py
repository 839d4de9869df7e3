"""Rank 0's policy: which rows go into the next step, and which sequence has which slot.

Knows: sequences, slots, how many stages there are to keep busy, what is in flight, and what is drafted.
Must not know: torch, MPI, text, time.

Steps come back in the order in which they went out. A sequence's prompt goes out in chunks that end at
places that depend on its length alone, whatever its company, one behind the other without waiting; then one
token at a time, each after the one before has come back. Sequences that decode are spread over as many steps as
there are stages: fewer would leave a stage without work, and more would read every weight more often than needed.

A row of decoding may carry drafts after its token, and then gives for each of them what would have come in its place.
Those that were right are kept, and the sequence goes on behind them; the others are written over.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from mpgpt.core import NO_TOKEN, Request, Result, Row, Sequence, Step, TokenLogprob
from mpgpt.engine.drafts import ROW_COST, Lookup, allot

CHUNK = 96
"""Tokens of a prompt that go out together at most: enough to multiply well, few enough to fill a pipeline early."""
LEAST_CHUNK = 48
"""And at least. The chunks get smaller towards the end, because the last one passes through the stages alone."""
DRAFTED_STEP = 16
"""The most tokens of a decoding step with drafts; in a larger step a row costs more than a draft gains."""


def next_chunk(left: int, most: int) -> int:
    """The length of a prompt's next chunk, of ``left`` tokens: half of them, but not under or over a chunk's bounds."""
    return min(left, most, max(LEAST_CHUNK, -(-left // 2)))


NewToken = tuple[Sequence, int, tuple[TokenLogprob, ...]]
"""A sequence's new token, and the logprobs that were wanted with it; ``NO_TOKEN`` if it ends with an error instead."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InFlight:
    """A step that is out, and whose rows they are."""

    step: Step
    sequences: tuple[Sequence, ...]
    decodes: bool
    """Whether sequences that decode are among them."""


class Scheduler:
    """Sequences wait, then run in a slot of every stage's cache, then finish."""

    def __init__(
        self, *, slots: int, context: int, stages: int, chunk: int = CHUNK, epoch: int = 0, drafts: bool = False,
        row_cost: float = ROW_COST,
    ) -> None:  # fmt: skip
        """``slots`` sequences at a time, each of at most ``context`` tokens, prompt and new ones together.

        No step has more than ``slots`` + ``chunk`` tokens. ``row_cost`` is what a further row costs, of a step of
        one row; it decides how sure a draft has to be.
        """
        self.context, self.epoch = context, epoch
        self._stages, self._chunk, self._number = stages, chunk, 0
        self._drafts, self._row_cost = drafts, row_cost
        self._slots = slots
        self._free = list(range(slots))
        self._waiting: deque[Sequence] = deque()
        # Of those that have a slot: whose prompt is not all out, who decodes, and whose last token is back, in order.
        self._running: set[Sequence] = set()
        self._prompting: dict[Sequence, None] = {}
        self._decoding: set[Sequence] = set()
        self._ready: dict[Sequence, None] = {}
        self._lookups: dict[Sequence, Lookup] = {}
        self._flights: deque[InFlight] = deque()

    @property
    def in_flight(self) -> int:
        return len(self._flights)

    @property
    def busy(self) -> bool:
        return bool(self._running or self._waiting or self._flights)

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Sequences that wait for one."""
        return len(self._waiting)

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
        if sequence not in self._running:
            self._waiting.remove(sequence)
            return
        self._prompting.pop(sequence, None)
        self._decoding.discard(sequence)
        self._ready.pop(sequence, None)
        self._lookups.pop(sequence, None)
        self._release(sequence)

    def next(self) -> InFlight | None:
        """The next step, now in flight; None while everything waits for what is out."""
        self._admit()
        decodes, prompts = self._decodes(), self._prompts()
        chosen = decodes + prompts
        if not chosen:
            return None
        rows = (*self._decode_rows(decodes, prompts), *map(self._prompt_row, prompts))
        step = Step(epoch=self.epoch, number=self._number, rows=rows)
        for sequence, row in zip(chosen, rows, strict=True):
            sequence.sent = row.stop
            sequence.in_flight += 1
        for sequence in decodes:
            del self._ready[sequence]
        for sequence in prompts:
            if sequence.sent == len(sequence.tokens):
                del self._prompting[sequence]
                self._decoding.add(sequence)
        self._number += 1
        self._flights.append(InFlight(step=step, sequences=tuple(chosen), decodes=bool(decodes)))
        return self._flights[-1]

    def commit(self, result: Result) -> list[NewToken]:
        """Take a result in: the new tokens of each sequence that got some and still ran, in order.

        A sequence's tokens stand together. It may have ended with the last of them.
        """
        flight = self._flights.popleft()
        assert (result.epoch, result.number) == (flight.step.epoch, flight.step.number), "a result out of order"
        ids, logprobs, news = iter(result.ids), iter(result.logprobs), list[NewToken]()
        for sequence, row in zip(flight.sequences, flight.step.rows, strict=True):
            sequence.in_flight -= 1
            tokens = [next(ids) for _ in range(row.outputs)]
            beside = [tuple(islice(logprobs, 0 if token == NO_TOKEN else row.logprobs)) for token in tokens]
            if sequence.finish_reason:
                self._release(sequence)
            elif tokens:
                kept = self._take(sequence, row, tokens)
                news += [(sequence, token, beside[at]) for at, token in enumerate(kept)]
        assert next(ids, None) is None and next(logprobs, None) is None, "a result with more than was asked for"
        return news

    def _take(self, sequence: Sequence, row: Row, sampled: list[int]) -> list[int]:
        """What of ``sampled`` is the sequence's: as far as the drafts were right, one more, and not beyond its end.

        A ``NO_TOKEN`` among them is its end; one behind a wrong draft is not its own.
        """
        drafts = row.ids[1:] if row.outputs > 1 else ()
        right = 0
        while right < len(drafts) and drafts[right] == sampled[right]:
            right += 1
        kept = []
        for token in sampled[: right + 1]:
            kept.append(token)
            if token == NO_TOKEN:
                self.finish(sequence, "error")
                break
            sequence.tokens.append(token)
            self._judge(sequence, token)
            if sequence.finish_reason:
                break
        sequence.drafted += len(drafts)
        sequence.accepted += max(0, len(kept) - 1 - kept.count(NO_TOKEN))
        if not sequence.finish_reason:
            sequence.sent = len(sequence.tokens) - 1
            self._ready[sequence] = None
            self._learn(sequence, kept)
        return kept

    def _judge(self, sequence: Sequence, token: int) -> None:
        request, new = sequence.request, len(sequence.tokens) - len(sequence.request.ids)
        if token in request.stop_ids:
            self.finish(sequence, "stop")
        elif new >= request.max_new_tokens or len(sequence.tokens) >= self.context:
            self.finish(sequence, "length")

    def _learn(self, sequence: Sequence, tokens: list[int]) -> None:
        if not self._drafts:
            return
        if lookup := self._lookups.get(sequence):
            for token in tokens:
                lookup.push(token)
        else:
            self._lookups[sequence] = Lookup(sequence.tokens)

    def _admit(self) -> None:
        while self._waiting and self._free:
            sequence = self._waiting.popleft()
            sequence.slot = heapq.heappop(self._free)
            self._running.add(sequence)
            self._prompting[sequence] = None

    def _release(self, sequence: Sequence) -> None:
        if sequence.in_flight == 0:
            self._running.remove(sequence)
            heapq.heappush(self._free, sequence.slot)

    def _decodes(self) -> list[Sequence]:
        """Those whose last token came back: an even share of all that decode, if a stage wants work."""
        if not self._ready or sum(flight.decodes for flight in self._flights) >= self._stages:
            return []
        return list(islice(self._ready, -(-len(self._decoding) // self._stages)))

    def _prompts(self) -> list[Sequence]:
        """Those with some of their prompt to go, oldest first, while their chunks fit into one chunk's budget."""
        chosen: list[Sequence] = []
        budget = self._chunk
        for s in self._prompting:
            if not budget:
                break
            tokens = self._until(s) - s.sent
            if tokens <= budget:
                chosen.append(s)
                budget -= tokens
        return chosen

    def _until(self, sequence: Sequence) -> int:
        """Where the sequence's next row ends."""
        left = len(sequence.tokens) - sequence.sent
        return sequence.sent + next_chunk(left, self._chunk)

    def _prompt_row(self, sequence: Sequence) -> Row:
        start, stop = sequence.sent, self._until(sequence)
        return Row(
            slot=sequence.slot,
            start=start,
            ids=tuple(sequence.tokens[start:stop]),
            outputs=1 if stop == len(sequence.tokens) else 0,
            prompt=len(sequence.request.ids),
            logprobs=sequence.request.logprobs,
            sampling=sequence.request.sampling,
        )

    def _decode_rows(self, decodes: list[Sequence], prompts: list[Sequence]) -> Iterator[Row]:
        """The last token of each, and what is drafted behind it."""
        drafts: list[tuple[int, ...]] = [()] * len(decodes)
        if self._drafts and len(decodes) < DRAFTED_STEP:
            taken = len(decodes) + sum(self._until(s) - s.sent for s in prompts)
            room = min(DRAFTED_STEP - len(decodes), self._slots + self._chunk - taken)
            lookups = [self._lookups[s] for s in decodes]
            counts = allot(lookups, [self._most_drafts(s) for s in decodes], room, self._row_cost)
            drafts = [lookup.take(count) for lookup, count in zip(lookups, counts, strict=True)]
        for s, more in zip(decodes, drafts, strict=True):
            ids = (s.tokens[-1], *more)
            yield Row(
                slot=s.slot, start=s.sent, ids=ids, outputs=len(ids), prompt=len(s.request.ids),
                logprobs=s.request.logprobs, sampling=s.request.sampling,
            )  # fmt: skip

    def _most_drafts(self, sequence: Sequence) -> int:
        """The most drafts that fit before the sequence's end; the step yields one token more than drafts."""
        new = len(sequence.tokens) - len(sequence.request.ids)
        return min(sequence.request.max_new_tokens - new, self.context - len(sequence.tokens)) - 1
