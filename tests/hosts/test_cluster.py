"""The pretend hosts themselves: whatever is tried on them is worth no more than they are."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.hosts.cluster import CHECKOUT, Cluster, obstacle
from tests.hosts.host import Host, HostError, Setup
from tests.hosts.limits import PREFIX, ROOT
from tests.hosts.openssh import NoOpenSSH, find_openssh

PYTHON = str(CHECKOUT / ".venv/bin/python")
ECHO = [PYTHON, "-m", "tests.hosts.echo"]
SSH = ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=2"]
PORT = 7777


@contextmanager
def listening(host: Host, what: str = "serve") -> Iterator[subprocess.Popen[str]]:
    """``echo.py`` on the host; killed at the end if it still runs."""
    with host.started([*ECHO, what, str(PORT)]) as process:
        assert process.stdout and process.stdout.readline() == "ready\n", process.communicate()
        yield process


def ping(source: Host, target: Host, kind: str = "tcp", count: int = 10, size: int = 64) -> list[float | None]:
    """Round trips in milliseconds; None for what was lost."""
    run = source.run([*ECHO, "ping", kind, target.address, str(PORT), str(count), str(size)])
    assert run.returncode == 0, run.stderr
    trips: list[float | None] = json.loads(run.stdout)
    return trips


def received(source: Host, target: Host, count: int) -> int:
    """How many of so many datagrams arrive."""
    with listening(target, "count") as counter:
        assert source.run([*ECHO, "send", target.address, str(PORT), str(count)]).returncode == 0
        return int(counter.communicate(timeout=60)[0])


def fastest(trips: list[float | None]) -> float:
    """The least of round trips of which none was lost."""
    assert None not in trips
    return min(trip for trip in trips if trip is not None)


# Hosts


@pytest.mark.parametrize("name", ["mini1", "outside"])
def test_ssh_without_a_question(cluster: Cluster, name: str) -> None:
    for other in cluster:
        run = cluster[name].run([*SSH, other.name, "hostname; echo $PATH"])
        assert run.returncode == 0 and run.stderr == "", run.stderr
        hostname, path = run.stdout.splitlines()
        assert hostname == other.name and ".venv" not in path
    assert cluster[name].run([*SSH, "10.10.0.3", "hostname"]).stdout == "pi5\n"


def test_a_users_environment(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_pml", "none-of-the-hosts-business")
    host = cluster["mini2"]
    run = host.run("hostname; pwd; which mpirun; cat; env", input="typed", env={"MORE": "1"})
    assert run.stdout.startswith(f"mini2\n{CHECKOUT}\n{CHECKOUT}/.venv/bin/mpirun\ntyped")
    assert "TERM=dumb\n" in run.stdout and "MORE=1\n" in run.stdout and "OMPI_MCA_pml" not in run.stdout
    assert host.run("which mpirun", venv=False).returncode == 1
    assert host.run(["pwd"], cwd="/tmp").stdout == "/tmp\n"
    with pytest.raises(subprocess.TimeoutExpired):
        host.run("sleep 60; true", timeout=0.5)
    assert host.wait_until_idle(5) == []


def test_a_host_may_call_itself_otherwise(cluster: Cluster) -> None:
    cluster["mini1"].boot(Setup(hostname="mini1.local"))
    assert cluster["mini1"].run("uname -n").stdout == "mini1.local\n"
    assert cluster["mini2"].run([*SSH, "mini1", "hostname"]).stdout == "mini1.local\n"
    assert cluster.reset() == [] and cluster["mini1"].run("hostname").stdout == "mini1\n"


def test_files_are_a_hosts_own_and_a_boot_renews_them(cluster: Cluster, tmp_path: Path) -> None:
    host, name = cluster["mini1"], "only-on-mini1"
    places = ["/tmp", "/dev/shm", "/etc", "/run", str(Path.home()), str(CHECKOUT), str(CHECKOUT / "mpgpt")]
    for place in places:
        assert host.run(f"echo here > {place}/{name}").returncode == 0
    for place in places:
        assert host.read_file(f"{place}/{name}") == "here\n"
        assert not Path(place, name).exists() and not cluster["mini2"].path(f"{place}/{name}").exists()
    assert host.run("rm -r mpgpt && ls").returncode == 0 and (CHECKOUT / "mpgpt/commands/cli.py").exists()
    (tmp_path / "file").write_text("copied")
    host.copy(tmp_path, "/tmp/folder")
    host.write_file("/tmp/new/script", "#!/bin/sh\ncat /tmp/folder/file\n", 0o755)
    assert host.run(["/tmp/new/script"]).stdout == "copied"
    host.boot()
    assert not any(host.path(f"{place}/{name}").exists() for place in places)
    assert host.path(CHECKOUT / "mpgpt/commands/cli.py").exists() and not host.path("/tmp/new").exists()


def test_what_a_host_lacks(cluster: Cluster) -> None:
    models = Path.home() / ".cache/mpgpt"
    host, other = cluster["mini2"], cluster["mini1"]
    assert host.path(models).exists() == models.exists()
    host.boot(Setup(checkout=False, models=False))
    assert not host.path(models).exists() and not host.path(CHECKOUT).exists()
    assert other.path(CHECKOUT).exists() and other.path(models).exists() == models.exists()
    assert other.run([*SSH, "mini2", f"ls {CHECKOUT}"]).returncode == 2
    assert host.run("mkdir -p ~/.cache/mpgpt/models && pwd").stdout.strip() == str(Path.home())


@pytest.mark.parametrize(
    ("sshd", "reason"),
    [("off", "Connection refused"), ("refuses", "Permission denied"), ("down", "timed out|No route")],
)
def test_a_host_that_ssh_does_not_reach(cluster: Cluster, sshd: Any, reason: str) -> None:
    host = cluster["pi5"]
    host.power_off() if sshd == "down" else host.boot(Setup(sshd=sshd))
    run = cluster["mini1"].run([*SSH, "pi5", "true"])
    assert run.returncode == 255 and any(text in run.stderr for text in reason.split("|")), run.stderr


def test_power(cluster: Cluster) -> None:
    host = cluster["mini2"]
    with host.started("sleep 1000") as running:
        host.power_off()
        assert running.wait(10) != 0 and not host.is_on
        with pytest.raises(HostError, match="mini2 is off"):
            host.run("true")
    assert cluster.reset() == [] and host.is_on and host.processes() == []
    assert cluster["mini1"].run([*SSH, "mini2", "hostname"]).stdout == "mini2\n"


def test_a_rebooted_host_knows_no_old_connection(cluster: Cluster) -> None:
    talk = (
        f"import socket; s = socket.create_connection(('mini2', {PORT})); print('up', flush=True); input(); "
        "s.settimeout(20); s.sendall(b'anyone?'); s.recv(10)"
    )
    with listening(cluster["mini2"]), cluster["mini1"].started([PYTHON, "-c", talk], stdin=subprocess.PIPE) as talking:
        assert talking.stdout and talking.stdout.readline() == "up\n"
        cluster["mini2"].boot()
        assert "ConnectionResetError" in talking.communicate("\n", timeout=60)[1]


def test_processes_and_signals(cluster: Cluster) -> None:
    host = cluster["mini1"]
    trap = "trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.05; done"
    with host.started(trap) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        bash = host.processes()[0]
        assert bash.name == "bash" and int(host.run("pgrep -x bash -o").stdout) == bash.pid
        assert cluster["mini2"].processes() == []
        host.interrupt(process)
        assert process.communicate(timeout=10)[0] == "interrupted\n" and process.returncode == 5
    with host.started("exec sleep 1000") as sleeping:
        (killed,) = host.kill("^sleep 1000$", signal.SIGTERM)
        assert sleeping.wait(10) == -signal.SIGTERM and killed.name == "sleep"
    with pytest.raises(HostError, match="mini1 runs nothing that matches 'sleep'"):
        host.find("sleep", seconds=0)


def test_what_is_left_running_is_told_and_killed(cluster: Cluster) -> None:
    with cluster["pi5"].started("exec sleep 1000"):
        cluster["pi5"].find("^sleep")
        (left,) = cluster.reset(grace=0.2)
    assert left.startswith("pi5: ") and left.endswith("sleep: sleep 1000")
    assert cluster["pi5"].processes() == [] and cluster.reset() == []


def test_one_core_and_bounded_memory(cluster: Cluster) -> None:
    limits = cluster["pi5"].limits
    if not limits or not limits.has_core or not limits.has_memory:
        pytest.skip("this machine's control groups do not limit cores and memory")
    assert all(host.run(["nproc"]).stdout == "1\n" for host in cluster)
    take = [PYTHON, "-c", "print(len(bytearray(200 << 20)))"]
    assert cluster["pi5"].run(take).stdout == f"{200 << 20}\n"
    cluster["pi5"].boot(Setup(memory=100 << 20))
    assert cluster["pi5"].run(take).returncode == -signal.SIGKILL and cluster["mini1"].run(take).returncode == 0


# The network


@pytest.mark.parametrize(("preset", "least"), [("ethernet", 0.2), ("wifi", 5.0)])
def test_presets(cluster: Cluster, preset: str, least: float) -> None:
    getattr(cluster.network, preset)()
    with listening(cluster["mini2"]):
        assert least <= fastest(ping(cluster["mini1"], cluster["mini2"], count=30)) < least + 3


def test_delay_is_as_set(cluster: Cluster) -> None:
    cluster.network.set("mini1", delay_ms=15)
    cluster.network.set("pi5", delay_ms=5)
    with listening(cluster["pi5"]):
        trips = ping(cluster["mini1"], cluster["pi5"], count=20)
        assert 40 <= fastest(trips) < 44
        assert statistics.median(trip for trip in trips if trip) < 80
        assert 10 <= fastest(ping(cluster["mini2"], cluster["pi5"], "udp")) < 14, "the path does not lead over mini1"


def test_rate_is_as_set(cluster: Cluster) -> None:
    size = 60_000
    with listening(cluster["mini2"]):
        assert fastest(ping(cluster["mini1"], cluster["mini2"], size=size)) < 30
        cluster.network.set("mini2", rate_mbit=10)  # the first bytes come back while the last are on their way there
        assert 8 * size / 10e6 * 1e3 <= fastest(ping(cluster["mini1"], cluster["mini2"], size=size)) < 96


def test_loss_is_as_set(cluster: Cluster) -> None:
    assert received(cluster["mini1"], cluster["mini2"], 300) == 300
    cluster.network.set("mini2", loss=0.3)
    assert 180 < received(cluster["mini1"], cluster["mini2"], 300) < 240  # four standard deviations
    assert received(cluster["mini1"], cluster["pi5"], 300) == 300
    cluster.network.set("mini2", loss=0.05)
    with listening(cluster["mini2"]):
        assert None not in ping(cluster["mini1"], cluster["mini2"]), "TCP sends again"


def test_a_cable_out_and_in(cluster: Cluster) -> None:
    with listening(cluster["mini2"]):
        cluster.network.set("mini2", up=False)
        assert ping(cluster["mini1"], cluster["mini2"], count=1) == [None]
        cluster.network.set("mini2", up=True)
        assert None not in ping(cluster["mini1"], cluster["mini2"])


def test_a_cut_is_of_one_direction(cluster: Cluster) -> None:
    one, two = cluster["mini1"], cluster["mini2"]
    with listening(two):
        assert None not in ping(one, two)  # both know the other's Ethernet address now
    cluster.network.cut("mini1", "mini2")
    assert received(two, one, 20) == 20 and received(cluster["pi5"], two, 20) == 20
    with listening(two):
        assert ping(one, two, "udp", count=1) == [None]
        cluster.network.heal()
        assert None not in ping(one, two, "udp")


def test_udp_is_dropped_and_tcp_is_not(cluster: Cluster) -> None:
    with listening(cluster["mini2"]):
        assert None not in ping(cluster["mini1"], cluster["mini2"], "udp")
        cluster.network.drop_udp()
        assert ping(cluster["mini1"], cluster["mini2"], "udp", count=1) == [None]
        assert None not in ping(cluster["mini1"], cluster["mini2"])
        cluster.network.drop_udp(False)
        assert None not in ping(cluster["mini1"], cluster["mini2"], "udp")


def test_a_firewall_lets_only_ssh_in(cluster: Cluster) -> None:
    cluster.network.firewall("mini2")
    with listening(cluster["mini2"]), listening(cluster["mini1"]):
        assert ping(cluster["mini1"], cluster["mini2"], count=1) == [None]
        assert ping(cluster["mini1"], cluster["mini2"], "udp", count=1) == [None]
        assert cluster["mini1"].run([*SSH, "mini2", "hostname"]).stdout == "mini2\n"
        assert None not in ping(cluster["mini2"], cluster["mini1"]), "its own connections get their answers"


def test_no_way_to_the_machine(cluster: Cluster) -> None:
    host = cluster["mini1"]
    assert host.run("ip -o -4 route").stdout.strip() == "10.10.0.0/24 dev eth0 proto kernel scope link src 10.10.0.1"
    assert host.run("ls /sys/class/net").stdout.split() == ["eth0", "lo"]


# mpirun


HOSTFILE = "/tmp/hosts"
TEXT = ["--raw", "--prompt", "Once upon a time", "--ignore-eos", "--max-new-tokens", "32"]
GENERATE = [PYTHON, "-m", "mpgpt", "generate", "--model", "/tmp/model", *TEXT]
RING = ["mpirun", "-hostfile", HOSTFILE, "-n", "3", *GENERATE, "--layers", "0-1,2-3,4"]


@pytest.fixture
def rank0(cluster: Cluster, models: dict[str, Path]) -> Host:
    """mini1, with a model on it and on the two other hosts of its hostfile."""
    for name in ("mini1", "mini2", "pi5"):
        cluster[name].copy(models["llama"], "/tmp/model")
    cluster["mini1"].write_file(HOSTFILE, "mini1 slots=1\nmini2 slots=1\npi5 slots=1\n")
    return cluster["mini1"]


def test_the_same_text_on_three_hosts(cluster: Cluster, rank0: Host) -> None:
    alone = rank0.run(GENERATE)
    assert alone.returncode == 0 and len(alone.stdout) > 20, alone.stderr
    with rank0.started(RING) as ring:
        assert [cluster.find_rank(n)[0].name for n in range(3)] == ["mini1", "mini2", "pi5"]
        out, err = ring.communicate(timeout=100)
    assert ring.returncode == 0 and out == alone.stdout, err


@pytest.mark.slow_hosts
def test_the_same_text_over_a_poor_network(cluster: Cluster, rank0: Host) -> None:
    alone = rank0.run(GENERATE)
    cluster.network.wifi()
    cluster.network.set("mini2", loss=0.02)
    cluster.network.drop_udp()
    ring = rank0.run(RING, timeout=300)
    assert ring.returncode == 0 and ring.stdout == alone.stdout, ring.stderr


# This machine


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.platform", "darwin")
        assert "Linux's namespaces" in str(obstacle())
    with monkeypatch.context() as patch:
        patch.setattr("os.getuid", lambda: 1000)
        assert "root" in str(obstacle())
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        assert "util-linux" in str(obstacle())
    if not shutil.which("apt-get"):
        return
    nothing = tmp_path / "apt.conf"
    nothing.write_text(f'Dir::State::lists "{tmp_path}/lists";\nDir::Cache "{tmp_path}/cache";\n')
    monkeypatch.setenv("APT_CONFIG", str(nothing))
    monkeypatch.setattr("tests.hosts.openssh.SYSTEM_PATH", str(tmp_path))
    # Where Debian's is installed, there is nothing to fetch.
    why = r"there is no sshd, and apt-get (cannot give Debian's \(perhaps after `apt-get update`\)|fetched none)"
    with pytest.raises(NoOpenSSH, match=why):
        find_openssh(tmp_path / "sshd")
    assert not [*tmp_path.glob("sshd*")]


# What stays


def test_a_killed_cluster_leaves_nothing(cluster: Cluster) -> None:
    """A second cluster beside this one, killed without a chance to clean up."""
    command = [sys.executable, "-m", "tests.hosts"]
    holder = psutil.Popen([*command, "--network", "wifi"], cwd=CHECKOUT, stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline().startswith("wifi: mini1 10.10.0.1, ")
        script = Path(holder.stdout.readline().split(":")[1].split()[0])
        ran = subprocess.run([script, "hostname"], capture_output=True, text=True, check=True)
        assert ran.stdout == "mini1\n"
        family = holder.children(recursive=True)
        assert len(family) > 5 * 2, family
        holder.kill()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert alive == []
    run = subprocess.run(
        [*command, "run", "mini2", "--", "sh", "-c", "hostname; exit 7"], cwd=CHECKOUT, capture_output=True
    )
    assert (run.returncode, run.stdout) == (7, b"mini2\n"), run.stderr
    assert not script.exists() and not [*ROOT.glob(f"**/{PREFIX}{holder.pid}-*")]
    assert cluster["mini1"].run([*SSH, "mini2", "hostname"]).stdout == "mini2\n"


def test_a_cluster_that_is_closed_leaves_nothing(cluster: Cluster) -> None:
    mine = {child.pid for child in psutil.Process().children()}
    with Cluster() as second:
        folders = [folder for host in second if host.limits for folder in host.limits.folders]
        assert len({child.pid for child in psutil.Process().children()} - mine) == len(second.hosts) + 1
        assert second["mini1"].run([*SSH, "mini2", "hostname"]).stdout == "mini2\n"
        scripts = second.write_scripts()
    assert {child.pid for child in psutil.Process().children()} == mine
    assert not any(folder.exists() for folder in [*folders, scripts])
