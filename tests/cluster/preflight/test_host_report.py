"""The program that runs on every host: here, on this one."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mpgpt.cluster.preflight import host_report, verdict
from mpgpt.cluster.preflight.ssh_session import Place, Session
from mpgpt.cluster.preflight.verdict import HostReport
from tests.cluster.preflight.reports import HOME, OPTIONS
from tests.support.launch import ROOT


@contextmanager
def listening(secret: bytes, name: str) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=host_report.serve, args=(listener, secret, name), daemon=True).start()
        yield listener.getsockname()[1]


def test_dialling() -> None:
    with listening(b"secret", "b") as port:
        assert host_report.dial("127.0.0.1", port, "b", b"secret") == ""
        assert host_report.dial("127.0.0.1", port, "b", b"another secret") == "another host answers"
        assert host_report.dial("127.0.0.1", port, "c", b"secret") == "another host answers"
        peers = [{"name": "b", "addresses": ["127.0.0.1"], "port": port}]
        assert host_report.dial_all(peers, b"secret") == {"b": {"127.0.0.1": ""}}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert host_report.dial("127.0.0.1", silent.getsockname()[1], "b", b"secret") == "another host answers"
        port = silent.getsockname()[1]
    assert "refused" in host_report.dial("127.0.0.1", port, "b", b"secret")


def test_a_stranger_is_not_answered() -> None:
    with listening(b"secret", "b") as port, socket.create_connection(("127.0.0.1", port), 5) as stranger:
        stranger.sendall(bytes(host_report.NONCE_BYTES + host_report.PROOF_BYTES))
        assert stranger.recv(1) == b""


def test_a_report_of_this_machine(tmp_path: Path, models: dict[str, Path]) -> None:
    session = Session("here", Place(checkout=ROOT, prefix=Path(sys.prefix)))
    options = OPTIONS | {"model": str(models["llama"]), "environment": {"MPGPT_HOME": str(tmp_path)}, "folder": "/"}
    session.start(options, os.environ)
    raw = session.ask(None, 60)
    assert raw, str(session.explain())
    report = HostReport(**raw)
    assert session.ask([{"name": "here", "addresses": ["127.0.0.1"], "port": report.port}], 30) == {
        "here": {"127.0.0.1": ""}
    }
    session.close()
    assert report.hostname == socket.gethostname() and report.bits == 64 and report.absent == [] and report.runtime
    assert report.code in report.version and 0 < report.available < report.memory
    assert report.model and report.model["home"] == str(tmp_path / "models")
    assert report.model["config"] == json.loads((models["llama"] / "config.json").read_text())
    assert verdict.judge_environments({"here": report}, HOME) == []


def test_a_control_groups_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = Path

    def moved(*parts: Any) -> Path:
        path = real(*parts)
        return tmp_path / path.relative_to("/") if path.is_absolute() else path

    group = tmp_path / "sys/fs/cgroup/pod"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/pod\n")
    for name, text in {"max": "1000000", "current": "600000", "stat": "anon 1\ninactive_file 200000\n"}.items():
        (group / f"memory.{name}").write_text(text)
    monkeypatch.setattr(host_report, "Path", moved)
    assert host_report.read_group(*host_report.GROUP_FILES[0]) == (1_000_000, 400_000)
    assert host_report.read_memory() == (1_000_000, 600_000)
    (group / "memory.max").write_text("max\n")
    assert host_report.read_group(*host_report.GROUP_FILES[0]) == (0, 0)
