"""Addresses that hosts have for one another, and ways between them."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest

from mpgpt.cluster.preflight import reachability
from mpgpt.cluster.preflight.verdict import Interface
from tests.cluster.preflight.reports import REPORT, hosts


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
