"""`mpgpt serve`: the ring, and the API on rank 0.

Knows: where to listen, who may come in, which thread does what, how it ends.
Must not know: endpoints.

The main thread is the engine's, the only one that calls MPI; uvicorn has a thread of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType

import click

from mpgpt.cluster.ring import Ring
from mpgpt.cluster.session import Session
from mpgpt.engine.engine import Engine
from mpgpt.errors import MpgptError, UsageError
from mpgpt.transport.link import World
from mpgpt_api.app import Served, make_app
from mpgpt_api.connections import Server, most_connections, most_requests
from mpgpt_api.guard import Access, is_loopback, origins, read_keys
from mpgpt_api.service import Limits, Service

PORT = 8000
PARTING_S = 2
"""How long clients with an answer under way have to read that the server stops."""
NOTIFY_S = 0.15
"""How long they have to read that the ring is lost; half a second after a rank died mpirun kills the others."""
AGAIN_S = 1.0
"""A signal so long after the first is a second Ctrl-C."""
END_S = 5.0
"""After so long an end that does not come about is forced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The options of `mpgpt serve` besides the session's. None leaves a value to the settings."""

    host: str | None = None
    port: int | None = None
    api_key_file: Path | None = None
    insecure: bool = False
    origins: tuple[str, ...] = ()
    queue: int | None = None
    time_limit: float | None = None


class Serve:
    """A job for the command line: ``start`` on every rank, ``run_rank0`` on rank 0."""

    def __init__(self, session: Session, options: ServeOptions) -> None:
        self._session, self._options = session, options

    def start(self, world: World) -> Ring:
        return self._session.start(world, self._prepare)

    def _prepare(self) -> None:
        """Find what is wrong before anything is loaded, a port that is taken too."""
        options, web = self._options, self._session.config.web_interface
        host = options.host or web.host or "127.0.0.1"
        port = options.port if options.port is not None else web.api_port or web.port or PORT
        local = is_loopback(host)
        key_file = options.api_key_file or (Path(web.api_key_file) if web.api_key_file else None)
        self._access = Access(
            keys=read_keys(key_file) if key_file else (),
            origins=origins(options.origins or web.origins),
            local=local and not key_file,
        )
        if not local and not key_file and not options.insecure:
            raise UsageError(
                f"on {host} everybody who reaches this machine could use it: give --api-key-file FILE, or --insecure "
                "if that is meant"
            )
        self._limits = Limits(
            queue=web.queue if options.queue is None else options.queue,
            time_s=options.time_limit or web.time_limit_s,
        )
        self._socket = _bind(host, port)

    def run_rank0(self, ring: Ring) -> int:
        """Serve until somebody ends it; the exit status."""
        engine = self._session.engine(ring)
        served = Served(
            engine=engine, session=self._session, reports=tuple(ring.reports), slots=ring.slots,
            model=_public(self._session.model), dtype=self._session.dtype, silences=ring.world.silences,
        )  # fmt: skip
        services: list[Service] = []
        most = most_connections()  # now: the ring has its descriptors already
        app = make_app(
            served, self._access, self._limits, started=services.append, requests=most_requests(most)
        )  # fmt: skip
        server = Server(app, most=most, parting_s=PARTING_S)
        thread = threading.Thread(target=server.run, args=([self._socket],), name="API", daemon=True)
        with _ended_by_signals(ring.world, engine, server, services):
            thread.start()
            self._announce(ring)
            try:
                engine.run()
            except MpgptError as error:
                _notify(services, str(error))
                raise
            thread.join(PARTING_S + 1.0)
        engine.stop()
        return 0

    def _announce(self, ring: Ring) -> None:
        address, port = self._socket.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        layers = ", ".join(f"{place.node.host} {place.span or '-'}" for place in ring.reports)
        name = _public(self._session.model)
        click.echo(f"mpgpt serves {name} at http://{shown}:{port} (layers: {layers}); Ctrl-C ends it", err=True)


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host} is no address of this machine: {error}") from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)  # who comes while the model loads waits; and of two servers one notices at once
    except OSError as error:
        bound.close()
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return bound


def _public(model: str) -> str:
    """A model's name without the way to its folder, which is nobody's business: the folder's own."""
    path = Path(os.path.expanduser(model))
    if not path.exists():
        return model
    name = path.resolve().name or "model"  # a container may have it at its root
    return name.encode("utf-8", "backslashreplace").decode()


def _notify(services: list[Service], sentence: str) -> None:
    """End every answer with a sentence on the lost ring, and every request of the moment that is left."""
    for service in services:
        service.run_in_loop(partial(service.fail, sentence))
    time.sleep(NOTIFY_S)


@contextlib.contextmanager
def _ended_by_signals(world: World, engine: Engine, server: Server, services: list[Service]) -> Iterator[None]:
    """SIGINT and SIGTERM end it in order: nothing comes in, clients that wait get an error, the ring stops. A later
    one, or ``END_S``, ends it at once; mpirun may send several together."""
    signals: list[float] = []

    def on_signal(signum: int, frame: FrameType | None) -> None:
        signals.append(time.monotonic())
        if len(signals) > 1:
            if signals[-1] - signals[0] > AGAIN_S:
                os._exit(128 + signum)
            return
        world.told_to_end()
        forced = threading.Timer(END_S, os._exit, (128 + signum,))
        forced.daemon = True
        forced.start()
        threading.Thread(target=stop, daemon=True).start()

    def stop() -> None:
        """On a thread of its own: a signal interrupts whoever holds a lock."""
        if world.lost_soon():  # mpirun ends all ranks for the one that died, and the engine says so
            return
        for service in services:
            service.run_in_loop(service.stop)
        server.should_exit = True
        engine.close()

    before = {signum: signal.signal(signum, on_signal) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
