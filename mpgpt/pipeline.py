"""Steps into the ring and results out of it: ``Pipeline`` on rank 0, ``relay`` on every other rank in the ring, and
``stand_by`` on those that have no layers.

Knows: one stage, the link to the next rank, the link from the one before.
Must not know: which rows are in a step or why, or anything of requests.
"""

from __future__ import annotations

from collections.abc import Sequence

from mpgpt.core import Result, Step, Stop
from mpgpt.errors import WireError
from mpgpt.link import Link
from mpgpt.stage import Stage
from mpgpt.wire import Codec


class Pipeline:
    """Rank 0's end of the ring. Several steps may be in it at once; their results come back in order."""

    def __init__(self, stage: Stage, codec: Codec, outbound: Link, inbound: Link, idle: Sequence[Link] = ()) -> None:
        """``idle`` lead to the ranks outside the ring, which wait for its end."""
        self._stage, self._codec = stage, codec
        self._outbound, self._inbound, self._idle = outbound, inbound, idle

    def push(self, step: Step) -> None:
        """Run the first stage on ``step`` and send it on; returns while the send goes on."""
        self._outbound.send(self._codec.encode(self._stage.forward(step)))

    def pop(self, timeout: float | None = None) -> Result | None:
        """The next result; None when ``timeout`` seconds have passed without one."""
        frame = self._inbound.recv(timeout)
        self._outbound.progress()
        if frame is None:
            return None
        message = self._codec.decode(frame)
        if not isinstance(message, Result):
            raise WireError("the last rank sent something that is not a result")
        return message

    def stop(self, epoch: int) -> None:
        """Send the stop around the ring and wait for it to come back: nothing is in flight after it."""
        for link in (self._outbound, *self._idle):
            link.send(self._codec.encode(Stop(epoch=epoch)))
        while True:
            frame = self._inbound.recv()
            if frame is not None and isinstance(self._codec.decode(frame), Stop):
                break
        self.close()

    def close(self) -> None:
        self._stage.close()
        for link in (self._outbound, self._inbound, *self._idle):
            link.close()


def relay(stage: Stage, codec: Codec, inbound: Link, outbound: Link) -> None:
    """Receive, run the stage, send: until a stop comes by, which is passed on."""
    while True:
        frame = inbound.recv()
        assert frame is not None, "a receive without a time-out came back empty"
        message = codec.decode(frame)
        if isinstance(message, Result):
            raise WireError("a result came where steps are expected")
        outbound.send(codec.encode(message if isinstance(message, Stop) else stage.forward(message)))
        if isinstance(message, Stop):
            break
    stage.close()
    outbound.close()
    inbound.close()


def stand_by(codec: Codec, inbound: Link) -> None:
    """A rank without layers: asleep until the stop comes from rank 0."""
    frame = inbound.recv()
    assert frame is not None, "a receive without a time-out came back empty"
    if not isinstance(codec.decode(frame), Stop):
        raise WireError("something else than the stop came to a rank without layers")
    inbound.close()
