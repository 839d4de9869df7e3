"""The link contract over MPI, in a ring that has the machine for itself: a busy one finds frames before their bell."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.launch import ENV, ROOT, mpirun
from tests.support.links import CASES


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("transport", ["shared memory", "sockets", "sockets alone"])
def test_mpi_link_keeps_the_contract(ranks: int, transport: str) -> None:
    """Through shared memory; through sockets with doorbells; and as between hosts, where nobody rings."""
    btl = "self,sm" if transport == "shared memory" else "self,tcp"
    alone = ["--sockets"] if transport == "sockets alone" else []
    run = subprocess.run(
        mpirun(ranks, "-m", "tests.mpi.contract", *alone), cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=ENV | {"OMPI_MCA_pml": "ob1", "OMPI_MCA_btl": btl}, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert [line.removeprefix("kept: ") for line in run.stdout.splitlines()] == list(CASES)
