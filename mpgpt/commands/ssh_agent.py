"""``mpgpt-ssh``: how mpirun reaches another host. ssh, never with a question, and with an answer that names the host.

Knows: ssh's options and exit statuses, the mpirun above it.
Must not know: MPI, what a run does.

mpirun calls it as it would call ssh (``make install`` sees to that). Beside connecting, it takes along the settings
that lie beside the hostfile, for a first rank on another machine than the one where mpirun was typed, and is that
rank's guard (``guard.py``); and it ends the run with a sentence, and not with a wall of text, when a host cannot be
reached. It does not outlive mpirun.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO, NoReturn

import psutil

from mpgpt.transport import guard, mpirun

OPTIONS = ("BatchMode=yes", "ConnectTimeout=5", "ServerAliveInterval=10", "ServerAliveCountMax=6")
WITH_VALUE = frozenset("BbcDEeFIiJLlmOoPpQRSWw")
"""ssh's options that take a value."""
FAILED = 255
"""ssh's own exit status; any other is the remote command's."""
NOT_FOUND = (126, 127)
OWN_WORDS = (
    "ssh:", "ssh_", "Permission denied", "Host key verification failed", "kex_exchange", "client_loop", "Connection ",
    "Timeout, server", "Unable to negotiate", "Received disconnect", "Disconnected from", "Bad owner or permissions",
)  # fmt: skip
TICK_S = 0.5
ENDING_S = 2.0
"""A connection that ends without a word may be of an mpirun that is interrupted, and is gone so soon."""


def main() -> NoReturn:
    """Connect, and end with ssh's status."""
    arguments, parent = sys.argv[1:], os.getppid()
    at = host_index(arguments)
    host, command = arguments[at], " ".join(arguments[at + 1 :])
    above = _launcher_above(parent)
    over, post = _stand_in(above) if above else (None, "")
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    words: list[str] = []
    try:
        remote = _remote(command, above, post)
        status = _connect([*arguments[:at], host, remote], at, words)
        if os.getppid() != parent or (above and not psutil.pid_exists(above.pid)):
            status = 1  # mpirun is gone, and took the connection with it
        elif (sentence := explain(host, command, status, words)) and above and not _is_of_an_end(status, words, above):
            print(f"mpgpt: {sentence}", file=sys.stderr, flush=True)
            mpirun.end(psutil.Process(above.pid))
        elif status:
            print(*words, sep="\n", end="\n" * bool(words), file=sys.stderr, flush=True)
    finally:
        if over is not None:
            os.write(over, b".")
    sys.exit(status if status >= 0 else 128 - status)


def _connect(arguments: list[str], at: int, words: list[str]) -> int:
    """ssh's status, negative for a signal; ``words`` gets its errors. The host stands at ``at``."""
    options = [word for option in OPTIONS for word in ("-o", option)]  # of two, ssh takes the first
    parent = os.getppid()
    try:
        process = subprocess.Popen(
            ["ssh", *arguments[:at], *options, *arguments[at:]], stderr=subprocess.PIPE, text=True, errors="replace"
        )
    except OSError as error:
        words.append(f"ssh does not start: {error.strerror}")
        return FAILED
    return _follow(process, words, parent)


def _follow(process: subprocess.Popen[str], words: list[str], parent: int) -> int:
    """ssh's status, at its end or at that of our parent, which it does not outlive."""
    listener = threading.Thread(target=_listen, args=(process.stderr, words), daemon=True)
    listener.start()
    try:
        while process.poll() is None and os.getppid() == parent:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TICK_S)
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    listener.join(1.0)
    return process.returncode


def host_index(arguments: list[str]) -> int:
    """The index of the host among ssh's arguments."""
    at = 0
    while at < len(arguments) and arguments[at].startswith("-") and arguments[at] != "--":
        word = arguments[at][1:]
        first = next((n for n, letter in enumerate(word) if letter in WITH_VALUE), None)
        at += 2 if first == len(word) - 1 else 1  # behind the letter, or the next word
    at += arguments[at : at + 1] == ["--"]
    if at >= len(arguments):
        print("mpgpt-ssh: usage: mpgpt-ssh [ssh's options] HOST COMMAND", file=sys.stderr)
        sys.exit(2)
    return at


def explain(host: str, command: str, status: int, words: list[str]) -> str:
    """Why the run cannot go on without this host; empty if all is well, or the host itself prints why."""
    if status < 0:
        return f"the ssh to {host} was ended by signal {-status}"
    if status == FAILED:
        why = words[-1] if words else "the connection broke"
        return (
            f"{host} cannot be reached by ssh ({why}): `ssh {host} true` must be silent; "
            "scripts/check_hosts.py HOSTFILE looks at all hosts"
        )
    if status in NOT_FOUND:
        program = next((word for word in command.replace(";", " ").split() if word.endswith("/prted")), "prted")
        return f"{host} has no {program}: check out and `make install` at the same path on every host"
    return ""


def _listen(stderr: IO[str] | None, words: list[str]) -> None:
    """ssh's own errors are kept; what comes from the host passes."""
    for line in stderr or ():
        if line.startswith(OWN_WORDS) or "Permission denied (" in line:
            words.append(line.strip().removeprefix("ssh: "))
        else:
            sys.stderr.write(line)
            sys.stderr.flush()


def with_settings(command: str, above: mpirun.Launcher | None) -> str:
    """The remote command, with the settings in its environment."""
    settings = above.settings if above else None
    if settings is None or not _is_bourne(command):
        return command
    try:
        return _export(mpirun.SETTINGS_VARIABLE, mpirun.pack(settings.resolve())) + command
    except OSError:  # whoever wants to read them says so
        return command


def _remote(command: str, above: mpirun.Launcher | None, post: str) -> str:
    """The remote command, with the settings and a guard in its environment."""
    guarded = _export(guard.GUARD_VARIABLE, post) if above and _is_bourne(command) else ""
    return guarded + with_settings(command, above)


def _is_bourne(command: str) -> bool:
    """Whether mpirun's own words are for a shell of Bourne's kind: then ours may be, too."""
    return "PREFIX=" in command.split(";")[0]


def _export(name: str, value: str) -> str:
    return f"{name}={shlex.quote(value)};export {name};"


def _stand_in(above: mpirun.Launcher) -> tuple[int, str]:
    """A child that guards a rank 0 on the other host (``guard.py``), and ends mpirun if this process is killed:
    mpirun alone would end at once with status 0.

    Returns the descriptor to write to once all is well; and the variable for rank 0.
    """
    post = guard.GuardPost(above)
    variable = post.variable
    reading, writing = os.pipe()
    if os.fork():
        os.close(reading)
        post.close()
        return writing, variable
    os.close(writing)
    for signum in mpirun.SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    post.begin()
    if not os.read(reading, 1):  # without a word: an mpirun that is interrupted kills it too
        mpirun.hurry(above.pid)
    post.join()
    os._exit(0)


def _is_of_an_end(status: int, words: list[str], above: mpirun.Launcher) -> bool:
    """Whether the connection ended because mpirun does: it is gone, or soon."""
    if words or status != FAILED:
        return False
    try:
        process, deadline = psutil.Process(above.pid), time.monotonic() + ENDING_S
    except psutil.Error:
        return True
    while (running := mpirun.is_running(process)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not running


def _launcher_above(pid: int) -> mpirun.Launcher | None:
    try:
        process = psutil.Process(pid)
        argv = process.cmdline()
        cwd = Path(process.cwd())
    except (psutil.Error, OSError):
        return None
    return mpirun.Launcher(pid=process.pid, argv=tuple(argv), cwd=cwd) if mpirun.is_launcher(argv) else None


if __name__ == "__main__":
    main()
