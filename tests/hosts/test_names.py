"""Hosts that call themselves what another does, as Raspberry Pis do."""

from __future__ import annotations

import json

from tests.hosts.cluster import CHECKOUT, Cluster
from tests.hosts.host import Setup

HOSTFILE = "/tmp/hosts"
SAY = (
    "import json; from mpgpt.transport.mpi import MPIWorld; w = MPIWorld(); print(json.dumps([w.rank, w.hosts])); "
    "w.close()"
)
TRANSPORT = ["--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp"]
RING = ["mpirun", "-hostfile", HOSTFILE, *TRANSPORT, "-n", "3", str(CHECKOUT / ".venv/bin/python"), "-c", SAY]


def test_hosts_of_one_name_are_told_apart(cluster: Cluster) -> None:
    """Ranks that share cores and memory are those of one host, not of one name. (Several ranks on a host of a name that
    two have are beyond Open MPI 5.0.11 itself: MPI_Init fails.)"""
    cluster["mini2"].boot(Setup(hostname="raspberrypi"))
    cluster["pi5"].boot(Setup(hostname="raspberrypi"))
    cluster["mini1"].write_file(HOSTFILE, "mini1 slots=1\nmini2 slots=1\npi5 slots=1\n")
    ring = cluster["mini1"].run(RING, timeout=180)
    assert ring.returncode == 0, ring.stderr
    hosts = ["mini1", "raspberrypi", "raspberrypi (rank 2)"]
    assert sorted(map(json.loads, ring.stdout.splitlines())) == [[rank, hosts] for rank in range(3)]
