"""llama.cpp over its RPC, on the weights and cores of a ring of ours.

Knows: llama.cpp's programs, their options, and how they say what they measured.
Must not know: our own rings, how speeds are compared or shown.

``llama-bench`` measures one sequence and ``llama-batched-bench`` several. That program is the first rank and keeps the
first layers; every other rank is an RPC server, and llama.cpp shares the other layers out among them. All that is not
said here is as llama.cpp has it by default: its cache, its batches.
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

from mpgpt.bench.baselines import LIMIT_S, Task
from mpgpt.bench.gguf_export import gguf_file
from mpgpt.cluster.processes import cause, end, listen, start
from mpgpt.errors import MpgptError, UsageError

BENCH, BATCHED = "llama-bench", "llama-batched-bench"
SERVERS = ("rpc-server", "ggml-rpc-server")
"""What the server was called first, and is called now."""
START_S = 20.0
"""How long a server may take until it can be reached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Programs:
    """Those of llama.cpp that are run."""

    bench: Path
    batched: Path
    server: Path
    version: str


def programs(folder: Path) -> Programs:
    """Those in ``folder``. Raises ``UsageError`` where one is absent or does not run."""

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
        said = subprocess.run([batched, "--version"], capture_output=True, text=True, timeout=START_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UsageError(f"--against llama-rpc: {batched} does not run: {error}") from None
    version = re.search(r"version: (.+)", said.stdout + said.stderr)
    return Programs(bench=bench, batched=batched, server=server, version=version[1].strip() if version else "")


class LlamaRpc:
    """As many processes as our ring has ranks, each with the same cores and threads, in the same dtype."""

    name = "llama-rpc"

    def __init__(
        self, task: Task, its: Programs, dtypes: Sequence[str], home: Path, report: Callable[[str], None]
    ) -> None:
        """Writes the GGUF files for ``dtypes`` under ``home``, where they are not there yet."""
        self._task, self._its = task, its
        self._files = {dtype: gguf_file(task.folder, dtype, home, report) for dtype in dtypes}

    def compared(self, dtype: str, ranks: int) -> tuple[str, int]:
        return dtype, ranks

    def run(self, dtype: str, ranks: int, hear: Callable[[dict[str, Any]], None]) -> None:
        task = self._task
        who = {"peer": self.name, "version": self._its.version, "dtype": dtype, "ranks": ranks}
        units = task.layers + 1  # it counts the head as a layer, and those that are offloaded from the end
        offloaded = units - round(units / ranks)
        with servers(self._its.server, ranks, task) as ends:
            there = ["--rpc", ",".join(ends)] if ends else []
            common = [
                "-m", str(self._files[dtype]), "-t", str(task.threads_of(ranks)), "-ngl", str(offloaded), *there
            ]  # fmt: skip
            for concurrency in task.concurrency:
                decode, prompt = self._one(common) if concurrency == 1 else self._several(common, concurrency)
                figures = {"decode_tokens_per_s": decode, "prompt_tokens_per_s": prompt}
                hear(who | {"concurrency": concurrency} | figures)

    def _one(self, common: list[str]) -> tuple[float, float]:
        """Decoding and prompt tokens/s of one sequence: new tokens after a prompt, and the prompt."""
        task, options = self._task, [*common, "-o", "jsonl", "-r", self._task.repeats]
        after = self._said(self._its.bench, *options, "-p", 0, "-n", task.new_tokens - 1, "-d", task.prompt_tokens)
        prompt = self._said(self._its.bench, *options, "-p", task.prompt_tokens, "-n", 0)
        decode, first = (
            _median(self._its.bench, [speed for said in runs for speed in said.get("samples_ts", ())])
            for runs in (after, prompt)
        )
        return decode, first

    def _several(self, common: list[str], concurrency: int) -> tuple[float, float]:
        """The same of several sequences at once, each with a prompt of its own."""
        task = self._task
        runs = self._said(
            self._its.batched, *common, "--output-format", "jsonl",
            "-c", concurrency * (task.prompt_tokens + task.new_tokens), "-npp", task.prompt_tokens,
            "-ntg", task.new_tokens - 1, "-npl", ",".join([str(concurrency)] * task.repeats),
        )  # fmt: skip
        decode, first = (
            _median(self._its.batched, [said[name] for said in runs if name in said])
            for name in ("speed_tg", "speed_pp")
        )
        return decode, first

    def _said(self, program: Path, *options: object) -> list[dict[str, Any]]:
        """What ``program`` printed, an object a line."""
        said: list[dict[str, Any]] = []
        try:
            listen(
                [str(program), *map(str, options)], self._task.env, said.append, cores=self._task.cores(0),
                limit_s=LIMIT_S,
            )  # fmt: skip
        except MpgptError as error:
            raise MpgptError(f"{program.name}: {error}") from None
        return said


def _median(program: Path, speeds: list[Any]) -> float:
    if not speeds or not all(isinstance(speed, int | float) and speed > 0 for speed in speeds):
        raise MpgptError(f"{program.name} printed no speeds that can be read: is it of another version of llama.cpp?")
    return float(statistics.median(speeds))


@contextlib.contextmanager
def servers(program: Path, ranks: int, task: Task) -> Iterator[list[str]]:
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
            words = ["-H", "127.0.0.1", "-p", str(port), "-t", str(task.threads_of(ranks))]
            process = start([str(program), *words], task.env, stdout=log, stderr=log, cores=task.cores(rank))
            stack.callback(_kill, process)
            _reach(program.name, process, port, log)
            running.append((process, log))
            ends.append(f"127.0.0.1:{port}")
        try:
            yield ends
        except MpgptError as error:
            for server, its_log in running:
                if server.poll() is not None:
                    said = f"{program.name} ended with status {server.returncode}: {cause(its_log)}"
                    raise MpgptError(f"{error}\n{said}") from None
            raise


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _reach(name: str, process: subprocess.Popen[str], port: int, log: IO[str]) -> None:
    """Wait until it listens."""
    deadline = time.monotonic() + START_S
    while process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0):
            return
        if time.monotonic() > deadline:
            raise MpgptError(f"{name} cannot be reached on port {port} {START_S:.0f} s after its start: {cause(log)}")
        time.sleep(0.02)
    raise MpgptError(f"{name} ended with status {process.returncode} at its start: {cause(log)}")


def _kill(process: subprocess.Popen[str]) -> None:
    process.kill()  # it has nothing to save
    end(process)
