"""One pretend host: its namespaces, its power switch, its processes, and commands that run on it.

Knows: namespaces, control groups, ``init.py``. Must not know: mpgpt, or which hosts there are.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from tests.hosts.init import SSHD_PID, BootOptions, File, Overlay
from tests.hosts.limits import Limits
from tests.hosts.network import Network, read_line
from tests.hosts.openssh import SYSTEM_PATH, Key, OpenSSH, sshd_config

INIT = Path(__file__).with_name("init.py")
BOOT_S = 30.0
DOTFILES = (".ssh", ".bashrc", ".bash_profile", ".bash_login", ".profile", ".openmpi", ".prte", ".pmix")
"""What a developer's home may hold that would change what a host does."""
_JOIN = 'for group in $1; do echo $$ > "$group/cgroup.procs"; done; shift; exec "$@"'


class HostError(Exception):
    """A pretend host cannot do what was asked of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """How a host is when it is switched on."""

    hostname: str | None = None
    """What ``hostname`` prints; None is the name by which the others know the host."""
    sshd: Literal["on", "off", "refuses"] = "on"
    """``off`` refuses the connection, ``refuses`` the key."""
    checkout: bool = True
    models: bool = True
    memory: int = 4 << 30
    """Bytes, where control groups can be had."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """What all hosts of a cluster have in common."""

    label: str
    checkout: Path
    openssh: OpenSSH
    addresses: Mapping[str, str]
    user_key: Key
    host_keys: Mapping[str, Key]
    user: str = field(default_factory=lambda: pwd.getpwuid(os.getuid()).pw_name)
    home: Path = field(default_factory=lambda: Path(pwd.getpwuid(os.getuid()).pw_dir))

    @property
    def models(self) -> Path:
        """This machine's model cache, which every host begins with."""
        return self.home / ".cache" / "mpgpt"


@dataclass(frozen=True, slots=True)
class HostProcess:
    """A process as the host sees it."""

    pid: int
    name: str
    cmdline: str
    machine_pid: int
    """Its id outside, for ``os.kill``."""
    rank: int | None
    """Its rank if mpirun started it; a rank's own children have none."""


class Host:
    """A pretend host. Off at first; ``boot`` gives it new namespaces and a file system as if newly installed."""

    def __init__(self, name: str, core: int, installation: Installation, network: Network) -> None:
        self.name = name
        self.address = installation.addresses[name]
        self.core = core
        self.setup = Setup()
        self.limits: Limits | None = None
        self._installation = installation
        self._network = network
        self._unshare: subprocess.Popen[bytes] | None = None
        self._pid = 0
        self._own = {1}
        """The ids, on the host, of what runs there from the start."""

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.address} {'on' if self.is_on else 'off'}>"

    # Power

    @property
    def is_on(self) -> bool:
        return self._unshare is not None and self._unshare.poll() is None

    @property
    def pid(self) -> int:
        """The machine's id of the host's process 1."""
        if not self.is_on:
            raise HostError(f"{self.name} is off")
        return self._pid

    def boot(self, setup: Setup | None = None) -> None:
        """Switch on, off first if need be; everything that was written on the host is gone."""
        self.begin_boot(setup)
        self.finish_boot()

    def begin_boot(self, setup: Setup | None = None) -> None:
        """The first half of ``boot``: several hosts may begin before the first is waited for."""
        self.power_off()
        self.setup = setup or Setup()
        self.limits = Limits(f"{self._installation.label}-{self.name}", self.core, self.setup.memory)
        unshare = ["unshare", "-n", "-m", "-u", "-i", "-p", "--fork", "--kill-child", "--propagation", "private"]
        self._unshare = subprocess.Popen(
            self._limited([*unshare, sys.executable, "-I", "-S", str(INIT)]), bufsize=0, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd="/",
            env={"PATH": SYSTEM_PATH},
        )  # fmt: skip
        self._send(json.dumps(self._boot_options()))

    def finish_boot(self) -> None:
        """The second half of ``boot``: returns when the host is on the network and sshd listens."""
        assert self._unshare
        self._expect("mounted")
        (child,) = psutil.Process(self._unshare.pid).children()
        self._pid = child.pid
        self._network.attach(self.name, self._pid)
        self._send("network")
        self._expect("ready")
        self._own = {1, int(self.read_file(SSHD_PID))} if self.setup.sshd != "off" else {1}

    def power_off(self) -> None:
        """Pull the power cord, or do nothing if it is out. The network goes first, so that no connection is closed."""
        if self._unshare is None:
            return
        self._network.detach(self.name)
        if self.is_on and self._pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        assert self._unshare.stdin and self._unshare.stdout and self.limits
        self._unshare.stdin.close()
        self._unshare.wait(BOOT_S)
        self._unshare.stdout.close()
        self.limits.close()
        self._unshare, self._pid = None, 0

    # Commands

    def run(
        self, command: str | Sequence[str | Path], *, timeout: float = 60, env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None, venv: bool = True, input: str = "",
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a command to its end as the user; a string is a line for bash. See ``start``."""
        process = self.start(command, env=env, cwd=cwd, venv=venv, stdin=subprocess.PIPE)
        try:
            out, err = process.communicate(input, timeout)
        except BaseException:
            self.kill_group(process)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(
        self, command: str | Sequence[str | Path], *, env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None, venv: bool = True, **popen: Any,
    ) -> subprocess.Popen[str]:  # fmt: skip
        """Start a command as the user who sits at the host: in the checkout, with a login's environment and ``env``.

        With ``venv`` the checkout's .venv/bin is first in PATH. Output goes to pipes unless ``popen`` says otherwise.
        The command leads a process group: see ``interrupt`` and ``kill_group``.
        """
        words = ["bash", "-c", command] if isinstance(command, str) else [str(word) for word in command]
        options: dict[str, Any] = {
            "stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True,
            "errors": "replace", "start_new_session": True,
        }  # fmt: skip
        before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores it, and so would ours
        try:
            return subprocess.Popen(self.command_line(words, env=env, cwd=cwd, venv=venv), **(options | popen))
        finally:
            signal.signal(signal.SIGINT, before)

    @contextlib.contextmanager
    def started(self, command: str | Sequence[str | Path], **options: Any) -> Iterator[subprocess.Popen[str]]:
        """``start``, and ``kill_group`` at the end."""
        process = self.start(command, **options)
        try:
            yield process
        finally:
            self.kill_group(process)

    def command_line(
        self, words: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str | Path | None = None,
        venv: bool = True,
    ) -> list[str]:  # fmt: skip
        """What this machine must run to have ``words`` run on the host as ``start`` does, until the host is off."""
        variables = [f"{name}={value}" for name, value in (self._environment(venv) | dict(env or {})).items()]
        folder = cwd or (self._installation.checkout if self.setup.checkout else self._installation.home)
        enter = ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-i", "-p", "--"]
        return self._limited([*enter, "env", "-i", "-C", str(folder), *variables, *words])

    def interrupt(self, process: subprocess.Popen[str], signum: int = signal.SIGINT) -> None:
        """Ctrl-C in the terminal of a started command: its process group on the host gets the signal."""
        for pid in self._group(process):
            os.kill(pid, signum)

    def kill_group(self, process: subprocess.Popen[str]) -> None:
        """Kill a started command and its process group, and wait for it."""
        self.interrupt(process, signal.SIGKILL)
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                pipe.close()

    def processes(self) -> list[HostProcess]:
        """Everything that runs on the host except process 1 and the sshd that listens; zombies are left out."""
        return [p for p in self._all_processes() if p.pid not in self._own]

    def find(self, which: int | str, seconds: float = 5) -> list[HostProcess]:
        """The process with an id on the host, or all whose command line matches a pattern; waits for the first."""
        end = time.monotonic() + seconds
        while True:
            running = self.processes()
            if isinstance(which, int):
                found = [process for process in running if process.pid == which]
            else:
                found = [process for process in running if re.search(which, process.cmdline)]
            if found:
                return found
            if time.monotonic() > end:
                raise HostError(f"{self.name} runs nothing that matches {which!r}: {running}")
            time.sleep(0.02)

    def kill(self, which: int | str, signum: int = signal.SIGKILL) -> list[HostProcess]:
        """Send a signal to what ``find`` finds."""
        found = self.find(which)
        for process in found:
            os.kill(process.machine_pid, signum)
        return found

    def wait_until_idle(self, seconds: float) -> list[HostProcess]:
        """Wait until nothing runs but what a newly booted host runs; returns what is left when the time is over."""
        end = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.05)
        return left

    # Files

    def path(self, path: str | Path) -> Path:
        """A path of the host's file system as this process can open it while the host is on. Absolute links mislead."""
        return Path(f"/proc/{self.pid}/root", str(path).lstrip("/"))

    def write_file(self, path: str | Path, text: str, mode: int = 0o644) -> None:
        """Write a file on the host, and the folders above it."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        target.chmod(mode)

    def read_file(self, path: str | Path) -> str:
        """The text of a file on the host."""
        return self.path(path).read_text(encoding="utf-8")

    def copy(self, source: Path, path: str | Path) -> None:
        """Copy this machine's file or folder onto the host."""
        target = self.path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, dirs_exist_ok=True)
        else:
            shutil.copy2(source, target)

    # Within

    def _limited(self, command: list[str]) -> list[str]:
        assert self.limits
        return ["sh", "-c", _JOIN, "sh", " ".join(map(str, self.limits.folders)), *command]

    def _environment(self, venv: bool) -> dict[str, str]:
        path = f"{self._installation.checkout}/.venv/bin:{SYSTEM_PATH}" if venv else SYSTEM_PATH
        user = self._installation.user
        login = {"HOME": str(self._installation.home), "USER": user, "LOGNAME": user, "SHELL": "/bin/bash"}
        root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"} if os.getuid() == 0 else {}
        return login | {"PATH": path, "TERM": "dumb", "LANG": "C.UTF-8"} | root

    def _boot_options(self) -> BootOptions:
        return BootOptions(
            hostname=self.setup.hostname or self.name, address=f"{self.address}/24", overlays=self._overlays(),
            files=self._files(), sshd=self.setup.sshd != "off",
        )  # fmt: skip

    def _overlays(self) -> list[Overlay]:
        """Private copies of /etc, /usr, the home and the checkout, without what the setup leaves out."""
        common = self._installation
        hidden = [common.home / name for name in DOTFILES]
        folders = [Path("/etc"), common.home, common.checkout]
        if not self.setup.models:
            hidden.append(common.models)
        if not self.setup.checkout:
            folders[-1] = common.checkout.parent
            hidden.append(common.checkout)
        overlays = [
            Overlay(
                path=str(folder), lower=[str(folder)],
                hidden=[str(path.relative_to(folder)) for path in hidden if path.is_relative_to(folder)],
            )
            for folder in sorted(set(folders))
        ]  # fmt: skip
        if common.openssh.usr:
            overlays.append(Overlay(path="/usr", lower=[str(common.openssh.usr), "/usr"], hidden=[]))
        return overlays

    def _files(self) -> list[File]:
        common, ssh = self._installation, self._installation.home / ".ssh"
        names = "".join(f"{address}\t{name}\n" for name, address in common.addresses.items())
        known = "".join(f"{name},{common.addresses[name]} {key.public}" for name, key in common.host_keys.items())
        hostname = self.setup.hostname or self.name
        files = {
            "/etc/hosts": (f"127.0.0.1\tlocalhost\n{names}", 0o644),
            "/etc/hostname": (f"{hostname}\n", 0o644),
            "/run/ssh_host_key": (common.host_keys[self.name].private, 0o600),
            "/run/sshd_config": (sshd_config("/run/ssh_host_key", str(SSHD_PID)), 0o644),
            f"{ssh}/id_ed25519": (common.user_key.private, 0o600),
            f"{ssh}/id_ed25519.pub": (common.user_key.public, 0o644),
            f"{ssh}/authorized_keys": ("" if self.setup.sshd == "refuses" else common.user_key.public, 0o600),
            f"{ssh}/known_hosts": (known, 0o600),
        }
        return [File(path=path, text=text, mode=mode) for path, (text, mode) in files.items()]

    def _send(self, line: str) -> None:
        assert self._unshare and self._unshare.stdin
        with contextlib.suppress(BrokenPipeError):  # it has ended already: its log says why
            self._unshare.stdin.write(line.encode() + b"\n")

    def _expect(self, word: str) -> None:
        assert self._unshare and self._unshare.stdout
        said: list[str] = []
        while (line := read_line(self._unshare.stdout, BOOT_S)) != word:
            if not line:
                self.power_off()
                raise HostError("\n".join([f"{self.name} did not boot (it was to say {word!r})", *said]))
            said.append(line)

    def _all_processes(self) -> list[HostProcess]:
        namespace = os.readlink(f"/proc/{self.pid}/ns/pid")
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit():
                with contextlib.suppress(OSError):  # it has ended meanwhile
                    if os.readlink(f"/proc/{name}/ns/pid") == namespace:
                        found.append(_read_process(Path("/proc", name)))
        return sorted((p for p in found if p is not None), key=lambda p: p.pid)

    def _group(self, process: subprocess.Popen[str]) -> list[int]:
        """The machine's ids of the host's processes in the process group that a started command leads."""
        if not self.is_on:
            return []
        members = []
        for other in self._all_processes():
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(other.machine_pid) == process.pid:
                    members.append(other.machine_pid)
        return members


def _read_process(entry: Path) -> HostProcess | None:
    fields = dict(line.split(":\t", 1) for line in (entry / "status").read_text().splitlines() if ":\t" in line)
    if fields["State"].startswith(("Z", "X")):
        return None
    cmdline = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    rank = _read_rank(entry)
    if rank is not None and rank == _read_rank(entry.with_name(fields["PPid"])):
        rank = None
    return HostProcess(int(fields["NSpid"].split()[-1]), fields["Name"], cmdline, int(entry.name), rank)


def _read_rank(entry: Path) -> int | None:
    """The rank in the environment that a process was started with."""
    try:
        variables = (entry / "environ").read_bytes().split(b"\0")
    except OSError:  # it has no parent, or the parent has ended
        return None
    found = [value.partition(b"=")[2] for value in variables if value.startswith(b"OMPI_COMM_WORLD_RANK=")]
    return int(found[0]) if found else None
