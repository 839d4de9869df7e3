"""`mpgpt ipad-node`: the Python stand-in for the iPad, from its options.

Knows: what the options mean, which backend can run a package here, signals.
Must not know: the wire, how a package is run or kept.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import signal
import sys
from pathlib import Path

import click
import torch

from mpgpt.display import notify
from mpgpt.errors import ModelError, UsageError
from mpgpt_ios.bundle import Bundle
from mpgpt_ios.executor import COMPUTE_UNITS, Backend, CoreMLBackend, EvaluatorBackend, Executor
from mpgpt_ios.node.bundle_store import Store
from mpgpt_ios.node.server import NodeServer
from mpgpt_ios.protocol.auth import fingerprint, read_token


def run_node(
    *, package: Path | None, host: str, port: int, token_file: Path | None, store: Path, precision: str, threads: int,
) -> None:  # fmt: skip
    """Listen until interrupted. Raises ``UsageError`` and ``ModelError``."""
    if token_file is None:
        raise UsageError("an iPad node needs --token-file, the same token as the proxy rank's")
    token = read_token(token_file)
    _hush()
    bundle = Bundle.at(package) if package else None
    torch.set_num_threads(threads)

    def open_(bundle: Bundle) -> tuple[Executor, str]:
        backend, unit = _backend(bundle.package, precision)
        return Executor(backend, bundle.manifest, "float32" if precision == "float32" else "float16"), unit

    node = NodeServer(host, port, token, Store(store), open_=open_, say=_say, package=bundle)
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda signum, frame: node.close())
    if bundle:
        node.compute_thread.load(bundle)
    notify(f"the token's fingerprint is {fingerprint(token)}")
    _say(f"listening on {host}:{node.port}")
    node.serve()


def _backend(package: Path, precision: str) -> tuple[Backend, str]:
    """On macOS Core ML on the fastest unit that loads the package, elsewhere, or for float32, the evaluator."""
    if sys.platform == "darwin" and precision == "declared":
        for units in COMPUTE_UNITS[:-1]:
            try:
                return CoreMLBackend(package, units), f"Core ML, {units}"
            except ModelError as error:
                _say(str(error))
    return EvaluatorBackend(package, "float32" if precision == "float32" else "declared"), f"evaluator, {precision}"


def _hush() -> None:
    """Importing coremltools prints which of Apple's libraries are not here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with contextlib.suppress(ImportError):
        importlib.import_module("coremltools")
    logging.disable(before)


def _say(line: str) -> None:
    click.echo(line)
    sys.stdout.flush()
