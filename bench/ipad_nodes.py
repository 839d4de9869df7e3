"""The iPad's node in Swift beside its stand-in in Python, with no ring: time outside of computing, memory, descriptors.

    swift build -c release --package-path ios_proxy/GPT2Node --product mpgpt-node
    python bench/ipad_nodes.py --node ios_proxy/GPT2Node/.build/release/mpgpt-node [--requests 10000] [--rounds 5]

One layer of SmolLM2 as a package (kept in bench/out/), which both nodes execute in the same evaluator: the one in Swift
in a child. A client, the proxy rank's own, asks each for one token after another, in turn: ``--requests`` in all, in
``--rounds`` rounds. Printed are for each node the median over the rounds of what a request takes beside computing, and
the resident memory and open descriptors of its processes after each round.

Knows: the commands, what the system tells of a process. Must not know: how a node works.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from mpgpt.core import Span
from mpgpt.model.pull import model_home, pull
from mpgpt.transport.doorbell import Doorbell, wait
from mpgpt_ios.bundle import Bundle
from mpgpt_ios.convert.package import PackageOptions, convert
from mpgpt_ios.proxy.client import Client
from mpgpt_ios.proxy.stage import Call

OUT = Path(__file__).parent / "out"
SPAN, CONTEXT = Span(start=10, stop=11), 256
TIMEOUT_S = 30.0


@dataclass(slots=True)
class Node:
    """A node under way, and what was measured of it."""

    process: psutil.Process
    client: Client
    bell: Doorbell
    outside_ms: list[float] = field(default_factory=list)
    """Of each round, a request."""
    states: list[tuple[int, int]] = field(default_factory=list)
    """After each round: MB of memory, open descriptors."""

    def ask(self, requests: int, embed: int) -> None:
        """One token after another of one sequence, begun anew where the context ends."""
        epoch = self.client.epoch
        if epoch is None:
            raise SystemExit(self.client.trouble)
        self.client.account()
        x = np.random.default_rng(1).normal(size=(1, embed)).astype(np.float32)
        for number in range(requests):
            self.client.submit(epoch, Call(slots=(0,), positions=(number % CONTEXT,), x=x))
            wait(lambda: self._is_over(epoch), self.bell, TIMEOUT_S)
            if self.client.epoch != epoch:
                raise SystemExit(self.client.trouble)
        account = self.client.account()
        self.outside_ms.append(account.network_s / account.requests * 1e3)
        family = [self.process, *self.process.children(recursive=True)]
        memory = sum(process.memory_info().rss for process in family) // 1_000_000
        self.states.append((memory, sum(process.num_fds() for process in family)))

    def _is_over(self, epoch: int) -> bool:
        """Whether the answer has been taken, or will never come."""
        return self.client.take(epoch) is not None or self.client.epoch != epoch


@contextlib.contextmanager
def started(command: list[str], folder: Path, bundle: Bundle) -> Iterator[Node]:
    options = ["--port", "0", "--token-file", str(folder / "token"), "--store", str(folder / "store")]
    command = [*command, *options, "--package", str(bundle.package)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        port, bell = int(process.stdout.readline().rpartition(":")[2]), Doorbell()
        token = (folder / "token").read_bytes()
        client = Client(("127.0.0.1", port), token, bundle, bell, timeout_s=TIMEOUT_S, report=lambda said: None)
        try:
            client.wait_until_ready()
            yield Node(psutil.Process(process.pid), client, bell)
        finally:
            client.close()
            bell.close()
            process.terminate()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--node", type=Path, required=True, help="the mpgpt-node that was built")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    model = pull("smollm2-135m", home=model_home(), progress=False)
    path = OUT / f"smollm2-135m-{SPAN}.mlpackage"
    bundle, _ = convert(model, SPAN, path, PackageOptions(slots=4, context=CONTEXT))
    commands = {
        "Swift": [str(options.node), "--python", sys.executable],
        "Python": [sys.executable, "-m", "mpgpt", "ipad-node"],
    }
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        (folder / "token").write_text(secrets.token_urlsafe())
        nodes = {what: stack.enter_context(started(command, folder, bundle)) for what, command in commands.items()}
        for number in range(options.rounds):
            for what, node in nodes.items():
                node.ask(options.requests // options.rounds, bundle.manifest.embed)
                ms, (memory, descriptors) = node.outside_ms[-1], node.states[-1]
                print(f"round {number + 1}, {what:6}: {ms:.2f} ms, {memory} MB, {descriptors} descriptors", flush=True)
        for what, node in nodes.items():
            low, high = min(node.outside_ms), max(node.outside_ms)
            print(f"{what:6}: {statistics.median(node.outside_ms):.2f} ms a request ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
