"""What can go wrong between the proxy rank and the iPad, over real sockets: each fault ends in the rank computing for
itself, within the time that the test states, and the answers stay what they would have been."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpgpt.errors import LinkError
from mpgpt_ios.bundle import Bundle
from mpgpt_ios.protocol.frames import HEADER, MAGIC
from tests.ios_proxy.rig import STEPS, Proxy, Wire, a_step, serving

TIMEOUT_S = 1.0
"""How late an answer may be here."""
BOUND_S = 10.0
"""No fault holds a step up for longer; it is noticed in ``TIMEOUT_S``, and a busy machine is slow besides."""


def test_the_package_is_sent_once_and_the_ipad_computes(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path
) -> None:
    for again in (False, True):
        with serving(folder, tmp_path / "store") as (node, executor):
            proxy = proxies(node.port)
            assert proxy.client.wait_until_ready()
            assert all(proxy.go(step) for step in STEPS)
            account = proxy.stage.account()
            assert account.requests == executor.calls - 1, "and the self-test"
            assert account.compute_s > 0 and account.network_s > 0 and (account.falls, account.away_s) == (0, 0.0)
            assert (account.sent > bundle.length) is not again, "a node keeps what it was sent"
            assert proxy.stage.account().requests == 0
            proxy.close()
            assert any("sending" in line for line in proxy.said) is not again and "is ready: torch" in proxy.said[-1]


def test_several_steps_are_under_way_at_once(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path
) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, executor):
        proxy = proxies(node.port)
        proxy.client.wait_until_ready()
        executor.nap = 0.05
        begun = time.monotonic()
        assert [proxy.stage.forward(step) for step in STEPS[:4]] == [None] * 4
        assert time.monotonic() - begun < 0.05, "handing over does not wait for the iPad"
        for _ in range(4):
            proxy.stage.finish()
        account = proxy.stage.account()
        assert account.network_s < account.compute_s / 2, "the network is hidden behind computing"


def test_an_overflow_there_ends_no_connection(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One sequence is computed here from then on; the cache is emptied when its slot gets the next one."""
    with serving(folder, tmp_path, package=bundle) as (node, executor):
        proxy = proxies(node.port)
        assert proxy.client.wait_until_ready()
        assert proxy.go(a_step(9, (2, 0, 1))), "its first RESET is done"
        compute, reset, resets = executor.compute, executor.reset, list[int]()

        def counted() -> None:
            resets.append(executor.calls)
            reset()

        monkeypatch.setattr(executor, "compute", lambda rows, x: compute(rows, x) * (np.inf if len(x) == 7 else 1))
        monkeypatch.setattr(executor, "reset", counted)
        steps = [
            a_step(1, (0, 0, 7), (1, 0, 3)), a_step(2, (0, 7, 1), (1, 3, 1)), a_step(3, (0, 8, 1), (1, 4, 1)),
            a_step(4, (0, 0, 5), (1, 5, 1)), a_step(5, (0, 5, 1), (1, 6, 1)),
        ]  # fmt: skip
        for step in steps:
            assert proxy.go(step), "on the iPad"
            assert len(resets) == (step.number >= 4)
        assert proxy.stage.account().falls == 0 and len(proxy.said) == 1


@pytest.mark.parametrize("where", ["in a header", "in a payload", "after a request"])
def test_a_cut_connection(
    folder: Path,
    bundle: Bundle,
    proxies: Callable[..., Proxy],
    wires: Callable[[int], Wire],
    tmp_path: Path,
    where: str,
) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, executor):
        wire = wires(node.port)
        proxy = proxies(wire.port)
        assert proxy.client.wait_until_ready()
        assert proxy.go(STEPS[0]) and proxy.go(STEPS[1])
        if where == "after a request":
            executor.nap = 0.3
            threading.Timer(0.15, wire.cut).start()
        else:
            keep = 10 if where == "in a header" else HEADER.size + 50
            wire.bend = lambda data, at: _first(wire, data, keep)
        begun = time.monotonic()
        proxy.go(STEPS[2])
        assert time.monotonic() - begun < BOUND_S
        assert (
            proxy.said[-1].startswith("the iPad at 127.0.0.1")
            and "went away: it closed the connection" in proxy.said[-1]
        )
        wire.bend, executor.nap = (lambda data, at: data), 0.0
        assert not proxy.go(STEPS[3]), "meanwhile the rank computes"
        proxy.back()
        assert proxy.go(STEPS[4]), "and hands over again at the next step"
        assert all(proxy.go(step) for step in STEPS[5:])
        account = proxy.stage.account()
        assert account.falls == 1 and 0 < account.away_s < BOUND_S
        assert sum("went away" in line for line in proxy.said) == 1 and "is back" in proxy.said[-1]


def _first(wire: Wire, data: bytes, keep: int) -> bytes:
    """So many bytes go through, then the connection is cut."""
    threading.Timer(0.02, wire.cut).start()
    return data[:keep]


def test_silence(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], wires: Callable[[int], Wire], tmp_path: Path
) -> None:
    """Nothing comes any more, and nothing is closed: noticed in a second, not in thirty."""
    with serving(folder, tmp_path, package=bundle) as (node, _):
        wire = wires(node.port)
        proxy = proxies(wire.port, timeout_s=TIMEOUT_S)
        assert proxy.client.wait_until_ready() and proxy.go(STEPS[0])
        wire.frozen = True
        begun = time.monotonic()
        proxy.go(STEPS[1])
        assert TIMEOUT_S < time.monotonic() - begun < TIMEOUT_S + BOUND_S
        assert "an answer is more than 1 s late" in proxy.said[-1]
        wire.frozen = False
        proxy.back()
        assert proxy.go(STEPS[2])


def test_an_idle_ipad_that_falls_silent_is_noticed_too(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], wires: Callable[[int], Wire], tmp_path: Path
) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, _):
        wire = wires(node.port)
        proxy = proxies(wire.port)
        assert proxy.client.wait_until_ready()
        wire.frozen = True
        deadline = time.monotonic() + 4.0 + BOUND_S  # twice the time between two PINGs
        while proxy.client.epoch is not None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert "nothing was heard" in proxy.said[-1]


def test_a_damaged_answer(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], wires: Callable[[int], Wire], tmp_path: Path
) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, _):
        wire = wires(node.port)
        proxy = proxies(wire.port)
        assert proxy.client.wait_until_ready() and proxy.go(STEPS[0])
        wire.bend = lambda data, at: data[:60] + bytes([data[60] ^ 4]) + data[61:] if len(data) > 60 else data
        begun = time.monotonic()
        proxy.go(STEPS[1])
        assert time.monotonic() - begun < BOUND_S and "checksum" in proxy.said[-1]
        wire.bend = lambda data, at: data
        proxy.back()
        assert proxy.go(STEPS[2])


def test_the_node_goes_and_another_comes(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path
) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, executor):
        proxy, port = proxies(node.port), node.port
        assert proxy.client.wait_until_ready() and all(proxy.go(step) for step in STEPS[:3])
    begun = time.monotonic()
    assert not proxy.go(STEPS[3]) or time.monotonic() - begun < BOUND_S
    assert not proxy.go(STEPS[4])
    with serving(folder, tmp_path, package=bundle, port=port) as (node, executor):
        proxy.back()
        assert proxy.go(STEPS[5]) and executor.filled[0] == 25, "it was told what it had missed"
        assert all(proxy.go(step) for step in STEPS[6:])


def test_without_a_fallback_the_run_ends_with_a_sentence(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path
) -> None:
    with serving(folder, tmp_path, package=bundle) as (node, _):
        proxy = proxies(node.port, fallback=False)
        assert proxy.client.wait_until_ready() and proxy.go(STEPS[0])
    with pytest.raises(LinkError, match=r"went away: .*`fallback: none`"):
        proxy.go(STEPS[1])


def test_another_token(folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path) -> None:
    with serving(folder, tmp_path, package=bundle, token=b"quite another token") as (node, executor):
        proxy = proxies(node.port)
        assert not proxy.client.wait_until_ready()
        assert "cannot be used: it has another token" in proxy.said[-1]
        assert not proxy.go(STEPS[0]) and not executor.calls
    assert proxy.stage.account().falls == 1


def test_nobody_there(proxies: Callable[..., Proxy]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    proxy = proxies(port)
    begun = time.monotonic()
    assert not proxy.client.wait_until_ready() and time.monotonic() - begun < BOUND_S
    assert "cannot be used: Connection refused" in proxy.said[-1]
    assert not proxy.go(STEPS[0])


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        (HEADER.pack(MAGIC, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0) + bytes(64), "version 0 of the protocol"),
        (HEADER.pack(MAGIC, 1, 2, 0, 0, 0, 0, 0, 0, 0, 0, 2**32 - 1, 0), "4294967295 bytes"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "this is no mpgpt iPad link"),
        (b"", "it closed the connection"),
        (struct.pack("<64x"), "this is no mpgpt iPad link"),
    ],
    ids=["an older version", "4 GB", "something else that listens", "nothing", "zeros"],
)
def test_what_answers_is_no_ipad(proxies: Callable[..., Proxy], sent: bytes, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(1000):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        proxy = proxies(listener.getsockname()[1])
        begun = time.monotonic()
        assert not proxy.client.wait_until_ready() and time.monotonic() - begun < BOUND_S
        assert words in proxy.said[-1]
        assert not proxy.go(STEPS[0])
        proxy.close()
        thread.join(5.0)


def test_asked_to_dial_again_it_does_not_wait_for_its_time(
    folder: Path, bundle: Bundle, proxies: Callable[..., Proxy], tmp_path: Path
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        proxy = proxies(port, back_off_s=(600.0,))
        assert not proxy.client.wait_until_ready()
    assert not proxy.go(STEPS[0]) and proxy.stage.account().away
    with serving(folder, tmp_path, package=bundle, port=port):
        proxy.stage.redial()
        proxy.back()
        assert proxy.go(STEPS[1]) and not proxy.stage.account().away
