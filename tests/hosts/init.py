"""Process 1 of a pretend host: makes its file system and network its own, starts sshd, and reaps orphans.

Run by ``host.py`` in new namespaces, with Python's standard library alone. Standard input carries one line of JSON
(``BootOptions``), then "network" once eth0 is there; standard output says "mounted", then "ready". The end of standard
input is the power cord: this process ends, and the kernel kills everything else in its pid namespace.

Knows: mounts, addresses, sshd. Must not know: the cluster, or what the host is for.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import TypedDict

SSHD_PID = Path("/run/sshd.pid")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
STAGING = Path("/mnt")
"""Where overlays are put together before they cover what they are made of; empty again once the host is up."""


class Overlay(TypedDict):
    """A folder that the host has for itself: what is written into it is seen here only, and lost at power off."""

    path: str
    lower: list[str]
    """Folders whose content it begins with; the first covers the later ones."""
    hidden: list[str]
    """Paths in it, relative, that the host does not have."""


class File(TypedDict):
    path: str
    text: str
    mode: int


class BootOptions(TypedDict):
    hostname: str
    address: str
    overlays: list[Overlay]
    """Parents before children."""
    files: list[File]
    sshd: bool


def run(*command: str, text: str | None = None) -> None:
    subprocess.run(command, input=text, text=True, stdout=sys.stderr, check=True)


def mount_all(overlays: list[Overlay]) -> None:
    run("mount", "-t", "proc", "proc", "/proc")
    run("mount", "-t", "tmpfs", "tmpfs", str(STAGING))
    groups = STAGING / "groups"
    groups.mkdir()
    run("mount", "--rbind", str(CONTROL_GROUPS), str(groups))
    run("mount", "-t", "sysfs", "sysfs", "/sys")  # one of its own: /sys/class/net is that of this network namespace
    run("mount", "--move", str(groups), str(CONTROL_GROUPS))  # where a host sees how much memory it may use
    for n, overlay in enumerate(overlays):
        prepare(STAGING / str(n), overlay)
    for path in ("/tmp", "/dev/shm", "/run"):
        run("mount", "-t", "tmpfs", "-o", f"mode={755 if path == '/run' else 1777}", "tmpfs", path)
    for n, overlay in enumerate(overlays):
        Path(overlay["path"]).mkdir(parents=True, exist_ok=True)
        run("mount", "--move", str(STAGING / str(n) / "merged"), overlay["path"])
    run("umount", "--lazy", str(STAGING))


def prepare(folder: Path, overlay: Overlay) -> None:
    """Mount the overlay at ``folder/merged``, with whiteouts for what is hidden."""
    upper, work, merged = (folder / name for name in ("upper", "work", "merged"))
    for made in (upper, work, merged):
        made.mkdir(parents=True)
    original = os.stat(overlay["lower"][-1])
    os.chmod(upper, stat.S_IMODE(original.st_mode))
    os.chown(upper, original.st_uid, original.st_gid)
    for hidden in overlay["hidden"]:
        (upper / hidden).parent.mkdir(parents=True, exist_ok=True)
        os.mknod(upper / hidden, stat.S_IFCHR, 0)
    lower = ":".join(path.replace("\\", "\\\\").replace(":", "\\:").replace(",", "\\,") for path in overlay["lower"])
    run("mount", "-t", "overlay", "overlay", "-o", f"lowerdir={lower},upperdir={upper},workdir={work}", str(merged))


def write_files(files: list[File]) -> None:
    for file in files:
        path = Path(file["path"])
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.write_text(file["text"], encoding="utf-8")
        path.chmod(file["mode"])


def set_up_network(address: str) -> None:
    # A TAP device drops what its queue does not hold; a real interface would have its sender wait.
    lines = ["link set lo up", "link set eth0 txqueuelen 10000", "link set eth0 up", f"addr add {address} dev eth0"]
    run("ip", "-batch", "-", text="\n".join(lines) + "\n")


def start_sshd() -> None:
    Path("/run/sshd").mkdir(mode=0o755)
    accounts = Path("/etc/passwd")
    if not any(line.startswith("sshd:") for line in accounts.read_text().splitlines()):
        with accounts.open("a") as file:
            file.write("sshd:x:110:65534::/run/sshd:/usr/sbin/nologin\n")
    run("/usr/sbin/sshd", "-f", "/run/sshd_config", "-E", "/run/sshd.log")
    while not (SSHD_PID.exists() and SSHD_PID.read_text().endswith("\n")):  # it writes its id once it listens
        time.sleep(0.005)


def reap(signum: int, frame: object) -> None:
    """Collect every child that has ended: orphans become children of process 1."""
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass
    except ChildProcessError:
        pass


def report(word: str) -> None:
    os.write(1, f"{word}\n".encode())


def main() -> None:
    options: BootOptions = json.loads(sys.stdin.readline())
    socket.sethostname(options["hostname"])
    mount_all(options["overlays"])
    write_files(options["files"])
    report("mounted")
    if sys.stdin.readline().strip() != "network":
        return
    set_up_network(options["address"])
    if options["sshd"]:
        start_sshd()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which process 1 does not receive
    signal.signal(signal.SIGCHLD, reap)
    reap(0, None)
    report("ready")
    while os.read(0, 4096):
        pass


if __name__ == "__main__":
    main()
