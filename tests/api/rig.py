"""A server in this process: a ring of one with a small random model, the engine on a thread, uvicorn on another."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai

from mpgpt.cluster.ring import Ring
from mpgpt.cluster.session import Session, SessionOptions
from mpgpt.engine.engine import Engine
from mpgpt.transport.doorbell import Doorbell
from mpgpt.transport.link import Link, QueueLink, Silence, SoloWorld
from mpgpt_api import connections
from mpgpt_api.app import Served, make_app
from mpgpt_api.connections import MOST, Phase, most_requests
from mpgpt_api.connections import Server as HTTPServer
from mpgpt_api.guard import Access
from mpgpt_api.service import Limits, Service
from tests.support.models import save_random, save_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)
PATIENCE_S = 20.0


@dataclass(slots=True)
class Server:
    """A server that runs, and the ring behind it."""

    url: str
    folder: Path
    engine: Engine
    service: Service
    session: Session
    nap_s: list[float] = field(default_factory=lambda: [0.0])
    """How long every step takes besides; a list, to be changed while it runs."""
    silences: list[Silence] = field(default_factory=list)
    """Ranks that are not heard."""

    def client(self, **more: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **more)

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=PATIENCE_S, **more)

    def get(self, path: str, **more: Any) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE_S, **more)

    def idle(self) -> None:
        """Wait until nothing is under way any more."""
        until(lambda: not self.engine.running and not self.engine.waiting and not self.service.streams)

    @contextlib.contextmanager
    def slow(self, nap_s: float = 0.02) -> Iterator[None]:
        self.nap_s[0] = nap_s
        try:
            yield
        finally:
            self.nap_s[0] = 0.0


def until(true: Callable[[], object], seconds: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)


def save_model(name: str, folder: Path, chat: bool = True) -> Path:
    """A random model whose tokenizer has a chat template."""
    save_random(name, folder)
    save_tokenizer(folder, chat_template=TEMPLATE if chat else None)
    return folder


class SlowLink(QueueLink):
    """A link that takes ``naps[0]`` seconds for each frame."""

    def __init__(self, bell: Doorbell, naps: Sequence[float]) -> None:
        super().__init__(bell)
        self._naps = naps

    def send(self, frame: bytearray) -> None:
        time.sleep(self._naps[0])
        super().send(frame)


class SlowWorld(SoloWorld):
    """A process alone, whose ring is slow."""

    def __init__(self, naps: Sequence[float]) -> None:
        super().__init__()
        self._naps = naps

    def connect(self, source: int, target: int, capacity: int) -> Link:
        return SlowLink(self.bell, self._naps)


@contextlib.contextmanager
def serving(
    folder: Path, *, access: Access = Access(), limits: Limits = Limits(), most: int = MOST,  # noqa: B008
    patience_s: Mapping[Phase, float] = connections.PATIENCE_S, **options: Any,
) -> Iterator[Server]:  # fmt: skip
    """A server of the model in ``folder``; ``options`` are those of the command line, ``most`` its connections."""
    session = Session(
        SessionOptions(**{"model": str(folder), "threads": 1, "ignore_eos": True, **options}),
        home=folder.parent,
        file=None,
        device_factory=_nobody,
        explain=lambda timings, computing: None,
        report=lambda line: None,
    )
    naps = [0.0]
    ring: Ring = session.start(SlowWorld(naps), lambda: None)
    engine = session.engine(ring)
    silences: list[Silence] = []
    served = Served(
        engine=engine, session=session, reports=tuple(ring.reports), slots=ring.slots, model="tiny",
        dtype=session.dtype, silences=lambda: tuple(silences),
    )  # fmt: skip
    services: list[Service] = []
    app = make_app(served, access, limits, started=services.append, requests=most_requests(most))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = HTTPServer(app, most=most, parting_s=1, patience_s=patience_s)
        threads = [
            threading.Thread(target=engine.run, daemon=True),
            threading.Thread(target=server.run, args=([listening],), daemon=True),
        ]
        for thread in threads:
            thread.start()
        until(lambda: services and server.started)
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        try:
            yield Server(url, folder, engine, services[0], session, naps, silences)
        finally:
            server.should_exit = True
            naps[0] = 0.0
            engine.close()
            for thread in threads:
                thread.join(PATIENCE_S)
                assert not thread.is_alive()
            engine.stop()


def _nobody(ipad: Any, world: Any) -> Any:
    raise AssertionError("there is no iPad here")


def events(response: httpx.Response) -> list[Any]:
    """The data of a stream's events: JSON, but for the last of OpenAI's."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = [block for block in response.text.split("\n\n") if block and not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    data = [block.removeprefix("data: ") for block in blocks]
    return [text if text == "[DONE]" else json.loads(text) for text in data]
