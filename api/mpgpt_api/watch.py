"""The ring as it is: what every rank does, from the accounts that travel round it.

Knows: places, accounts, and how long the ring has been silent.
Must not know: HTTP, requests, text.

Nothing is sent while nobody looks: an idle cluster stays asleep. Whoever looks gets accounts that are ``FRESH_S`` old
at most, or the last there are if the ring is too busy to answer at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from mpgpt.cluster.ring import RankReport
from mpgpt.core import StageStats, Thermal
from mpgpt.engine.engine import Engine
from mpgpt.transport.link import Silence

FRESH_S = 1.0
ANSWER_S = 0.5
"""How long somebody who looks waits for the ring's answer."""
STALLED_S = 10.0
"""A ring that has something in it and returns nothing for so long is stalled: no step takes so long."""

State = Literal["ok", "stalled", "away"]
Kind = Literal["cpu", "ipad"]


class Device(BaseModel):
    """What an iPad did in the window."""

    requests: int
    compute_s: float
    network_s: float
    sent: int
    received: int
    falls: int
    away_s: float
    thermal: Thermal


class Rank(BaseModel):
    """Bytes, and shares of the window."""

    rank: int
    host: str
    kind: Kind
    layers: tuple[int, int] | None
    memory: int
    slice_bytes: int
    kv_bytes: int
    peak_rss: int
    threads: int
    state: State
    steps: int
    tokens: int
    compute: float
    wait: float
    send: float
    other: float
    device: Device | None


@dataclass(slots=True)
class Total:
    """A rank's counts since the start."""

    steps: int = 0
    tokens: int = 0
    compute_s: float = 0.0
    wait_s: float = 0.0
    send_s: float = 0.0
    other_s: float = 0.0
    device_requests: int = 0
    device_falls: int = 0
    device_away_s: float = 0.0

    def add(self, account: StageStats) -> None:
        self.steps += account.steps
        self.tokens += account.tokens
        self.compute_s += account.compute_s
        self.wait_s += account.wait_s
        self.send_s += account.send_s
        self.other_s += account.other_s
        if account.device:
            self.device_requests += account.device.requests
            self.device_falls += account.device.falls
            self.device_away_s += account.device.away_s


class Watch:
    """Belongs to one event loop."""

    def __init__(
        self, engine: Engine, reports: Sequence[RankReport], silences: Callable[[], tuple[Silence, ...]] = tuple
    ) -> None:
        """``silences`` gives the ranks that have been silent for some seconds."""
        self._silences = silences
        self.reports = tuple(reports)
        self.totals = {place.node.rank: Total() for place in reports}
        self._generated = 0
        self.rate = 0.0
        """Tokens of answers a second, in the window."""
        self._engine = engine
        self._accounts: Mapping[int, StageStats] = {}
        self._at = -FRESH_S
        self._mark = (time.monotonic(), 0)
        self._asking: asyncio.Future[None] | None = None

    def count(self, tokens: int) -> None:
        """Count tokens of answers. Called on the engine's thread alone."""
        self._generated += tokens

    async def look(self) -> None:
        """Have accounts that are fresh, if the ring can give them at once."""
        if time.monotonic() - self._at < FRESH_S:
            return
        with contextlib.suppress(TimeoutError):
            await self.ask(ANSWER_S)

    async def ask(self, patience_s: float, *, redial: bool = False) -> None:
        """New accounts, from every rank in the ring. ``TimeoutError`` if they take too long; they come all the same."""
        if self._asking is None or self._asking.done() or redial:
            self._asking = self._ask(redial)
        async with asyncio.timeout(patience_s):
            await asyncio.shield(self._asking)

    def _ask(self, redial: bool) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        answered: asyncio.Future[None] = loop.create_future()

        def on_stats(accounts: tuple[StageStats, ...]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(take, accounts)

        def take(accounts: tuple[StageStats, ...]) -> None:
            self._take(accounts)
            if not answered.done():
                answered.set_result(None)

        self._engine.request_stats(on_stats, redial=redial)
        return answered

    def _take(self, accounts: Sequence[StageStats]) -> None:
        now = time.monotonic()
        before, generated = self._mark
        self.rate = (self._generated - generated) / max(now - before, 1e-9)
        self._mark, self._at = (now, self._generated), now
        self._accounts = {account.rank: account for account in accounts}
        for account in accounts:
            self.totals[account.rank].add(account)

    @property
    def window_s(self) -> float:
        """The seconds that the last accounts cover; 0 before the first."""
        return max((account.wall_s for account in self._accounts.values()), default=0.0)

    @property
    def stalled(self) -> bool:
        return bool(self._silences()) or self._engine.silent_s > STALLED_S

    def silent(self) -> dict[int, float]:
        """The seconds since each rank last sent something that was due."""
        return {silence.rank: silence.seconds for silence in self._silences()}

    @property
    def away(self) -> bool:
        """Whether an iPad was away by the last accounts."""
        return any(account.device and account.device.away for account in self._accounts.values())

    def state(self, rank: int) -> State:
        account = self._accounts.get(rank)
        if account and account.device and account.device.away:
            return "away"
        if silent := self.silent():  # they are to blame, and no others
            return "stalled" if rank in silent else "ok"
        return "stalled" if self.stalled else "ok"

    def ranks(self) -> list[Rank]:
        return [self._rank(place) for place in self.reports]

    def _rank(self, place: RankReport) -> Rank:
        node, span = place.node, place.span
        account = self._accounts.get(node.rank)
        shares = {name: 0.0 for name in ("compute", "wait", "send", "other")}
        if account and account.wall_s:
            shares = {name: getattr(account, f"{name}_s") / account.wall_s for name in shares}
        return Rank(
            rank=node.rank, host=node.host, kind="ipad" if node.kind == "ipad" else "cpu",
            layers=(span.start, span.stop - 1) if span else None, memory=node.memory, slice_bytes=place.slice_bytes,
            kv_bytes=place.kv_bytes, peak_rss=account.peak_rss if account else 0, threads=node.threads,
            state=self.state(node.rank), steps=account.steps if account else 0,
            tokens=account.tokens if account else 0, device=_device(account), **shares,
        )  # fmt: skip


def _device(account: StageStats | None) -> Device | None:
    if account is None or account.device is None:
        return None
    facts: dict[str, Any] = {name: getattr(account.device, name) for name in Device.model_fields}
    return Device(**facts)
