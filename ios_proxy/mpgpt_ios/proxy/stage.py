"""The stage of the proxy rank: steps become calls of the iPad, and its results become steps.

Knows: which positions each of the two caches holds, the iPad's and this rank's own; how one catches up with the other.
Must not know: sockets, bytes on the wire, how the iPad or torch computes a layer.

Two machines can run the span: the iPad, and this rank itself (``own``) while the iPad is away. Each has a cache of its
own, which lags behind while the other computes. So the stage records its inputs for every slot and position (slots x
context x embed numbers), and a machine that is to compute a row first computes the row's earlier positions that its
cache lacks. Nothing else is needed for falling back, for coming back, and for a cache that the iPad has lost.

Steps leave in their order. The steps pending when the iPad is lost are computed here, and only when none is pending
do steps go to it again.

The iPad attends over all of a slot under a mask, and a mask does not hide NaN. So hidden states that are not finite are
not sent to it: from there on the sequence is computed here, or is NaN where there is no fallback. Where the iPad's own
result is not finite, the same holds, and its cache is emptied before the slot is used again.

Two epochs meet here: that of the ring is in its steps, that of the iPad's cache is PROTOCOL.md's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mpgpt.core import DeviceAccount, Result, Row, Span, Step
from mpgpt.engine.scheduler import CHUNK
from mpgpt.engine.stage import TorchStage
from mpgpt.errors import LinkError
from mpgpt.transport.doorbell import Doorbell, wait

Values = NDArray[Any]
"""float16 or float32."""
LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request to the iPad: tokens of one sequence that follow one another, or one token of each of several."""

    slots: tuple[int, ...]
    """One for all tokens, or one for each."""
    positions: tuple[int, ...]
    """The first token's, or each one's."""
    x: Values
    """[tokens, embed] float32, within the range of float16."""

    def position_of(self, token: int) -> tuple[int, int]:
        """The slot and the position of one of its tokens."""
        if len(self.slots) == 1:
            return self.slots[0], self.positions[0] + token
        return self.slots[token], self.positions[token]


class DeviceConnection(Protocol):
    """The connection to the iPad (``client.Client``), which dials again by itself when the iPad was lost."""

    @property
    def epoch(self) -> int | None:
        """The epoch of the iPad's cache; None while the iPad is away. Every epoch begins with an empty cache."""

    def submit(self, epoch: int, call: Call) -> None:
        """Send a call; nothing happens when the epoch is over."""

    def take(self, epoch: int) -> Values | None:
        """The result of the oldest open call of the epoch, [tokens, embed]; None if it has not arrived."""

    def renew(self, epoch: int) -> int | None:
        """Begin another epoch, when no call of this one is open, and return it; None when this one is over."""

    @property
    def trouble(self) -> str:
        """Why the iPad is away, in a sentence."""

    def account(self) -> DeviceAccount:
        """Counts and times since the previous call."""

    def redial(self) -> None:
        """Dial now, if it is away."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSizes:
    """The sizes of a stage's cache and of its calls."""

    slots: int
    context: int
    embed: int
    chunk: int
    """Tokens in one call, at most."""


@dataclass(slots=True, kw_only=True)
class PendingStep:
    """A step of which results are missing."""

    step: Step
    """With a copy of its hidden states."""
    y: Tensor
    """[T, E] float32: the results so far."""
    missing: int = 0
    """Open calls."""
    lost: bool = False
    """Whether the iPad was lost while calls were open."""


@dataclass(slots=True, kw_only=True)
class CacheExtent:
    """How many positions of each slot a cache holds of the slot's present sequence."""

    upto: list[int] = field(default_factory=list)

    def advance(self, row: Row) -> None:
        self.upto[row.slot] = row.stop

    def cut_back(self, row: Row) -> None:
        """The row was computed elsewhere: positions from its start on are stale here."""
        self.upto[row.slot] = min(self.upto[row.slot], row.start)

    def gap(self, row: Row) -> Iterator[Row]:
        """Rows of at most ``CHUNK`` positions that bring the slot to where the row begins."""
        for start in range(min(self.upto[row.slot], row.start), row.start, CHUNK):
            yield Row(slot=row.slot, start=start, ids=(0,) * min(CHUNK, row.start - start))


class IPadStage:
    """A span that an iPad runs, or this rank in its stead."""

    def __init__(
        self,
        span: Span,
        connection: DeviceConnection,
        own: TorchStage | None,
        bell: Doorbell,
        sizes: StageSizes,
    ) -> None:
        """``own`` is None without a fallback. ``bell`` rings when a result has arrived, and when the iPad was lost."""
        slots = sizes.slots
        self.span: Span | None = span
        self._connection, self._own, self._bell, self._chunk = connection, own, bell, sizes.chunk
        self._inputs = torch.zeros(slots, sizes.context, sizes.embed)
        self._device_extent, self._own_extent = CacheExtent(upto=[0] * slots), CacheExtent(upto=[0] * slots)
        self._epoch: int | None = None
        self._pending: deque[PendingStep] = deque()
        self._calls: deque[tuple[PendingStep, Call, list[int]]] = deque()
        """Open calls in order: the step of each, and its tokens in that step, none for a gap."""
        self._withheld: dict[int, int] = {}
        """Slots whose sequence is withheld from the iPad, and the position that is not finite, as an input or as the
        iPad's result. A row that writes over that position ends it."""
        self._spoilt: set[int] = set()
        """Slots whose cache on the iPad may hold numbers that are not finite."""

    def forward(self, step: Step) -> Step | Result | None:
        x_TE = self._record(step)
        self._collect()
        if not self._pending and self._connection.epoch is not None:
            self._begin_epoch()
        if self._epoch is not None and self._spoilt & {row.slot for row in step.rows} - self._withheld.keys():
            self._renew()
        if self._epoch is None and not self._pending:
            return self._compute(step)
        copied = Step(epoch=step.epoch, number=step.number, rows=step.rows, hidden=bytearray(step.hidden))
        pending = PendingStep(step=copied, y=torch.full_like(x_TE, math.nan), lost=self._epoch is None)
        self._pending.append(pending)
        if not pending.lost:
            self._send(pending, x_TE)
        return None

    def done(self) -> bool:
        self._collect()
        return bool(self._pending) and (self._pending[0].lost or not self._pending[0].missing)

    def finish(self) -> Step | Result:
        wait(self.done, self._bell)
        pending = self._pending.popleft()
        if pending.lost:
            return self._compute(pending.step)
        self._repair(pending)
        step = pending.step
        return Step(epoch=step.epoch, number=step.number, rows=step.rows, hidden=_to_bytes(pending.y))

    def account(self) -> DeviceAccount:
        return self._connection.account()

    def redial(self) -> None:
        self._connection.redial()

    def close(self) -> None:
        self._connection.close()

    # -- on the iPad

    def _begin_epoch(self) -> None:
        if self._epoch != self._connection.epoch:
            self._epoch = self._connection.epoch
            self._forget()

    def _renew(self) -> None:
        """Empty the iPad's cache, when no call is open any more."""

        def none_open() -> bool:
            self._collect()
            return not self._calls

        wait(none_open, self._bell)
        if self._epoch is not None:
            self._epoch = self._connection.renew(self._epoch)
            self._forget()

    def _forget(self) -> None:
        self._device_extent.upto = [0] * len(self._device_extent.upto)
        self._spoilt.clear()

    def _collect(self) -> None:
        """Take the results that have arrived. When the iPad was lost, so are the steps with open calls."""
        epoch = self._epoch
        if epoch is None:
            return
        while self._calls and (y := self._connection.take(epoch)) is not None:
            pending, call, tokens = self._calls.popleft()
            pending.missing -= 1
            for i in np.flatnonzero(~np.isfinite(y).all(axis=1)).tolist():
                self._spoil(*call.position_of(i))
            if tokens:
                pending.y[tokens] = torch.from_numpy(y).float()
        if self._connection.epoch != epoch:
            self._epoch = None
            self._calls.clear()
            for pending in self._pending:
                pending.lost = pending.lost or bool(pending.missing)

    def _spoil(self, slot: int, position: int) -> None:
        """The iPad's result at that position is not finite."""
        self._spoilt.add(slot)
        self._withheld[slot] = min(position, self._withheld.get(slot, position))

    def _send(self, pending: PendingStep, x_TE: Tensor) -> None:
        """Send rows of one token in one call, others chunk by chunk, each after the positions that its cache lacks."""
        single: list[tuple[Row, int]] = []
        for row, tokens in _token_ranges(pending.step):
            if row.slot in self._withheld:
                continue
            for gap in self._device_extent.gap(row):
                self._submit(pending, gap, self._inputs[gap.slot, gap.start : gap.stop], [])
            if len(row.ids) == 1:
                single.append((row, tokens[0]))
            else:
                self._submit(pending, row, x_TE[tokens.start : tokens.stop], tokens)
            self._device_extent.advance(row)
            self._own_extent.cut_back(row)
        if single:
            where = [at for _, at in single]
            slots, positions = tuple(row.slot for row, _ in single), tuple(row.start for row, _ in single)
            self._call(pending, Call(slots=slots, positions=positions, x=_values(x_TE[where])), where)

    def _submit(self, pending: PendingStep, row: Row, x_TE: Tensor, tokens: Sequence[int]) -> None:
        for start in range(0, len(row.ids), self._chunk):
            piece = slice(start, start + self._chunk)
            call = Call(slots=(row.slot,), positions=(row.start + start,), x=_values(x_TE[piece]))
            self._call(pending, call, list(tokens[piece]))

    def _call(self, pending: PendingStep, call: Call, tokens: list[int]) -> None:
        assert self._epoch is not None
        self._calls.append((pending, call, tokens))
        pending.missing += 1
        self._connection.submit(self._epoch, call)

    # -- on this rank

    def _repair(self, pending: PendingStep) -> None:
        """Compute here the rows without a finite result; without a fallback they stay as they are."""
        finite_T = pending.y.isfinite().all(-1).tolist()
        bad = [
            (row, tokens)
            for row, tokens in _token_ranges(pending.step)
            if not all(finite_T[tokens.start : tokens.stop])
        ]
        if bad and self._own:
            where = [at for _, tokens in bad for at in tokens]
            hidden_TE = self._hidden(pending.step)[where]
            rows = tuple(row for row, _ in bad)
            answer = self._compute(
                Step(epoch=pending.step.epoch, number=pending.step.number, rows=rows, hidden=_to_bytes(hidden_TE))
            )
            assert isinstance(answer, Step), "an iPad has neither the first nor the last layer"
            pending.y[where] = self._hidden(answer)

    def _compute(self, step: Step) -> Step | Result:
        """Run the step on this rank. Raises ``LinkError`` without a fallback."""
        if self._own is None:
            raise LinkError(f"{self._connection.trouble}; `fallback: none` lets nobody compute its layers")
        for row in step.rows:
            for gap in self._own_extent.gap(row):
                hidden = _to_bytes(self._inputs[gap.slot, gap.start : gap.stop])
                self._own.forward(Step(epoch=step.epoch, number=step.number, rows=(gap,), hidden=hidden))
            self._own_extent.advance(row)
            self._device_extent.cut_back(row)
        answer = self._own.forward(step)
        assert answer is not None
        return answer

    def _record(self, step: Step) -> Tensor:
        """Record the step's hidden states, and return them as [T, E]; withhold sequences that are not finite."""
        x_TE = self._hidden(step)
        finite_T = x_TE.isfinite().all(-1).tolist()
        for row, tokens in _token_ranges(step):
            self._inputs[row.slot, row.start : row.stop] = x_TE[tokens.start : tokens.stop]
            if row.start <= self._withheld.get(row.slot, -1):
                del self._withheld[row.slot]
            if row.slot not in self._withheld and not all(finite := finite_T[tokens.start : tokens.stop]):
                self._withheld[row.slot] = row.start + finite.index(False)
        return x_TE

    def _hidden(self, step: Step) -> Tensor:
        return torch.frombuffer(step.hidden, dtype=self._inputs.dtype).view(-1, self._inputs.shape[-1])


def _token_ranges(step: Step) -> Iterator[tuple[Row, range]]:
    """Each row, and its range among the step's tokens."""
    at = 0
    for row in step.rows:
        yield row, range(at, at + len(row.ids))
        at += len(row.ids)


def _values(x_TE: Tensor) -> Values:
    """float32, clamped to the range of float16."""
    values: Values = x_TE.float().clamp(-LARGEST, LARGEST).numpy()
    return values


def _to_bytes(x_TE: Tensor) -> memoryview:
    return x_TE.contiguous().view(torch.uint8).reshape(-1).numpy().data
