"""The node's end of the iPad link: which message may come when."""

from __future__ import annotations

import numpy as np
import pytest

from mpgpt_ios.protocol import frames as f
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import QUEUE, SessionError
from tests.ios_proxy.sessions import Pair, node_session, proxy_session, read
from tests.ios_proxy.vectors import MESSAGES, OTHER


def test_a_proof_cannot_be_sent_back() -> None:
    """A stranger with two connections hands each end what the other said."""
    ours = node_session()
    ours.receive(f.encode(m.Hello(nonce=OTHER)), 0.0)
    (challenge,) = read(ours.out)
    assert isinstance(challenge, m.Challenge)
    with pytest.raises(SessionError, match="tokens"):
        ours.receive(f.encode(m.Proof(proof=challenge.proof)), 0.0)


def test_an_older_version_is_told_so() -> None:
    ours = node_session()
    with pytest.raises(f.VersionError):
        ours.receive(b"mpIP\x00" + bytes(40), 0.0)
    (trouble,) = read(ours.out)
    assert isinstance(trouble, m.Error) and trouble.code == "BAD_VERSION"
    with pytest.raises(SessionError, match=r"it refused: .*version 0"):
        proxy_session().receive(bytes(ours.out), 0.0)


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
            (trouble,) = read(pair.node.out)
            assert isinstance(trouble, m.Error)


def test_more_requests_than_the_node_takes() -> None:
    pair = Pair().until("serving")
    requests = [
        m.Prefill(epoch=5, request=n + 1, positions=((0, 0),), x=np.ones((1, 4), np.float16)) for n in range(QUEUE + 1)
    ]
    for request in requests[:QUEUE]:
        pair.node.receive(f.encode(request), 0.0)
    with pytest.raises(SessionError, match="more than 8"):
        pair.node.receive(f.encode(requests[QUEUE]), 0.0)


@pytest.mark.parametrize(
    ("request_", "epoch"), [(1, 4), (1, 6), (0, 5)], ids=["an older epoch", "a newer epoch", "a number again"]
)
def test_a_request_of_another_life(request_: int, epoch: int) -> None:
    pair = Pair().until("serving")
    request = m.Prefill(epoch=epoch, request=request_, positions=((0, 0),), x=np.ones((1, 4), np.float16))
    with pytest.raises(SessionError, match="request"):
        pair.node.receive(f.encode(request), 0.0)
    assert read(pair.node.out)[0].code == "BAD_REQUEST"  # type: ignore[union-attr]


def test_loading_another_bundle_than_was_offered() -> None:
    pair = Pair().until("stored")
    with pytest.raises(SessionError, match="not offered"):
        pair.node.receive(f.encode(m.Load(bundle=OTHER)), 0.0)
