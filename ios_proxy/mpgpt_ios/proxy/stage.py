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


class Line(Protocol):
    """The way to the iPad (``client.Client``). It looks after itself: it dials again when the iPad went away."""

    @property
    def life(self) -> int | None:
        """Which life of the iPad's cache this is; None while it is away. A new life begins with an empty cache."""

    def submit(self, life: int, call: Call) -> None:
        """Send a call; nothing happens when that life is over."""

    def take(self, life: int) -> Values | None:
        """The answer to the first call of that life that is not answered yet, [tokens, embed], if it is here."""

    def renew(self, life: int) -> int | None:
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
class Owed:
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
class Filled:
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


class IPadStage:
    """A span that an iPad runs, or this rank for it."""

    def __init__(
        self, span: Span, line: Line, own: TorchStage | None, bell: Doorbell, *, slots: int, context: int, embed: int,
        chunk: int, dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """``own`` is None if nobody is to compute while the iPad is away; ``chunk`` tokens are the most in one call;
        ``dtype`` is that of the ring's hidden states. ``bell`` rings when an answer has come, or none will."""
        self.span: Span | None = span
        self._line, self._own, self._bell, self._chunk = line, own, bell, chunk
        self._kept = torch.zeros(slots, context, embed, dtype=dtype)
        self._there, self._here = Filled(upto=[0] * slots), Filled(upto=[0] * slots)
        self._life: int | None = None
        self._owed: deque[Owed] = deque()
        self._calls: deque[tuple[Owed, Call, list[int]]] = deque()
        """What is asked of the iPad, in order: for which step, and where its tokens go; nowhere for a gap."""
        self._apart: dict[int, int] = {}
        """Slots whose sequence is kept from the iPad, and from which position on: there it is not finite, or was not
        on the iPad. Writing over that position ends it."""
        self._spoilt: set[int] = set()
        """Slots whose cache on the iPad may hold what is not finite."""

    def forward(self, step: Step) -> Step | Result | None:
        x_TE = self._keep(step)
        self._look()
        if not self._owed and self._line.life is not None:
            self._begin_life()
        if self._life is not None and self._spoilt & {row.slot for row in step.rows} - self._apart.keys():
            self._renew()
        if self._life is None and not self._owed:
            return self._compute(step)
        copied = Step(epoch=step.epoch, number=step.number, rows=step.rows, hidden=bytearray(step.hidden))
        owed = Owed(step=copied, y=torch.full_like(x_TE, math.nan), lost=self._life is None)
        self._owed.append(owed)
        if not owed.lost:
            self._ask(owed, x_TE)
        return None

    def done(self) -> bool:
        self._look()
        return bool(self._owed) and (self._owed[0].lost or not self._owed[0].missing)

    def finish(self) -> Step | Result:
        wait(self.done, self._bell)
        owed = self._owed.popleft()
        if owed.lost:
            return self._compute(owed.step)
        self._mend(owed)
        step = owed.step
        return Step(epoch=step.epoch, number=step.number, rows=step.rows, hidden=_to_bytes(owed.y))

    def account(self) -> DeviceAccount:
        return self._line.account()

    def redial(self) -> None:
        self._line.redial()

    def close(self) -> None:
        self._line.close()

    # -- with the iPad

    def _begin_life(self) -> None:
        if self._life != self._line.life:
            self._life = self._line.life
            self._empty()

    def _renew(self) -> None:
        """Have the iPad forget its cache, when it has answered what it was asked before."""

        def quiet() -> bool:
            self._look()
            return not self._calls

        wait(quiet, self._bell)
        if self._life is not None:
            self._life = self._line.renew(self._life)
            self._empty()

    def _empty(self) -> None:
        self._there.upto = [0] * len(self._there.upto)
        self._spoilt.clear()

    def _look(self) -> None:
        """Take in what has come. When the iPad went away, what it owes is lost."""
        life = self._life
        if life is None:
            return
        while self._calls and (y := self._line.take(life)) is not None:
            owed, call, places = self._calls.popleft()
            owed.missing -= 1
            for i in np.flatnonzero(~np.isfinite(y).all(axis=1)).tolist():
                self._spoil(*call.place(i))
            if places:
                owed.y[places] = torch.from_numpy(y).to(owed.y.dtype)
        if self._line.life != life:
            self._life = None
            self._calls.clear()
            for owed in self._owed:
                owed.lost = owed.lost or bool(owed.missing)

    def _spoil(self, slot: int, position: int) -> None:
        """What the iPad computed there is not finite."""
        self._spoilt.add(slot)
        self._apart[slot] = min(position, self._apart.get(slot, position))

    def _ask(self, owed: Owed, x_TE: Tensor) -> None:
        """Rows of one token in one call, all others piece by piece, each after what the iPad has missed of it."""
        single: list[tuple[Row, int]] = []
        for row, places in _placed(owed.step):
            if row.slot in self._apart:
                continue
            for gap in self._there.gap(row):
                self._submit(owed, gap, self._kept[gap.slot, gap.start : gap.stop], [])
            if len(row.ids) == 1:
                single.append((row, places[0]))
            else:
                self._submit(owed, row, x_TE[places.start : places.stop], places)
            self._there.wrote(row)
            self._here.missed(row)
        if single:
            where = [at for _, at in single]
            slots, positions = tuple(row.slot for row, _ in single), tuple(row.start for row, _ in single)
            self._call(owed, Call(slots=slots, positions=positions, x=_values(x_TE[where])), where)

    def _submit(self, owed: Owed, row: Row, x_TE: Tensor, places: Sequence[int]) -> None:
        for start in range(0, len(row.ids), self._chunk):
            piece = slice(start, start + self._chunk)
            call = Call(slots=(row.slot,), positions=(row.start + start,), x=_values(x_TE[piece]))
            self._call(owed, call, list(places[piece]))

    def _call(self, owed: Owed, call: Call, places: list[int]) -> None:
        assert self._life is not None
        self._calls.append((owed, call, places))
        owed.missing += 1
        self._line.submit(self._life, call)

    # -- without

    def _mend(self, owed: Owed) -> None:
        """Compute here what the iPad did not, or not in finite numbers; where nobody is to, it stays as it is."""
        finite_T = owed.y.isfinite().all(-1).tolist()
        bad = [(row, places) for row, places in _placed(owed.step) if not all(finite_T[places.start : places.stop])]
        if bad and self._own:
            where = [at for _, places in bad for at in places]
            hidden_TE = self._hidden(owed.step)[where]
            rows = tuple(row for row, _ in bad)
            answer = self._compute(
                Step(epoch=owed.step.epoch, number=owed.step.number, rows=rows, hidden=_to_bytes(hidden_TE))
            )
            assert isinstance(answer, Step), "an iPad has neither the first nor the last layer"
            owed.y[where] = self._hidden(answer)

    def _compute(self, step: Step) -> Step | Result:
        """Here and now. Raises ``LinkError`` where that is not wanted."""
        if self._own is None:
            raise LinkError(f"{self._line.trouble}; `fallback: none` lets nobody compute its layers")
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
        for row, places in _placed(step):
            self._kept[row.slot, row.start : row.stop] = x_TE[places.start : places.stop]
            if row.start <= self._apart.get(row.slot, -1):
                del self._apart[row.slot]
            if row.slot not in self._apart and not all(finite := finite_T[places.start : places.stop]):
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
