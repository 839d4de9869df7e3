"""What ssh and a host's shell say, as a sentence with a cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpgpt.cluster.preflight import ssh_session, verdict
from mpgpt.cluster.preflight.ssh_session import Place, Session, explain_ssh
from tests.cluster.preflight.reports import HOME, OPTIONS, hosts


@pytest.mark.parametrize(
    ("words", "what", "cure"),
    [
        ("ssh: connect to host b port 22: Connection timed out", "does not answer", "is it on"),
        ("ssh: connect to host b port 22: No route to host", "does not answer", "is it on"),
        ("ssh: connect to host b port 22: Operation timed out", "does not answer", "is it on"),
        ("Connection timed out during banner exchange", "does not answer", "is it on"),
        ("ssh: connect to host b port 22: Connection refused", "refuses ssh connections", "sshd"),
        ("joe@b: Permission denied (publickey,password).", "refuses this user's key", "ssh-copy-id joe@b"),
        ("ssh: Could not resolve hostname b: Name or service not known", "name is not known", "/etc/hosts"),
        ("ssh: Could not resolve hostname b: nodename nor servname provided", "name is not known", "/etc/hosts"),
        ("Host key verification failed.", "does not know its host key", "ssh joe@b once"),
        (
            "@ WARNING: REMOTE HOST IDENTIFICATION HAS CHANGED! @\nHost key verification failed.",
            "host key is another one", "ssh-keygen -R b",
        ),
        ("Received disconnect: 2: Too many authentication failures", "too many keys", "IdentitiesOnly"),
        ("kex_exchange_identification: read: reset by peer", "does not reach it (kex_exchange", "`ssh joe@b true`"),
        ("", "without a word", "`ssh joe@b true`"),
    ],
)  # fmt: skip
def test_what_ssh_says(words: str, what: str, cure: str) -> None:
    trouble = explain_ssh("b", "joe@b", words.splitlines())
    assert trouble.host == "b" and what in trouble.what and cure in trouble.cure


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A checkout without anything."""
    return Place(checkout=tmp_path / "it's here", prefix=tmp_path / "it's here" / ".venv")


def through_a_shell(host: str, place: Place, tmp_path: Path) -> Session:
    """A session over an ssh that gives its last argument to a shell here, as sshd does."""
    ssh = tmp_path / "ssh"
    ssh.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    ssh.chmod(0o755)
    return Session(host, place, ssh=[str(ssh)], target=host)


def test_what_a_host_lacks(place: Place, tmp_path: Path) -> None:
    def trouble(home: Path) -> str:
        session = through_a_shell("b", place, tmp_path)
        session.start(OPTIONS, {"PATH": "/usr/bin:/bin", "HOME": str(home)})
        assert session.ask(None, 20) is None
        explained = str(session.explain())
        session.close()
        return explained

    other = tmp_path / "home" / "src" / "mpgpt" / "mpgpt" / "__main__.py"
    assert f"it has no {place.checkout}: the checkout must be at the same path" in trouble(tmp_path)
    other.parent.mkdir(parents=True)
    other.touch()
    assert f"its checkout is in {other.parents[1]}" in trouble(tmp_path / "home")
    place.checkout.mkdir()
    assert f"it has no environment in {place.prefix}" in trouble(tmp_path)
    python = Path(place.python)
    python.parent.mkdir(parents=True)
    python.symlink_to("/nowhere/python")
    assert "cannot run" in trouble(tmp_path)
    python.unlink()
    python.write_bytes(b"\x7fELF of another machine")
    python.chmod(0o755)
    assert "cannot run" in trouble(tmp_path)
    python.write_text("#!/bin/sh\necho no module named encodings >&2\nexit 1\n")
    assert "does not work (no module named encodings)" in trouble(tmp_path)
    python.write_text("#!/bin/sh\nexec sleep 30\n")
    session = through_a_shell("b", place, tmp_path)
    session.start(OPTIONS, {"PATH": "/usr/bin:/bin"})
    assert session.ask(None, 0.5) is None
    assert "has not answered within" in str(session.explain())
    session.close()


def test_a_32_bit_system(place: Place) -> None:
    trouble = ssh_session.explain_lack("pi3", place, ["mpgpt-lacks", "environment", "32", "Linux", "armv7l"], [])
    assert str(trouble).startswith("pi3: its system is a 32-bit one (Linux armv7l)") and "64-bit" in trouble.cure
    (judged,) = verdict.judge_environments(hosts(a={}, b={"bits": 32, "system": "Linux armv8l"}), HOME)
    assert judged.host == "b" and "32-bit" in judged.what


def test_there_is_no_ssh(place: Place) -> None:
    session = Session("b", place, ssh=["/no/such/ssh"], target="b")
    with pytest.raises(OSError):
        session.start(OPTIONS, {})
    session.close()
