"""The node's end of the iPad link: which message may come when."""

from __future__ import annotations

import numpy as np
import pytest

from mpgpt_ios.protocol import frames as f
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import HANDSHAKE_S, PROXY_SILENCE_S, QUEUE, PeerClosed, SessionError
from mpgpt_ios.protocol.node_session import NodeSession
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
    with pytest.raises(SessionError, match=r"it refused: it speaks another version"):
        proxy_session().receive(bytes(ours.out), 0.0)


ALLOWED = {"new": {"HELLO"}, "offered": set[str](), "stored": {"LOAD"}, "serving": {"RESET", "PREFILL", "DECODE"}}


@pytest.mark.parametrize("state", list(ALLOWED))
def test_what_a_node_does_not_expect_ends_the_connection(state: str) -> None:
    for name, message in MESSAGES.items():
        if name.split(",")[0] in ALLOWED[state] or name in ("ERROR", "BYE") or (state != "new" and name == "PING"):
            continue
        pair = Pair()
        if state != "new":
            pair.until(state)
        pair.node.out.clear()
        with pytest.raises(SessionError):
            pair.node.receive(f.encode(message), 0.0)
        (trouble,) = read(pair.node.out)
        assert isinstance(trouble, m.Error) and trouble.code == "BAD_STATE"


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


def test_nothing_is_said_to_who_says_error_or_bye() -> None:
    for state in (*ALLOWED, "challenged"):
        for message in (m.Error(code="COMPUTE_FAILED", text="my reasons"), m.Bye()):
            pair = Pair()
            if state == "challenged":
                pair.node.receive(f.encode(m.Hello(nonce=OTHER)), 0.0)
            elif state != "new":
                pair.until(state)
            proved = state not in ("new", "challenged")
            pair.node.out.clear()
            with pytest.raises(PeerClosed) as caught:
                pair.node.receive(f.encode(message), 0.0)
            assert not pair.node.out
            assert ("my reasons" in str(caught.value)) is (proved and isinstance(message, m.Error))


def test_a_proxy_that_has_another_token_is_understood() -> None:
    """The node proves itself first, so it is the proxy that finds out."""
    ours = node_session()
    ours.receive(f.encode(m.Hello(nonce=OTHER)), 0.0)
    with pytest.raises(PeerClosed, match="it refused: the tokens of the two ends differ") as caught:
        ours.receive(f.encode(m.Error(code="BAD_TOKEN", text="\N{SKULL} words of a stranger")), 0.0)
    assert caught.value.code == "BAD_TOKEN"


def test_a_stranger_costs_a_header() -> None:
    """What the state does not allow is refused before its payload comes."""
    ours = node_session()
    with pytest.raises(SessionError, match="DATA was not expected"):
        ours.receive(f.encode(m.Data(offset=0, piece=bytes(99)))[: f.HEADER.size], 0.0)
    assert read(ours.out)[0].code == "BAD_STATE"  # type: ignore[union-attr]


def test_it_is_served_when_the_node_says_so() -> None:
    pair = Pair()
    up = bytes(pair.proxy.out)
    pair.node.receive(up, 0.0)
    pair.proxy.receive(bytes(pair.node.out), 0.0)
    pair.node.out.clear()
    proof = bytes(pair.proxy.out)[len(up) :]
    assert pair.node.receive(proof, 0.0) == read(proof) and not pair.node.out
    pair.node.receive(f.encode(m.Ping(number=3)), 0.0)
    assert isinstance(read(pair.node.out)[0], m.Pong), "a PING is answered meanwhile"
    with pytest.raises(SessionError, match="OFFER was not expected"):
        pair.node.receive(f.encode(MESSAGES["OFFER"]), 0.0)


def a_request(number: int, **changes: object) -> m.Prefill:
    fields = {"epoch": 5, "positions": ((0, 0),), "x": np.ones((1, 4), np.float16)} | changes
    return m.Prefill(request=number, **fields)  # type: ignore[arg-type]


def requests(node: NodeSession, data: bytes) -> list[m.Request]:
    """The requests in ``data``, as the node takes them."""
    return [command for command in node.receive(data, 0.0) if isinstance(command, m.Prefill | m.Decode)]


@pytest.mark.parametrize("code", ["BAD_POS", "COMPUTE_FAILED"])
def test_it_goes_on_after_a_request_that_failed(code: m.Code) -> None:
    pair = Pair().until("serving")
    first, second = a_request(1), a_request(2)
    opened = requests(pair.node, f.encode(first) + f.encode(second))
    pair.node.out.clear()
    (later,) = requests(pair.node, f.encode(a_request(4)))
    pair.node.failed(opened[0], code, "why")
    for request in (opened[1], later):
        pair.node.result(request, request.x, 0.0)
    trouble, *results = read(pair.node.out)
    assert isinstance(trouble, m.Error) and (trouble.code, trouble.epoch, trouble.request) == (code, 5, 1)
    assert [result.request for result in results] == [2, 4]  # type: ignore[union-attr]


def test_nothing_is_sent_about_what_a_reset_dropped() -> None:
    pair = Pair().until("serving")
    dropped = requests(pair.node, f.encode(a_request(1)) + f.encode(a_request(2)))
    pair.node.receive(f.encode(m.Reset(epoch=6)), 0.0)
    (kept,) = requests(pair.node, f.encode(a_request(3, epoch=6)))
    pair.node.out.clear()
    pair.node.failed(dropped[0], "BAD_POS", "why")
    pair.node.result(dropped[1], dropped[1].x, 0.0)
    assert not pair.node.out
    pair.node.result(kept, kept.x, 0.0)
    assert [message.request for message in read(pair.node.out)] == [3]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes",
    [
        {"x": np.ones((1, 5), np.float16)}, {"x": np.ones((1, 4), np.float32)}, {"positions": ((3, 0),)},
    ],
    ids=["another width", "another dtype", "a slot that is not there"],
)  # fmt: skip
def test_a_request_for_another_package(changes: dict[str, object]) -> None:
    pair = Pair().until("loaded")
    pair.node.ready({"dtype": "float16", "embed": 4, "slots": 3})
    pair.talk()
    with pytest.raises(SessionError):
        pair.node.receive(f.encode(a_request(1, **changes)), 0.0)
    assert read(pair.node.out)[0].code == "BAD_REQUEST"  # type: ignore[union-attr]


def test_a_slot_twice() -> None:
    pair = Pair().until("serving")
    twice = m.Decode(epoch=5, request=1, positions=((0, 1), (0, 2)), x=np.ones((2, 4), np.float16))
    with pytest.raises(SessionError, match="slots"):
        pair.node.receive(f.encode(twice), 0.0)
    assert read(pair.node.out)[0].code == "BAD_REQUEST"  # type: ignore[union-attr]


def test_a_proxy_that_falls_silent() -> None:
    pair = Pair().until("serving")
    assert not pair.node.late(PROXY_SILENCE_S) and "nothing was heard" in pair.node.late(PROXY_SILENCE_S + 0.1)
    assert "did not prove itself" in node_session().late(HANDSHAKE_S + 0.1)
