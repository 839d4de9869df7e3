"""Hosts' names and addresses: which of them differ, which lead to another host, and over which a process is connected.

Knows: IP networks, this host's interfaces, this process's descriptors.
Must not know: MPI, ranks' work.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable, Sequence

import psutil

from mpgpt.transport.doorbell import MOST_DESCRIPTOR


def named_apart(hosts: Sequence[str], homes: Sequence[int]) -> list[str]:
    """Every rank's host by name, where two hosts of one name (two Raspberry Pis are both called raspberrypi) differ.

    ``hosts`` are the names that the ranks' hosts give themselves, ``homes`` each host's first rank.
    """
    first = {host: home for host, home in reversed(list(zip(hosts, homes, strict=True)))}
    return [host if first[host] == home else f"{host} (rank {home})" for host, home in zip(hosts, homes, strict=True)]


def nearest(theirs: Iterable[str], ours: Iterable[str]) -> list[str]:
    """Another host's addresses, those in a network of ``ours`` ("10.0.0.2/24") first.

    An address that both hosts have (the bridge of a container engine) leads nowhere and is left out; but if there is
    no other, both are one host, whose ranks see different files.
    """
    own, all_theirs = [ipaddress.ip_interface(text) for text in ours], [ipaddress.ip_interface(text) for text in theirs]
    candidates = [c for c in all_theirs if c.ip not in {o.ip for o in own}] or all_theirs
    return [str(c.ip) for c in sorted(candidates, key=lambda c: not any(c.ip in o.network for o in own))]


def own_addresses() -> list[str]:
    """This host's addresses with their networks; left out are those that mean another host elsewhere."""
    found = []
    for addresses in psutil.net_if_addrs().values():
        for a in addresses:
            if a.family in (socket.AF_INET, socket.AF_INET6):
                ip = ipaddress.ip_address(a.address.split("%")[0])
                if not ip.is_loopback and not (ip.version == 6 and ip.is_link_local):
                    found.append(f"{ip}/{_prefix(a.netmask, ip.max_prefixlen)}")
    return found


def _prefix(netmask: str | None, longest: int) -> int:
    return bin(int(ipaddress.ip_address(netmask))).count("1") if netmask else longest


def plain(address: str) -> str:
    """An address as it is compared: IPv4 where that is meant, without a network interface."""
    ip = ipaddress.ip_address(address.split("%")[0])
    return str(ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else str(ip)


def connections() -> list[tuple[int, int, int, str]]:
    """This process's TCP connections: descriptor, port here, port and address there."""
    found = []
    for fd in _descriptors():
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(fd).st_mode):
                one = socket.socket(fileno=fd)
                try:
                    if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                        address, port = one.getpeername()[:2]
                        found.append((fd, one.getsockname()[1], port, plain(address)))
                finally:
                    one.detach()
    return found


def _descriptors() -> list[int]:
    """This process's open descriptors; one may be closed by now."""
    try:
        return sorted(int(name) for name in os.listdir("/dev/fd"))
    except (OSError, ValueError):
        return list(range(3, MOST_DESCRIPTOR))
