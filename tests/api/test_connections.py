"""Connections that keep a server waiting: by number, by time, and what is left for the others."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from mpgpt_api import connections
from mpgpt_api.app import PAGE
from mpgpt_api.connections import FEWEST, MOST, Phase, most_connections, most_requests
from tests.api import rig
from tests.api.rig import PATIENCE_S, Server, serving, until
from tests.support.launch import ENV, ROOT, mpirun

PROMPT = {"prompt": "Once upon a time", "max_tokens": 400, "stream": True}
MANY = 300
DESCRIPTORS = 256


def post(path: str, body: Any) -> bytes:
    content = json.dumps(body).encode()
    length = f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\n{length}".encode() + content


ASSET = "/assets/" + max((PAGE / "assets").iterdir(), key=lambda path: path.stat().st_size).name
GET = b"GET %s HTTP/1.1\r\nHost: localhost\r\n\r\n"
KINDS = {
    "nothing": b"",
    "half a head": b"GET /health HTTP/1.1\r\nHost: loc",
    "half a body": post("/query", {"text": "x" * 1000})[:-5],
    "no body at all": b"POST /query HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n",
    "requests, and stays": GET % b"/health",
    "streams that it does not read": post("/v1/completions", PROMPT),
    "pages that it does not read": GET % ASSET.encode() * 8,
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n",
}


@contextlib.contextmanager
def connected(url: str, count: int = 1, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """``count`` connections that send ``first``, and then what the test has them send."""
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        opened = []
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=PATIENCE_S))
            with contextlib.suppress(OSError):
                connection.sendall(first)
            opened.append(connection)
        yield opened


def closed(connection: socket.socket) -> bool:
    """Whether its other end has closed it; what came before is passed over."""
    connection.setblocking(False)
    try:
        while connection.recv(1 << 16):
            pass
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def rest(connection: socket.socket) -> bytes:
    """All that comes until its other end closes it."""
    told = b""
    with contextlib.suppress(ConnectionError):
        while part := connection.recv(1 << 16):
            told += part
    return told


# -- a process with few descriptors


@pytest.fixture(scope="module")
def poor(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process, Path]]:
    """A server as a person starts it, in a process that may have 256 descriptors; and where its standard error goes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = tmp_path_factory.mktemp("poor") / "stderr"
    command = mpirun(0, "-m", "mpgpt", "serve", "--model", folder, "--port", str(port), "--threads", "1")
    limit = ["bash", "-c", f'ulimit -n {DESCRIPTORS}; exec "$@"', "limit", *command, "--ignore-eos"]
    with said.open("wb") as error, subprocess.Popen(limit, env=ENV, cwd=ROOT, stderr=error) as process:
        url = f"http://127.0.0.1:{port}"

        def up() -> bool:
            assert process.poll() is None, said.read_text()
            with contextlib.suppress(httpx.TransportError):
                return httpx.get(f"{url}/health").status_code == 200
            return False

        try:
            until(up, 90.0)
            yield url, psutil.Process(process.pid), said
        finally:
            process.terminate()
            assert process.wait(PATIENCE_S) == 0


@pytest.mark.parametrize("first", KINDS.values(), ids=KINDS.keys())
def test_more_connections_than_descriptors(poor: tuple[str, psutil.Process, Path], first: bytes) -> None:
    """Whatever 300 connections wait for, /health is answered, nothing spins, and what is said of it is one line."""
    url, process, said = poor
    with connected(url, MANY, first):
        before = sum(process.cpu_times()[:2])
        for _ in range(4):
            assert httpx.get(f"{url}/health", timeout=PATIENCE_S).status_code == 200
            time.sleep(0.5)
        used = sum(process.cpu_times()[:2]) - before
        if not first:
            assert used < 0.5, "accepting again and again would take all of it"
        assert process.num_fds() <= DESCRIPTORS
    lines = [line for line in said.read_text().splitlines() if line.startswith("mpgpt: ")]
    assert len(lines) == 1 and "connections are open" in lines[0]
    assert "Traceback" not in said.read_text()
    until(lambda: process.num_fds() < DESCRIPTORS / 4, 60.0)


def test_the_bound_is_what_descriptors_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    open_now = psutil.Process().num_fds()
    for soft, low, high in ((256 + open_now, 150, 192), (10**6, MOST, MOST), (resource.RLIM_INFINITY, MOST, MOST),
                            (open_now + 2, FEWEST, FEWEST), (1, FEWEST, FEWEST)):  # fmt: skip
        monkeypatch.setattr(resource, "getrlimit", lambda which, soft=soft: (soft, soft))
        assert low <= most_connections() <= high
    assert all(0 < most_requests(most) < most for most in range(FEWEST, MOST + 1))


# -- deadlines


@pytest.fixture(scope="module")
def hasty(folder: Path) -> Iterator[Server]:
    """A server with deadlines of half a second."""
    hurried = dict.fromkeys((Phase.HEAD, Phase.BODY, Phase.CLOSING), 0.5)
    with serving(folder, patience_s={**connections.PATIENCE_S, **hurried}) as server:
        yield server


def test_a_head_that_does_not_come_is_not_waited_for(hasty: Server) -> None:
    with connected(hasty.url) as (connection,):
        assert rest(connection) == b""
    with connected(hasty.url, first=b"GET /health HTTP/1.1\r\n") as (connection,):
        told = rest(connection)
        assert told.startswith(b"HTTP/1.1 408 ") and b"the request's head did not arrive" in told
    with connected(hasty.url, first=GET % b"/health" + b"G") as (connection,):
        told = rest(connection)
        assert told.startswith(b"HTTP/1.1 200 ") and b"HTTP/1.1 408 " in told, "nor that of a second request"


@pytest.mark.parametrize(
    "first",
    [b"GET /health HTTP/1.1\r\nX: ", GET % b"/health" + b"G",
     b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999\r\n\r\n"],
    ids=["a head", "a second head", "a body that nobody wants"],
)  # fmt: skip
def test_byte_by_byte_is_no_way_to_stay(hasty: Server, first: bytes) -> None:
    with connected(hasty.url, first=first) as (connection,):

        def cut_off() -> bool:
            with contextlib.suppress(OSError):
                connection.send(b"x")
            return closed(connection)

        until(cut_off)


def test_who_is_not_late_stays(server: Server) -> None:
    """A connection that is used again, and one whose head comes in pieces."""
    with connected(server.url) as (connection,):
        for _ in range(3):
            for piece in (b"GET /health HT", b"TP/1.1\r\nHost: local", b"host\r\n\r\n"):
                connection.sendall(piece)
                time.sleep(0.1)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")
            time.sleep(0.5)
    with connected(server.url, first=GET % b"/health" * 5) as (connection,):
        told = b""
        while told.count(b"HTTP/1.1 200 ") < 5:
            told += connection.recv(1 << 16)


def test_a_stream_that_nobody_reads_ends(hasty: Server) -> None:
    """Its slots are free before the answers are at their end."""
    until(lambda: not hasty.engine.running)
    wide = PROMPT | {"max_tokens": 400, "logprobs": 20, "n": 4}
    host, port = hasty.url.removeprefix("http://").split(":")
    with socket.socket() as connection, hasty.slow(0.01):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.sendall(post("/v1/completions", wide))
        until(lambda: hasty.engine.running == 4)
        streams = list(hasty.service.streams)
        until(lambda: not hasty.engine.running)
        assert [stream.finish_reason for stream in streams] == ["cancelled"] * 4
    hasty.idle()
    assert hasty.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200


# -- who makes room


@pytest.fixture(scope="module")
def small(folder: Path) -> Iterator[Server]:
    """A server of 16 connections, 14 of which may be requests that it answers."""
    with serving(folder, max_sequences=4, most=16) as server:
        yield server


def test_idle_connections_go_first(small: Server) -> None:
    with connected(small.url, 8, GET % b"/health") as idle, connected(small.url, 8) as silent:
        until(lambda: all(connection.recv(1 << 16) for connection in idle))
        with connected(small.url, 5, GET % b"/health") as late:
            assert all(connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ") for connection in late)
            assert [closed(connection) for connection in idle] == [True] * 5 + [False] * 3
            assert not any(map(closed, silent))


def test_who_is_being_answered_stays_and_is_not_interrupted(small: Server) -> None:
    """Streams under way are never closed for a new connection; the silent ones are, the oldest first."""
    small.idle()
    with small.slow(), connected(small.url, 4, post("/v1/completions", PROMPT)) as streams:
        until(lambda: small.engine.running == 4)
        with connected(small.url, 40) as silent:
            assert small.get("/health").status_code == 200
            until(lambda: sum(map(closed, silent)) >= 28)
            assert not closed(silent[-1])
        small.nap_s[0] = 0.0
        for connection in streams:
            told = b""
            while b"data: [DONE]" not in told:
                told += (part := connection.recv(1 << 16))
                assert part, "it was interrupted"


def test_one_clients_connections_do_not_close_anothers(small: Server) -> None:
    """Those of the address that has most of them make room."""
    port = int(small.url.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0)) as modest:
        modest.sendall(b"GET /health HTTP/1.1\r\n")
        with connected(small.url, 40) as silent:
            until(lambda: sum(map(closed, silent)) >= 24)
            modest.sendall(b"Host: localhost\r\n\r\n")
            modest.settimeout(PATIENCE_S)
            assert modest.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_too_many_requests_leave_the_monitor_its_place(small: Server) -> None:
    """What is too much is refused in a sentence, and what no longer fits is closed at once."""
    small.idle()
    with small.slow(), connected(small.url, 14, post("/query", {"text": "Once", "max_tokens": 400})) as asked:
        until(lambda: small.engine.running == 4 and small.engine.waiting == 10)
        answer = small.post("/query", {"text": "a"})
        assert answer.status_code == 503 and "too many requests" in answer.json()["error"]
        assert answer.headers["retry-after"] == "1"
        assert small.get("/config").status_code == 503 and small.get("/health").status_code == 200
        assert not any(map(closed, asked))
    small.idle()
    assert small.get("/config").status_code == 200


def test_what_does_not_fit_is_closed_at_once(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every connection has a request that is being answered, nobody gives way; and one line says so."""
    monkeypatch.setattr(rig, "most_requests", lambda most: 100)
    with serving(folder, max_sequences=4, most=4) as server, server.slow():
        with connected(server.url, 4, post("/chat", {"text": "Once", "max_tokens": 400})) as asked:
            until(lambda: server.engine.running == 4)
            with connected(server.url, 30, GET % b"/health") as late:
                assert [rest(connection) for connection in late] == [b""] * 30
            assert server.engine.running == 4 and not any(map(closed, asked))
        until(lambda: not server.engine.running)
        assert server.get("/health").status_code == 200
    assert capfd.readouterr().err.count("connections are open") == 1


def test_without_descriptors_it_waits_and_says_so_once(
    server: Server, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be gone for other reasons than connections. Until there are some, it tries now and then."""
    accept, tries = socket.socket.accept, [0]

    def exhausted(listening: socket.socket) -> Any:
        tries[0] += 1
        if tries[0] < 5:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return accept(listening)

    begun = time.monotonic()
    monkeypatch.setattr(socket.socket, "accept", exhausted)
    assert server.get("/health").status_code == 200
    assert time.monotonic() - begun > 3 * connections.REST_S, "it did not rest"
    said = capfd.readouterr().err
    assert said == "mpgpt: a connection cannot be accepted: Too many open files\n"


def test_silent_connections_do_not_delay_the_end(folder: Path) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(serving(folder))
        with connected(server.url, 20) as silent:
            assert server.get("/health").status_code == 200
            begun = time.monotonic()
            stack.close()
            assert time.monotonic() - begun < PATIENCE_S and all(map(closed, silent))
