"""The proxy rank's stage, with a span of a small random model behind it that comes and goes: whatever happens, its
answers are those of the same span computed in one place."""

from __future__ import annotations

import itertools
import random
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpgpt.core import DeviceAccount, Result, Row, Step
from mpgpt.engine.stage import TorchStage
from mpgpt.errors import LinkError
from mpgpt.transport.doorbell import Doorbell
from mpgpt_ios.proxy.stage import Call, IPadStage, Values
from tests.ios_proxy.rig import CHUNK, CONTEXT, EMBED, SIZES, SLOTS, SPAN, a_step, hidden, torch_stage


@pytest.fixture(scope="module")
def stages(models: dict[str, Path]) -> tuple[TorchStage, TorchStage, TorchStage]:
    """The truth, the rank's own, and the iPad's."""
    own, there, truth = (torch_stage(models["llama"]) for _ in range(3))
    return truth, own, there


IMPATIENT = 6
"""Whoever looks for an answer so often does nothing else."""
TOO_MUCH = 40.0
"""In a token's first element: the pretended iPad is a weak one."""


class Pretended:
    """An iPad that answers when told to, loses its cache when it goes away, and refuses what a cache cannot do.

    As on the real one a mask does not hide what is not finite in a slot, and some numbers are too much for float16.
    """

    def __init__(self, stage: TorchStage) -> None:
        self._stage, self.epoch, self.trouble = stage, None, "the iPad at h:1 went away: it was unplugged"
        self._filled = [0] * SLOTS
        self._asked: deque[Call] = deque()
        self._answers: deque[Values] = deque()
        self.calls: list[Call] = []
        self.closed = False
        self._last_epoch = self.renewed = self._asked_in_vain = 0
        self._spoilt = set[int]()

    epoch: int | None

    def come(self) -> None:
        self._last_epoch += 1
        self.epoch, self._filled = self._last_epoch, [0] * SLOTS
        self._spoilt.clear()

    def renew(self, epoch: int) -> int | None:
        if epoch != self.epoch:
            return None
        assert not self._asked and not self._answers, "what was asked before would be dropped"
        self.renewed += 1
        self.come()
        return self.epoch

    def go(self) -> None:
        self.epoch = None
        self._asked.clear()
        self._answers.clear()

    def submit(self, epoch: int, call: Call) -> None:
        if epoch == self.epoch:
            self._asked.append(call)

    def answer(self, count: int) -> None:
        """Work on so many calls, one after the other."""
        for _ in range(min(count, len(self._asked))):
            call = self._asked.popleft()
            self.calls.append(call)
            self._answers.append(self._run(call))

    def _run(self, call: Call) -> Values:
        one = len(call.slots) == 1
        assert len(call.positions) == len(call.slots) and (
            one or len(call.slots) == len(call.x) == len(set(call.slots))
        )
        assert len(call.x) <= CHUNK and call.x.dtype == np.float32
        count = len(call.x) if one else 1
        rows = tuple(
            Row(slot=slot, start=start, ids=(0,) * count)
            for slot, start in zip(call.slots, call.positions, strict=True)
        )
        for row in rows:
            assert row.start <= self._filled[row.slot] and row.stop <= CONTEXT, "a position that the cache cannot have"
            self._filled[row.slot] = row.stop
        assert np.isfinite(call.x).all(), "what is not finite must not get here"
        hidden = bytearray(call.x.astype(np.float16).astype(np.float32).tobytes())
        step = self._stage.forward(Step(epoch=0, number=0, rows=rows, hidden=hidden))
        assert isinstance(step, Step)
        with np.errstate(over="ignore"):
            y = np.frombuffer(step.hidden, np.float32).reshape(-1, EMBED).astype(np.float16)
        for i in range(len(y)):
            slot, _ = call.position_of(i)
            if slot in self._spoilt or call.x[i, 0] >= TOO_MUCH:
                self._spoilt.add(slot)
                y[i] = np.nan
        return y

    def take(self, epoch: int) -> Values | None:
        if epoch != self.epoch or not self._answers:
            self._asked_in_vain += 1
            if self._asked_in_vain >= IMPATIENT and epoch == self.epoch:
                self.answer(99)  # somebody waits for it, and cannot tell it to
            return None
        self._asked_in_vain = 0
        return self._answers.popleft()

    def account(self) -> DeviceAccount:
        return DeviceAccount(requests=len(self.calls), compute_s=0, network_s=0, sent=0, received=0, falls=0, away_s=0)

    def redial(self) -> None:
        self.dialled = True

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def bell() -> Iterator[Doorbell]:
    bell = Doorbell()
    yield bell
    bell.close()


def make(line: Pretended, own: TorchStage | None, bell: Doorbell) -> IPadStage:
    return IPadStage(SPAN, line, own, bell, SIZES)


def agree(got: Step | Result | None, truth: Step | Result) -> None:
    torch.testing.assert_close(hidden(got), hidden(truth), atol=2e-2, rtol=2e-3, equal_nan=True)


def agree_where_finite(got: Step | Result | None, truth: Step | Result, step: Step) -> None:
    """In a prompt's chunk what is not finite reaches the tokens before it as well, so that where a slot is computed
    again in other pieces, some tokens of the same sequence may be better off; never those that came in so."""
    ours, theirs = hidden(got), hidden(truth)
    finite = theirs.isfinite().all(-1)
    torch.testing.assert_close(ours[finite], theirs[finite], atol=2e-2, rtol=2e-3)
    assert not ours[~hidden(step).isfinite().all(-1)].isfinite().all(-1).any()


def changed(step: Step, slot: int, offset: int, value: float) -> Step:
    """The same with the first element of one token of a row of ``slot`` set."""
    before = itertools.takewhile(lambda row: row.slot != slot, step.rows)
    x_TE = hidden(step)
    x_TE[sum(len(row.ids) for row in before) + offset, 0] = value
    return replace(step, hidden=bytearray(x_TE.numpy().tobytes()))


STEPS = [
    a_step(1, (0, 0, 20)), a_step(2, (0, 20, 13), (1, 0, 5)), a_step(3, (0, 33, 1), (1, 5, 1), (2, 0, 1)),
    a_step(4, (0, 34, 1), (2, 1, 30)), a_step(5, (0, 33, 4), (1, 6, 1)), a_step(6, (1, 0, 9), (2, 31, 1)),
    a_step(7, (0, 35, 1), (1, 9, 1), (2, 32, 1)),
]  # fmt: skip


def test_the_ipad_computes_it(stages: tuple[TorchStage, ...], bell: Doorbell) -> None:
    """Prompts piece by piece, single tokens of several sequences in one call, positions and slots used again."""
    truth, _, there = stages
    line = Pretended(there)
    line.come()
    stage = make(line, None, bell)
    for step in STEPS:
        assert stage.forward(step) is None and not stage.done()
        line.answer(99)
        assert stage.done()
        agree(stage.finish(), truth.forward(step))
    assert [(len(call.slots), len(call.x)) for call in line.calls[:8]] == [
        (1, 8), (1, 8), (1, 4), (1, 8), (1, 5), (1, 5), (3, 3), (1, 8),
    ]  # fmt: skip
    account = stage.account()
    assert account.requests == len(line.calls)
    stage.close()
    assert line.closed


def test_steps_go_out_while_answers_are_owed(stages: tuple[TorchStage, ...], bell: Doorbell) -> None:
    truth, _, there = stages
    line = Pretended(there)
    line.come()
    stage = make(line, None, bell)
    for step in STEPS[:3]:
        assert stage.forward(step) is None
    line.answer(3)
    assert stage.done()
    agree(stage.finish(), truth.forward(STEPS[0]))
    line.answer(2)
    assert not stage.done(), "the second step needs three calls"
    line.answer(99)
    for step in STEPS[1:3]:
        agree(stage.finish(), truth.forward(step))


def test_without_a_fallback_it_is_an_error_that_says_why(stages: tuple[TorchStage, ...], bell: Doorbell) -> None:
    line = Pretended(stages[2])
    line.come()
    stage = make(line, None, bell)
    assert stage.forward(STEPS[0]) is None
    line.go()
    assert stage.done()
    with pytest.raises(LinkError, match="it was unplugged; `fallback: none`"):
        stage.finish()


def test_what_float16_cannot_hold_stays_finite(stages: tuple[TorchStage, ...], bell: Doorbell) -> None:
    line = Pretended(stages[2])
    line.come()
    stage = make(line, None, bell)
    stage.forward(
        Step(epoch=0, number=0, rows=(Row(slot=0, start=0, ids=(1,)),), hidden=bytearray(EMBED * b"\0\0\x7f\x7f"))
    )
    line.answer(1)
    assert np.isfinite(line.calls[0].x).all() and line.calls[0].x.max() == np.finfo(np.float16).max


def of(step: Step | Result | None, slot: int, rows: tuple[Row, ...]) -> torch.Tensor:
    """The hidden states of the row of ``slot``."""
    at = list(itertools.accumulate((len(row.ids) for row in rows), initial=0))
    return next(hidden(step)[at[i] : at[i + 1]] for i, row in enumerate(rows) if row.slot == slot)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2 * TOO_MUCH])
@pytest.mark.parametrize("fallback", [True, False])
def test_what_is_not_finite_is_one_sequences_trouble(
    stages: tuple[TorchStage, ...], bell: Doorbell, value: float, fallback: bool
) -> None:
    """What comes in so, and what the iPad makes so: computed here or NaN, and nothing of it stays on the iPad."""
    truth, own, there = stages
    line = Pretended(there)
    line.come()
    stage = make(line, own if fallback else None, bell)
    steps = [
        a_step(1, (0, 0, 20), (1, 0, 5)), a_step(2, (0, 20, 13), (1, 5, 1), (2, 0, 30)),
        a_step(3, (0, 33, 1), (1, 6, 1)), a_step(4, (0, 34, 1), (1, 7, 1), (2, 30, 1)),
    ]  # fmt: skip
    steps = [changed(steps[0], 0, 11, value), *steps[1:]]
    for step in steps[:2]:  # both are out before the first answer
        assert stage.forward(step) is None
    for step in steps:
        if step in steps[2:]:
            assert stage.forward(step) is None
        line.answer(99)
        assert stage.done()
        got, right = stage.finish(), truth.forward(step)
        if fallback:
            agree(got, right)
        for row in step.rows:
            if row.slot:
                torch.testing.assert_close(of(got, row.slot, step.rows), of(right, row.slot, step.rows),
                                           atol=2e-2, rtol=2e-3)  # fmt: skip
            elif not fallback:
                assert not of(got, 0, step.rows)[-1].isfinite().any(), "so that the last rank notices"
    assert line.renewed == 0, "as long as nobody else has the slot there is no hurry"
    calls = len(line.calls)
    again = a_step(5, (0, 0, 9), (1, 8, 1))
    assert stage.forward(again) is None
    line.answer(99)
    agree(stage.finish(), truth.forward(again))
    assert line.renewed == (value == 2 * TOO_MUCH) and len(line.calls) > calls


def test_an_ipad_that_goes_away_while_its_cache_is_to_be_emptied(
    stages: tuple[TorchStage, ...], bell: Doorbell
) -> None:
    truth, own, there = stages
    line = Pretended(there)
    line.come()
    stage = make(line, own, bell)
    bad = changed(a_step(1, (0, 0, 5)), 0, 3, TOO_MUCH)
    assert stage.forward(bad) is None
    line.answer(99)
    agree(stage.finish(), truth.forward(bad))
    busy, new = a_step(2, (1, 0, 9)), a_step(3, (0, 0, 4))
    assert stage.forward(busy) is None

    def go() -> None:
        line.go()
        bell.ring()

    line.answer = lambda count: None  # type: ignore[method-assign]
    gone = threading.Timer(0.2, go)
    gone.start()
    assert stage.forward(new) is None, "the step before is owed still"
    gone.join()
    del line.answer
    for step in (busy, new):
        assert stage.done()
        agree(stage.finish(), truth.forward(step))
    line.come()
    more = a_step(4, (0, 4, 1), (1, 9, 1))
    assert stage.forward(more) is None
    line.answer(99)
    agree(stage.finish(), truth.forward(more))
    assert line.renewed == 0, "a new epoch is empty anyway"


def next_step(dice: random.Random, number: int, filled: list[int], owed: deque[Step], faults: float = 0.0) -> Step:
    """What a scheduler might send: prompts, single tokens, drafts taken back, a slot given to another sequence; but
    nothing goes back as long as an answer for that slot is owed."""
    busy = {row.slot for step in owed for row in step.rows}
    rows = []
    for slot in sorted(dice.sample(range(SLOTS), dice.randint(1, SLOTS))):
        start, tokens = filled[slot], dice.choice((1, 1, 1, 3, 17))
        if slot in busy and start + tokens > CONTEXT:
            continue
        if slot not in busy and dice.random() < 0.2:
            start = max(0, start - dice.randint(1, 3))
        if slot not in busy and (dice.random() < 0.15 or start + tokens > CONTEXT):
            start = 0
        rows.append((slot, start, tokens))
        filled[slot] = start + tokens
    if not rows:
        return next_step(dice, number, filled, owed, faults)
    step = a_step(number, *rows)
    if dice.random() < faults:
        slot, _, tokens = dice.choice(rows)
        step = changed(step, slot, dice.randrange(tokens), dice.choice((np.nan, np.inf, TOO_MUCH, 2 * TOO_MUCH)))
    return step


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_whatever_happens_to_the_ipad_the_answers_are_the_same(stages: tuple[TorchStage, ...], seed: int) -> None:
    """It comes, goes, and goes in the middle of anything, with up to three steps owed; answers stay in order. Some
    hidden states are not finite, and some are more than the iPad can compute with."""
    faults = 0.2 * (seed % 2)
    dice, (truth, own, there), bell = random.Random(seed), stages, Doorbell()
    line = Pretended(there)
    stage = make(line, own, bell)
    owed: deque[Step] = deque()
    filled = [0] * SLOTS
    for number in range(25):
        step = next_step(dice, number, filled, owed, faults)
        if line.epoch is None and dice.random() < 0.3:
            line.come()
        if (answer := stage.forward(step)) is not None:
            assert not owed, "an answer overtook another"
            agree_where_finite(answer, truth.forward(step), step)
        else:
            owed.append(step)
        line.answer(dice.randint(0, 5))
        if line.epoch is not None and dice.random() < 0.15:
            line.go()
            if dice.random() < 0.5:
                line.come()
        if dice.random() < 0.3 or len(owed) == 3:
            line.answer(99)
        while owed and stage.done():
            agree_where_finite(stage.finish(), truth.forward(owed[0]), owed.popleft())
    line.answer(99)
    while owed:
        assert stage.done()
        agree_where_finite(stage.finish(), truth.forward(owed[0]), owed.popleft())
    bell.close()
