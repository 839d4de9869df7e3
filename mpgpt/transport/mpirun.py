"""The mpirun above this run: its hostfile, the settings beside it, its standard error, and its end.

Knows: mpirun's command line, processes, signals; Open MPI's runtime ends at once at the third of them.
Must not know: MPI, what a settings file says, when a run is to end (``guard.py``).
"""

from __future__ import annotations

import base64
import contextlib
import os
import re
import signal
import socket
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import psutil

from mpgpt.errors import UsageError

LAUNCHERS = frozenset({"mpirun", "mpiexec", "prterun", "orterun"})
HOSTFILE_OPTION = re.compile(r"--?(?:hostfile|machinefile|default-hostfile)(?:=(.*))?", re.DOTALL)
NAMESPACE = re.compile(r"\w+-(.*)-([0-9]+)@[0-9]+")
"""How Open MPI names a run: the launcher's program, host and process."""
SETTINGS_VARIABLE = "MPGPT_SETTINGS"
"""The variable in which ``mpgpt-ssh`` passes settings to other hosts: their path, a space, and the packed text."""
MOST_BYTES = 1 << 20
"""The largest file that is read as settings."""
TOO_LONG = "-"
MOST_PACKED = 100_000
"""The most bytes of packed settings: Linux allows 128 KiB in one environment variable, of which they are a part."""
CONNECTIONS = ("ssh", "mpgpt-ssh")
DAEMON = "prted"
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""At the first mpirun ends all ranks in order, at the third itself, at once. Three kinds are not taken for one, and
leave it no time for a page of explanations."""
SIGNALS_S = 0.02
KILL_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsFile:
    """A settings file, and its text if it lies on another machine."""

    path: Path
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """The mpirun above this process, on this host."""

    pid: int
    argv: tuple[str, ...]
    cwd: Path

    @property
    def settings(self) -> Path | None:
        """The settings beside its hostfile."""
        hostfile = hostfile_of(self.argv)
        return beside(hostfile, self.cwd) if hostfile else None

    @property
    def terminal(self) -> bool:
        """Whether a person sits at its standard input, of which ours is a copy. Where that cannot be seen (macOS),
        whether it was started on a terminal."""
        try:
            return os.readlink(f"/proc/{self.pid}/fd/0").startswith(("/dev/pts", "/dev/tty"))
        except OSError:
            pass
        try:
            return sys.platform != "linux" and psutil.Process(self.pid).terminal() is not None
        except psutil.Error:
            return False

    def say(self, sentence: str) -> bool:
        """Write to its standard error at once, where that can be done (Linux): mpirun may be ended before it has
        forwarded what a rank prints. Whether it was. Never waits long: nobody may read there."""
        try:
            errors = os.open(f"/proc/{self.pid}/fd/2", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)
        except OSError:  # it is closed, a socket, or a pipe that nobody reads any more
            return False
        try:
            return _write(errors, f"{sentence}\n".encode(errors="backslashreplace"))
        finally:
            os.close(errors)


def _write(descriptor: int, data: bytes) -> bool:
    """Write all, within ``KILL_S``. Whether it could be."""
    deadline = time.monotonic() + KILL_S
    while data and time.monotonic() < deadline:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            time.sleep(SIGNALS_S)
        except OSError:
            return False
    return not data


def find(environment: Mapping[str, str]) -> Launcher | None:
    """The mpirun above this process, if it runs on this host."""
    candidates: list[int] = []
    with contextlib.suppress(psutil.Error):
        candidates += [process.pid for process in psutil.Process().parents()]
    # Where the hostfile calls this host by another name, mpirun comes by ssh, and is nobody's parent here.
    if (match := NAMESPACE.fullmatch(environment.get("PMIX_NAMESPACE", ""))) and _is_here(match[1]):
        candidates.append(int(match[2]))
    for pid in candidates:
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if is_launcher(argv := process.cmdline()):
                return Launcher(pid=pid, argv=tuple(argv), cwd=Path(process.cwd()))
    return None


def _is_here(host: str) -> bool:
    """Whether a launcher's host is this one; it leaves out the domain, such as macOS's ``.local``."""
    return host in (name := socket.gethostname(), name.partition(".")[0])


def settings(launcher: Launcher | None, environment: Mapping[str, str]) -> SettingsFile | None:
    """The settings beside the hostfile: of the launcher on this host, or what came along from another machine.

    Raises ``UsageError`` when they could not come along.
    """
    if launcher:
        return SettingsFile(path=launcher.settings) if launcher.settings else None
    path, _, packed = environment.get(SETTINGS_VARIABLE, "").rpartition(" ")
    if not path:
        return None
    if packed == TOO_LONG:
        raise UsageError(
            f"{path} is too long to be taken to another host ({MOST_PACKED // 1000} kB packed is the most): "
            "copy it there and name it with --config"
        )
    try:
        return SettingsFile(path=Path(path), text=zlib.decompress(base64.b64decode(packed)).decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not UTF-8; save the file as UTF-8 text") from None
    except (ValueError, zlib.error):
        raise UsageError(f"{SETTINGS_VARIABLE} is not what mpgpt-ssh writes; unset it") from None


def pack(path: Path) -> str:
    """A settings file as the value of ``SETTINGS_VARIABLE``. Raises ``OSError``."""
    with path.open("rb") as file:
        packed = base64.b64encode(zlib.compress(file.read(MOST_BYTES + 1), 9)).decode()
    return f"{path} {packed if len(packed) <= MOST_PACKED else TOO_LONG}"


def is_launcher(argv: Sequence[str]) -> bool:
    """Whether a command line is that of mpirun, under any of its names."""
    return bool(argv) and PurePath(argv[0]).name in LAUNCHERS


def hostfile_of(argv: Sequence[str]) -> str | None:
    """The hostfile in a launcher's argument list; None if it names none, or is not a launcher's.

    The first one counts: the launcher's own options come before the program, whose arguments are anybody's.
    """
    if not is_launcher(argv):
        return None
    words = iter(argv[1:])
    for word in words:
        if match := HOSTFILE_OPTION.fullmatch(word):
            return next(words, None) if match[1] is None else match[1]
    return None


def beside(hostfile: str, cwd: Path) -> Path | None:
    """The settings beside a hostfile, ``NAME.yaml`` for ``NAME``, if there are any."""
    path = cwd / f"{hostfile}.yaml"
    return path if os.path.exists(path) else None


def hurry(pid: int) -> None:
    """Have mpirun end at once and not with status 0."""
    with contextlib.suppress(OSError):
        for signum in SIGNALS:
            os.kill(pid, signum)


def end(launcher: psutil.Process) -> None:
    """End mpirun at once, whatever it waits for, and the connections to other hosts that it would leave behind."""
    connections: list[psutil.Process] = []
    with contextlib.suppress(psutil.Error):
        connections = [child for child in launcher.children(recursive=True) if _connects(child)]
        connections = [child for child in connections if child.pid != os.getpid()]
        deadline = time.monotonic() + KILL_S
        while time.monotonic() < deadline and is_running(launcher):
            hurry(launcher.pid)
            time.sleep(SIGNALS_S)
    with contextlib.suppress(psutil.Error):
        launcher.kill()
    for connection in connections:
        with contextlib.suppress(psutil.Error):
            connection.terminate()


def is_running(process: psutil.Process) -> bool:
    """Whether it is still there: its number may be another's by now, or wait for a parent to look at its status."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _connects(process: psutil.Process) -> bool:
    try:
        return any(PurePath(word).name in CONNECTIONS for word in process.cmdline()[:2])
    except psutil.Error:
        return False


def end_daemon() -> None:
    """End mpirun's daemon above this process, which would wait for an mpirun that cannot be reached."""
    with contextlib.suppress(psutil.Error):
        if (parent := psutil.Process().parent()) and parent.name() == DAEMON:
            parent.kill()
