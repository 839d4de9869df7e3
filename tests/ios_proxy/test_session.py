"""Both ends of the iPad link without a network: who may say what when, and what is late."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpgpt.errors import WireError
from mpgpt_ios.protocol import frames as f
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import HANDSHAKE_S, LOAD_SILENCE_S, PING_S, QUEUE, SessionError
from mpgpt_ios.protocol.messages import Reset
from mpgpt_ios.protocol.node_session import NodeSession
from mpgpt_ios.protocol.proxy_session import Authenticated, Health, Progress, ProxySession, Reply, Serving
from tests.ios_proxy.vectors import FACTS, HASH, MESSAGES, OTHER

TOKEN, PIECES = b"the shared token", bytes(range(256)) * 3000


class BundleReader:
    """A bundle of one file, in memory."""

    hash, length = HASH, len(PIECES)
    entries = (m.File(name="manifest.json", length=len(PIECES), sha256=OTHER),)

    def read(self, offset: int, count: int) -> bytes:
        return PIECES[offset : offset + count]


def proxy(token: bytes = TOKEN, now: float = 0.0) -> ProxySession:
    return ProxySession(token, BundleReader(), HASH, now, epoch=5, timeout_s=10.0)


def node(token: bytes = TOKEN, now: float = 0.0) -> NodeSession:
    return NodeSession(token, OTHER, now, facts={"name": "iPad"}, health=lambda: FACTS)


class Pair:
    """The two, and what each heard."""

    def __init__(self) -> None:
        self.proxy, self.node, self.now = proxy(), node(), 0.0
        self.events: list[Any] = []
        self.asked: list[Any] = []

    def talk(self) -> None:
        """Until neither has anything to say."""
        while self.proxy.out or self.node.out:
            up, self.proxy.out = bytes(self.proxy.out), bytearray()
            self.asked += self.node.receive(up, self.now)
            down, self.node.out = bytes(self.node.out), bytearray()
            self.events += self.proxy.receive(down, self.now)
            self.proxy.fill()

    def until(self, state: str) -> Pair:
        """Go on as far as ``offered``, ``stored``, ``loaded`` or ``serving``."""
        self.talk()
        assert isinstance(self.asked[-1], m.Offer)
        if state == "offered":
            return self
        self.node.want(0)
        self.talk()
        self.node.stored()
        if state == "stored":
            return self
        self.talk()
        assert isinstance(self.asked[-1], m.Load)
        self.node.loading("compiling")
        if state == "loaded":
            return self
        self.node.ready({"dtype": "float16"})
        self.talk()
        return self

    def answer(self, ask: m.Request, **changes: Any) -> None:
        """The node's answer, or another one than it would give."""
        fields: dict[str, Any] = {"epoch": ask.epoch, "request": ask.request, "positions": ask.positions, "y": ask.x}
        fields |= {"compute_ns": 10**9}
        self.node.out += f.encode(m.Result(**(fields | changes)))


def test_a_whole_life() -> None:
    pair = Pair().until("serving")
    assert [type(event) for event in pair.events] == [Authenticated, Progress, Progress, Serving]
    assert pair.events[0].facts == {"name": "iPad"} and pair.events[2].text == "compiling"
    data = [asked for asked in pair.asked if isinstance(asked, m.Data)]
    assert b"".join(piece.piece for piece in data) == PIECES and len(data) == 3
    assert pair.asked[-1] == m.Reset(epoch=5) and pair.proxy.queue == QUEUE
    pair.now = 1.0
    first = pair.proxy.call(((1, 0),), np.ones((3, 4), np.float32), pair.now)
    second = pair.proxy.call(((1, 3), (0, 0)), np.ones((2, 4), np.float32), pair.now)
    pair.talk()
    a, b = pair.asked[-2:]
    assert (a.prefill, b.prefill, a.x.dtype, pair.proxy.open) == (True, False, np.float16, 2)
    pair.now = 3.0
    pair.node.answer(a, 2 * a.x, 1.5)
    pair.talk()
    pair.now = 4.0
    pair.node.answer(b, 3 * b.x, 1.0)
    pair.talk()
    replies = [event for event in pair.events if isinstance(event, Reply)]
    assert [(r.request, r.compute_s, r.seconds) for r in replies] == [(first, 1.5, 2.0), (second, 1.0, 1.0)]
    assert (replies[0].y == 2).all() and not pair.proxy.open
    pair.now = 4.0 + PING_S + 0.1
    pair.proxy.tick(pair.now)
    pair.talk()
    assert pair.events[-1] == Health(facts=FACTS)
    pair.proxy.part()
    with pytest.raises(SessionError, match="good-bye"):
        pair.talk()


def test_another_token_is_found_out_by_either_end() -> None:
    pair = Pair()
    pair.proxy = proxy(b"another token that is")
    with pytest.raises(SessionError, match="token files"):
        pair.talk()
    assert not pair.events and not pair.asked
    theirs, ours = proxy(), node(b"another token that is")
    ours.receive(bytes(theirs.out), 0.0)
    with pytest.raises(SessionError, match="tokens"):
        ours.receive(f.encode(m.Proof(proof=HASH)), 0.0)
    assert b"iPad" not in ours.out and not ours.known, "nothing of itself was said"


def test_a_proof_cannot_be_sent_back() -> None:
    """A stranger with two connections hands each end what the other said."""
    ours = node()
    ours.receive(f.encode(m.Hello(nonce=OTHER)), 0.0)
    (challenge,) = _read(ours.out)
    assert isinstance(challenge, m.Challenge)
    with pytest.raises(SessionError, match="tokens"):
        ours.receive(f.encode(m.Proof(proof=challenge.proof)), 0.0)


def _read(data: bytes | bytearray) -> list[m.Message]:
    frames, messages = f.Frames(), list[m.Message]()
    frames.feed(bytes(data))
    while (message := frames.next()) is not None:
        messages.append(message)
    return messages


def test_an_older_version_is_told_so() -> None:
    ours = node()
    with pytest.raises(f.VersionError):
        ours.receive(b"mpIP\x00" + bytes(40), 0.0)
    (trouble,) = _read(ours.out)
    assert isinstance(trouble, m.Error) and trouble.code == "BAD_VERSION"
    with pytest.raises(SessionError, match=r"it refused: .*version 0"):
        proxy().receive(bytes(ours.out), 0.0)


ALLOWED = {"new": {"HELLO"}, "offered": set[str](), "stored": {"LOAD"}, "serving": {"RESET", "PREFILL", "DECODE"}}


@pytest.mark.parametrize("state", list(ALLOWED))
def test_what_a_node_does_not_expect_ends_the_connection(state: str) -> None:
    for name, message in MESSAGES.items():
        if name.split(",")[0] in ALLOWED[state] or (state != "new" and name in ("PING", "ERROR", "BYE")):
            continue
        pair = Pair()
        if state != "new":
            pair.until(state)
        pair.node.out.clear()
        with pytest.raises(SessionError):
            pair.node.receive(f.encode(message), 0.0)
        if name != "BYE":
            (trouble,) = _read(pair.node.out)
            assert isinstance(trouble, m.Error)


EXPECTED = {"new": {"CHALLENGE"}, "offered": {"WANT"}, "loaded": {"LOADING", "READY"}, "serving": set[str]()}


@pytest.mark.parametrize("state", list(EXPECTED))
def test_what_a_proxy_does_not_expect_ends_the_connection(state: str) -> None:
    for name, message in MESSAGES.items():
        if name in EXPECTED[state] or (state != "new" and name == "PONG"):
            continue
        pair = Pair()
        if state != "new":
            pair.until(state)
        with pytest.raises(SessionError):
            pair.proxy.receive(f.encode(message), 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"request": 7}, {"epoch": 4}, {"positions": ((1, 1),)}, {"y": np.ones((3, 4), np.float16)},
        {"y": np.ones((2, 3), np.float16)}, {"y": np.ones((2, 4), np.float32)},
    ],
)  # fmt: skip
def test_an_answer_that_is_none(changes: dict[str, Any]) -> None:
    pair = Pair().until("serving")
    pair.proxy.call(((1, 0),), np.ones((2, 4), np.float32), 0.0)
    pair.talk()
    pair.answer(pair.asked[-1], **changes)
    with pytest.raises(SessionError, match="answer"):
        pair.talk()
    assert not any(isinstance(event, Reply) for event in pair.events)


def test_an_answer_that_is_not_finite_is_an_answer() -> None:
    """It is one sequence's trouble. And the cache can be emptied without a new connection."""
    pair = Pair().until("serving")
    for n, value in enumerate((np.nan, np.inf, 1.0)):
        pair.proxy.call(((1, 0),), np.ones((2, 4), np.float32), 0.0)
        pair.talk()
        pair.answer(pair.asked[-1], y=np.full((2, 4), value, np.float16))
        pair.talk()
        reply = [event for event in pair.events if isinstance(event, Reply)][-1]
        np.testing.assert_array_equal(reply.y, np.full((2, 4), value, np.float16))
        pair.proxy.renew(40 + n)
        pair.talk()
        assert pair.asked[-1] == Reset(epoch=40 + n)
    pair.proxy.call(((1, 0),), np.ones((2, 4), np.float32), 0.0)
    pair.talk()
    assert pair.asked[-1].epoch == 42
    with pytest.raises(AssertionError, match="calls are open"):
        pair.proxy.renew(43)


def test_what_is_late() -> None:
    session = proxy()
    session.tick(HANDSHAKE_S)
    with pytest.raises(SessionError, match="did not prove itself"):
        session.tick(HANDSHAKE_S + 0.1)
    assert node().late(HANDSHAKE_S + 0.1) and not node().late(HANDSHAKE_S)
    pair = Pair().until("loaded")
    pair.talk()
    pair.proxy.tick(LOAD_SILENCE_S)
    with pytest.raises(SessionError, match="nothing was heard"):
        pair.proxy.tick(LOAD_SILENCE_S + 1)
    pair = Pair().until("serving")
    pair.now = 100.0
    pair.proxy.call(((1, 0),), np.ones((2, 4), np.float32), 100.0)
    pair.proxy.call(((1, 2),), np.ones((2, 4), np.float32), 100.0)
    pair.talk()
    pair.now = 109.0
    pair.answer(pair.asked[-2])
    pair.talk()
    pair.proxy.tick(118.0)
    with pytest.raises(SessionError, match="more than 10 s late"):
        pair.proxy.tick(119.5)


def test_more_requests_than_the_node_takes() -> None:
    pair = Pair().until("serving")
    asks = [
        m.Request(epoch=5, request=n + 1, positions=((0, 0),), prefill=True, x=np.ones((1, 4), np.float16))
        for n in range(QUEUE + 1)
    ]
    for ask in asks[:QUEUE]:
        pair.node.receive(f.encode(ask), 0.0)
    with pytest.raises(SessionError, match="more than 8"):
        pair.node.receive(f.encode(asks[QUEUE]), 0.0)


@pytest.mark.parametrize(
    ("request_", "epoch"), [(1, 4), (1, 6), (0, 5)], ids=["an older epoch", "a newer epoch", "a number again"]
)
def test_a_request_of_another_life(request_: int, epoch: int) -> None:
    pair = Pair().until("serving")
    ask = m.Request(epoch=epoch, request=request_, positions=((0, 0),), prefill=True, x=np.ones((1, 4), np.float16))
    with pytest.raises(SessionError, match="request"):
        pair.node.receive(f.encode(ask), 0.0)
    assert _read(pair.node.out)[0].code == "BAD_REQUEST"  # type: ignore[union-attr]


def test_a_bundle_from_the_middle_on() -> None:
    pair = Pair().until("offered")
    pair.node.want(len(PIECES) - 10)
    pair.talk()
    (data,) = [asked for asked in pair.asked if isinstance(asked, m.Data)]
    assert (data.offset, data.piece) == (len(PIECES) - 10, PIECES[-10:])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda pair: pair.node.receive(f.encode(m.Data(offset=1, piece=b"x")), 0.0),
        lambda pair: pair.node.receive(f.encode(m.Data(offset=0, piece=b"x" * 262144)) * 4, 0.0),
        lambda pair: pair.proxy.receive(f.encode(m.Want(offset=len(PIECES) + 1)), 0.0),
        lambda pair: pair.proxy.receive(f.encode(m.Want(offset=0)) + f.encode(m.Stored(bundle=HASH)), 0.0),
        lambda pair: pair.proxy.receive(f.encode(m.Want(offset=len(PIECES))) + f.encode(m.Stored(bundle=OTHER)), 0.0),
    ],
    ids=["data elsewhere", "more than was offered", "wanted beyond", "stored before it was sent", "another stored"],
)
def test_a_bundle_that_goes_wrong(spoil: Callable[[Pair], Any]) -> None:
    pair = Pair().until("offered")
    if not pair.node._offer:
        raise AssertionError
    pair.node.want(0)
    with pytest.raises(SessionError):
        spoil(pair)


def test_loading_another_bundle_than_was_offered() -> None:
    pair = Pair().until("stored")
    with pytest.raises(SessionError, match="not offered"):
        pair.node.receive(f.encode(m.Load(bundle=OTHER)), 0.0)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(["new", "offered", "stored", "serving"]), st.binary(max_size=200), st.sampled_from(list(MESSAGES))
)
def test_any_bytes_end_a_session_or_wait(state: str, junk: bytes, name: str) -> None:
    for end in ("proxy", "node"):
        for data in (junk, f.encode(MESSAGES[name]) + junk):
            pair = Pair()
            if state != "new":
                pair.until(state)
            with contextlib.suppress(WireError, SessionError):
                getattr(pair, end).receive(data, 0.0)
