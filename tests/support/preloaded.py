"""Python programs that begin with torch and transformers imported: what a start costs is most of a short ring's time.

Knows: the server, which imports once and forks for every start; what a process takes over from whoever asked for it;
signals and exit statuses on the way back.
Must not know: mpirun, what is tested.

A start here has the arguments, environment, folder and descriptors of a start by hand, and is the same program from
``mpgpt.commands.cli`` on. What it lacks is a new interpreter: variables that Python or torch read as they begin
(``PYTHON...``, ``OMP_NUM_THREADS``) are the server's. The parent is the server, too, and not mpirun's daemon.

    pytest -- starts --> server (this module) -- forks --> minder -- forks --> the program
    mpirun -- starts --> preloaded_client.py -- asks --> server; minder -- status --> preloaded_client.py
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

CLIENT = Path(__file__).with_name("preloaded_client.py")


@functools.cache
def command(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    """The beginning of a command line that runs ``mpgpt`` with the arguments that follow. The server is started in
    ``environment``, once a process of pytest, and ends with it."""
    folder = tempfile.TemporaryDirectory()
    path = str(Path(folder.name) / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        server = subprocess.Popen(
            [sys.executable, "-m", __name__, str(listener.fileno())], stdin=subprocess.PIPE,
            pass_fds=[listener.fileno()], env=dict(environment), cwd=Path(__file__).parents[2],
        )  # fmt: skip

    def end() -> None:
        server.communicate()  # the end of its standard input is its own
        folder.cleanup()

    atexit.register(end)
    return sys.executable, "-I", "-S", str(CLIENT), path


def serve(listener: socket.socket) -> None:
    """Fork for everybody who connects, until standard input ends."""
    for module in ("mpgpt.commands.generate", "transformers.tokenization_utils_tokenizers"):  # torch with the first
        importlib.import_module(module)

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for minders
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            return
        connection, _ = listener.accept()
        with connection:
            if os.fork() == 0:
                listener.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                mind(connection)


def mind(connection: socket.socket) -> NoReturn:
    """Run the program that is asked for in a process of its own. Tells its number, and what it ended with; ends it when
    whoever asked is gone. Does not return."""
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 3)
    size = int.from_bytes(message[:4], "little")
    message = message[4:]
    while len(message) < size and (more := connection.recv(1 << 16)):
        message += more
    asked = json.loads(message)
    pid = os.fork()
    if pid == 0:
        connection.close()
        run(asked["arguments"], asked["environment"], asked["folder"], descriptors)
    connection.sendall(pid.to_bytes(4, "little"))
    program = os.pidfd_open(pid)
    ready, _, _ = select.select([program, connection.fileno()], [], [])
    if program not in ready:
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    connection.sendall(status.to_bytes(4, "little", signed=True))
    os._exit(0)


def run(arguments: list[str], environment: Mapping[str, str], folder: str, descriptors: list[int]) -> NoReturn:
    """Be the program. Does not return: the interpreter ends as any does."""
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["mpgpt", *arguments]
    from mpgpt.commands.cli import main

    main()


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
