"""Which addresses hosts have for one another, and what it means where TCP does not come through.

Knows: IPv4 networks, which of a host's addresses Open MPI uses.
Must not know: how anything was dialled; what else hosts report.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from itertools import permutations

from mpgpt.cluster.preflight.verdict import HostReport, Interface, Reports, Trouble

UNUSED = "127.0.0.1/8,sppp"
"""What Open MPI leaves out where nothing is set."""
NETWORK_OPTIONS = "--mca btl_tcp_if_include {0} --prtemca prte_if_include {0}"


def usable(report: HostReport, include: str, exclude: str) -> list[Interface]:
    """The addresses that Open MPI uses on a host, where it is set to use these or not those."""
    include = include or ("" if exclude else report.parameters.get("btl_tcp_if_include", ""))
    if include:
        return [one for one in report.interfaces if _named(one, include)]
    exclude = exclude or report.parameters.get("btl_tcp_if_exclude", "") or UNUSED
    return [one for one in report.interfaces if not _named(one, exclude)]


def _named(one: Interface, names: str) -> bool:
    """Whether an interface is among names and networks, such as eth0,10.0.0.0/8."""
    for name in filter(None, (part.strip() for part in names.split(","))):
        try:
            if one[1].ip in ipaddress.IPv4Network(name, strict=False):
                return True
        except ValueError:
            if name == one[0]:
                return True
    return False


def judge_networks(reports: Reports, given: Mapping[str, str]) -> list[Trouble]:
    """Hosts that have no address in the networks that mpirun's parameters name; ``given`` is what each includes."""
    return [
        Trouble(host=host, what=f"it has no address in {names}, which {parameter} names",
                cure="name a network that all hosts are in")
        for parameter, names in given.items() if names and len(reports) > 1
        for host, report in reports.items() if not any(_named(one, names) for one in report.interfaces)
    ]  # fmt: skip


def judge_addresses(used: Mapping[str, Sequence[Interface]]) -> list[Trouble]:
    """Addresses that several hosts have, of which MPI would think that they lead from one to another."""
    owners: dict[str, list[str]] = {}
    names: dict[str, str] = {}
    for host, interfaces in used.items():
        for name, interface in interfaces:
            owners.setdefault(str(interface.ip), []).append(host)
            names[str(interface.ip)] = name
    return [
        Trouble(
            host=", ".join(hosts),
            what=f"they have one address, {address} ({names[address]}, such as a container bridge), which MPI would "
            "take for a way between them",
            cure=f"name the network to use: {network_options(used) or NETWORK_OPTIONS.format('NETWORK')}",
        )
        for address, hosts in owners.items() if len(set(hosts)) > 1
    ]  # fmt: skip


def network_options(used: Mapping[str, Sequence[Interface]]) -> str:
    """mpirun's options that name the network that all hosts share, each with an address of its own; empty if there is
    none."""
    everyone = [{interface.network for _, interface in interfaces} for interfaces in used.values()]
    for network in sorted(set.intersection(*everyone) if everyone else set()):
        addresses = {
            interface.ip for interfaces in used.values() for _, interface in interfaces if interface.ip in network
        }
        if len(addresses) >= len(used):
            return NETWORK_OPTIONS.format(network)
    return ""


def ways(used: Mapping[str, Sequence[Interface]]) -> dict[tuple[str, str], tuple[list[str], bool]]:
    """For each ordered pair of hosts the addresses to dial, and whether all of them must answer: in networks that both
    have every one must, as MPI uses them all; over routers one is enough."""
    found = {}
    shared = _shared(used)
    for source, target in permutations(used, 2):
        theirs = [one.ip for _, one in used[target] if str(one.ip) not in shared]
        near = [ip for ip in theirs if any(ip in one.network for _, one in used[source])]
        found[source, target] = ([str(ip) for ip in near or theirs], bool(near))
    return found


def _shared(used: Mapping[str, Sequence[Interface]]) -> set[str]:
    """Addresses that lead nowhere, because several hosts have them."""
    addresses = [{str(one.ip) for _, one in interfaces} for interfaces in used.values()]
    return {address for here in addresses for address in here if sum(address in there for there in addresses) > 1}


def judge_ways(
    tried: Mapping[tuple[str, str], Mapping[str, str]], every: Mapping[tuple[str, str], bool],
    used: Mapping[str, Sequence[Interface]],
) -> list[Trouble]:  # fmt: skip
    """Where TCP does not come through. ``tried`` is what came of each address, empty if it answered; ``every`` whether
    all addresses of a pair must answer; ``used`` what addresses there are."""
    failed = {pair: {at: why for at, why in answers.items() if why} for pair, answers in tried.items()}
    broken = {
        pair: ", ".join(f"{address}: {why}" for address, why in answers.items())
        for pair, answers in failed.items() if answers and (every[pair] or len(answers) == len(tried[pair]))
    }  # fmt: skip
    dead = {address for answers in failed.values() for address in answers}
    other = network_options({host: [one for one in mine if str(one[1].ip) not in dead] for host, mine in used.items()})
    hint = f"; or take another network: {other}" if other else ""
    found = []
    for target in dict.fromkeys(target for _, target in tried):
        sources = [source for source, one in tried if one == target]
        if all((source, target) in broken for source in sources):
            found.append(_closed(target, sources, broken[sources[0], target], hint))
            broken = {pair: why for pair, why in broken.items() if pair[1] != target}
    for a, b in [pair for pair in broken if pair[0] < pair[1] and pair[::-1] in broken]:
        found.append(Trouble(
            host=f"{a} and {b}", what=f"no TCP connection comes through between them ({broken.pop((a, b))}), though "
            "ssh reaches both", cure="they must reach each other on all ports above 1023: see firewalls, switches and "
            f"guest networks of Wi-Fi{hint}",
        ))  # fmt: skip
        del broken[b, a]
    for source in dict.fromkeys(source for source, _ in broken):
        targets = [target for one, target in broken if one == source]
        found.append(Trouble(
            host=source, what=f"its TCP connections to {_list(targets)} do not come through "
            f"({broken[source, targets[0]]}), though ssh reaches it",
            cure=f"firewalls must let it connect to {_list(targets)} on all ports above 1023{hint}",
        ))  # fmt: skip
    return found


def _closed(target: str, sources: Sequence[str], why: str, hint: str) -> Trouble:
    if "small packets" in why:
        return Trouble(
            host=target, what=f"only small packets reach it from {_list(sources)} ({why})",
            cure=f"set the same MTU on all hosts and switches (ip link show){hint}",
        )  # fmt: skip
    return Trouble(
        host=target, what=f"ssh comes in, but no other TCP connection from {_list(sources)} ({why})",
        cure="its firewall must let the other hosts in on all ports above 1023 (sudo ufw allow from NETWORK; macOS: "
        f"System Settings, Network, Firewall){hint}",
    )  # fmt: skip


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
