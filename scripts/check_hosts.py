"""Try a cluster before a model is put on it: can every host be reached, do versions agree, how fast are the links?

    python scripts/check_hosts.py hostfiles/standard

Starts one rank on every host of the hostfile, and prints what each host is and what the link to the next one gives.
Exit status 0 if a ring can be formed, 1 if not, with the reason.

Knows: mpirun, versions, ping-pong. Must not know: models.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import psutil
from rich.console import Console
from rich.table import Table

AGREE = ("mpgpt", "openmpi", "mpi4py", "torch", "byteorder")
SIZES = {"latency": 3 << 10, "bandwidth": 1 << 20}
"""A decoding step's frame, and one long enough to tell the bandwidth; bytes."""
ROUNDS = 50
LIMIT_S = 90


def describe() -> dict[str, Any]:
    """What this host is."""
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "byteorder": sys.byteorder,
        **{name: version(name) for name in AGREE if name != "byteorder"},
    }


def measure(world: Any) -> list[dict[str, float]]:
    """Microseconds one way (median) to the next rank, for each size; the edges one after the other."""
    edges = []
    for source in range(world.size if world.size > 1 else 0):
        target = (source + 1) % world.size
        figures: dict[str, float] = {}
        if world.rank in (source, target):
            there = world.connect(source, target, max(SIZES.values()))
            back = world.connect(target, source, max(SIZES.values()))
            for name, size in SIZES.items():
                figures[name] = ping(there, back, size) if world.rank == source else pong(there, back, size)
            there.close()
            back.close()
        edges.append(json.loads(world.gather(json.dumps(figures).encode())[source]))
    return edges


def ping(there: Any, back: Any, size: int) -> float:
    times = []
    for _ in range(ROUNDS):
        begun = time.perf_counter()
        there.send(bytearray(size))
        back.recv()
        times.append((time.perf_counter() - begun) / 2)
    return 1e6 * statistics.median(times)


def pong(there: Any, back: Any, size: int) -> float:
    for _ in range(ROUNDS):
        there.recv()
        back.send(bytearray(size))
    return 0.0


def rank() -> None:
    """One host's part, under mpirun; rank 0 prints what all found."""
    from mpgpt.cli import MPI_DEFAULTS

    os.environ.update({key: value for key, value in MPI_DEFAULTS.items() if key not in os.environ})
    from mpgpt.mpi import MPIWorld

    world = MPIWorld()
    nodes = [json.loads(data) for data in world.gather(json.dumps(describe()).encode())]
    edges = measure(world)
    if world.rank == 0:
        print(json.dumps({"nodes": nodes, "edges": edges}))
    world.close()


def show(nodes: list[dict[str, Any]], edges: list[dict[str, float]]) -> None:
    columns = ("rank", "host", "system", "cores", "memory", "Open MPI", "torch", "to the next rank", "bandwidth")
    table = Table(*columns)
    for n, node in enumerate(nodes):
        link = ["", ""]
        if edges:
            seconds = 1e-6 * (edges[n]["bandwidth"] - edges[n]["latency"])
            link = [
                f"{edges[n]['latency']:.0f} us",
                f"{(SIZES['bandwidth'] - SIZES['latency']) / seconds / 1e6:.0f} MB/s",
            ]
        memory = f"{node['memory_gib']} GiB"
        table.add_row(
            str(n), node["host"], node["system"], str(node["cores"]), memory, node["openmpi"], node["torch"], *link
        )
    Console().print(table)


def disagreements(nodes: list[dict[str, Any]]) -> list[str]:
    """A sentence for each thing that must be the same on every host and is not."""
    said = []
    for key in AGREE:
        values = {node["host"]: node[key] for node in nodes}
        plain = {host: str(value).partition("+")[0] for host, value in values.items()}  # a CPU and a CUDA build agree
        if len(set(plain.values())) > 1:
            said.append(f"{key} differs: " + ", ".join(f"{host} has {value}" for host, value in values.items()))
    return said


@click.command(help=(__doc__ or "").partition("Knows:")[0])
@click.argument("hostfile", type=click.Path(exists=True, dir_okay=False, path_type=Path))
def main(hostfile: Path) -> None:
    mpirun = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    command = [
        mpirun, "--prtemca", "plm_ssh_agent", "ssh -o BatchMode=yes -o ConnectTimeout=5", "-hostfile", str(hostfile),
        "--map-by", "ppr:1:node", "--bind-to", "none", sys.executable, str(Path(__file__).resolve()),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise click.ClickException(
            f"no answer within {LIMIT_S} s: a host lacks {sys.executable}, or hosts cannot reach each other "
            "(name the network: see README, What the hosts need)"
        ) from None
    if done.returncode:
        raise click.ClickException("mpirun could not start a rank on every host; what it said is above")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    show(found["nodes"], found["edges"])
    if problems := disagreements(found["nodes"]):
        raise click.ClickException("\n".join(problems))
    click.echo(f"{len(found['nodes'])} hosts are ready.")


if __name__ == "__main__":
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        rank()
    else:
        main()
