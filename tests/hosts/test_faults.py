"""What goes wrong in mid-run over several hosts: who hears of it, how soon, and what is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.hosts.cluster import CHECKOUT, Cluster
from tests.hosts.host import Host

PYTHON = str(CHECKOUT / ".venv/bin/python")
HOSTFILE, PROMPTS, OUT, MODEL = "/tmp/ring/standard", "/tmp/ring/prompts.jsonl", "/tmp/ring/out/out.jsonl", "/tmp/model"
INTERVAL_S, TIMEOUT_S = 0.5, 3.0
SETTINGS = f"""
hf_model_name: {MODEL}
heartbeat: {{interval_s: {INTERVAL_S}, timeout_s: {TIMEOUT_S}}}
max_sequences: 2
threads: 1
kernel: plain
"""
NOTICED_S = TIMEOUT_S + 2.0
"""The user reads of a silent host after so long at the latest..."""
ENDED_S = 2.0
"""...and has the prompt back so long after that, or after Ctrl-C."""
SLACK_S = float(os.environ.get("MPGPT_TEST_SLACK", "4"))
"""How much later this machine may be with everything: it has fewer cores than the hosts believe."""
PAGES = ("noticed that", "MPI_ABORT", "daemon", "ORTE", "PRTE ERROR", "Traceback", "unable to", "=====")
RING = ["mpirun", "-hostfile", HOSTFILE, "-n", "3", "mpgpt"]
COMMON = ["--layers", "0-1,2-3,4", "--raw", "--ignore-eos", "--strategy", "greedy"]
PORT = 8123
LONG = 400
SHORT, SHORT_TOKENS = 12, 200
HOSTS = ("mini1", "mini2", "pi5")


class Run:
    """A command of a user at a host's keyboard, and what it says, with the time of each line."""

    def __init__(self, host: Host, command: list[str]) -> None:
        self.host, self.command = host, command
        self.process = host.start(command)
        self.errors: list[tuple[float, str]] = []
        self.lines: list[tuple[float, str]] = []
        self.ended = 0.0
        self._readers = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self.process.stdout, self.lines), (self.process.stderr, self.errors))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, pipe: Any, lines: list[tuple[float, str]]) -> None:
        for line in pipe:
            lines.append((time.monotonic(), line.rstrip("\n")))

    def wait(self, seconds: float) -> int:
        """Its exit status. ``ended`` is when it ended."""
        end = time.monotonic() + seconds
        while self.process.poll() is None:
            assert time.monotonic() < end, f"it still runs after {seconds:g} s and has said {self.text!r}"
            time.sleep(0.02)
        self.ended = time.monotonic()
        for reader in self._readers:  # a process that is left may hold the pipe
            reader.join(2.0)
        status = self.process.returncode
        return 128 - status if status < 0 else status

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.errors)

    @property
    def ours(self) -> list[tuple[float, str]]:
        """Sentences of ours that are bad news."""
        return [(at, line) for at, line in self.errors if line.startswith("mpgpt: ")]

    def heard(self, text: str, seconds: float = 60) -> None:
        """Wait until it has said so on standard error."""
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end and self.process.poll() is None, f"it said {self.text!r}"
            time.sleep(0.05)

    def json(self) -> list[dict[str, Any]]:
        return [json.loads(line) for _, line in list(self.lines)]


class Ring:
    """A batch or a server over three hosts, in which something is going to happen."""

    def __init__(self, cluster: Cluster, typed_on: str = "mini1") -> None:
        self.cluster, self.rank0, self.typed_on = cluster, cluster["mini1"], cluster[typed_on]
        self._stack = ExitStack()
        self.stream: Run | None = None
        self.health: Run | None = None
        self.prompts = 0
        self.at = 0.0
        """When it happened."""

    def batch(self, *, prompts: int = 200, tokens: int = LONG, begun: int = 2) -> Ring:
        """Returns when some records are there and more are coming."""
        self.prompts = prompts
        lines = [{"id": n, "prompt": f"Number {n} is", "max_new_tokens": tokens} for n in range(prompts)]
        self.rank0.write_file(PROMPTS, "".join(json.dumps(line) + "\n" for line in lines))
        self.start([*RING, "generate", *COMMON, "--prompts", PROMPTS, "--out", OUT])
        self.wait_for_records(begun)
        return self

    def short_batch(self) -> Ring:
        """The prompts of ``undisturbed``."""
        return self.batch(prompts=SHORT, tokens=SHORT_TOKENS, begun=1)

    def be_patient(self, seconds: float) -> None:
        """A host may be silent for so long."""
        for host in (self.rank0, self.typed_on):
            settings = host.read_file(f"{HOSTFILE}.yaml")
            host.write_file(f"{HOSTFILE}.yaml", settings.replace(f"timeout_s: {TIMEOUT_S}", f"timeout_s: {seconds}"))

    def serve(self, clients: bool = True) -> Ring:
        """Returns when a client reads a stream and another one looks at /health."""
        self.start([*RING, "serve", *COMMON, "--port", str(PORT)])
        self.run.heard("mpgpt serves", 100)
        self.run.errors.clear()
        if not clients:
            return self
        self.stream, self.health = self._client("stream"), self._client("health")
        end = time.monotonic() + 60
        while len(self.stream.lines) < 10 or not self.health.lines:
            assert time.monotonic() < end, (self.run.text, self.stream.text)
            time.sleep(0.05)
        return self

    def _client(self, what: str) -> Run:
        return self._keep(Run(self.rank0, [PYTHON, "-m", "tests.hosts.client", what, str(PORT)]))

    def start(self, command: list[str]) -> None:
        self.run = self._keep(Run(self.typed_on, command))

    def _keep(self, run: Run) -> Run:
        self._stack.callback(run.host.kill_group, run.process)
        return run

    def close(self) -> None:
        self._stack.close()

    def records(self) -> list[dict[str, Any]]:
        """The whole records that are written."""
        path = self.rank0.path(OUT)
        lines = path.read_text().split("\n") if path.exists() else [""]
        return [json.loads(line) for line in lines[:-1]]

    def wait_for_records(self, count: int) -> None:
        end = time.monotonic() + 100
        while len(self.records()) < count:
            assert time.monotonic() < end and self.run.process.poll() is None, self.run.text
            time.sleep(0.05)

    def stranger(self, host: Host, seconds: float) -> Run:
        """Somebody dials a rank's heartbeat with junk, holds connections and sends datagrams."""
        command = [PYTHON, "-c", STRANGER, host.address, str(heartbeat_port(host)), str(seconds)]
        return self._keep(Run(self.cluster["stranger"], command))

    def rank(self, rank: int) -> int:
        """The id of a rank's process on this machine."""
        return self.cluster.find_rank(rank)[1].machine_pid

    def happens(self) -> float:
        """Now: what is measured is measured from here."""
        self.at = time.monotonic()
        return self.at

    # What is expected

    def ends(self, *said: str, within: float, most: float = 60.0) -> int:
        """One sentence of ours that names all that, so soon; the end soon after; no page of anybody else's."""
        status = self.run.wait(most)
        after = self.run.ended - self.at
        ours = [f"{at - self.at:.1f} s: {line}" for at, line in self.run.ours]
        print(f"\nEND status {status} after {after:.1f} s; {ours}; all: {self.run.text!r}")
        assert status != 0
        assert len(ours) == 1, self.run.text
        for text in said:
            assert re.search(text, ours[0]), ours[0]
        assert self.run.ours[0][0] - self.at < within + SLACK_S
        assert after < within + ENDED_S + SLACK_S
        self.without_pages()
        return status

    def ends_quietly(self, *allowed: str) -> None:
        """Not with 0, soon, and without a word or with "interrupted", or one of those ``allowed``."""
        status = self.run.wait(60)
        print(f"\nEND status {status} after {self.run.ended - self.at:.1f}: {self.run.text!r}")
        assert status != 0 and self.run.ended - self.at < ENDED_S + SLACK_S
        assert [line for _, line in self.run.ours] in ([], ["mpgpt: interrupted"], *([line] for line in allowed))
        self.without_pages()

    def without_pages(self) -> None:
        for _, line in self.run.errors:
            if not line.startswith(("mpgpt: ", "Abort is in progress")):
                assert not any(word in line for word in PAGES), self.run.text

    def tells_clients(self, *said: str, silent: str | None = None) -> None:
        """The stream ends by an error that says so, and /health gave the silent host's name before."""
        assert self.stream and self.health
        self.stream.wait(10)
        last = self.stream.json()[-1]
        print("STREAM", last)
        assert "error" in last["body"], last
        for text in said:
            assert re.search(text, last["body"]["error"]["message"]), last
        told = [answer for answer in self.health.json() if answer["at"] > self.at]
        bad = [answer for answer in told if answer["status"] == 503]
        if silent:
            assert bad, told
            blamed = [{rank["host"] for rank in answer["body"]["ranks"] if rank["silent_s"] > 0} for answer in bad]
            assert {silent} in blamed, bad[-1]

    def nothing_left(self, *names: str, seconds: float = 8.0) -> None:
        for name in names or HOSTS:
            left = self.cluster[name].wait_until_idle(seconds)
            assert not left, f"{name}: {[(p.pid, p.cmdline[:80]) for p in left]}"

    def finishes_later(self) -> None:
        """Whole records are kept, and the same command does what is missing."""
        kept = {record["id"]: record for record in self.records()}
        assert 0 < len(kept) < self.prompts
        self.start(self.run.command)
        assert self.run.wait(200) == 0, self.run.text
        records = self.records()
        assert sorted(record["id"] for record in records) == list(range(self.prompts))
        assert {record["id"]: record for record in records if record["id"] in kept} == kept
        assert not any(record["error"] for record in records)

    def goes_on(self, undisturbed: dict[int, list[int]]) -> None:
        """To its end, as if nothing had happened."""
        assert self.run.wait(200) == 0, self.run.text
        assert not self.run.ours and {record["id"]: record["token_ids"] for record in self.records()} == undisturbed


@pytest.fixture
def ring(cluster: Cluster, models: dict[str, Path], request: pytest.FixtureRequest) -> Iterator[Ring]:
    """A ring whose mpirun is typed on mini1, or on another host where the test's parameter says so."""
    typed_on = getattr(request, "param", "mini1")
    for name in HOSTS:
        cluster[name].copy(models["llama"], MODEL)
    for name in ("mini1", "outside"):
        cluster[name].write_file(HOSTFILE, "".join(f"{host} slots=1\n" for host in HOSTS))
        cluster[name].write_file(f"{HOSTFILE}.yaml", SETTINGS)
    cluster["mini1"].path(OUT).parent.mkdir(parents=True, exist_ok=True)
    cluster["mini1"].path(OUT).unlink(missing_ok=True)
    made = Ring(cluster, typed_on)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def undisturbed(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[int]]:
    """The tokens of ``Ring.short_batch``, by id, of one process on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    prompts, out = folder / "prompts.jsonl", folder / "out.jsonl"
    lines = [{"id": n, "prompt": f"Number {n} is", "max_new_tokens": SHORT_TOKENS} for n in range(SHORT)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = [*COMMON[2:], "--kernel", "plain", "--threads", "1", "--max-sequences", "2"]
    command = [PYTHON, "-m", "mpgpt", "generate", "--model", str(models["llama"]), *options]
    subprocess.run(
        [*command, "--prompts", str(prompts), "--out", str(out)], check=True, capture_output=True, timeout=120
    )
    return {record["id"]: record["token_ids"] for record in map(json.loads, out.read_text().splitlines())}


SLOW = pytest.mark.slow_hosts
BOTH = pytest.mark.parametrize("how", ["batch", pytest.param("serve", marks=SLOW)])
OUTSIDE = pytest.mark.parametrize("ring", ["outside"], indirect=True)

# A rank


@BOTH
@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_is_killed(ring: Ring, how: str, rank: int) -> None:
    getattr(ring, how)()
    pid = ring.rank(rank)
    ring.happens()
    os.kill(pid, signal.SIGKILL)
    ring.ends(f"rank {rank} on {HOSTS[rank]}", within=1)
    if how == "serve" and rank:
        ring.tells_clients("rank 1 on mini2")
    ring.nothing_left()


@SLOW
@BOTH
@pytest.mark.parametrize("rank", [1, 0])
def test_a_rank_is_stopped(ring: Ring, how: str, rank: int) -> None:
    getattr(ring, how)()
    pid = ring.rank(rank)
    ring.happens()
    os.kill(pid, signal.SIGSTOP)
    ring.ends(f"rank {rank} on {HOSTS[rank]}", "[0-9] s", within=NOTICED_S)
    if how == "serve" and rank:
        ring.tells_clients("rank 1 on mini2", silent="mini2")
    ring.nothing_left()


@SLOW
def test_a_rank_is_told_to_end(ring: Ring) -> None:
    ring.batch()
    pid = ring.rank(1)
    ring.happens()
    os.kill(pid, signal.SIGTERM)
    ring.ends("rank 1 on mini2 was ended", within=1)
    ring.nothing_left()


# A host


@SLOW
def test_a_host_is_shut_down(ring: Ring) -> None:
    """All its processes are told to end at the same time. What mpirun sees first decides what is said."""
    ring.batch(prompts=12)
    ring.happens()
    for process in ring.cluster["mini2"].processes():
        with suppress(ProcessLookupError):
            os.kill(process.machine_pid, signal.SIGTERM)
    status = ring.run.wait(30)
    print(f"\nEND status {status} after {ring.run.ended - ring.at:.1f}: {ring.run.text!r}")
    assert status != 0
    ring.without_pages()
    ring.nothing_left()
    ring.finishes_later()


@SLOW
@BOTH
@pytest.mark.parametrize("host", ["mini2"])
def test_a_cable_is_out_for_good(ring: Ring, how: str, host: str) -> None:
    getattr(ring, how)()
    ring.happens()
    ring.cluster.network.set(host, up=False)
    ring.ends(f"on {host}", "[0-9] s", within=NOTICED_S)
    if how == "serve":
        ring.tells_clients(f"on {host}", silent=host)
    ring.nothing_left(*[name for name in HOSTS if name != host])
    ring.cluster.network.set(host, up=True)
    ring.nothing_left(host, seconds=10)


@BOTH
def test_a_host_is_off(ring: Ring, how: str) -> None:
    getattr(ring, how)()
    ring.happens()
    ring.cluster["pi5"].power_off()
    ring.ends("rank 2 on pi5", "[0-9] s", within=NOTICED_S)
    if how == "serve":
        ring.tells_clients("rank 2 on pi5", silent="pi5")
    ring.nothing_left("mini1", "mini2")


@SLOW
def test_the_host_of_rank_0_is_off(ring: Ring) -> None:
    ring.batch()
    ring.happens()
    ring.cluster["mini1"].power_off()
    for name in ("mini2", "pi5"):
        end = time.monotonic() + NOTICED_S + SLACK_S
        while left := [process for process in ring.cluster[name].processes() if "sshd" not in process.name]:
            assert time.monotonic() < end, left
            time.sleep(0.1)
    ring.cluster["mini1"].boot()  # which tells the two sshd that nobody is there any more
    ring.nothing_left(seconds=40)


def test_a_cable_is_out_for_3_seconds(ring: Ring, undisturbed: dict[int, list[int]]) -> None:
    ring.be_patient(10)
    ring.short_batch()
    ring.cluster.network.set("mini2", up=False)
    time.sleep(3)
    ring.cluster.network.set("mini2", up=True)
    ring.goes_on(undisturbed)


@SLOW
@BOTH
def test_a_host_is_off_and_back(ring: Ring, how: str, models: dict[str, Path]) -> None:
    ring.be_patient(15)
    ring.batch(prompts=12) if how == "batch" else ring.serve()
    ring.happens()
    ring.cluster["pi5"].power_off()
    time.sleep(1)
    ring.cluster["pi5"].boot()
    ring.ends("rank 2 on pi5", within=10)
    if how == "serve":
        ring.tells_clients("rank 2 on pi5")
        return
    ring.nothing_left()
    ring.cluster["pi5"].copy(models["llama"], MODEL)
    ring.finishes_later()


@SLOW
def test_a_network_that_loses_one_of_twenty(ring: Ring, undisturbed: dict[int, list[int]]) -> None:
    ring.short_batch()
    ring.cluster.network.set("mini2", loss=0.05)
    ring.goes_on(undisturbed)


@SLOW
def test_all_udp_is_dropped(ring: Ring, undisturbed: dict[int, list[int]]) -> None:
    ring.cluster.network.drop_udp()
    ring.short_batch()
    ring.goes_on(undisturbed)


@SLOW
@BOTH
def test_a_cut_in_one_direction(ring: Ring, how: str) -> None:
    getattr(ring, how)()
    ring.happens()
    ring.cluster.network.cut("mini2", "pi5")
    ring.ends("on mini2", "on pi5", "[0-9] s", within=NOTICED_S)
    if how == "serve":
        ring.tells_clients("mini2", "pi5")
    ring.nothing_left()


HOG = """
import os, sys, time
held = []
while os.path.exists("/proc/" + sys.argv[1]):
    held.append(b"x" * (8 << 20))
    time.sleep(0.01)
"""


@SLOW
def test_a_host_runs_out_of_memory(ring: Ring) -> None:
    host = ring.cluster["mini2"]
    if not host.limits or not host.limits.has_memory:
        pytest.skip("this machine's control groups do not limit memory")
    ring.batch()
    host.limits.set_memory(1 << 30)
    rank = ring.cluster.find_rank(1)[1]
    Path("/proc", str(rank.machine_pid), "oom_score_adj").write_text("1000")  # the kernel takes it first
    with host.started([PYTHON, "-c", HOG, str(rank.pid)]) as hog:
        while psutil.pid_exists(rank.machine_pid):
            assert hog.poll() is None, hog.communicate()
            time.sleep(0.01)
        ring.happens()
        ring.ends("rank 1 on mini2", within=1)
        hog.wait(30)
    ring.nothing_left()


@SLOW
def test_the_disk_is_full(ring: Ring) -> None:
    folder = Path(OUT).parent
    assert ring.rank0.run(f"mount -t tmpfs -o size=32k tmpfs {folder}").returncode == 0
    ring.batch(prompts=16)
    ring.happens()
    ring.ends(f"--out {OUT} cannot be written: No space left on device; it holds [0-9]+ records", within=60)
    ring.nothing_left()
    assert ring.rank0.run(f"mount -o remount,size=4m {folder}").returncode == 0
    ring.finishes_later()
    assert ring.rank0.run(f"umount {folder}").returncode == 0


# Somebody else on the network


STRANGER = """
import os, socket, sys, threading, time
address, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
end = time.monotonic() + seconds
greeting = b"mpgb" + bytes([1, 0, 0, 0]) + bytes(16)
held = []

def junk():
    for n in range(10**9):
        if time.monotonic() > end:
            return
        try:
            with socket.create_connection((address, port), 1) as one:
                one.sendall([os.urandom(4096), greeting + os.urandom(32), b"GET / HTTP/1.1\r\n\r\n"][n % 3])
        except OSError:
            pass
        time.sleep(0.005)

def hold():
    while time.monotonic() < end:
        try:
            held.append(socket.create_connection((address, port), 1))
        except OSError:
            pass
        time.sleep(0.02)

def flood():
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    while time.monotonic() < end:
        for _ in range(10):
            try:
                datagrams.sendto(bytes(64), (address, port))
            except OSError:
                pass
        time.sleep(0.005)

threads = [threading.Thread(target=what) for what in (junk, hold, flood)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def heartbeat_port(host: Host) -> int:
    """The one on which a rank listens with a backlog of 128, other than the API's."""
    for line in host.run("ss -ltnpH").stdout.splitlines():
        _, _, backlog, address = line.split()[:4]
        port = int(address.rpartition(":")[2])
        if backlog == "128" and '"mpgpt"' in line and port != PORT:
            return port
    raise AssertionError("no rank listens for heartbeats")


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


@SLOW
def test_a_stranger_disturbs_no_text(ring: Ring, undisturbed: dict[int, list[int]]) -> None:
    ring.short_batch()
    for host in (ring.rank0, ring.cluster["pi5"]):
        ring.stranger(host, 8)
    ring.goes_on(undisturbed)
    ring.nothing_left("stranger", seconds=20)


@SLOW
def test_a_stranger_costs_an_idle_rank_little(ring: Ring) -> None:
    ring.serve(clients=False)
    seconds = 5.0
    pid = ring.rank(0)
    attack = ring.stranger(ring.rank0, seconds + 1)
    time.sleep(0.5)
    before, begun = cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    share = (cpu_seconds(pid) - before) / (time.monotonic() - begun)
    print(f"idle CPU {share:.3f}")
    assert share < 0.3
    attack.wait(30)
    assert ring.run.process.poll() is None and not ring.run.ours


# The end


@BOTH
@pytest.mark.parametrize("off", [False, True])
def test_ctrl_c(ring: Ring, how: str, off: bool) -> None:
    getattr(ring, how)()
    if off:
        ring.cluster["pi5"].power_off()
        time.sleep(0.5)
    ring.happens()
    ring.typed_on.interrupt(ring.run.process)
    ring.ends_quietly()
    ring.nothing_left("mini1", "mini2")


@SLOW
@pytest.mark.parametrize("what", ["mpgpt-ssh mini2", "^ssh .*mini2"])
def test_a_connection_is_killed(ring: Ring, what: str) -> None:
    ring.batch()
    pid = ring.rank0.find(what)[0].machine_pid
    ring.happens()
    os.kill(pid, signal.SIGKILL)
    status = ring.run.wait(30)
    print(f"\nEND status {status} after {ring.run.ended - ring.at:.1f}: {ring.run.text!r}")
    assert status != 0
    ring.without_pages()
    ring.nothing_left()


@SLOW
def test_mpirun_is_killed(ring: Ring) -> None:
    ring.batch()
    ring.happens()
    ring.rank0.kill("mpirun|prterun")
    ring.run.wait(30)
    print(ring.run.text)
    ring.nothing_left()


# mpirun on a host that is not in the hostfile


@SLOW
@OUTSIDE
@pytest.mark.parametrize("off", [False, True])
def test_outside_ctrl_c(ring: Ring, off: bool) -> None:
    ring.batch()
    if off:
        ring.cluster["pi5"].power_off()
        time.sleep(0.5)
    ring.happens()
    ring.typed_on.interrupt(ring.run.process)
    # Where mpirun cannot tell rank 0, its daemon kills it as mpirun goes, and the guard cannot know why.
    ring.ends_quietly(*(["mpgpt: rank 0 on mini1 ended without a word: it was killed"] if off else []))
    ring.nothing_left("mini1", "mini2", "outside")


@SLOW
@OUTSIDE
@pytest.mark.parametrize("how", ["kill", "stop"])
@pytest.mark.parametrize("rank", [0, 2])
def test_outside_a_rank(ring: Ring, rank: int, how: str) -> None:
    ring.batch()
    pid = ring.rank(rank)
    ring.happens()
    os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    ring.ends(f"rank {rank} on {HOSTS[rank]}", within=NOTICED_S)
    ring.nothing_left(*HOSTS, "outside")


@SLOW
@OUTSIDE
@pytest.mark.parametrize("host", ["mini1", "pi5"])
def test_outside_a_host_is_off(ring: Ring, host: str) -> None:
    ring.batch()
    ring.happens()
    ring.cluster[host].power_off()
    ring.ends(f"on {host}", "[0-9] s", within=NOTICED_S)
    ring.nothing_left("mini2", "outside")
