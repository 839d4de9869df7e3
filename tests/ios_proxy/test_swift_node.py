"""The Swift node as a program against the Python proxy: what is sent, resumed, refused, and computed to the last bit.

Skipped where nobody has built it: `swift build --package-path ios_proxy/GPT2Node`, or MPGPT_NODE names the binary.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("coremltools")

from mpgpt.transport.doorbell import Doorbell
from mpgpt_ios.bundle import Bundle, Manifest
from mpgpt_ios.executor import EvaluatorBackend, Executor
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import SessionError
from mpgpt_ios.proxy.client import Client
from tests.ios_proxy.packages import CHUNK, CONTEXT, EMBED, HEADS, LAYERS, SLOTS, Array, Small, rows
from tests.ios_proxy.rig import TOKEN, ByHand, Wire
from tests.support.launch import ENV, ROOT
from tests.support.swift import built

READY_S = 60.0
"""A child that imports torch takes its time on a busy machine."""


@pytest.fixture(scope="module")
def program() -> Path:
    return built("mpgpt-node")


@pytest.fixture(scope="module")
def package(small: dict[str, Small], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small GPT-2 with a manifest and a self-test."""
    return make_bundle(small["gpt2"], tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def other(small: dict[str, Small], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """One that fails its self-test."""
    return make_bundle(small["gpt2"], tmp_path_factory.mktemp("other"), truth_off_by=1.0)


def make_bundle(small: Small, folder: Path, truth_off_by: float = 0.0) -> Bundle:
    package = folder / "small.mlpackage"
    shutil.copytree(small.path, package)
    sizes = small.sizes
    manifest = {
        "format": 1, "model": "small", "model_hash": "ab" * 32, "family": "gpt2", "model_layers": LAYERS,
        "layers": (0, LAYERS), "embed": EMBED, "heads": HEADS, "kv_heads": sizes.kv_heads, "head_dim": sizes.head_dim,
        "slots": SLOTS, "context": CONTEXT, "chunk": CHUNK, "weights": "float16", "rotary": None, "tolerance": 0.05,
        "made_by": {"mpgpt": "0", "coremltools": "9", "torch": "2"},
    }  # fmt: skip
    (folder / "small.manifest.json").write_text(Manifest.model_validate(manifest).model_dump_json())
    x = rows(5, seed=3)
    tensors: dict[str, Any] = {
        "0.slot": np.zeros(5, np.int32), "0.pos": np.arange(5, dtype=np.int32), "0.x": x,
        "0.y": small.model.whole(x) + np.float32(truth_off_by),
    }  # fmt: skip
    save_file(tensors, folder / "small.selftest.safetensors", metadata={"kind.0": "prefill"})
    return Bundle.at(package)


@dataclass(slots=True)
class Node:
    """A node that listens, and what it has printed."""

    process: subprocess.Popen[str]
    port: int

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip("\n")


Start = Callable[..., contextlib.AbstractContextManager[Node]]


@pytest.fixture
def start(program: Path, tmp_path: Path) -> Start:
    (tmp_path / "token").write_bytes(TOKEN + b"\n")

    @contextlib.contextmanager
    def start(*options: str | Path, port: int = 0, token: str = "token", python: bool = False) -> Iterator[Node]:
        where = ("--port", str(port), "--token-file", str(tmp_path / token), "--store", str(tmp_path / "store"))
        swift = (str(program), "--python", sys.executable)
        command = (sys.executable, "-m", "mpgpt", "ipad-node") if python else swift
        process = subprocess.Popen([*command, *where, *map(str, options)], stdout=subprocess.PIPE, text=True, **child())
        try:
            assert process.stdout
            line = process.stdout.readline()
            assert line.startswith("listening on 127.0.0.1:"), line
            yield Node(process, int(line.rpartition(":")[2]))
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=10)
            process.kill()
            process.communicate()

    return start


def child() -> dict[str, Any]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "ios_proxy")])
    return {"env": ENV | {"PYTHONPATH": path}, "cwd": ROOT}


@contextlib.contextmanager
def by_hand(node: Node, bundle: Bundle, token: bytes = TOKEN) -> Iterator[ByHand]:
    proxy = ByHand(node.port, bundle, token)
    proxy.socket.settimeout(READY_S)
    try:
        yield proxy
    finally:
        proxy.close()


def prefill(number: int, x: Array, position: int, *, slot: int = 0, epoch: int = 1) -> m.Prefill:
    return m.Prefill(epoch=epoch, request=number, positions=((slot, position),), x=x)


def decode(number: int, x: Array, positions: m.Positions) -> m.Decode:
    return m.Decode(epoch=1, request=number, positions=positions, x=x)


def result(message: m.Message) -> m.Result:
    assert isinstance(message, m.Result), message
    return message


def test_a_package_is_sent_once_and_used(start: Start, package: Bundle, tmp_path: Path) -> None:
    for again in (False, True):
        with start() as node, by_hand(node, package) as proxy:
            proxy.serving()
            wants = [message.offset for message in proxy.heard if isinstance(message, m.Want)]
            assert wants == [package.length if again else 0]
            ready = next(message for message in proxy.heard if isinstance(message, m.Ready))
            assert ready.facts["unit"] == "evaluator, declared" and ready.facts["dtype"] == "float16"
            assert ready.facts["layers"] == [0, LAYERS] and 0 <= ready.facts["selftest"] < 0.05
            info = next(message for message in proxy.heard if isinstance(message, m.Info))
            assert info.facts["bundles"] == ([package.hash.hex()] if again else [])
            assert "the proxy at 127.0.0.1" in node.line()
            x = rows(3)
            proxy.send(prefill(1, x, 0))
            answer = result(proxy.hear())
            executor = Executor(EvaluatorBackend(package.package), package.manifest)
            assert answer.y.tobytes() == executor.prefill(0, 0, x).tobytes() and answer.compute_ns > 0
            proxy.send(m.Bye())
            node.process.terminate()
            assert node.process.wait(10) == 0


def test_a_package_that_came_half_is_taken_up_by_the_next_node(start: Start, package: Bundle) -> None:
    with start() as node, by_hand(node, package) as proxy:
        proxy.take(proxy.until(m.Info))
        assert proxy.hear() == m.Want(offset=0)
        half = package.length // 2
        proxy.send(m.Data(offset=0, piece=package.read(0, half)), m.Ping(number=1))
        assert isinstance(proxy.hear(), m.Pong)
        time.sleep(0.2)
        node.process.kill()
        node.process.wait(10)
    with start() as node, by_hand(node, package) as proxy:
        proxy.serving()
        assert [message.offset for message in proxy.heard if isinstance(message, m.Want)] == [half]


def test_a_node_that_is_killed_and_restarted_is_used_again(start: Start, package: Bundle, tmp_path: Path) -> None:
    """The rank's own client dials again, and finds the package where it left it."""
    bell, said = Doorbell(), list[str]()
    with contextlib.ExitStack() as stack:
        stack.callback(bell.close)
        node = stack.enter_context(start())
        client = Client(("127.0.0.1", node.port), TOKEN, package, bell, timeout_s=READY_S, report=said.append)
        stack.callback(client.close)
        assert client.wait_until_ready(), said
        node.process.send_signal(signal.SIGKILL)
        node.process.wait(10)
        stack.enter_context(start(port=node.port))
        deadline = time.monotonic() + READY_S
        while client.epoch != 2 and time.monotonic() < deadline:
            client.redial()
            time.sleep(0.2)
        assert client.epoch == 2 and "is back: evaluator" in said[-1], said
        assert sum("sending its package" in line for line in said) == 1


def test_another_token(start: Start, package: Bundle, tmp_path: Path) -> None:
    (tmp_path / "another").write_text("quite another token")
    with start(token="another") as node:
        with by_hand(node, package) as proxy, pytest.raises(SessionError, match="another token"):
            proxy.serving()
        with by_hand(node, package) as proxy:
            proxy.send(m.Hello(nonce=bytes(32)))
            assert isinstance(proxy.hear(), m.Challenge)
            proxy.send(m.Proof(proof=bytes(32)))
            trouble = proxy.hear()
            assert isinstance(trouble, m.Error) and trouble.code == "BAD_TOKEN"
            with pytest.raises(EOFError):
                proxy.hear()


def test_requests_that_fail_and_requests_that_are_dropped(start: Start, package: Bundle) -> None:
    with start("--package", package.package) as node, by_hand(node, package) as proxy:
        proxy.serving()
        x = rows(2)
        proxy.send(prefill(1, x, 0), prefill(2, x, 7), prefill(3, x, 2))
        heard = [proxy.hear() for _ in range(3)]
        assert [message.request for message in heard] == [1, 2, 3]  # type: ignore[union-attr]
        assert isinstance(heard[1], m.Error) and heard[1].code == "BAD_POS"
        proxy.send(*(prefill(number, x, 0) for number in range(4, 12)), m.Reset(epoch=2), prefill(12, x, 0, epoch=2))
        while (message := proxy.hear()) and getattr(message, "epoch", 0) == 1:
            assert result(message).request < 12, "it may have been done before the RESET came"
        assert result(message).request == 12 and result(message).y.tobytes() == result(heard[0]).y.tobytes()
        proxy.send(m.Ping(number=5))
        pong = proxy.hear()
        assert isinstance(pong, m.Pong) and pong.number == 5 and pong.facts["free"] > 0
        proxy.send(prefill(13, x, 0, slot=SLOTS, epoch=2))
        trouble = proxy.hear()
        assert isinstance(trouble, m.Error) and trouble.code == "BAD_REQUEST"


def test_a_package_that_fails_its_selftest_is_not_tried_again(start: Start, other: Bundle) -> None:
    said = []
    with start() as node:
        for _ in "12":
            with by_hand(node, other) as proxy:
                trouble = proxy.until(m.Error)
                assert isinstance(trouble, m.Error) and trouble.code == "LOAD_FAILED"
                said.append(trouble.text)
    assert "self-test" in said[0] and "is not tried again" in said[1]


def test_a_child_that_dies_is_another_at_the_next_load(start: Start, package: Bundle) -> None:
    with start("--package", package.package) as node:
        with by_hand(node, package) as proxy:
            proxy.serving()
            (pid,) = children(node.process.pid)
            os.kill(pid, signal.SIGKILL)
            proxy.send(prefill(1, rows(2), 0))
            trouble = proxy.hear()
            assert isinstance(trouble, m.Error) and (trouble.code, trouble.request) == ("COMPUTE_FAILED", 1)
        with by_hand(node, package) as proxy:
            proxy.serving()
            proxy.send(prefill(1, rows(2), 0))
            assert result(proxy.hear()).request == 1


HANGING = """#!{python}
import sys, time
from pathlib import Path
from mpgpt_ios import predicting
from mpgpt_ios.executor import EvaluatorBackend

run = EvaluatorBackend.run

def run_or_hang(self, function, inputs):
    while Path("{flag}").exists():
        time.sleep(0.05)
    return run(self, function, inputs)

EvaluatorBackend.run = run_or_hang
sys.argv[:] = sys.argv[2:]  # behind -m
sys.exit(predicting.main())
"""


def test_a_child_that_hangs_is_ended(start: Start, package: Bundle, tmp_path: Path) -> None:
    flag, script = tmp_path / "hang", tmp_path / "python"
    script.write_text(HANGING.format(python=sys.executable, flag=flag))
    script.chmod(0o755)
    with start("--package", package.package, "--python", script, "--timeout", "3") as node:
        with by_hand(node, package) as proxy:
            proxy.serving()
            (pid,) = children(node.process.pid)
            flag.touch()
            begun = time.monotonic()
            proxy.send(prefill(1, rows(2), 0))
            trouble = proxy.hear()
            assert isinstance(trouble, m.Error) and (trouble.code, trouble.request) == ("COMPUTE_FAILED", 1)
            assert "has not answered for 3 s, and was ended" in trouble.text and time.monotonic() - begun < 10
            while pid in children(node.process.pid):
                assert time.monotonic() - begun < 10
                time.sleep(0.05)
            proxy.send(m.Reset(epoch=2))
            closing = proxy.hear()
            assert isinstance(closing, m.Error) and (closing.code, closing.request) == ("COMPUTE_FAILED", 0)
            with pytest.raises(EOFError):
                proxy.hear()
        flag.unlink()
        with by_hand(node, package) as proxy:
            proxy.serving()
            proxy.send(prefill(1, rows(2), 0))
            assert result(proxy.hear()).request == 1


def children(pid: int) -> list[int]:
    told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in told.stdout.split()]


def test_the_same_bytes_as_the_python_node(start: Start, package: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    """200 calls in a random order, through all slots: chunks, single tokens, ends of the context, slots begun anew."""
    rng = np.random.default_rng(5)
    filled, calls = [0] * SLOTS, list[tuple[Array, m.Positions]]()
    for _ in range(200):
        slots = rng.permutation(SLOTS)[: rng.integers(1, SLOTS + 1)]
        if rng.random() < 0.5:
            slot = int(slots[0])
            begin = int(rng.integers(0, filled[slot] + 1)) if rng.random() < 0.3 else filled[slot]
            begin = 0 if begin >= CONTEXT else begin
            count = int(rng.integers(1, min(CONTEXT - begin, 3 * CHUNK) + 1))
            positions: m.Positions = ((slot, begin),)
            filled[slot] = begin + count
        else:
            positions = tuple((int(slot), filled[slot] % CONTEXT) for slot in slots)
            count = len(positions)
            for slot, position in positions:
                filled[slot] = position + 1
        calls.append((rng.normal(size=(count, EMBED)).astype(np.float16), positions))
    answers, outside_ms = list[list[bytes]](), list[float]()
    for python in (False, True):
        options = ("--package", package.package)
        with start(*options, python=python) as node, by_hand(node, package) as proxy:
            proxy.serving()
            outside, answered = list[float](), list[bytes]()
            for number, (x, positions) in enumerate(calls, 1):
                single = len(x) == len(positions)
                begun = time.perf_counter()
                proxy.send(
                    decode(number, x, positions)
                    if single
                    else prefill(number, x, positions[0][1], slot=positions[0][0])
                )
                answer = result(proxy.hear())
                outside.append(time.perf_counter() - begun - answer.compute_ns / 1e9)
                answered.append(answer.y.tobytes())
            answers.append(answered)
            outside_ms.append(float(np.median(outside)) * 1e3)
    assert answers[0] == answers[1]
    with capsys.disabled():
        print(f" [outside computing, a request: Swift {outside_ms[0]:.2f} ms, Python {outside_ms[1]:.2f} ms] ", end="")


def test_strangers_and_a_wire_that_is_bent(start: Start, package: Bundle) -> None:
    with start("--package", package.package) as node, contextlib.ExitStack() as stack:
        wire = Wire(node.port)
        stack.callback(wire.close)
        for junk in (b"\xff" * 5000, b"GET / HTTP/1.1\r\n\r\n", b"mpIP\x02"):
            stranger = stack.enter_context(socket.create_connection(("127.0.0.1", wire.port)))
            stranger.sendall(junk)
        proxy = stack.enter_context(by_hand(node, package))
        proxy.serving()
        proxy.send(prefill(1, rows(2), 0))
        assert result(proxy.hear()).request == 1


# -- the command line


def run(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=READY_S, check=False, **child())


def test_check_says_how_far_a_package_is_off(program: Path, package: Bundle, other: Bundle) -> None:
    good = run(program, "check", package.package, "--python", sys.executable)
    assert good.returncode == 0 and good.stdout.startswith("evaluator, declared: off by 0.0"), good
    assert "ms a token" in good.stdout and "loaded in" in good.stdout, good
    bad = run(program, "check", other.package, "--python", sys.executable)
    assert bad.returncode == 1 and "self-test" in bad.stderr, bad
    absent = run(program, "check", "absent.mlpackage")
    assert absent.returncode == 1 and "absent.mlpackage" in absent.stderr, absent


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "needs --token-file"),
        (("--token-file", "absent"), "there is no token file absent"),
        (("--token-file", "short"), "16 to 1024 bytes"),
        (("--token-file", "token", "--port", "70000"), "--port is 0 to 65535"),
        (("--token-file", "token", "--threads"), "--threads needs a value"),
        (("--units", "gpu"), "--units is a list of evaluator, not gpu"),
        (("--timeout", "0"), "--timeout is 1 to 86400, not 0"),
        (("--verbose",), "there is no option --verbose"),
        (("check",), "check needs a package"),
    ],
)
def test_what_cannot_be_is_said(program: Path, tmp_path: Path, options: tuple[str, ...], words: str) -> None:
    (tmp_path / "token").write_bytes(TOKEN)
    (tmp_path / "short").write_text("short")
    with contextlib.chdir(tmp_path):
        ended = subprocess.run(
            [str(program), *options], capture_output=True, text=True, timeout=READY_S, check=False, env=ENV
        )
    assert ended.returncode == 2 and words in ended.stderr and not ended.stdout, ended


def test_a_port_that_is_taken(program: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(TOKEN)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ended = run(program, "--token-file", tmp_path / "token", "--port", str(port), "--store", tmp_path / "store")
    assert ended.returncode == 2 and f"cannot listen on 127.0.0.1:{port}" in ended.stderr, ended
