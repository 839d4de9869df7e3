"""A node over real sockets: packages that come half or changed, a full disk, several proxies, strangers."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from mpgpt_ios.bundle import Bundle
from mpgpt_ios.node.bundle_store import NoRoom, PartialBundle, Store
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.node_session import NodeSession
from tests.ios_proxy.rig import CHUNK, STEPS, Proxy, Wire, serving


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

    def error(session: NodeSession, code: m.Code, text: str, request: m.Request | None = None) -> None:
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


def test_a_newer_proxy_takes_the_place_of_an_older_one(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path
) -> None:
    """An iPad that slept may still hold a connection whose other end is long gone."""
    with serving(folder, tmp_path, package=bundle) as (node, _):
        older = proxies(node.port, back_off_s=(600.0,))  # it will not dial again
        assert older.client.wait_until_ready() and older.go(STEPS[0])
        newer = proxies(node.port)
        assert newer.client.wait_until_ready() and newer.go(STEPS[0])


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
