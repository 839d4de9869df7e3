"""llama.cpp over its RPC, on the weights and cores of a ring of ours.

Knows: llama.cpp's programs, their options, and their output.
Must not know: our own rings, how speeds are compared or shown.

``llama-bench`` measures one sequence and ``llama-batched-bench`` several. That program is the first rank and keeps the
first layers; every other rank is an RPC server, and llama.cpp shares the other layers out among them. Everything
else, such as its cache and its batches, is llama.cpp's default.
"""

from __future__ import annotations

import contextlib
import re
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mpgpt.bench.baselines import BaselineSettings
from mpgpt.bench.gguf_export import gguf_file
from mpgpt.cluster.processes import cause, end, listen, start
from mpgpt.errors import MpgptError, UsageError

BENCH, BATCHED = "llama-bench", "llama-batched-bench"
SERVERS = ("rpc-server", "ggml-rpc-server")
"""The server's earlier name, and its present one."""
VERSION_S = 20.0
"""How long a program may take to print its version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """The programs of llama.cpp that are run."""

    bench: Path
    batched: Path
    server: Path
    version: str


def programs(folder: Path) -> Programs:
    """The programs in ``folder``. Raises ``UsageError`` if one is absent or does not run."""

    def find(*names: str) -> Path:
        for name in names:
            if (folder / name).is_file():
                return (folder / name).resolve()
        raise UsageError(
            f"--against llama-rpc: {folder} has no {' or '.join(names)}; build llama.cpp with GGML_RPC=ON and name the "
            "folder of its programs"
        )

    bench, batched, server = find(BENCH), find(BATCHED), find(*SERVERS)
    try:
        done = subprocess.run([batched, "--version"], capture_output=True, text=True, timeout=VERSION_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--against llama-rpc: {batched} does not run: {error}") from None
    version = re.search(r"version: (.+)", done.stdout + done.stderr)
    return Programs(bench=bench, batched=batched, server=server, version=version[1].strip() if version else "")


class LlamaRpc:
    """As many processes as our ring has ranks, each with the same cores and threads, in the same dtype."""

    name = "llama-rpc"

    def __init__(
        self,
        settings: BaselineSettings,
        its: Programs,
        dtypes: Sequence[str],
        home: Path,
        report: Callable[[str], None],
    ) -> None:
        """Writes the GGUF files for ``dtypes`` under ``home``, where they are not there yet."""
        self._settings, self._its = settings, its
        self._files = {dtype: gguf_file(settings.folder, dtype, home, report) for dtype in dtypes}

    def compared(self, dtype: str, ranks: int) -> tuple[str, int]:
        return dtype, ranks

    def run(self, dtype: str, ranks: int, on_run: Callable[[dict[str, Any]], None]) -> None:
        settings = self._settings
        who = {"peer": self.name, "version": self._its.version, "dtype": dtype, "ranks": ranks}
        units = settings.layers + 1  # it counts the head as a layer, and those that are offloaded from the end
        offloaded = units - round(units / ranks)
        with servers(self._its.server, ranks, settings) as ends:
            there = ["--rpc", ",".join(ends)] if ends else []
            common = [
                "-m", str(self._files[dtype]), "-t", str(settings.threads_of(ranks)), "-ngl", str(offloaded), *there
            ]  # fmt: skip
            for concurrency in settings.concurrency:
                decode, prompt = self._one(common) if concurrency == 1 else self._several(common, concurrency)
                figures = {"decode_tokens_per_s": decode, "prompt_tokens_per_s": prompt}
                on_run(who | {"concurrency": concurrency} | figures)

    def _one(self, common: list[str]) -> tuple[float, float]:
        """Decoding and prompt tokens/s of one sequence: new tokens after a prompt, and the prompt."""
        settings, options = self._settings, [*common, "-o", "jsonl", "-r", self._settings.repeats]
        after = self._output(
            self._its.bench, *options, "-p", 0, "-n", settings.new_tokens - 1, "-d", settings.prompt_tokens
        )
        prompt = self._output(self._its.bench, *options, "-p", settings.prompt_tokens, "-n", 0)
        decode, first = (
            _median(self._its.bench, [speed for run in runs for speed in run.get("samples_ts", ())])
            for runs in (after, prompt)
        )
        return decode, first

    def _several(self, common: list[str], concurrency: int) -> tuple[float, float]:
        """The same of several sequences at once, each with a prompt of its own."""
        settings = self._settings
        runs = self._output(
            self._its.batched, *common, "--output-format", "jsonl",
            "-c", concurrency * (settings.prompt_tokens + settings.new_tokens), "-npp", settings.prompt_tokens,
            "-ntg", settings.new_tokens - 1, "-npl", ",".join([str(concurrency)] * settings.repeats),
        )  # fmt: skip
        decode, first = (
            _median(self._its.batched, [run[name] for run in runs if name in run]) for name in ("speed_tg", "speed_pp")
        )
        return decode, first

    def _output(self, program: Path, *options: object) -> list[dict[str, Any]]:
        """The output of ``program``, one object a line."""
        output: list[dict[str, Any]] = []
        try:
            listen(
                [str(program), *map(str, options)], self._settings.env, output.append, cores=self._settings.cores(0),
                limit_s=self._settings.limit_s,
            )  # fmt: skip
        except MpgptError as error:
            raise MpgptError(f"{program.name}: {error}") from None
        return output


def _median(program: Path, speeds: list[Any]) -> float:
    if not speeds or not all(isinstance(speed, int | float) and speed > 0 for speed in speeds):
        raise MpgptError(f"{program.name} printed no speeds that can be read: is it of another version of llama.cpp?")
    return float(statistics.median(speeds))


@contextlib.contextmanager
def servers(program: Path, ranks: int, settings: BaselineSettings) -> Iterator[list[str]]:
    """An RPC server for every rank but the first, on this host's own address; gives host:port of each.

    Raises ``MpgptError`` when one does not come up. They are killed whatever happens; when something fails and one
    of them had ended by itself, the error says so too.
    """
    with contextlib.ExitStack() as stack:
        running: list[tuple[subprocess.Popen[str], IO[str]]] = []
        ends = []
        for rank in range(1, ranks):
            log = stack.enter_context(tempfile.TemporaryFile("w+", errors="replace"))
            port = _free_port()
            words = ["-H", "127.0.0.1", "-p", str(port), "-t", str(settings.threads_of(ranks))]
            process = start([str(program), *words], settings.env, stdout=log, stderr=log, cores=settings.cores(rank))
            stack.callback(_kill, process)
            _reach(program.name, process, port, log, settings.start_s)
            running.append((process, log))
            ends.append(f"127.0.0.1:{port}")
        try:
            yield ends
        except MpgptError as error:
            for server, its_log in running:
                if server.poll() is not None:
                    ended = f"{program.name} ended with status {server.returncode}: {cause(its_log)}"
                    raise MpgptError(f"{error}\n{ended}") from None
            raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _reach(name: str, process: subprocess.Popen[str], port: int, log: IO[str], limit_s: float) -> None:
    """Wait until it listens."""
    deadline = time.monotonic() + limit_s
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        if time.monotonic() > deadline:
            raise MpgptError(f"{name} cannot be reached on port {port} {limit_s:.0f} s after its start: {cause(log)}")
        time.sleep(0.02)
    raise MpgptError(f"{name} ended with status {process.returncode} at its start: {cause(log)}")


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()  # it has nothing to save
    end(process)
