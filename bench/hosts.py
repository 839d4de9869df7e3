"""What a network between the ranks costs: a ring of two on one host, and over two pretend hosts, in turn.

    python -m bench.hosts [--rounds 3] [--networks ethernet,wifi,loss,no-udp,stranger] [--idle] [--plan]

As root on Linux: the hosts are those of tests/hosts, one core each; the ring on one host has two cores. SmolLM2, half
of its layers on each rank, one thread a rank. Printed are tokens a second, the ratio to the ring on one host in the
same round, what a token takes longer, and the bare time of the token's two frames over plain MPI that spins. ``loss``
is Ethernet that loses 1% of the frames, ``stranger`` one on which somebody else rings at every port of a rank.
``--plan`` has each network's ring predicted first; ``--idle`` measures what waiting costs a server's ranks.

Knows: the pretend hosts, `mpgpt bench`, `plan` and `serve`. Must not know: how ranks wait.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from mpgpt.model.pull import model_home, pull
from tests.hosts.cluster import Cluster
from tests.hosts.host import Host

SPANS = "0-14,15-29"
PROMPT, NEW, SEQUENCES = 64, 100, (1, 8)
STEP_BYTES, RESULT_BYTES = 2560, 64
"""A decoding step's frame and a result's, of one sequence."""
IDLE_S = 10
STRANGER = """
import socket, sys, time
host, ports, end = sys.argv[1], [int(p) for p in sys.argv[2].split(",")], time.time() + float(sys.argv[3])
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while time.time() < end:
    for port in ports:
        udp.sendto(b"!", (host, port))
        try:
            with socket.create_connection((host, port), 0.2) as tcp:
                tcp.sendall(b"GET / HTTP/1.0\\r\\n\\r\\n")
        except OSError:
            pass
    time.sleep(0.02)
"""
BARE = """
import os, statistics, sys, time
os.environ.update(OMPI_MCA_pml="ob1", OMPI_MCA_btl="self,sm,tcp", OMPI_MCA_btl_tcp_eager_limit="4194304")
from mpi4py import MPI
comm, there, back = MPI.COMM_WORLD, bytearray(int(sys.argv[1])), bytearray(int(sys.argv[2]))
times = []
for n in range(80):
    comm.Barrier()
    time.sleep(0.005)
    begun = time.perf_counter()
    if comm.rank == 0:
        comm.Send([there, MPI.BYTE], 1)
        comm.Recv([back, MPI.BYTE], 1)
    else:
        comm.Recv([there, MPI.BYTE], 0)
        comm.Send([back, MPI.BYTE], 0)
    times.append(time.perf_counter() - begun)
if comm.rank == 0:
    print("bare", statistics.median(times[5:]))
"""


def hostfile(cluster: Cluster, one_host: bool) -> str:
    cluster["mini1"].write_file("/tmp/ring", "mini1 slots=2\n" if one_host else "mini1 slots=1\nmini2 slots=1\n")
    limits = cluster["mini1"].limits
    assert limits
    limits.set_cores(",".join(map(str, sorted(os.sched_getaffinity(0)))) if one_host else str(cluster["mini1"].core))
    return "/tmp/ring"


def ring_command(cluster: Cluster, one_host: bool) -> str:
    return f"mpirun {'--bind-to core --map-by core ' if one_host else ''}-hostfile {hostfile(cluster, one_host)} -n 2"


def run(host: Host, command: str, seconds: float = 300) -> str:
    done = host.run(command, timeout=seconds)
    if done.returncode:
        raise click.ClickException(f"{command}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def bench(cluster: Cluster, model: str, one_host: bool, spans: str = SPANS) -> dict[int, float]:
    """Decoding tokens a second by the number of sequences."""
    run(
        cluster["mini1"],
        f"{ring_command(cluster, one_host)} mpgpt bench --model {model} --layers {spans} --threads 1 --rounds 1 "
        f"--concurrency {','.join(map(str, SEQUENCES))} --prompt-tokens {PROMPT} --new-tokens {NEW} "
        "--json /tmp/bench.json",
    )  # fmt: skip
    runs = json.loads(cluster["mini1"].read_file("/tmp/bench.json"))["runs"]
    return {one["concurrency"]: round(one["decode_tokens_per_s"], 1) for one in runs}


def bare(cluster: Cluster) -> float:
    """Seconds for a token's frames, there and back, where both ranks spin."""
    python = cluster.checkout / ".venv/bin/python"
    for name in ("mini1", "mini2"):
        cluster[name].write_file("/tmp/bare.py", BARE)
    out = run(cluster["mini1"], f"{ring_command(cluster, False)} {python} /tmp/bare.py {STEP_BYTES} {RESULT_BYTES}", 60)
    return float(out.split("bare")[1])


def predict(cluster: Cluster, model: str) -> tuple[dict[int, float], str]:
    """What `mpgpt plan` expects of two ranks, by the number of sequences, and with which layers on each."""
    run(
        cluster["mini1"],
        f"{ring_command(cluster, False)} mpgpt plan --model {model} --threads 1 --sequences {SEQUENCES[-1]} "
        f"--prompt-tokens {PROMPT} --new-tokens {NEW} --json /tmp/plan.json",
    )  # fmt: skip
    tree: dict[str, Any] = json.loads(cluster["mini1"].read_file("/tmp/plan.json"))
    two = next(one for one in tree["alternatives"] if one["ranks_with_layers"] == 2)
    spans = ",".join(f"{start}-{stop - 1}" for start, stop in two["layers"])
    return {1: two["one_tokens_per_s"], SEQUENCES[-1]: two["many_tokens_per_s"]}, spans


@contextmanager
def network(cluster: Cluster, name: str) -> Iterator[None]:
    """The network of that name between the hosts."""
    cluster.network.reset()
    stranger = None
    if name == "wifi":
        cluster.network.wifi()
    if name == "loss":
        for host in ("mini1", "mini2"):
            cluster.network.set(host, loss=0.005)
    if name == "no-udp":
        cluster.network.drop_udp()
    if name == "stranger":
        cluster["stranger"].write_file("/tmp/stranger.py", STRANGER)
        ports = ",".join(map(str, range(1024, 1028)))
        stranger = cluster["stranger"].start(
            f"python3 /tmp/stranger.py {cluster['mini2'].address} {ports} 240", stdout=None, stderr=None
        )
    try:
        yield
    finally:
        if stranger:
            cluster["stranger"].kill_group(stranger)
            stranger.wait()
        cluster.network.reset()


def idle(cluster: Cluster, model: str) -> list[float]:
    """Percent of a core that each rank of an idle server takes."""
    server = cluster["mini1"].start(
        f"{ring_command(cluster, False)} mpgpt serve --model {model} --layers {SPANS} --threads 1"
    )
    try:
        ranks = [cluster.find_rank(rank, 60) for rank in (0, 1)]
        time.sleep(30)
        before = [ticks(process.pid, host) for host, process in ranks]
        time.sleep(IDLE_S)
        after = [ticks(process.pid, host) for host, process in ranks]
        return [100 * (b - a) / os.sysconf("SC_CLK_TCK") / IDLE_S for a, b in zip(before, after, strict=True)]
    finally:
        cluster["mini1"].interrupt(server)
        server.communicate(timeout=30)


def ticks(pid: int, host: Host) -> int:
    fields = host.run(f"cat /proc/{pid}/stat", timeout=10).stdout.rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@click.command(help=(__doc__ or "").partition("Knows:")[0])
@click.option("--rounds", default=3, show_default=True)
@click.option("--networks", default="ethernet,wifi,loss,no-udp,stranger", show_default=True)
@click.option("--plan", "planned", is_flag=True)
@click.option("--idle", "idling", is_flag=True)
def main(rounds: int, networks: str, planned: bool, idling: bool) -> None:
    model = pull("smollm2-135m", home=model_home(), progress=False)
    ratios: dict[tuple[str, int], list[float]] = {}
    with Cluster() as cluster:
        for turn in range(rounds):
            one = bench(cluster, str(model), True)
            click.echo(f"round {turn + 1}: one host {one}")
            for name in networks.split(","):
                with network(cluster, name):
                    expected, spans = predict(cluster, str(model)) if planned else ({}, SPANS)
                    two, frames = bench(cluster, str(model), False, spans), bare(cluster)
                for count in SEQUENCES:
                    ratios.setdefault((name, count), []).append(two[count] / one[count])
                for count, predicted in expected.items():
                    ratios.setdefault((f"{name} predicted / measured", count), []).append(predicted / two[count])
                click.echo(
                    f"round {turn + 1}: {name} {two}; a token takes {1e3 * (1 / two[1] - 1 / one[1]):+.2f} ms, "
                    f"its frames alone {1e3 * frames:.2f} ms"
                    + (f"; predicted {expected}, layers {spans}" if expected else "")
                )
        for (name, count), found in ratios.items():
            click.echo(
                f"{name}, {count} sequence(s): x {statistics.median(found):.2f} ({min(found):.2f} to {max(found):.2f})"
            )
        if idling:
            shares = ", ".join(f"{share:.2f}" for share in idle(cluster, str(model)))
            click.echo(f"idle server, percent of a core: {shares}")


if __name__ == "__main__":
    main()
