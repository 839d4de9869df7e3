"""The start of this process: the mpirun above it, its rank, and the settings beside the hostfile.

Knows: the environment that mpirun gives its ranks, the parameters that MPI wants before it starts.
Must not know: options, jobs, or how a run ends (``job.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpgpt.transport.mpirun import Launcher, SettingsFile

RANK, SIZE, LOCAL_SIZE = "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"

MPI_DEFAULTS = {
    # The plain TCP and shared-memory transport: starts in a tenth of the time, and is what macOS has anyway.
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    # Without it MPI ends a process, with a page of text, as soon as another one's connection closes.
    "OMPI_MCA_mpi_ft_enable": "1",
    # A frame goes out in one piece, without waiting until the receiver reports that it is ready.
    "OMPI_MCA_btl_tcp_eager_limit": "4194304",
    "OMPI_MCA_btl_tcp_rndv_eager_limit": "4194304",
    "OMPI_MCA_btl_tcp_max_send_size": "4194304",
}


def set_mpi_defaults(environment: MutableMapping[str, str]) -> None:
    """Set MPI's parameters where the environment has none of its own."""
    for name, value in MPI_DEFAULTS.items():
        environment.setdefault(name, value)


def rank_of(environment: Mapping[str, str]) -> int | None:
    """This process's rank; None without mpirun."""
    return int(environment[RANK]) if RANK in environment else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How this process was started."""

    environment: Mapping[str, str]
    launcher: Launcher | None
    """The mpirun above, if it runs on this host."""

    @property
    def by_mpirun(self) -> bool:
        return SIZE in self.environment

    @property
    def several_hosts(self) -> bool:
        """Whether ranks run on other hosts than this one."""
        return self.environment.get(LOCAL_SIZE) != self.environment.get(SIZE)

    @property
    def interactive(self) -> bool:
        """Whether standard input is a terminal: mpirun's, where that is above."""
        if self.launcher:
            return self.launcher.terminal
        return sys.stdin is not None and sys.stdin.isatty()

    def settings(self, config: Path | None) -> SettingsFile | None:
        """The settings file ``config``, or else the one beside the hostfile. Raises ``UsageError``."""
        from mpgpt.transport.mpirun import SettingsFile, settings

        return SettingsFile(path=config) if config else settings(self.launcher, self.environment)


def detect(environment: Mapping[str, str]) -> Launch:
    """How this process was started, by its environment and its ancestors."""
    from mpgpt.transport.mpirun import find

    return Launch(environment=environment, launcher=find(environment))
