"""The proxy rank's stage, with a span of a small random model behind it that comes and goes: whatever happens, its
answers are those of the same span computed in one place."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpgpt.core import DeviceAccount, Result, Row, Step
from mpgpt.doorbell import Doorbell
from mpgpt.errors import LinkError
from mpgpt.stage import TorchStage
from mpgpt_ios.stage import Call, IPadStage, Values
from tests.ios_proxy.rig import CHUNK, CONTEXT, EMBED, SLOTS, SPAN, a_step, hidden, torch_stage


@pytest.fixture(scope="module")
def stages(models: dict[str, Path]) -> tuple[TorchStage, TorchStage, TorchStage]:
    """The truth, the rank's own, and the iPad's."""
    own, there, truth = (torch_stage(models["llama"]) for _ in range(3))
    return truth, own, there


class Pretended:
    """An iPad that answers when told to, loses its cache when it goes away, and refuses what a cache cannot do."""

    def __init__(self, stage: TorchStage) -> None:
        self._stage, self.life, self.trouble = stage, None, "the iPad at h:1 went away: it was unplugged"
        self._filled = [0] * SLOTS
        self._asked: deque[Call] = deque()
        self._answers: deque[Values] = deque()
        self.calls: list[Call] = []
        self.closed = False
        self._lives = 0

    life: int | None

    def come(self) -> None:
        self._lives += 1
        self.life, self._filled = self._lives, [0] * SLOTS

    def go(self) -> None:
        self.life = None
        self._asked.clear()
        self._answers.clear()

    def submit(self, life: int, call: Call) -> None:
        if life == self.life:
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
        hidden = bytearray(call.x.astype(np.float16).astype(np.float32).tobytes())
        step = self._stage.forward(Step(epoch=0, number=0, rows=rows, hidden=hidden))
        assert isinstance(step, Step)
        with np.errstate(over="ignore"):
            return np.frombuffer(step.hidden, np.float32).reshape(-1, EMBED).astype(np.float16)

    def take(self, life: int) -> Values | None:
        return self._answers.popleft() if life == self.life and self._answers else None

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
    return IPadStage(
        SPAN, line, own, bell, slots=SLOTS, context=CONTEXT, embed=EMBED, chunk=CHUNK, dtype=torch.float32
    )  # fmt: skip


def agree(got: Step | Result | None, truth: Step | Result) -> None:
    torch.testing.assert_close(hidden(got), hidden(truth), atol=2e-2, rtol=2e-3)


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
        Step(epoch=0, number=0, rows=(Row(slot=0, start=0, ids=(1,)),), hidden=bytearray(EMBED * b"\0\0\x80\x7f"))
    )
    line.answer(1)
    assert np.isfinite(line.calls[0].x).all() and line.calls[0].x.max() == np.finfo(np.float16).max


def next_step(dice: random.Random, number: int, filled: list[int], owed: deque[Step]) -> Step:
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
    return a_step(number, *rows) if rows else next_step(dice, number, filled, owed)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 2**32))
def test_whatever_happens_to_the_ipad_the_answers_are_the_same(stages: tuple[TorchStage, ...], seed: int) -> None:
    """It comes, goes, and goes in the middle of anything, with up to three steps owed; answers stay in order."""
    dice, (truth, own, there), bell = random.Random(seed), stages, Doorbell()
    line = Pretended(there)
    stage = make(line, own, bell)
    owed: deque[Step] = deque()
    filled = [0] * SLOTS
    for number in range(25):
        step = next_step(dice, number, filled, owed)
        if line.life is None and dice.random() < 0.3:
            line.come()
        if (answer := stage.forward(step)) is not None:
            assert not owed, "an answer overtook another"
            agree(answer, truth.forward(step))
        else:
            owed.append(step)
        line.answer(dice.randint(0, 5))
        if line.life is not None and dice.random() < 0.15:
            line.go()
            if dice.random() < 0.5:
                line.come()
        if dice.random() < 0.3 or len(owed) == 3:
            line.answer(99)
        while owed and stage.done():
            agree(stage.finish(), truth.forward(owed.popleft()))
    line.answer(99)
    while owed:
        assert stage.done()
        agree(stage.finish(), truth.forward(owed.popleft()))
    bell.close()
