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
from mpgpt_api.guard import API, Access, check_origin, is_loopback, origins, read_keys
from mpgpt_api.service import Limits
from tests.api.rig import Server, serving

KEY = "correct-horse-battery"
PAGE = "http://localhost:3000"
LISTED = (
    "app://obsidian.md", "chrome-extension://abcdefghijklmnopabcdefghijklmnop", "moz-extension://1b-2c", "app://.",
    "tauri://localhost", "capacitor://localhost", "file://", "http://xn--bcher-kva.example", "https://[::1]:8443",
    "null",
)  # fmt: skip


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


# -- pages of other origins


@pytest.fixture(scope="module")
def listing(folder: Path) -> Iterator[Server]:
    """A server for this machine only, which lists pages of many schemes."""
    with serving(folder, access=Access(origins=LISTED)) as server:
        yield server


def preflight(server: Server, origin: str, **more: str) -> httpx.Response:
    headers = {"origin": origin, "access-control-request-method": "POST"}
    headers |= {"access-control-" + name.replace("_", "-"): value for name, value in more.items()}
    return httpx.options(server.url + "/v1/chat/completions", headers=headers)


SENT = (
    "authorization, content-type, x-stainless-os, x-stainless-lang, x-stainless-arch, x-stainless-runtime, "
    "x-stainless-package-version, x-stainless-runtime-version, x-stainless-retry-count, x-stainless-timeout, "
    "x-stainless-helper-method, openai-beta, openai-organization, openai-project, x-title, http-referer, "
    "idempotency-key, user-agent, X-Some_Thing.else"
)
"""What OpenAI's clients and their users set."""


def test_a_preflight_allows_whatever_headers_a_client_sets(keyed: Server) -> None:
    answer = preflight(keyed, PAGE, request_headers=SENT)
    assert answer.status_code == 200 and not answer.content
    allowed = answer.headers["access-control-allow-headers"].split(", ")
    assert set(SENT.lower().split(", ")) <= set(allowed)
    assert set(answer.headers["access-control-allow-methods"].split(", ")) == {"GET", "HEAD", "POST"}
    assert int(answer.headers["access-control-max-age"]) >= 600
    assert "Origin" in answer.headers["vary"] and "access-control-allow-private-network" not in answer.headers
    odd = preflight(keyed, PAGE, request_headers="x-ok, not a name, x(y), ,*, x:y")
    assert odd.headers["access-control-allow-headers"] == "authorization, content-type, x-ok, *"
    assert preflight(keyed, PAGE).status_code == 200, "none is asked for"


def test_a_public_page_may_ask_into_the_private_network(keyed: Server) -> None:
    answer = preflight(keyed, PAGE, request_private_network="true")
    assert answer.status_code == 200 and answer.headers["access-control-allow-private-network"] == "true"
    refused = preflight(keyed, "http://evil.example", request_private_network="true", request_headers="x-title")
    assert refused.status_code == 403
    assert not [name for name in refused.headers if name.startswith("access-control-allow")]


@pytest.mark.parametrize("origin", [*LISTED, "APP://Obsidian.md", "http://XN--bcher-kva.example:80"])
def test_origins_of_any_scheme_may_be_listed(listing: Server, origin: str) -> None:
    """And nothing else about a preflight or an answer depends on the scheme."""
    answer = preflight(listing, origin, request_headers="x-stainless-os")
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
    answer = listing.post("/query", {"text": "a", "max_tokens": 1}, headers={"origin": origin})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == origin
    assert "retry-after" in answer.headers["access-control-expose-headers"] and "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "origin",
    ["app://other.md", "obsidian.md", "http://obsidian.md", "tauri://localhost:1", "https://[::1]", "http://[", "x",
     "http://xn--bcher-kva.example:8080", "NULL", "file:///etc", "app://obsidian.md.evil.example"],
)  # fmt: skip
def test_no_other_origin_comes_with_them(listing: Server, origin: str) -> None:
    for answer in (preflight(listing, origin), listing.get("/config", headers={"origin": origin})):
        assert answer.status_code == 403 and "may not use this server" in answer.text
        assert "access-control-allow-origin" not in answer.headers


def test_pages_without_an_origin_only_by_name(server: Server, keyed: Server) -> None:
    """Sandboxed frames and files send null; so may anybody's."""
    for each in (server, keyed):
        answer = each.get("/health", headers={"origin": "null"})
        assert answer.status_code == 403 and "--origin null" in answer.json()["error"]


def test_the_same_origin_is_by_scheme_too(server: Server) -> None:
    """An application's page whose host is named like this one is not this server's page."""
    host = server.url.removeprefix("http://")
    assert server.get("/config", headers={"origin": server.url.upper()}).status_code == 200
    assert server.get("/config", headers={"origin": f"https://{host}"}).status_code == 200, "behind a proxy with TLS"
    assert server.get("/config", headers={"origin": f"app://{host}"}).status_code == 403
    for origin, name in (("http://localhost", "localhost:80"), ("https://localhost", "localhost:443")):
        assert server.get("/config", headers={"origin": origin, "host": name}).status_code == 200
        assert server.get("/config", headers={"origin": origin, "host": "localhost:81"}).status_code == 403


# -- methods, and HTTP/1.0


READ = [
    "/health",
    "/v1/models",
    "/v1/models/tiny",
    "/config",
    "/cluster",
    "/metrics",
    "/openapi.json",
    "/",
    "/favicon.svg",
]


@pytest.mark.parametrize("path", READ)
def test_head_is_get_without_the_body(keyed: Server, path: str) -> None:
    given = bearer(KEY)
    whole = keyed.get(path, headers=given | {"accept-encoding": "identity"})
    head = httpx.head(keyed.url + path, headers=given | {"accept-encoding": "identity"})
    assert head.status_code == whole.status_code == 200 and not head.content
    assert head.headers["content-type"] == whole.headers["content-type"]
    if path not in ("/cluster", "/metrics"):  # whose figures change
        assert head.headers["content-length"] == str(len(whole.content))
    if path not in guard.OPEN and path.startswith(API):
        assert httpx.head(keyed.url + path).status_code == 401, "it needs the key all the same"


def test_head_leaves_a_connection_in_order(server: Server) -> None:
    """A body after it would be read as the next answer."""
    with httpx.Client(base_url=server.url) as client:
        for path in ("/health", "/v1/nothing", "/chat", "/"):
            head = client.head(path)
            assert not head.content and head.status_code == {"/v1/nothing": 404, "/chat": 405}.get(path, 200)
            assert client.get("/health").json()["model"] == "tiny"


@pytest.mark.parametrize(
    "path, allowed",
    [("/health", "GET, HEAD, OPTIONS"), ("/v1/models/tiny", "GET, HEAD, OPTIONS"), ("/chat", "OPTIONS, POST"),
     ("/v1/completions", "OPTIONS, POST"), ("/", "GET, HEAD, OPTIONS")],
)  # fmt: skip
def test_options_says_what_a_path_allows(server: Server, path: str, allowed: str) -> None:
    answer = httpx.options(server.url + path)
    assert answer.status_code == 204 and not answer.content and answer.headers["allow"] == allowed
    wrong = httpx.delete(server.url + path)
    assert wrong.status_code == 405 and wrong.headers["allow"] == allowed and wrong.json()["error"]
    assert httpx.options(server.url + "/v1/nothing").status_code == 404


def raw(server: Server, request: bytes) -> bytes:
    host, port = server.url.removeprefix("http://").split(":")
    told = b""
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request)
        while part := connection.recv(4096):
            told += part
    return told


def test_a_probe_of_http_1_0_needs_no_host(server: Server) -> None:
    """A name that is given is still looked at, and HTTP/1.1 must give one."""
    assert raw(server, b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    head = raw(server, b"HEAD /health HTTP/1.0\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ") and head.endswith(b"\r\n\r\n")
    assert raw(server, b"GET /health HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    for name in (b"evil.example", b""):
        refused = raw(server, b"GET /health HTTP/1.0\r\nHost: %s\r\n\r\n" % name)
        assert refused.startswith(b"HTTP/1.1 403 ")
    assert raw(server, b"GET /health HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    stranger = raw(server, b"GET /health HTTP/1.0\r\nOrigin: http://evil.example\r\n\r\n")
    assert stranger.startswith(b"HTTP/1.1 403 ")


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


def test_a_body_that_does_not_come_is_not_waited_for(folder: Path) -> None:
    with serving(folder, limits=Limits(body_s=0.2)) as server:
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

    monkeypatch.setattr(server.session.tokenizer, "encode", fail)
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
    assert check_origin("https://a.example:443") == "https://a.example"
    assert check_origin("http://a.example:443") == "http://a.example:443"
    assert check_origin("http://bücher.example") == "http://xn--bcher-kva.example"
    assert check_origin("http://[0:0:0:0:0:0:0:1]:80/") == "http://[::1]"
    assert origins(LISTED) == LISTED
    for wrong in (
        "localhost:3000", "*", "http://", "file:///x", "http://a/b", "http://*.example", "chrome-extension://", "",
        "http://a@b", "http://a:99999", "http://a:b", "http://a?", "http://[::", "http://a b", "about:blank", "NULL",
        "http://ä" * 9,
    ):  # fmt: skip
        with pytest.raises(UsageError, match=r"the origin .* is none: .{20}"):
            check_origin(wrong)
