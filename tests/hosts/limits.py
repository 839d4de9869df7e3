"""Control groups of the pretend hosts: one core and a bound on memory for each, where the machine allows it.

Knows: cgroup v1 and v2 under /sys/fs/cgroup. Must not know: namespaces, or what a host runs.
"""

from __future__ import annotations

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
PREFIX = "mpgpt-hosts-"
V1, V2 = ("cpuset", "memory"), "cgroup.controllers"


class Limits:
    """The control groups of one host; a machine that allows none gives a host without limits."""

    def __init__(self, group: str, core: int, memory: int) -> None:
        self.folders: list[Path] = []
        """Whoever writes its process id to ``cgroup.procs`` in each of them is limited."""
        if (ROOT / V2).exists():
            self._make_v2(ROOT / group, core)
        else:
            self._make_v1(group, core)
        self.set_memory(memory)

    @property
    def has_core(self) -> bool:
        """Whether the host is kept to one core."""
        return any((folder / "cpuset.cpus").exists() for folder in self.folders)

    @property
    def has_memory(self) -> bool:
        """Whether the host's memory is bounded."""
        return any(self._memory_files())

    def set_cores(self, cores: str) -> None:
        """Let the host have these cores, such as 0-1, instead of its one."""
        for file in (folder / "cpuset.cpus" for folder in self.folders):
            if file.exists():
                file.write_text(cores)

    def set_memory(self, size: int) -> None:
        """Bound the host's memory in bytes; a process that would go over is killed, and nothing is swapped."""
        for file in self._memory_files():
            file.write_text(str(size))
            for name in ("memory.swappiness", "memory.swap.max"):
                if (file.parent / name).exists():
                    (file.parent / name).write_text("0")

    def close(self) -> None:
        """Remove the groups; the processes in them must have been killed."""
        for folder in self.folders:
            _remove(folder)

    def _memory_files(self) -> list[Path]:
        files = [folder / name for folder in self.folders for name in ("memory.limit_in_bytes", "memory.max")]
        return [file for file in files if file.exists()]

    def _make_v1(self, group: str, core: int) -> None:
        for controller in V1:
            folder = ROOT / controller / group
            with suppress(OSError):
                folder.mkdir(exist_ok=True)
                if controller == "cpuset":  # without cores and memory nodes no process may enter
                    (folder / "cpuset.mems").write_text((folder.parent / "cpuset.mems").read_text())
                    (folder / "cpuset.cpus").write_text(str(core))
                self.folders.append(folder)

    def _make_v2(self, folder: Path, core: int) -> None:
        with suppress(OSError):
            (ROOT / "cgroup.subtree_control").write_text("+cpuset +memory")
            folder.mkdir(exist_ok=True)
            (folder / "cpuset.cpus").write_text(str(core))
            self.folders.append(folder)


def make_label() -> str:
    """A new name for the folders that a cluster makes on the machine; it holds this process's id, for ``is_stale``."""
    return f"{PREFIX}{os.getpid()}-{secrets.token_hex(2)}"


def is_stale(folder: Path) -> bool:
    """Whether the process is gone whose label a folder's name begins with."""
    owner = folder.name.removeprefix(PREFIX).split("-")[0]
    return owner.isdigit() and not Path("/proc", owner).exists()


def remove_stale() -> None:
    """Remove the groups of runs that were killed."""
    for folder in [*ROOT.glob(f"{PREFIX}*"), *ROOT.glob(f"*/{PREFIX}*")]:
        if is_stale(folder):
            _remove(folder)


def _remove(folder: Path, seconds: float = 2.0) -> None:
    """Remove a group; it is busy until the kernel has buried its last process."""
    end = time.monotonic() + seconds
    while folder.exists() and time.monotonic() < end:
        with suppress(OSError):
            folder.rmdir()
            return
        time.sleep(0.01)
