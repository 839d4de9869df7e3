"""The proxy's end of the iPad link, with the node's: the course of a session, lateness, wrong answers."""

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
from mpgpt_ios.protocol.auth import HANDSHAKE_S, LOAD_SILENCE_S, PING_S, QUEUE, PeerClosed, SessionError
from mpgpt_ios.protocol.messages import Reset
from mpgpt_ios.protocol.proxy_session import Authenticated, Health, Progress, Ready, Reply
from tests.ios_proxy.sessions import PIECES, Pair, node_session, proxy_session, read
from tests.ios_proxy.vectors import FACTS, HASH, MESSAGES, OTHER


def test_a_whole_session() -> None:
    pair = Pair().until("serving")
    assert [type(event) for event in pair.events] == [Authenticated, Progress, Progress, Ready]
    assert pair.events[0].facts == {"name": "iPad"} and pair.events[2].text == "compiling"
    data = [command for command in pair.commands if isinstance(command, m.Data)]
    assert b"".join(piece.piece for piece in data) == PIECES and len(data) == 3
    assert pair.commands[-1] == m.Reset(epoch=5) and pair.proxy.queue == QUEUE
    pair.now = 1.0
    first = pair.proxy.call(((1, 0),), np.ones((3, 4), np.float32), pair.now)
    second = pair.proxy.call(((1, 3), (0, 0)), np.ones((2, 4), np.float32), pair.now)
    pair.talk()
    a, b = pair.commands[-2:]
    assert (type(a), type(b), a.x.dtype, pair.proxy.open) == (m.Prefill, m.Decode, np.float16, 2)
    pair.now = 3.0
    pair.node.result(a, 2 * a.x, 1.5)
    pair.talk()
    pair.now = 4.0
    pair.node.result(b, 3 * b.x, 1.0)
    pair.talk()
    replies = [event for event in pair.events if isinstance(event, Reply)]
    assert [(r.request, r.compute_s, r.seconds) for r in replies] == [(first, 1.5, 2.0), (second, 1.0, 1.0)]
    assert (replies[0].y == 2).all() and not pair.proxy.open
    pair.now = 4.0 + PING_S + 0.1
    pair.proxy.tick(pair.now)
    pair.talk()
    assert pair.events[-1] == Health(facts=FACTS)
    pair.proxy.bye()
    with pytest.raises(SessionError, match="good-bye"):
        pair.talk()


def test_another_token_is_found_out_by_either_end() -> None:
    pair = Pair()
    pair.proxy = proxy_session(b"another token that is")
    with pytest.raises(SessionError, match="token files"):
        pair.talk()
    assert not pair.events and not pair.commands
    theirs, ours = proxy_session(), node_session(b"another token that is")
    ours.receive(bytes(theirs.out), 0.0)
    with pytest.raises(SessionError, match="tokens"):
        ours.receive(f.encode(m.Proof(proof=HASH)), 0.0)
    assert b"iPad" not in ours.out and not ours.authenticated, "nothing of itself was said"


EXPECTED = {"new": {"CHALLENGE"}, "offered": {"WANT"}, "loaded": {"LOADING", "READY"}, "serving": set[str]()}


@pytest.mark.parametrize("state", list(EXPECTED))
def test_what_a_proxy_does_not_expect_ends_the_connection(state: str) -> None:
    for name, message in MESSAGES.items():
        if name in EXPECTED[state] or name in ("ERROR", "BYE") or (state != "new" and name == "PONG"):
            continue
        pair = Pair()
        if state != "new":
            pair.until(state)
        pair.proxy.out.clear()
        with pytest.raises(SessionError):
            pair.proxy.receive(f.encode(message), 0.0)
        (trouble,) = read(pair.proxy.out)
        assert isinstance(trouble, m.Error) and trouble.code == "BAD_STATE"


def test_a_proxy_says_nothing_to_who_says_error_or_bye() -> None:
    for state in ("offered", "serving"):
        for message, words in ((m.Error(code="#12", text="news of later"), "news of later"), (m.Bye(), "good-bye")):
            pair = Pair().until(state)
            pair.proxy.out.clear()
            with pytest.raises(PeerClosed, match=words):
                pair.proxy.receive(f.encode(message), 0.0)
            assert not pair.proxy.out
    with pytest.raises(PeerClosed) as caught:
        proxy_session().receive(f.encode(m.Error(code="BUSY", text="words of a stranger")), 0.0)
    assert caught.value.code == "BUSY" and "stranger" not in str(caught.value)


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
    pair.answer(pair.commands[-1], **changes)
    with pytest.raises(SessionError, match="answer"):
        pair.talk()
    assert not any(isinstance(event, Reply) for event in pair.events)


def test_an_answer_that_is_not_finite_is_an_answer() -> None:
    """It is one sequence's trouble. And the cache can be emptied without a new connection."""
    pair = Pair().until("serving")
    for n, value in enumerate((np.nan, np.inf, 1.0)):
        pair.proxy.call(((1, 0),), np.ones((2, 4), np.float32), 0.0)
        pair.talk()
        pair.answer(pair.commands[-1], y=np.full((2, 4), value, np.float16))
        pair.talk()
        reply = [event for event in pair.events if isinstance(event, Reply)][-1]
        np.testing.assert_array_equal(reply.y, np.full((2, 4), value, np.float16))
        pair.proxy.renew(40 + n)
        pair.talk()
        assert pair.commands[-1] == Reset(epoch=40 + n)
    pair.proxy.call(((1, 0),), np.ones((2, 4), np.float32), 0.0)
    pair.talk()
    assert pair.commands[-1].epoch == 42
    with pytest.raises(AssertionError, match="calls are open"):
        pair.proxy.renew(43)


def test_what_is_late() -> None:
    session = proxy_session()
    session.tick(HANDSHAKE_S)
    with pytest.raises(SessionError, match="did not prove itself"):
        session.tick(HANDSHAKE_S + 0.1)
    assert not node_session().late(HANDSHAKE_S)
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
    pair.answer(pair.commands[-2])
    pair.talk()
    pair.proxy.tick(118.0)
    with pytest.raises(SessionError, match="more than 10 s late"):
        pair.proxy.tick(119.5)


def test_a_bundle_from_the_middle_on() -> None:
    pair = Pair().until("offered")
    pair.node.want(len(PIECES) - 10)
    pair.talk()
    (data,) = [command for command in pair.commands if isinstance(command, m.Data)]
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
    pair.node.want(0)
    with pytest.raises(SessionError):
        spoil(pair)


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
