"""Steps into the ring and results out of it: ``Pipeline`` on rank 0, ``relay`` on every other rank in the ring, and
``stand_by`` on those that have no layers.

Knows: one stage, the link to the next rank, the link from the one before, and what of its time is what.
Must not know: which rows are in a step or why, or anything of requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpgpt.core import Result, StageStats, StatsRound, Step, Stop
from mpgpt.engine.stage import Stage
from mpgpt.engine.stage_timer import COMPUTE, OTHER, SEND, WAIT, StageTimer
from mpgpt.errors import WireError
from mpgpt.transport.link import Link
from mpgpt.transport.wire import Codec, Message


class Pipeline:
    """Rank 0's end of the ring. Several steps may be in it at once; their results come back in order."""

    def __init__(
        self, stage: Stage, codec: Codec, outbound: Link, inbound: Link, timer: StageTimer, idle: Sequence[Link] = ()
    ) -> None:
        """``idle`` lead to the ranks outside the ring, which wait for its end."""
        self._stage, self._codec, self._timer = stage, codec, timer
        self._outbound, self._inbound, self._idle = outbound, inbound, idle

    def push(self, step: Step) -> None:
        """Run the first stage on ``step`` and send it on; returns while the send goes on."""
        answer = _compute(self._stage, step, self._timer)
        assert answer is not None, "rank 0 computes for itself"
        self._send(answer)

    def pop(self, timeout: float | None = None) -> Result | StatsRound | None:
        """The next result, or the tally that was requested; None when ``timeout`` seconds have passed without one."""
        self._timer.enter(WAIT)
        frame = self._inbound.recv(timeout)
        self._outbound.progress()
        self._timer.enter(OTHER)
        if frame is None:
            return None
        message = self._codec.decode(frame)
        if not isinstance(message, Result | StatsRound):
            raise WireError("the last rank sent something that is neither a result nor a tally")
        return message

    def request_stats(self, epoch: int, *, redial: bool = False) -> None:
        """Send a tally around, behind the steps that are out; ``pop`` gives it."""
        self._send(StatsRound(epoch=epoch, accounts=(self._timer.snapshot(),), redial=redial))

    def stats_round(self, epoch: int) -> tuple[StageStats, ...]:
        """Every stage's account, in the order of the ring; new ones begin. Nothing may be in flight."""
        self.request_stats(epoch)
        message = self.pop()
        assert isinstance(message, StatsRound), "a result that nobody waits for"
        self._timer.snapshot()  # the way round is nobody's work
        return message.accounts

    def stop(self, epoch: int) -> None:
        """Send the stop around the ring and wait for it to come back: nothing is in flight after it."""
        self._send(Stop(epoch=epoch))
        for link in self._idle:
            link.send(self._codec.encode(Stop(epoch=epoch)))
        while True:
            frame = self._inbound.recv()
            if frame is not None and isinstance(self._codec.decode(frame), Stop):
                break
        self.close()

    def _send(self, message: Message) -> None:
        self._timer.enter(SEND)
        self._outbound.send(self._codec.encode(message))
        self._timer.enter(OTHER)

    def close(self) -> None:
        self._stage.close()
        for link in (self._outbound, self._inbound, *self._idle):
            link.close()


def relay(stage: Stage, codec: Codec, inbound: Link, outbound: Link, timer: StageTimer) -> None:
    """Receive, run the stage, send: until a stop comes by, which is passed on like a tally.

    A stage whose answers come later gets the next steps meanwhile; its rank counts as computing as long as one is owed.
    """

    def send(message: Message) -> None:
        timer.enter(SEND)
        outbound.send(codec.encode(message))

    def flush(pending: int) -> None:
        for _ in range(pending):
            timer.enter(COMPUTE)
            send(stage.finish())

    message: Message | None = None
    pending = 0
    while not isinstance(message, Stop):
        timer.enter(COMPUTE if pending else WAIT)
        frame = inbound.recv(until=stage.done if pending else None)
        if frame is None:
            flush(1)
            pending -= 1
            continue
        timer.enter(OTHER)
        message = codec.decode(frame)
        if isinstance(message, Result):
            raise WireError("a result came where steps are expected")
        if isinstance(message, Step):
            answer = _compute(stage, message, timer)
            pending += answer is None
            if answer is not None:
                send(answer)
            continue
        flush(pending)
        pending = 0
        if isinstance(message, StatsRound):
            if message.redial:
                stage.redial()
            account = replace(timer.snapshot(), device=stage.account())
            message = replace(message, accounts=(*message.accounts, account))
        send(message)
    stage.close()
    outbound.close()
    inbound.close()


def _compute(stage: Stage, step: Step, timer: StageTimer) -> Step | Result | None:
    timer.enter(COMPUTE)
    answer = stage.forward(step)
    timer.count(step.tokens)
    return answer


def stand_by(codec: Codec, inbound: Link) -> None:
    """A rank without layers: asleep until the stop comes from rank 0."""
    frame = inbound.recv()
    assert frame is not None, "a receive without a time-out came back empty"
    if not isinstance(codec.decode(frame), Stop):
        raise WireError("something else than the stop came to a rank without layers")
    inbound.close()
