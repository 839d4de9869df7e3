"""The stage of the rank that stands before an iPad: steps become calls to it, and its answers become steps.

Knows: which positions each of the two caches holds, the iPad's and this rank's own; how one catches up with the other.
Must not know: sockets, bytes on the wire, how the iPad or torch computes a layer.

Two machines can run the span: the iPad, and this rank itself (``own``) while the iPad is away. Each has a cache of its
own, which the other's work leaves behind. So the hidden states that came in are kept, for every slot and position
(slots x context x embed numbers), and whoever is to compute a row whose earlier positions it has not seen computes
those first. That is all there is to falling back, to coming back, and to a cache that the iPad has lost.

Steps are answered in their order. What is owed when the iPad goes away is computed here, and only when nothing is owed
do steps go to it again.

The iPad attends over all of a slot under a mask, and a mask does not hide NaN. So hidden states that are not finite are
not sent to it: from there on the sequence is computed here, or is NaN where nobody is to compute. Where the iPad's own
answer is not finite, the same holds, and its cache is emptied before the slot is used again.
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
    """One of them: all tokens are its own. As many as tokens: one each."""
    positions: tuple[int, ...]
    """Of the first token, or of each."""
    x: Values
    """[tokens, embed] float32, within the range of float16."""

    def place(self, token: int) -> tuple[int, int]:
        """The slot and the position of one of its tokens."""
        if len(self.slots) == 1:
            return self.slots[0], self.positions[0] + token
        return self.slots[token], self.positions[token]


class DeviceConnection(Protocol):
    """The way to the iPad (``client.Client``). It looks after itself: it dials again when the iPad went away."""

    @property
    def epoch(self) -> int | None:
        """Which life of the iPad's cache this is; None while it is away. A new life begins with an empty cache."""

    def submit(self, epoch: int, call: Call) -> None:
        """Send a call; nothing happens when that life is over."""

    def take(self, epoch: int) -> Values | None:
        """The answer to the first call of that life that is not answered yet, [tokens, embed], if it is here."""

    def renew(self, epoch: int) -> int | None:
        """Begin another life, with an empty cache, once all calls of this one are answered; None when it is over."""

    @property
    def trouble(self) -> str:
        """Why the iPad is away, in a sentence."""

    def account(self) -> DeviceAccount:
        """What happened since the last call."""

    def redial(self) -> None:
        """Dial now, if it is away."""

    def close(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class PendingStep:
    """A step that is under way."""

    step: Step
    """Its hidden states are a copy."""
    y: Tensor
    """[T, E] of the ring's dtype: what has come of its answer."""
    missing: int = 0
    """Calls that are not answered yet."""
    lost: bool = False
    """Whether the iPad went away before it answered all."""


@dataclass(slots=True, kw_only=True)
class CacheExtent:
    """How far each slot of a cache is what the sequence in it is now."""

    upto: list[int] = field(default_factory=list)

    def wrote(self, row: Row) -> None:
        self.upto[row.slot] = row.stop

    def missed(self, row: Row) -> None:
        """Somebody else computed the row: what is here from its start on is of no use."""
        self.upto[row.slot] = min(self.upto[row.slot], row.start)

    def gap(self, row: Row) -> Iterator[Row]:
        """Rows of at most ``CHUNK`` positions that bring the slot to where the row begins."""
        for start in range(min(self.upto[row.slot], row.start), row.start, CHUNK):
            yield Row(slot=row.slot, start=start, ids=(0,) * min(CHUNK, row.start - start))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSizes:
    """The sizes of a stage's cache and of its calls."""

    slots: int
    context: int
    embed: int
    chunk: int
    """Tokens in one call at most."""
    dtype: torch.dtype
    """Of the ring's hidden states."""


class IPadStage:
    """A span that an iPad runs, or this rank for it."""

    def __init__(
        self, span: Span, connection: DeviceConnection, own: TorchStage | None, bell: Doorbell, sizes: StageSizes
    ) -> None:
        """``own`` is None if nobody is to compute while the iPad is away; ``bell`` rings when an answer has come, or
        none will."""
        self.span: Span | None = span
        self._connection, self._own, self._bell, self._chunk = connection, own, bell, sizes.chunk
        self._kept = torch.zeros(sizes.slots, sizes.context, sizes.embed, dtype=sizes.dtype)
        self._there, self._here = (CacheExtent(upto=[0] * sizes.slots) for _ in range(2))
        self._epoch: int | None = None
        self._pending: deque[PendingStep] = deque()
        self._calls: deque[tuple[PendingStep, Call, list[int]]] = deque()
        """What is asked of the iPad, in order: for which step, and where its tokens go; nowhere for a gap."""
        self._apart: dict[int, int] = {}
        """Slots whose sequence is kept from the iPad, and from which position on: there it is not finite, or was not
        on the iPad. Writing over that position ends it."""
        self._spoilt: set[int] = set()
        """Slots whose cache on the iPad may hold what is not finite."""

    def forward(self, step: Step) -> Step | Result | None:
        x_TE = self._keep(step)
        self._look()
        if not self._pending and self._connection.epoch is not None:
            self._begin_life()
        if self._epoch is not None and self._spoilt & {row.slot for row in step.rows} - self._apart.keys():
            self._renew()
        if self._epoch is None and not self._pending:
            return self._compute(step)
        copied = Step(epoch=step.epoch, number=step.number, rows=step.rows, hidden=bytearray(step.hidden))
        pending = PendingStep(step=copied, y=torch.full_like(x_TE, math.nan), lost=self._epoch is None)
        self._pending.append(pending)
        if not pending.lost:
            self._ask(pending, x_TE)
        return None

    def done(self) -> bool:
        self._look()
        return bool(self._pending) and (self._pending[0].lost or not self._pending[0].missing)

    def finish(self) -> Step | Result:
        wait(self.done, self._bell)
        pending = self._pending.popleft()
        if pending.lost:
            return self._compute(pending.step)
        self._mend(pending)
        step = pending.step
        return Step(epoch=step.epoch, number=step.number, rows=step.rows, hidden=_to_bytes(pending.y))

    def account(self) -> DeviceAccount:
        return self._connection.account()

    def redial(self) -> None:
        self._connection.redial()

    def close(self) -> None:
        self._connection.close()

    # -- with the iPad

    def _begin_life(self) -> None:
        if self._epoch != self._connection.epoch:
            self._epoch = self._connection.epoch
            self._empty()

    def _renew(self) -> None:
        """Have the iPad forget its cache, when it has answered what it was asked before."""

        def quiet() -> bool:
            self._look()
            return not self._calls

        wait(quiet, self._bell)
        if self._epoch is not None:
            self._epoch = self._connection.renew(self._epoch)
            self._empty()

    def _empty(self) -> None:
        self._there.upto = [0] * len(self._there.upto)
        self._spoilt.clear()

    def _look(self) -> None:
        """Take in what has come. When the iPad went away, what it owes is lost."""
        epoch = self._epoch
        if epoch is None:
            return
        while self._calls and (y := self._connection.take(epoch)) is not None:
            pending, call, tokens = self._calls.popleft()
            pending.missing -= 1
            for i in np.flatnonzero(~np.isfinite(y).all(axis=1)).tolist():
                self._spoil(*call.place(i))
            if tokens:
                pending.y[tokens] = torch.from_numpy(y).to(pending.y.dtype)
        if self._connection.epoch != epoch:
            self._epoch = None
            self._calls.clear()
            for pending in self._pending:
                pending.lost = pending.lost or bool(pending.missing)

    def _spoil(self, slot: int, position: int) -> None:
        """What the iPad computed there is not finite."""
        self._spoilt.add(slot)
        self._apart[slot] = min(position, self._apart.get(slot, position))

    def _ask(self, pending: PendingStep, x_TE: Tensor) -> None:
        """Rows of one token in one call, all others piece by piece, each after what the iPad has missed of it."""
        single: list[tuple[Row, int]] = []
        for row, tokens in _placed(pending.step):
            if row.slot in self._apart:
                continue
            for gap in self._there.gap(row):
                self._submit(pending, gap, self._kept[gap.slot, gap.start : gap.stop], [])
            if len(row.ids) == 1:
                single.append((row, tokens[0]))
            else:
                self._submit(pending, row, x_TE[tokens.start : tokens.stop], tokens)
            self._there.wrote(row)
            self._here.missed(row)
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

    # -- without

    def _mend(self, pending: PendingStep) -> None:
        """Compute here what the iPad did not, or not in finite numbers; where nobody is to, it stays as it is."""
        finite_T = pending.y.isfinite().all(-1).tolist()
        bad = [(row, tokens) for row, tokens in _placed(pending.step) if not all(finite_T[tokens.start : tokens.stop])]
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
        """Here and now. Raises ``LinkError`` where that is not wanted."""
        if self._own is None:
            raise LinkError(f"{self._connection.trouble}; `fallback: none` lets nobody compute its layers")
        for row in step.rows:
            for gap in self._here.gap(row):
                hidden = _to_bytes(self._kept[gap.slot, gap.start : gap.stop])
                self._own.forward(Step(epoch=step.epoch, number=step.number, rows=(gap,), hidden=hidden))
            self._here.wrote(row)
            self._there.missed(row)
        answer = self._own.forward(step)
        assert answer is not None
        return answer

    def _keep(self, step: Step) -> Tensor:
        """Keep the step's hidden states for whoever misses them, as [T, E], and notice what is not finite."""
        x_TE = self._hidden(step)
        finite_T = x_TE.isfinite().all(-1).tolist()
        for row, tokens in _placed(step):
            self._kept[row.slot, row.start : row.stop] = x_TE[tokens.start : tokens.stop]
            if row.start <= self._apart.get(row.slot, -1):
                del self._apart[row.slot]
            if row.slot not in self._apart and not all(finite := finite_T[tokens.start : tokens.stop]):
                self._apart[row.slot] = row.start + finite.index(False)
        return x_TE

    def _hidden(self, step: Step) -> Tensor:
        return torch.frombuffer(step.hidden, dtype=self._kept.dtype).view(-1, self._kept.shape[-1])


def _placed(step: Step) -> Iterator[tuple[Row, range]]:
    """Each row, and where its tokens stand in the step."""
    at = 0
    for row in step.rows:
        yield row, range(at, at + len(row.ids))
        at += len(row.ids)


def _values(x_TE: Tensor) -> Values:
    """float32; what float16 cannot hold becomes the largest that it can."""
    values: Values = x_TE.float().clamp(-LARGEST, LARGEST).numpy()
    return values


def _to_bytes(x_TE: Tensor) -> memoryview:
    return x_TE.contiguous().view(torch.uint8).reshape(-1).numpy().data
