"""A node over real sockets: packages that come half or changed, a full disk, several proxies, strangers."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpgpt_ios.bundle import Bundle
from mpgpt_ios.executor import Executor
from mpgpt_ios.node.bundle_store import NoRoom, PartialBundle, Store
from mpgpt_ios.node.server import NodeServer
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.node_session import NodeSession
from tests.ios_proxy.rig import CHUNK, EMBED, STEPS, TOKEN, ByHand, Proxy, Wire, serving


def test_a_package_that_comes_half_is_taken_up_again(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], wires: Callable[[int], Wire], tmp_path: Path
) -> None:
    """Cut after a million bytes, and the node restarted: the rest alone is sent."""
    with serving(folder, tmp_path) as (node, _):
        wire, port = wires(node.port), node.port
        wire.bend_up = lambda data, at: None if at > 1_000_000 else data
        proxy = proxies(wire.port)
        assert not proxy.client.wait_until_ready()
        wire.closed = True
    first, wire.up = wire.up, 0
    with serving(folder, tmp_path, port=port):
        wire.bend_up, wire.closed = (lambda data, at: data), False
        proxy.back()
        assert first > 900_000 and wire.up < bundle.length - 700_000
        assert proxy.go(STEPS[0])


def test_a_package_that_is_changed_on_the_way_is_not_kept(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path
) -> None:
    class Changed:
        """One byte of the weights is another than when they were hashed."""

        hash, length, entries = bundle.hash, bundle.length, bundle.entries

        def read(self, offset: int, count: int) -> bytes:
            data = bytearray(bundle.read(offset, count))
            if offset <= 2_000_000 < offset + count:
                data[2_000_000 - offset] ^= 1
            return bytes(data)

    with serving(folder, tmp_path / "store") as (node, executor):
        proxy = Proxy(folder, Changed(), node.port)  # type: ignore[arg-type]
        assert not proxy.client.wait_until_ready()
        assert "its hash does not fit" in proxy.said[-1] and not executor.calls
        assert not proxy.go(STEPS[0])
        proxy.close()
        assert not any((tmp_path / "store").iterdir())


@pytest.mark.parametrize("when", ["before it comes", "on the way"])
def test_a_node_whose_disk_is_full_says_so(
    folder: Path,
    bundle: Bundle,
    proxies: Callable[..., Proxy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    when: str,
) -> None:
    codes: list[str] = []
    send_error = NodeSession.error

    def error(session: NodeSession, code: str, text: str, request: m.Request | None = None) -> None:
        codes.append(code)
        send_error(session, code, text, request)

    def full(*args: object) -> None:
        raise NoRoom("the disk is full")

    monkeypatch.setattr(NodeSession, "error", error)
    owner, name = (Store, "receive") if when == "before it comes" else (PartialBundle, "write")
    monkeypatch.setattr(owner, name, full)
    with serving(folder, tmp_path) as (node, executor):
        proxy = proxies(node.port)
        assert not proxy.client.wait_until_ready() and not executor.calls
        assert "the disk is full" in proxy.said[-1] and codes[0] == "NO_SPACE", (proxy.said, codes)
        assert not proxy.go(STEPS[0])


def test_a_proxy_that_is_there_is_not_displaced(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path
) -> None:
    """Two rings with one token: the second is told, and waits; when the first is over it is served."""
    with serving(folder, tmp_path, package=bundle) as (node, _):
        first = proxies(node.port)
        assert first.client.wait_until_ready() and first.go(STEPS[0])
        second = proxies(node.port)
        assert not second.client.wait_until_ready() and "refused: another proxy is served" in second.said[-1]
        assert not second.go(STEPS[0])
        assert first.go(STEPS[1]) and first.stage.account().falls == 0
        first.close()
        second.back()
        assert second.go(STEPS[1])


def test_a_proxy_that_has_fallen_silent_is(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], wires: Callable[[int], Wire], tmp_path: Path
) -> None:
    """An iPad that slept may still hold a connection whose other end is long gone."""
    with serving(folder, tmp_path, package=bundle, decide_s=3.5) as (node, _):
        wire = wires(node.port)
        first = proxies(wire.port, back_off_s=(600.0,), busy_s=600.0)
        assert first.client.wait_until_ready() and first.go(STEPS[0])
        wire.frozen = True
        second = proxies(node.port)
        assert second.client.wait_until_ready() and second.go(STEPS[0])


def test_one_that_is_displaced_is_told(
    by_hand: Callable[..., ByHand], folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    with serving(folder, tmp_path, package=bundle, decide_s=3.5) as (node, _):
        first = by_hand(node.port).serving()
        by_hand(node.port).serving()
        assert first.hear() == m.Error(code="BUSY", text="another proxy took over")


def a_request(number: int, position: int, *, epoch: int = 1, slot: int = 0) -> m.Prefill:
    x = np.ones((2, EMBED), np.float32)
    return m.Prefill(epoch=epoch, request=number, positions=((slot, position),), x=x)


def test_it_goes_on_after_a_request_that_fails(
    by_hand: Callable[..., ByHand], folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, executor):
        proxy = by_hand(node.port).serving()
        proxy.send(a_request(1, 0), a_request(2, 7), a_request(3, 2))
        heard = [proxy.hear() for _ in range(3)]
        assert [message.request for message in heard] == [1, 2, 3]  # type: ignore[union-attr]
        assert isinstance(heard[1], m.Error) and heard[1].code == "BAD_POS"
        compute = executor.compute

        def failing(rows: object, x: object) -> object:
            monkeypatch.setattr(executor, "compute", compute)
            raise RuntimeError("no luck")

        monkeypatch.setattr(executor, "compute", failing)
        proxy.send(a_request(4, 4), a_request(5, 4))
        trouble, result = proxy.hear(), proxy.hear()
        assert trouble == m.Error(code="COMPUTE_FAILED", text="no luck", epoch=1, request=4)
        assert isinstance(result, m.Result) and result.request == 5


def test_a_reset_that_fails(
    by_hand: Callable[..., ByHand], folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, executor):
        proxy = by_hand(node.port).serving()
        proxy.send(a_request(1, 0))
        assert isinstance(proxy.hear(), m.Result)
        reset = executor.reset

        def failing() -> None:
            monkeypatch.setattr(executor, "reset", reset)
            raise RuntimeError("no state")

        monkeypatch.setattr(executor, "reset", failing)
        proxy.send(m.Reset(epoch=2))
        assert proxy.hear() == m.Error(code="COMPUTE_FAILED", text="no state")
        with pytest.raises(EOFError):
            proxy.hear()
        proxy.close()
        again = by_hand(node.port).serving()
        again.send(a_request(1, 0))
        assert isinstance(again.hear(), m.Result), "the next connection is served"


def test_nothing_comes_about_what_a_reset_dropped(
    by_hand: Callable[..., ByHand], folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, executor):
        proxy = by_hand(node.port).serving()
        executor.nap = 0.1
        proxy.send(a_request(1, 0), a_request(2, 99), a_request(3, 2), m.Reset(epoch=2), a_request(4, 0, epoch=2))
        while (message := proxy.hear()) and getattr(message, "epoch", 0) == 1:
            assert message.request == 1, "it may have been done before the RESET came"  # type: ignore[union-attr]
        assert isinstance(message, m.Result) and message.request == 4


def test_a_ping_is_answered_while_a_package_is_hashed(
    by_hand: Callable[..., ByHand], folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashing, go_on, finish, find = threading.Event(), threading.Event(), PartialBundle.finish, Store.find

    def slow(work: Callable[..., object]) -> Callable[..., object]:
        def wait(*arguments: object) -> object:
            hashing.set()
            assert go_on.wait(10.0)
            return work(*arguments)

        return wait

    monkeypatch.setattr(PartialBundle, "finish", slow(finish))
    monkeypatch.setattr(Store, "find", slow(find))
    with serving(folder, tmp_path) as (node, _):
        proxy = by_hand(node.port)
        for number, next_one in ((1, m.Want), (2, m.Stored)):
            if number == 1:
                proxy.take(proxy.until(m.Info))
            assert hashing.wait(10.0)
            proxy.send(m.Ping(number=number))
            pong = proxy.hear()
            assert isinstance(pong, m.Pong) and pong.number == number
            go_on.set()
            message = proxy.hear()
            assert isinstance(message, next_one)
            hashing.clear()
            go_on.clear()
            proxy.take(message)


def test_a_load_that_failed_is_not_tried_again(
    by_hand: Callable[..., ByHand], folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    tried: list[Bundle] = []

    def open_(bundle: Bundle) -> tuple[Executor, str]:
        tried.append(bundle)
        raise RuntimeError("the Neural Engine does not like it")

    node = NodeServer("127.0.0.1", 0, TOKEN, Store(tmp_path), open_=open_, say=lambda line: None, package=bundle)
    thread = threading.Thread(target=node.serve)
    thread.start()
    said = []
    for _ in range(3):
        proxy = by_hand(node.port)
        message = proxy.until(m.Error)
        assert isinstance(message, m.Error) and message.code == "LOAD_FAILED"
        said.append(message.text)
        proxy.close()
    node.close()
    thread.join(10.0)
    assert len(tried) == 1 and said[0] == "the Neural Engine does not like it"
    assert said[1] == said[2] == f"{said[0]} (it is not tried again until the node is started anew)"


def test_a_node_that_ends_says_good_bye(
    by_hand: Callable[..., ByHand], folder: Path, bundle: Bundle, tmp_path: Path
) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, _):
        proxy = by_hand(node.port).serving()
    assert proxy.hear() == m.Bye()


def test_strangers_do_not_disturb(folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, _):
        proxy = proxies(node.port)
        assert proxy.client.wait_until_ready() and proxy.go(STEPS[0])
        strangers = [socket.create_connection(("127.0.0.1", node.port)) for _ in range(20)]
        for stranger in strangers[::2]:
            stranger.sendall(b"\xff" * 5000)
        assert proxy.go(STEPS[1]) and CHUNK
        for stranger in strangers:
            stranger.close()
