"""A node, a proxy's stage and a wire between them that can be cut: real sockets, and torch where Core ML would compute.

Both ends compute the same layers of the same small random model in float32, so whatever happens on the way, the answers
must be those of one stage alone.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from mpgpt.core import Result, Row, Span, Step
from mpgpt.engine.stage import TorchStage
from mpgpt.model.linear import Kernels
from mpgpt.model.sampler import Sampler
from mpgpt.model.slice import Slice
from mpgpt.model.weights import Checkpoint, model_config
from mpgpt.transport.doorbell import Doorbell
from mpgpt_ios.bundle import Bundle, slice_hash
from mpgpt_ios.executor import BadPosition
from mpgpt_ios.node.bundle_store import Store
from mpgpt_ios.node.server import NodeServer
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.frames import Frames, encode
from mpgpt_ios.protocol.proxy_session import ProxySession
from mpgpt_ios.proxy.client import BACK_OFF_S, Client
from mpgpt_ios.proxy.stage import IPadStage, StageSizes

SLOTS, CONTEXT, CHUNK, EMBED, SPAN = 3, 256, 8, 64, Span(start=1, stop=4)
SIZES = StageSizes(slots=SLOTS, context=CONTEXT, embed=EMBED, chunk=CHUNK)
TOKEN = b"a token that both ends have"


def torch_stage(folder: Path) -> TorchStage:
    config = model_config(folder)
    model = Slice(config, SPAN, Checkpoint(folder), slots=SLOTS, context=CONTEXT, kernels=Kernels(dtype="float32"))
    return TorchStage(model, Sampler(slots=SLOTS, context=CONTEXT, vocab=config.vocab), lambda: None)


def a_step(number: int, *rows: tuple[int, int, int]) -> Step:
    """Rows of (slot, start, tokens); hidden states that float16 holds exactly, the same for the same number."""
    made = tuple(Row(slot=slot, start=start, ids=(1,) * count) for slot, start, count in rows)
    x = torch.randn(sum(len(row.ids) for row in made), EMBED, generator=torch.Generator().manual_seed(number))
    return Step(epoch=0, number=number, rows=made, hidden=bytearray(x.half().float().numpy().tobytes()))


STEPS = [a_step(1, (0, 0, 20), (1, 0, 3)), *(a_step(n, (0, 18 + n, 1), (1, 1 + n, 1)) for n in range(2, 12))]


def hidden(step: Step | Result | None) -> torch.Tensor:
    assert isinstance(step, Step)
    return torch.frombuffer(bytearray(step.hidden), dtype=torch.float32).view(-1, EMBED)


class TorchExecutor:
    """What ``executor.Executor`` promises, in torch; ``nap`` is how long a call takes at least."""

    def __init__(self, folder: Path) -> None:
        self._stage, self.dtype, self.nap = torch_stage(folder), np.dtype(np.float32), 0.0
        self.filled, self.calls = [0] * SLOTS, 0

    def reset(self) -> None:
        self.filled = [0] * SLOTS

    def prefill(self, slot: int, pos: int, x: Any) -> Any:
        return self.compute([Row(slot=slot, start=pos, ids=(0,) * len(x))], x)

    def decode(self, slots: list[int], positions: list[int], x: Any) -> Any:
        return self.compute([Row(slot=s, start=p, ids=(0,)) for s, p in zip(slots, positions, strict=True)], x)

    def compute(self, rows: list[Row], x: Any) -> Any:
        self.calls += 1
        time.sleep(self.nap)
        for row in rows:
            if row.start > self.filled[row.slot]:
                raise BadPosition(f"slot {row.slot} holds {self.filled[row.slot]} positions, not {row.start}")
            self.filled[row.slot] = row.stop
        step = Step(epoch=0, number=0, rows=tuple(rows), hidden=bytearray(x.astype(np.float32).tobytes()))
        return hidden(self._stage.forward(step)).numpy()


def make_bundle(folder: Path, out: Path, padding: int = 0) -> Bundle:
    """A bundle of the span with nothing in its package but ``padding`` bytes: for whoever computes in torch."""
    config = model_config(folder)
    package = out / "small.mlpackage"
    (package / "Data").mkdir(parents=True)
    (package / "Manifest.json").write_text("{}")
    (package / "Data" / "weight.bin").write_bytes(np.random.default_rng(1).bytes(padding))
    manifest = {
        "format": 1, "model": "small", "model_hash": slice_hash(config, Checkpoint(folder), SPAN), "family": "llama",
        "model_layers": config.layers, "layers": [SPAN.start, SPAN.stop], "embed": EMBED, "heads": config.heads,
        "kv_heads": config.kv_heads, "head_dim": config.head_dim, "slots": SLOTS, "context": CONTEXT, "chunk": CHUNK,
        "weights": "float16", "rotary": None, "tolerance": 0.02,
        "made_by": {"mpgpt": "0", "coremltools": "9", "torch": "2"},
    }  # fmt: skip
    (out / "small.manifest.json").write_text(json.dumps(manifest))
    step = a_step(5, (0, 0, 4))
    truth = hidden(torch_stage(folder).forward(step)).numpy()
    tensors: dict[str, Any] = {
        "0.slot": np.zeros(4, np.int32), "0.pos": np.arange(4, dtype=np.int32),
        "0.x": hidden(step).numpy().astype(np.float16), "0.y": truth,
    }  # fmt: skip
    save_file(tensors, out / "small.selftest.safetensors", metadata={"kind.0": "prefill"})
    return Bundle.at(package)


@contextlib.contextmanager
def serving(
    folder: Path,
    store: Path,
    *,
    package: Bundle | None = None,
    port: int = 0,
    token: bytes = TOKEN,
    decide_s: float = 0.5,
) -> Iterator[tuple[NodeServer, TorchExecutor]]:
    """A node that listens, on a thread of its own."""
    executor, said = TorchExecutor(folder), list[str]()
    node = NodeServer(
        "127.0.0.1", port, token, Store(store), open_=lambda bundle: (executor, "torch"),  # type: ignore[arg-type,return-value]
        say=said.append, package=package, decide_s=decide_s,
    )  # fmt: skip
    thread = threading.Thread(target=node.serve, daemon=True)
    thread.start()
    try:
        yield node, executor
    finally:
        node.close()
        thread.join(10.0)
        assert not thread.is_alive()


class Wire:
    """A TCP relay between the proxy and a node, which can be cut, frozen, and bent."""

    def __init__(self, port: int) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.port: int = self._listener.getsockname()[1]
        self._to, self._closing, self._pairs = port, False, list[tuple[socket.socket, socket.socket]]()
        self.bend: Callable[[bytes, int], bytes | None] = lambda data, at: data
        """What becomes of bytes from the node to the proxy, of which ``at`` went by on this connection; None cuts."""
        self.bend_up: Callable[[bytes, int], bytes | None] = lambda data, at: data
        """The same from the proxy to the node."""
        self.frozen = self.closed = False
        self.dialled = 0
        self.up = 0
        """Bytes from the proxy to the node."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while not self._closing:
            with contextlib.suppress(TimeoutError):
                try:
                    near, _ = self._listener.accept()
                except OSError as error:
                    if isinstance(error, TimeoutError):
                        raise
                    return
                self.dialled += 1
                if self.closed:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self._to))
                except ConnectionRefusedError:  # the node has gone
                    near.close()
                    continue
                self._pairs.append((near, far))
                for a, b, up in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._pump, args=(a, b, up), daemon=True).start()

    def _pump(self, a: socket.socket, b: socket.socket, up: bool) -> None:
        at = 0
        with contextlib.suppress(OSError):
            while data := a.recv(4096):
                while self.frozen:
                    time.sleep(0.02)
                bent = (self.bend_up if up else self.bend)(data, at)
                at += len(data)
                self.up += len(data) * up
                if bent is None:
                    break
                b.sendall(bent)
        self._shut(a, b)

    @staticmethod
    def _shut(*sockets: socket.socket) -> None:
        for each in sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """Cut every connection that there is."""
        for pair in self._pairs:
            self._shut(*pair)

    def close(self) -> None:
        self._closing, self.frozen = True, False
        self.cut()
        self._listener.close()
        for pair in self._pairs:
            for each in pair:
                each.close()


class ByHand:
    """A proxy that does what a test says, message by message."""

    def __init__(self, port: int, bundle: Bundle, token: bytes = TOKEN) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.settimeout(15.0)
        self.session = ProxySession(token, bundle, bytes(range(32)), time.monotonic(), epoch=1, timeout_s=60.0)
        self._frames, self.heard = Frames(), list[m.Message]()

    def send(self, *messages: m.Message) -> None:
        self.socket.sendall(b"".join(map(encode, messages)))

    def hear(self) -> m.Message:
        """The next message that is no LOADING."""
        while (message := self._frames.next()) is None:
            data = self.socket.recv(1 << 16)
            if not data:
                raise EOFError
            self._frames.feed(data)
        self.heard.append(message)
        return self.hear() if isinstance(message, m.Loading) else message

    def take(self, message: m.Message) -> None:
        """Have the session take a message and send what it says to it."""
        self.session.receive(encode(message), time.monotonic())
        self.flush()

    def flush(self) -> None:
        self.session.fill()
        while self.session.out:
            self.socket.sendall(self.session.out)
            self.session.out.clear()
            self.session.fill()

    def until(self, *kinds: type[m.Message]) -> m.Message:
        """Go on as a proxy does, up to a message of these kinds, which the session does not take."""
        self.flush()
        while not isinstance(message := self.hear(), kinds):
            self.take(message)
        return message

    def serving(self) -> ByHand:
        """Go on until requests may be sent, in epoch 1."""
        self.take(self.until(m.Ready))
        return self

    def close(self) -> None:
        self.socket.close()


class Proxy:
    """The proxy rank: a client, its stage, and the truth to compare with."""

    def __init__(
        self, folder: Path, bundle: Bundle, port: int, *, token: bytes = TOKEN, timeout_s: float = 1.0,
        fallback: bool = True, back_off_s: Sequence[float] = BACK_OFF_S, busy_s: float = 0.5,
    ) -> None:  # fmt: skip
        self.bell, self.said = Doorbell(), list[str]()
        self.client = Client(
            ("127.0.0.1", port), token, bundle, self.bell, timeout_s=timeout_s, report=self.said.append,
            back_off_s=back_off_s, busy_s=busy_s,
        )  # fmt: skip
        self.stage = IPadStage(SPAN, self.client, torch_stage(folder) if fallback else None, self.bell, SIZES)
        self._truth = torch_stage(folder)

    def go(self, step: Step) -> bool:
        """Run a step; whether the answer came later, as from an iPad. Compares it with the truth."""
        answer = self.stage.forward(step)
        later = answer is None
        got = self.stage.finish() if answer is None else answer
        torch.testing.assert_close(hidden(got), hidden(self._truth.forward(step)), atol=2e-2, rtol=2e-3)
        return later

    def back(self, seconds: float = 15.0) -> None:
        """Wait until the iPad is back."""
        deadline = time.monotonic() + seconds
        while self.client.epoch is None:
            assert time.monotonic() < deadline, f"it did not come back: {self.said}"
            time.sleep(0.02)

    def close(self) -> None:
        self.stage.close()
        self.bell.close()
