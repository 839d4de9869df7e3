"""The guard of a run: what ends mpirun when rank 0 has failed, was killed, or has fallen silent.

Knows: rank 0's words, how rank 0 of another host proves itself, how long mpirun may outlive rank 0.
Must not know: MPI, why a run fails, how mpirun is found or ended (``mpirun.py``).

mpirun waits for ever for a host that is gone, and then ends with status 0. So a run that fails is ended from outside,
by a guard beside mpirun. It ends mpirun, and the ssh connections that mpirun would leave, when rank 0 says so, and when
rank 0 is killed, falls silent, or does not get rid of it. Where rank 0 runs on mpirun's host, the guard is a small
process of its own. Elsewhere it is the ``mpgpt-ssh`` that reached rank 0's host, which rank 0 dials, with the secret
that came along by ssh.

Rank 0's words are lines: n and its name, b and seconds (it lives, and a longer silence is its end), s (it was told to
end), d (all work is done), e (end it now), m and a sentence in JSON (say it). A signal's bare number means s.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import math
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from mpgpt.transport.mpirun import KILL_S, SIGNALS, SIGNALS_S, Launcher, end, is_running

RUN_VARIABLES = ("OMPI_COMM_", "PMIX_", "PRTE_")
"""What makes a process one of mpirun's."""
GUARD_VARIABLE = "MPGPT_GUARD"
"""What ``mpgpt-ssh`` gives to other hosts besides: the secret, the port and the addresses of a guard to be dialled."""
NONCE_BYTES, PROOF_BYTES = 16, 32
DIAL_S = 1.0
PROVE_S = 5.0
"""The time in which a caller must prove that it is rank 0, s."""
CALLERS = 16
"""The most callers at a time that have not proved it yet."""
START_S = 120.0
"""How long a guard waits to be dialled."""
KEEP_ALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
"""Socket options; the first two are one option's names on Linux and on macOS."""
STOPPING_S = 0.8
"""How long mpirun may outlive a rank 0 that was told to end."""
DONE_S = 20.0
"""How long mpirun may outlive a rank 0 that has done all its work."""
SIGNAL_BYTES = bytes(SIGNALS)


class Guard:
    """Rank 0's end of the guard, which is a process of its own on this host."""

    def __init__(self, launcher: Launcher, name: str) -> None:
        """``name`` is what a person should read of rank 0 if it is killed."""
        self.launcher = launcher
        own = {name: value for name, value in os.environ.items() if not name.startswith(RUN_VARIABLES)}
        ours = str(Path(__file__).parents[2])
        command = [sys.executable, "-m", "mpgpt.transport.guard", str(launcher.pid), name, str(os.getpid())]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, cwd="/", bufsize=0,
            env=own | {"PYTHONPATH": os.pathsep.join(filter(None, (ours, os.environ.get("PYTHONPATH"))))},
        )  # fmt: skip
        assert self.process.stdin is not None
        self.wakeup: int = self.process.stdin.fileno()
        """A descriptor for ``signal.set_wakeup_fd``: a signal means ``stopping`` even while Python is computing."""
        os.set_blocking(self.wakeup, False)

    def beat(self, patience_s: float) -> None:
        """Rank 0 lives; a silence of ``patience_s`` would mean that it does not."""
        self._write(f"b{patience_s}")

    def say(self, sentence: str) -> bool:
        """Write to mpirun's standard error at once. Whether it could be done."""
        return self.launcher.say(sentence)

    def stopping(self) -> None:
        """Rank 0 was told to end: mpirun is at it, and may take a moment."""
        self._write("s")

    def done(self) -> None:
        """All work is done: mpirun ends by itself."""
        self._write("d")

    def end(self) -> None:
        """End the run now; returns when mpirun is gone, if this process lives to see it."""
        self._write("e")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(2 * KILL_S)

    def _write(self, word: str) -> None:
        """A guard that does not read for so long that the pipe is full is beyond help."""
        with contextlib.suppress(OSError):
            os.write(self.wakeup, f"{word}\n".encode())


class DistantGuard(Guard):
    """Rank 0's end of a guard that runs on mpirun's host, which is another one."""

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.connection = connection
        self.wakeup = connection.fileno()
        connection.setblocking(False)
        self._write(f"n{name}")

    def say(self, sentence: str) -> bool:
        self._write(f"m{json.dumps(sentence)}")
        return True

    def end(self) -> None:
        self._write("e")
        select.select([self.connection], [], [], 2 * KILL_S)


def dial_guard(environment: Mapping[str, str], name: str) -> DistantGuard | None:
    """The guard on mpirun's host, if it can be reached."""
    words = environment.get(GUARD_VARIABLE, "").split()
    if len(words) < 3:
        return None
    secret, port, *addresses = words
    for address in addresses:
        with contextlib.suppress(OSError):
            connection = socket.create_connection((address, int(port)), DIAL_S)
            nonce = connection.recv(NONCE_BYTES, socket.MSG_WAITALL)
            if len(nonce) == NONCE_BYTES:
                connection.sendall(_prove(secret, nonce))
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return DistantGuard(connection, name)
            connection.close()
    return None


def _prove(secret: str, nonce: bytes) -> bytes:
    return hmac.digest(secret.encode(), nonce, hashlib.sha256)


class GuardPost:
    """Where rank 0 of another host may dial for a guard. ``begin`` must be called for anybody to be let in."""

    def __init__(self, launcher: Launcher) -> None:
        self._launcher = launcher
        self._secret = secrets.token_hex(16)
        self._listener = socket.create_server(("0.0.0.0", 0))
        self._callers = threading.Semaphore(CALLERS)
        self._guarding: threading.Thread | None = None

    @property
    def variable(self) -> str:
        """The value of ``GUARD_VARIABLE``."""
        found = [a for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET]
        addresses = [a.address for a in found if not a.address.startswith("127.")]
        return " ".join([self._secret, str(self._listener.getsockname()[1]), *addresses])

    def begin(self) -> None:
        threading.Thread(target=self._listen, name="guard post", daemon=True).start()

    def join(self) -> None:
        """Wait until there is nothing more to guard."""
        if self._guarding:
            self._guarding.join()

    def close(self) -> None:
        self._listener.close()

    def _listen(self) -> None:
        """Until somebody has proved to be rank 0, or nobody comes: rank 0 may run on this very host."""
        deadline = time.monotonic() + START_S
        with self._listener:
            while not self._guarding and time.monotonic() < deadline:
                self._listener.settimeout(DIAL_S)
                try:
                    connection, _ = self._listener.accept()
                except TimeoutError:
                    continue
                except OSError:
                    time.sleep(SIGNALS_S)
                    continue
                if self._callers.acquire(blocking=False):
                    threading.Thread(target=self._meet, args=(connection,), daemon=True).start()
                else:
                    connection.close()

    def _meet(self, connection: socket.socket) -> None:
        with connection:
            try:
                proved = self._proves(connection)
            except OSError:
                proved = False
            finally:
                self._callers.release()
            if proved:
                self._guarding = threading.current_thread()
                _keep_alive(connection)
                guard(self._launcher, "rank 0", Words(connection.fileno()))

    def _proves(self, connection: socket.socket) -> bool:
        nonce = secrets.token_bytes(NONCE_BYTES)
        connection.settimeout(PROVE_S)
        connection.sendall(nonce)
        proof = connection.recv(PROOF_BYTES, socket.MSG_WAITALL)
        connection.settimeout(None)
        return hmac.compare_digest(proof, _prove(self._secret, nonce))


def _keep_alive(connection: socket.socket) -> None:
    """Have the kernel notice that the other host is gone, where no beats show it: a run of one rank has none."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEP_ALIVE.items():
        if option := getattr(socket, name, None):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


class Words:
    """Rank 0's words as they come in: a call gives the next one, and nothing at the end. ``TimeoutError`` when it has
    been silent for longer than it announced."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._received = descriptor, b""
        self.patience_s: float | None = None

    def __call__(self) -> bytes:
        while b"\n" not in self._received:
            if signals := set(self._received) & set(SIGNAL_BYTES):
                self._received = self._received.translate(None, bytes(signals))
                return b"s"
            if not select.select([self._descriptor], [], [], self.patience_s)[0]:
                raise TimeoutError
            try:
                data = os.read(self._descriptor, 4096)
            except OSError:
                data = b""
            if not data:
                return b""
            self._received += data
        word, _, self._received = self._received.partition(b"\n")
        if word[:1] == b"b":
            patience_s = float(word[1:])
            self.patience_s = None if math.isinf(patience_s) else patience_s
        return word


def guard(launcher: Launcher, name: str, read: Callable[[], bytes]) -> None:
    """The guard's life: until rank 0 is gone, and mpirun after it. ``read`` gives rank 0's next word, or nothing at its
    end."""
    try:
        process = psutil.Process(launcher.pid)
    except psutil.Error:
        return
    last = _last_word(launcher, process, name, read)
    patience = {b"s": STOPPING_S, b"d": DONE_S}.get(last, 0.0)
    deadline = time.monotonic() + patience
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(SIGNALS_S)
    if is_running(process):
        end(process)


def _last_word(launcher: Launcher, process: psutil.Process, name: str, read: Callable[[], bytes]) -> bytes:
    """The last word that rank 0 sent of its end; where it sent none, the sentence is written here."""

    def say(sentence: str) -> None:
        if not launcher.say(sentence):
            print(sentence, file=sys.stderr, flush=True)

    said, begun = b"", time.monotonic()
    try:
        while word := read():
            begun = time.monotonic()
            if word[:1] == b"n":
                name = word[1:].decode()
            elif word[:1] == b"m":
                say(json.loads(word[1:]))
            elif word[:1] != b"b":
                said = word
            if word == b"e":
                break
    except TimeoutError:
        seconds = time.monotonic() - begun
        say(f"mpgpt: {name} has been silent for {seconds:.0f} s: it is stopped, its host is off, or the network is cut")
        return b"e"
    if not said and is_running(process):
        say(f"mpgpt: {name} ended without a word: it was killed")
    return said


def _guard_here(launcher: Launcher, name: str, rank0: int) -> None:
    """The guard of a rank 0 on this host: if it is stopped, it is still there when mpirun is gone, and ends too."""
    process = psutil.Process(rank0) if os.getppid() == rank0 else None
    guard(launcher, name, Words(0))
    if process is None:
        return
    with contextlib.suppress(psutil.Error):
        process.wait(KILL_S)
    with contextlib.suppress(psutil.Error):
        process.kill()


if __name__ == "__main__":
    for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are for the run, which it is to survive
        signal.signal(_number, signal.SIG_IGN)
    _guard_here(Launcher(pid=int(sys.argv[1]), argv=(), cwd=Path("/")), sys.argv[2], int(sys.argv[3]))
