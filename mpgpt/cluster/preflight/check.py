"""Can the hosts of a hostfile form a ring? What a run will need of them is tried, in seconds and all at once.

Knows: how mpirun shows which hosts it will reach, in which order things are tried.
Must not know: terminals; ssh's words (``ssh_session.py``), what must be the same on all hosts (``verdict.py``).

First mpirun says where it would start ranks. Then one program on every host, over ssh as mpirun would reach it, reports
what the host is, and the hosts dial one another over TCP. When nothing stands in the way, ranks are started as a run's
would be, and measure their links.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

import mpgpt
from mpgpt import config as configs
from mpgpt.cluster import processes
from mpgpt.cluster.preflight import fitting, host_report, reachability, verdict
from mpgpt.cluster.preflight.hostfile import Mpirun, read_hostfile
from mpgpt.cluster.preflight.ssh_session import Place, Session
from mpgpt.cluster.preflight.verdict import HostReport, Trouble
from mpgpt.errors import MpgptError, UsageError
from mpgpt.machines import Edge
from mpgpt.transport import mpirun

REPORT_S = 8.0
DIAL_S = 2 * (host_report.CONNECT_S + host_report.ANSWER_S)
MAP_S, RING_S = 20.0, 30.0
HERE = "this machine"
"""Where mpirun is typed, if no name of the hostfile is its own."""
NODE = re.compile(r"Data for node: (\S+).*?Daemon: \[[^]]*,(\d+)\]", re.DOTALL)
PROCESS = re.compile(r"Data for proc: \[[^]]*,(\d+)\]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be checked, and where."""

    mpirun: Mpirun
    model: str | None
    config: Path | None
    """Settings; None for those beside the hostfile."""
    environment: Mapping[str, str]
    folder: Path
    """Where mpirun would be typed."""
    defaults: Mapping[str, str]
    """The environment of a run's ranks, where nothing else is set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What came of it."""

    hosts: Sequence[str]
    """In the order of the ring."""
    reports: Mapping[str, HostReport]
    troubles: Sequence[Trouble]
    links: Mapping[tuple[int, int], Edge]
    """By the hosts' places in ``hosts``; empty where they were not measured."""

    @property
    def ready(self) -> bool:
        return all(trouble.weight == "remark" for trouble in self.troubles)


Watch = Callable[[str, str], None]
"""Hears of a host, or of nobody in particular, what it is at."""


class Preflight:
    """One check. Raises ``UsageError`` for what no host is to blame for."""

    def __init__(self, request: Request, watch: Watch) -> None:
        self._request, self._mpirun, self._watch = request, request.mpirun, watch
        self._lines = {line.name: line for line in read_hostfile(self._mpirun.hostfile)}
        file = request.config or mpirun.beside(str(self._mpirun.hostfile), request.folder)
        self._config = configs.load(file) if file else configs.RunConfig()
        self._model = request.model or self._config.hf_model_name or ""
        self._place = Place(checkout=Path(mpgpt.__file__).parent.parent, prefix=Path(sys.prefix))
        self._environment = processes.environment(request.environment)
        path = request.environment.get("PATH")
        self._program = processes.mpirun(1, threads=1, pin=False, hostfile=None, path=path)[0]
        self._troubles: list[Trouble] = []
        self._reports: dict[str, HostReport] = {}
        self._hosts: list[str] = []
        self._local: list[str] = []

    def run(self) -> Findings:
        """Everything; the findings hold every trouble there is."""
        self._plan()
        sessions = self._sessions()
        with _closing(sessions):
            self._gather(sessions)
            self._judge(sessions)
            self._dial(sessions)
        links = {} if any(trouble.weight == "ring" for trouble in self._troubles) else self._measure()
        return Findings(hosts=self._hosts, reports=self._reports, troubles=self._troubles, links=links)

    # -- where mpirun starts ranks

    def _plan(self) -> None:
        """Which hosts there are for mpirun, which of them it takes for this machine, and every rank's host in a run."""
        nodes = self._ask_mpirun(["--map-by", "ppr:1:node"], self._mpirun.elsewhere)
        remote = {name for name, (daemon, _) in nodes.items() if daemon}
        here = [name for name, (daemon, _) in nodes.items() if not daemon]
        local = [line for line in self._lines.values() if line.short not in remote] if here else []
        self._local = [line.name for line in sorted(local, key=lambda line: line.short not in here)]
        self._names = {line.short: name for name, line in self._lines.items() if line.short in remote}
        self._hosts = self._by_rank(nodes)
        ranks, wanted = self._mpirun.ranks, self._config.num_nodes
        if ranks and wanted and ranks != wanted:
            raise UsageError(f"num_nodes is {wanted} in the settings, and -n is {ranks}: change or remove one of them")
        ranks = ranks or wanted
        self._placed = self._by_rank(self._ask_mpirun(["-n", str(ranks)] if ranks else [], self._mpirun.words))

    def _by_rank(self, nodes: Mapping[str, tuple[int, list[int]]]) -> list[str]:
        hosts = {
            rank: self._names.get(node, node) if daemon else self._local[0]
            for node, (daemon, ranks) in nodes.items() for rank in ranks
        }  # fmt: skip
        return [hosts[rank] for rank in sorted(hosts)]

    def _ask_mpirun(self, more: Sequence[str], options: Sequence[str]) -> dict[str, tuple[int, list[int]]]:
        """Where it would start ranks: for every node the number of its daemon, which is 0 on this machine, and its
        ranks. Nothing is started."""
        plan = ["--display", "map-devel", "--runtime-options", "donotlaunch", "true"]
        command = [self._program, *options, "-hostfile", str(self._mpirun.hostfile), *more, *plan]
        try:
            done = subprocess.run(
                command, env=self._environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                errors="replace", timeout=MAP_S, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise MpgptError(f"mpirun does not say within {MAP_S:.0f} s where it would start ranks") from None
        nodes = {}
        for piece in re.split(r"(?=Data for node: )", done.stdout)[1:]:
            if match := NODE.match(piece):
                nodes[match[1]] = (int(match[2]), [int(rank) for rank in PROCESS.findall(piece)])
        if done.returncode or not nodes:
            raise UsageError(f"{self._mpirun.hostfile}: {refusal(done.stderr or done.stdout, more)}")
        return nodes

    # -- one program on every host

    def _sessions(self) -> dict[str, Session]:
        """By host. This machine has one too if it is in no hostfile: mpirun runs here."""
        here = self._local[0] if self._local else HERE
        ssh = ssh_command(self._mpirun.parameters, self._request.environment)
        remote = [self._lines[name] for name in self._names.values()]
        return {here: Session(here, self._place)} | {
            line.name: Session(line.name, self._place, ssh=ssh, target=line.target) for line in remote
        }

    def _gather(self, sessions: Mapping[str, Session]) -> None:
        """What every host reports."""
        given = self._request.environment
        exported = {name: given.get(name) if value is None else value for name, value in self._mpirun.exported.items()}
        options = {
            "environment": {name: value for name, value in exported.items() if value is not None},
            "folder": str(self._request.folder), "secret": secrets.token_hex(32), "model": self._model,
        }  # fmt: skip
        with ThreadPoolExecutor(len(sessions)) as pool, _killing(sessions):
            answers = pool.map(lambda session: self._ask_host(session, options), sessions.values())
            for host, answer in zip(sessions, answers, strict=True):
                if isinstance(answer, HostReport):
                    self._reports[host] = answer
                else:
                    self._troubles.append(answer)
        self._own_names()

    def _ask_host(self, session: Session, options: Mapping[str, Any]) -> HostReport | Trouble:
        self._watch(session.host, "is asked what it is")
        begun = time.monotonic()
        try:
            session.start(options, self._environment)
        except OSError as error:
            return Trouble(
                host=session.host, what=f"ssh cannot be started here ({error.strerror})", cure="install openssh-client"
            )
        raw = session.ask(None, REPORT_S)
        self._watch(session.host, f"answered in {time.monotonic() - begun:.1f} s" if raw else "does not answer")
        return HostReport(**raw) if raw else session.explain()

    def _own_names(self) -> None:
        """Say so of hosts that cannot be reached by ssh and are this very machine, under a name that is not its own."""
        here = self._reports.get(HERE)
        own = {str(interface.ip) for _, interface in here.interfaces} if here else set()
        for n, trouble in enumerate(self._troubles):
            addresses = addresses_of(trouble.host) if here else set()
            if here and (own & addresses or any(address.startswith("127.") for address in addresses)):
                cure = f"or write {here.hostname}, as it calls itself, in place of {trouble.host} into the hostfile"
                what = f"{trouble.what}, and mpirun does not see that it is this machine"
                self._troubles[n] = replace(trouble, what=what, cure=f"{trouble.cure}; {cure}")

    # -- what the reports mean

    def _judge(self, sessions: Mapping[str, Session]) -> None:
        members = {host: self._reports[host] for host in self._hosts if host in self._reports}
        for host in set(self._reports) - set(members):  # this machine, if it is in no hostfile, or by another name
            outside = self._reports[host]
            if any(outside.is_same_machine(report) for report in members.values()):
                del self._reports[host]
            else:  # of its code no more runs than mpirun
                versions = {"openmpi": outside.versions["openmpi"]}
                self._reports[host] = replace(outside, code="", versions=versions, python="", byteorder="")
        checkout = str(self._place.checkout)
        asked = {host: (sessions[host].begun, sessions[host].heard) for host in self._reports}
        self._troubles += verdict.judge_environments(members, checkout)
        self._troubles += verdict.judge_versions(members | self._reports, checkout)
        self._troubles += verdict.judge_names(members)
        self._troubles += verdict.judge_clocks(self._reports, asked)
        pull = f"{self._place.prefix / 'bin' / 'mpgpt'} pull {shlex.quote(self._model)}"
        there = {name: line.target for name, line in self._lines.items() if name not in self._local}
        self._troubles += fitting.judge_model(self._model, members, pull, there)
        models = [report.model for report in members.values() if report.model]
        if known := [model["config"] for model in models if model.get("config")]:
            other = self._request.model not in (None, self._config.hf_model_name)
            self._troubles += fitting.judge_memory(self._config, known[0], self._placed, members, other_model=other)

    def _dial(self, sessions: Mapping[str, Session]) -> None:
        """The hosts dial one another, both ways and all at once, and, as their daemons do, this machine."""
        include, exclude = (self._parameter("mca", f"btl_tcp_if_{kind}") for kind in ("include", "exclude"))
        given = {"btl_tcp_if_include": include, "prte_if_include": self._parameter("prtemca", "prte_if_include")}
        reports = verdict.distinct(self._reports)
        used = {host: reachability.usable(report, include, exclude) for host, report in reports.items()}
        self._troubles += reachability.judge_networks(reports, given) + reachability.judge_addresses(used)
        ways = {pair: way for pair, way in reachability.ways(used).items() if pair[0] in self._hosts and way[0]}

        def dial(source: str) -> dict[str, dict[str, str]]:
            peers = [
                {"name": target, "addresses": addresses, "port": reports[target].port}
                for (one, target), (addresses, _) in ways.items() if one == source
            ]  # fmt: skip
            answer = sessions[source].ask(peers, DIAL_S) if peers else {}
            if answer is None:
                what, cure = "its ssh connection broke in the middle", "try again, and see its log"
                self._troubles.append(Trouble(host=source, what=what, cure=cure))
            failed = [name for name, found in (answer or {}).items() if all(found.values())]
            self._watch(source, f"does not reach {', '.join(failed)}" if failed else "reaches the others")
            return answer or {}

        with ThreadPoolExecutor(max(1, len(reports))) as pool, _killing(sessions):
            answers = dict(zip(reports, pool.map(dial, reports), strict=True))
        tried = {(source, target): found for source, answer in answers.items() for target, found in answer.items()}
        every = {pair: way[1] for pair, way in ways.items()}
        self._troubles += reachability.judge_ways(tried, every, used)

    def _parameter(self, kind: str, name: str) -> str:
        """A parameter of Open MPI (``mca``) or of its runtime (``prtemca``), as the command line or the environment
        says."""
        given = self._mpirun.parameters.get(f"{kind} {name}")
        variable = f"{'OMPI' if kind == 'mca' else 'PRTE'}_MCA_{name}"
        return given if given is not None else self._request.environment.get(variable, "")

    # -- ranks

    def _measure(self) -> dict[tuple[int, int], Edge]:
        """Start a rank on every host as a run would, and have them measure their links."""
        self._watch("", "ranks start and measure their links")
        command = [
            self._program, *self._mpirun.elsewhere, "-hostfile", str(self._mpirun.hostfile), "--map-by", "ppr:1:node",
            "--bind-to", "none", self._place.python, "-m", "mpgpt.cluster.preflight.link_test",
        ]  # fmt: skip
        try:
            edges = json.loads(_output(command, {**self._request.defaults, **self._environment}))["edges"]
        except MpgptError as error:
            self._troubles.append(Trouble(
                host=", ".join(self._hosts), what=f"ranks form no ring, though all else is well: {error}",
                cure="start a run with MPGPT_TRACEBACK=1, which leaves mpirun's own words in place",
            ))  # fmt: skip
            return {}
        return {(a, b): Edge(latency_s=latency, bytes_per_s=rate) for a, b, latency, rate in edges}


def _output(command: list[str], environment: Mapping[str, str]) -> str:
    """The last line that rank 0 prints. mpirun is ended as a run's would be, which it may not be by one signal."""
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = processes.start(command, environment, stdout=subprocess.PIPE, stderr=errors)
        try:
            output, _ = process.communicate(timeout=RING_S)
        except subprocess.TimeoutExpired:
            raise MpgptError(f"they have not met within {RING_S:.0f} s") from None
        finally:
            if process.poll() is None:
                mpirun.end(psutil.Process(process.pid))
                process.communicate()
        lines = [line for line in output.splitlines() if line.startswith("{")]
        if process.returncode or not lines:
            raise MpgptError(processes.cause(errors) or f"mpirun ended with status {process.returncode}")
        return lines[-1]


@contextlib.contextmanager
def _closing(sessions: Mapping[str, Session]) -> Iterator[None]:
    try:
        yield
    finally:
        for session in sessions.values():
            session.close()


@contextlib.contextmanager
def _killing(sessions: Mapping[str, Session]) -> Iterator[None]:
    """Whoever waits for a host need not do so after Ctrl-C."""
    try:
        yield
    except BaseException:
        for session in sessions.values():
            session.kill()
        raise


def ssh_command(parameters: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """ssh as mpirun is set to call it."""
    agent = parameters.get("prtemca plm_ssh_agent") or environment.get("PRTE_MCA_plm_ssh_agent", "")
    words = shlex.split(agent.split(" : ")[0])
    return words if words and Path(words[0]).name != "mpgpt-ssh" else ["ssh", *words[1:]]


def addresses_of(name: str) -> set[str]:
    """What a name stands for here; nothing if it is unknown."""
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, socket.AF_INET)}
    except (OSError, UnicodeError):
        return set()


def refusal(text: str, more: Sequence[str]) -> str:
    """What mpirun prints when it starts nothing, in one line."""
    if "not enough slots" in text or "already filled" in text:
        return f"there are not enough slots for {' '.join(more) or 'a rank'}: raise slots=, or start fewer ranks"
    if match := re.search(r"Option: *(\S+)", text):
        return f"mpirun has no option {match[1]}"
    if match := re.search(r"line number (\d+)", text):
        return f"mpirun does not understand line {match[1]}"
    paragraphs = re.split(
        r"\n\s*\n", "\n".join(line for line in text.splitlines() if not line.startswith("---")).strip()
    )
    return f"mpirun refuses it: {' '.join(' '.join(paragraphs[:2]).split()) or 'without a word'}"
