"""Who may come in, and with how much."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from mpgpt.errors import UsageError
from mpgpt_api import guard
from mpgpt_api.guard import API, Access, check_origin, is_loopback, read_keys
from mpgpt_api.service import Limits
from tests.api.rig import Server, serving

KEY = "correct-horse-battery"
PAGE = "http://localhost:3000"


@pytest.fixture(scope="module")
def keyed(folder: Path) -> Iterator[Server]:
    """As on a host that others reach."""
    access = Access(
        keys=(b"another-key-of-others", KEY.encode(), "schlüssel-für-mich".encode()), origins=(PAGE,), local=False
    )
    with serving(folder, access=access, limits=Limits(body_bytes=2000)) as server:
        yield server


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


GIVEN = [
    {}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"}, {"authorization": "Bearer"},
    *map(bearer, ("wrong", KEY + "x", KEY[:-1], "ä")),
]  # fmt: skip


@pytest.mark.parametrize("given", GIVEN, ids=range(len(GIVEN)))
@pytest.mark.parametrize("path", ["/v1/models", "/config", "/cluster", "/metrics", "/openapi.json"])
def test_without_the_key_nothing_is_said(keyed: Server, path: str, given: dict[str, str]) -> None:
    answer = keyed.get(path, headers={name: value.encode() for name, value in given.items()})
    assert answer.status_code == 401 and answer.headers["www-authenticate"] == "Bearer"
    error = answer.json()["error"]
    message = error["message"] if path.startswith("/v1/") else error
    assert "key" in message
    if path.startswith("/v1/"):
        assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")


def test_with_a_key_it_is_open(keyed: Server) -> None:
    for key in (KEY, "another-key-of-others", "schlüssel-für-mich"):
        given = {name: value.encode() for name, value in bearer(key).items()}
        assert keyed.get("/v1/models", headers=given).status_code == 200
    assert keyed.post("/query", {"text": "a", "max_tokens": 2}, headers=bearer(KEY)).status_code == 200
    assert keyed.post("/query", {"text": "a", "max_tokens": 2}).status_code == 401
    assert keyed.get("/health").json()["status"] == "ok", "a monitor needs none"
    assert keyed.get("/").status_code == 200, "nor does the page, which asks for it"


def test_every_endpoint_is_behind_the_key(keyed: Server) -> None:
    document = keyed.get("/openapi.json", headers=bearer(KEY)).json()
    assert all(path.startswith(API) for path in document["paths"])


def test_pages_of_other_origins_are_kept_out(keyed: Server, server: Server) -> None:
    stranger = {"origin": "http://evil.example"}
    for each in (keyed, server):
        for method in ("GET", "POST", "OPTIONS"):
            answer = httpx.request(method, each.url + "/query", headers=stranger | bearer(KEY), content=b"{}")
            assert answer.status_code == 403 or "access-control-allow-origin" not in answer.headers
        answer = httpx.post(each.url + "/query", headers=stranger | bearer(KEY), json={"text": "a"})
        assert answer.status_code == 403 and "http://evil.example" in answer.json()["error"]
    same = {"origin": server.url}
    assert server.post("/query", {"text": "a", "max_tokens": 1}, headers=same).status_code == 200
    assert "access-control-allow-origin" not in server.get("/config", headers=same).headers


def test_a_listed_origin_may(keyed: Server) -> None:
    asked = {"origin": PAGE, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answer = httpx.options(keyed.url + "/chat", headers=asked)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    answer = keyed.get("/config", headers={"origin": PAGE} | bearer(KEY))
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == PAGE
    answer = keyed.get("/config", headers={"origin": PAGE})
    assert answer.status_code == 401 and answer.headers["access-control-allow-origin"] == PAGE, "it may read why"


@pytest.mark.parametrize("name", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "[::2]", ""])
def test_this_machine_only_under_its_own_name(server: Server, name: str) -> None:
    """A page from elsewhere whose name leads here (DNS rebinding) is of another origin than it looks."""
    assert server.get("/health", headers={"host": name}).status_code == 403


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST:9", "127.0.0.1", "127.1.2.3:80", "[::1]:80"])
def test_names_of_this_machine(server: Server, name: str) -> None:
    assert server.get("/health", headers={"host": name}).status_code == 200


def test_a_body_is_bounded(keyed: Server) -> None:
    long = {"text": "x" * 3000}
    assert keyed.post("/query", long, headers=bearer(KEY)).status_code == 413
    pieces = (b'{"text": "' + b"x" * 1000 for _ in range(9))
    answer = httpx.post(keyed.url + "/query", content=pieces, headers=bearer(KEY))
    assert answer.status_code == 413 and "2000 bytes" in answer.json()["error"], "announced or not"


def test_a_body_that_does_not_come_is_not_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "BODY_S", 0.2)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(b"POST /query HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n{")
        begun = time.monotonic()
        assert b"408" in connection.recv(4096).split(b"\r\n")[0]
        assert time.monotonic() - begun < 5


def test_what_a_browser_may_do_is_said(server: Server) -> None:
    for path in ("/", "/health", "/nothing", "/v1/models"):
        headers = server.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers


def test_no_stack_trace_leaves_the_process(
    server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(text: str) -> list[int]:
        raise RuntimeError("the secret of the house")

    monkeypatch.setattr(server.run.tokenizer, "encode", fail)
    for path, body in (("/v1/completions", {"prompt": "a"}), ("/query", {"text": "a", "raw": True})):
        answer = server.post(path, body)
        assert answer.status_code == 500 and "secret" not in answer.text and "Traceback" not in answer.text
        assert "internal error" in answer.text
    assert "the secret of the house" in capfd.readouterr().err


# -- what the command line says


def test_keys_are_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# mine\n\n  {KEY}  \nanother-key-of-others\n")
    assert read_keys(path) == (KEY.encode(), b"another-key-of-others")
    for content, why in (("", "no key"), ("# only\n", "no key"), ("short\n", "fewer than 16")):
        path.write_text(content)
        with pytest.raises(UsageError, match=why):
            read_keys(path)
    path.write_bytes(b"\xff" * 20)
    with pytest.raises(UsageError, match="UTF-8"):
        read_keys(path)
    with pytest.raises(UsageError, match="No such file"):
        read_keys(tmp_path / "none")


def test_which_hosts_are_this_one() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.8.7", "localhost", "LocalHost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "mini", "localhost.example", "")))


def test_origins_are_as_browsers_send_them() -> None:
    assert check_origin("HTTP://Localhost:3000/") == "http://localhost:3000"
    for wrong in ("localhost:3000", "*", "http://", "file:///x", "http://a/b"):
        with pytest.raises(UsageError, match="origin"):
            check_origin(wrong)
