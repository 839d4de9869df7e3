"""``mpgpt-ssh``: how mpirun reaches another host. ssh, never with a question, and with an answer that names the host.

Knows: ssh's options and exit statuses, the mpirun above it.
Must not know: MPI, what a run does.

mpirun calls it as it would call ssh (``make install`` sees to that). Beside connecting, it takes along the settings
that lie beside the hostfile, for a first rank on another machine than the one where mpirun was typed; and it ends the
run with a sentence, and not with a wall of text, when a host cannot be reached. It does not outlive mpirun.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO, NoReturn

import psutil

from mpgpt import launcher

OPTIONS = ("BatchMode=yes", "ConnectTimeout=5", "ServerAliveInterval=10", "ServerAliveCountMax=3")
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


def main() -> NoReturn:
    """Connect, and end with ssh's status."""
    arguments, parent = sys.argv[1:], os.getppid()
    at = host_index(arguments)
    host, command = arguments[at], " ".join(arguments[at + 1 :])
    above = _launcher_above(parent)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    options = [word for option in OPTIONS for word in ("-o", option)]  # of two, ssh takes the first
    words: list[str] = []
    try:
        process = subprocess.Popen(
            ["ssh", *arguments[:at], *options, host, _with_settings(command, above)], stderr=subprocess.PIPE, text=True,
            errors="replace",
        )  # fmt: skip
    except OSError as error:
        words, status = [f"ssh does not start: {error.strerror}"], FAILED
    else:
        status = _follow(process, words, parent)
    if os.getppid() != parent:  # mpirun is gone, and took the connection with it
        sys.exit(1)
    if (sentence := explain(host, command, status, words)) and above:
        print(f"mpgpt: {sentence}", file=sys.stderr, flush=True)
        launcher.end(psutil.Process(above.pid))
    elif status:
        print(*words, sep="\n", end="\n" * bool(words), file=sys.stderr, flush=True)
    sys.exit(status)


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
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def host_index(arguments: list[str]) -> int:
    """Where among ssh's arguments the host stands."""
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
    """Why the run cannot go on without this host; empty if all is well, or the host itself says why."""
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


def _with_settings(command: str, above: launcher.Launcher | None) -> str:
    """The remote command, with the settings in its environment. Only for a shell of Bourne's kind, which is what
    mpirun's own words are then for too."""
    settings = above.settings if above else None
    if settings is None or "PREFIX=" not in command.split(";")[0]:
        return command
    try:
        value = shlex.quote(launcher.pack(settings.resolve()))
    except OSError:  # whoever wants to read them says so
        return command
    return f"{launcher.SETTINGS_VARIABLE}={value};export {launcher.SETTINGS_VARIABLE};{command}"


def _launcher_above(pid: int) -> launcher.Launcher | None:
    try:
        process = psutil.Process(pid)
        argv = process.cmdline()
        cwd = Path(process.cwd())
    except (psutil.Error, OSError):
        return None
    return launcher.Launcher(pid=process.pid, argv=tuple(argv), cwd=cwd) if launcher.is_launcher(argv) else None


if __name__ == "__main__":
    main()
