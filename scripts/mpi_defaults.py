"""Give the mpirun of this environment the defaults that mpgpt wants. `make install` runs it.

    python scripts/mpi_defaults.py

Open MPI reads the files of parameters in the environment's etc/; a block of our own is written there, anew each time.
What is set on mpirun's command line or in the environment goes before it.

Knows: Open MPI's parameters. Must not know: anything of mpgpt.
"""

from __future__ import annotations

import shutil
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
    # ssh that never asks, gives up on a host that is down after seconds, and names it.
    "plm_ssh_agent": shutil.which("mpgpt-ssh", path=str(Path(sys.executable).parent)) or "ssh",
}


def write(file: Path, parameters: dict[str, str]) -> None:
    """Replace our block in a file of parameters, or put it at the end."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    before, found, rest = text.partition(BEGIN)
    after = rest.partition(END)[2] if found else ""
    lines = "".join(f"{name} = {value}\n" for name, value in parameters.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(before + BEGIN + lines + END + after, encoding="utf-8")


def main() -> None:
    etc = Path(sys.prefix) / "etc"
    write(etc / "openmpi-mca-params.conf", OPENMPI)
    write(etc / "prte-mca-params.conf", RUNTIME)


if __name__ == "__main__":
    main()
