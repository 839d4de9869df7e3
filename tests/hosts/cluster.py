"""A cluster of pretend hosts on this machine: each with its own namespaces, sshd, files and core, behind one switch.

Wants Linux, root, a C compiler and OpenSSH's sshd (or Debian's apt-get to fetch it). Nothing is installed, and nothing
stays: every host and the switch live as long as the process that made them.

Knows: which hosts there are, and what this machine must have. Must not know: mpgpt, or what the tests try.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from tests.hosts.host import Host, HostProcess, Installation, Setup
from tests.hosts.limits import PREFIX, is_stale, make_label, remove_stale
from tests.hosts.network import ETHERNET, Cable, Network, build_switch
from tests.hosts.openssh import NoOpenSSH, find_openssh

ADDRESSES = {
    "mini1": "10.10.0.1",
    "mini2": "10.10.0.2",
    "pi5": "10.10.0.3",
    "outside": "10.10.0.4",  # a laptop that is in no hostfile
    "stranger": "10.10.0.9",  # somebody else on the same network
}
CHECKOUT = Path(__file__).resolve().parents[2]
BUILD = CHECKOUT / "build"
_PROBE = (
    "mount -t tmpfs tmpfs /mnt && mkdir /mnt/upper /mnt/work && "
    "mount -t overlay overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work /etc"
)


class Cluster:
    """Pretend hosts that are booted on entry and gone on exit; ``cluster["mini1"]`` is one of them."""

    def __init__(self, cable: Cable = ETHERNET, checkout: Path = CHECKOUT, build: Path = BUILD) -> None:
        reason = obstacle(build)
        if reason:
            raise RuntimeError(f"no pretend hosts: {reason}")
        remove_stale()
        for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
            if is_stale(folder):
                shutil.rmtree(folder, ignore_errors=True)
        openssh = find_openssh(build / "sshd")
        self.label = make_label()
        installation = Installation(
            label=self.label, checkout=checkout, openssh=openssh, addresses=ADDRESSES,
            user_key=openssh.make_key("user"), host_keys={name: openssh.make_key(name) for name in ADDRESSES},
        )  # fmt: skip
        self.checkout = checkout
        self.network = Network(build_switch(_compiler() or "cc", build / "hosts"), list(ADDRESSES), cable)
        cores = sorted(os.sched_getaffinity(0))
        self.hosts = {
            name: Host(name, cores[n % len(cores)], installation, self.network) for n, name in enumerate(ADDRESSES)
        }

    def __enter__(self) -> Cluster:
        try:
            self.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(self.hosts.values())

    def boot(self, *names: str) -> None:
        """Switch these hosts on, or all, at the same time; one that is on is switched off first."""
        hosts = [self.hosts[name] for name in names] if names else list(self)
        for host in hosts:
            host.begin_boot()
        for host in hosts:
            host.finish_boot()

    def close(self) -> None:
        """Switch everything off."""
        self.network.close()
        for host in self:
            host.power_off()
        shutil.rmtree(self._scripts, ignore_errors=True)

    @property
    def _scripts(self) -> Path:
        return Path(tempfile.gettempdir(), self.label)

    def write_scripts(self) -> Path:
        """A folder with one program for each host, which runs its arguments there, or a shell; gone at ``close``."""
        self._scripts.mkdir(mode=0o700)
        for host in self:
            path = self._scripts / host.name
            path.write_text(f'#!/bin/sh\n[ $# -gt 0 ] || set -- bash\nexec {shlex.join(host.command_line([]))} "$@"\n')
            path.chmod(0o700)
        return self._scripts

    def find_rank(self, rank: int, seconds: float = 30) -> tuple[Host, HostProcess]:
        """The host and the process of an MPI rank; waits until mpirun has started it."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for host in self:
                for process in host.processes() if host.is_on else []:
                    if process.rank == rank:
                        return host, process
            time.sleep(0.2)
        raise TimeoutError(f"no host ran a rank {rank} within {seconds:g} s")

    def reset(self, grace: float = 5) -> list[str]:
        """Make the cluster as new but for what was written into files.

        What runs has ``grace`` seconds to end; what still runs then is killed, and returned.
        """
        self.network.reset()
        left = [
            f"{host.name}: {process.pid} {process.name}: {process.cmdline}"
            for host in self if host.is_on for process in host.wait_until_idle(grace)
        ]  # fmt: skip
        stale = [host.name for host in self if not host.is_on or host.setup != Setup() or host.processes()]
        if stale:
            self.boot(*stale)
        return left


def obstacle(build: Path = BUILD) -> str | None:
    """Why this machine cannot have pretend hosts, or None."""
    if sys.platform != "linux":
        return "they are made of Linux's namespaces"
    if os.getuid() != 0:
        return "making namespaces wants root"
    missing = [program for program in ("unshare", "nsenter", "mount", "ip") if not shutil.which(program)]
    if missing:
        return f"there is no {', '.join(missing)} (Debian's util-linux and iproute2)"
    if not _compiler():
        return "there is no C compiler"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "there is no /dev/net/tun"
    probe = subprocess.run(
        ["unshare", "-n", "-m", "-u", "-i", "-p", "--fork", "sh", "-c", _PROBE],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if probe.returncode:
        return f"namespaces or overlays are not allowed: {probe.stderr.strip()}"
    try:
        find_openssh(build / "sshd")
    except NoOpenSSH as error:
        return str(error)
    return None


def _compiler() -> str | None:
    return shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
