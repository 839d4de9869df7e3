"""The report program on one host, over ssh or here: how it is started, talked to, and why it may not answer.

Knows: ssh and what it prints, a shell on a host of which nothing is known yet.
Must not know: mpirun, other hosts, what a report means.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from mpgpt.cluster.preflight import host_report
from mpgpt.cluster.preflight.verdict import Trouble, too_narrow

SSH_OPTIONS = ("BatchMode=yes", "ConnectTimeout=5")
BOOT = "import sys;i=sys.stdin.buffer;exec(i.read(int(i.readline())))"
"""The program comes by standard input, so that it need not be quoted for any shell on the way."""
LACKS = "mpgpt-lacks"
OTHER_CHECKOUTS = " ".join(
    f"{place}/mpgpt/__main__.py" for place in ("$HOME", "$HOME/*", "$HOME/*/*", "/opt/*", "/srv/*")
)
FAILED = 255
"""ssh's own exit status; any other is the remote command's."""
CLOSE_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where mpgpt lies, on every host."""

    checkout: Path
    prefix: Path
    """Of its environment."""

    @property
    def python(self) -> str:
        return str(self.prefix / "bin" / "python")


class Session:
    """One host's program. ``start`` it, and ``ask`` it from one thread."""

    def __init__(self, host: str, place: Place, *, ssh: Sequence[str] = (), target: str = "") -> None:
        """``ssh`` and ``target`` lead to the host; without them it is this machine."""
        self.host = host
        self.begun = self.heard = 0.0
        """When it was started, and when its report was there, by the clock here."""
        self._place, self._target = place, target
        self._words: list[str] = []
        self._late = 0.0
        self._process: subprocess.Popen[str] | None = None
        options = [word for option in SSH_OPTIONS for word in ("-o", option)]
        self._command = [*ssh, *options, target, _remote(place)] if ssh else [place.python, "-c", BOOT]

    def start(self, options: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """Send the program and its options. Raises ``OSError`` if there is no ssh."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            encoding="utf-8", errors="replace", start_new_session=True, env={**environment, "LC_ALL": "C"},
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, args=(self._process.stderr,), daemon=True)
        self._listener.start()
        program = Path(host_report.__file__).read_text(encoding="utf-8")
        self.begun = time.time()
        self._write(f"{len(program.encode())}\n{program}{json.dumps({**options, 'name': self.host})}\n")

    def ask(self, question: Any, limit_s: float) -> dict[str, Any] | None:
        """The next answer; None if the program or the time ends before. The first one, to None, is the report."""
        assert self._process and self._process.stdout
        if question is not None:
            self._write(json.dumps(question) + "\n")
        clock = threading.Timer(limit_s, self._give_up, (limit_s,))
        clock.start()
        try:
            for line in self._process.stdout:
                _, found, answer = line.partition(host_report.MARK)
                if found:
                    self.heard = self.heard or time.time()
                    read: dict[str, Any] = json.loads(answer)
                    return read
                self._words.append(line.strip())
        except ValueError:
            return None
        finally:
            clock.cancel()
        self._listener.join(CLOSE_S)
        return None

    def explain(self) -> Trouble:
        """Why it did not report."""
        assert self._process
        words, checkout = [word for word in self._words if word], self._place.checkout
        if lacks := next((word.split() for word in words if word.startswith(LACKS)), None):
            elsewhere = [word for word in words if word.endswith("/__main__.py")]
            return explain_lack(self.host, self._place, lacks, elsewhere)
        if self._late:
            return Trouble(
                host=self.host, what=f"it has not answered within {self._late:.0f} s",
                cure=f"see whether `ssh {self._target} true` is quick: a busy host, or a login that waits",
            )  # fmt: skip
        status = self._process.wait()
        if status == FAILED:
            return explain_ssh(self.host, self._target, words)
        said = words[-1] if words else f"status {status}"
        return Trouble(
            host=self.host, what=f"its Python in {self._place.prefix} does not work ({said})",
            cure=f"there: cd {checkout} && rm -r .venv && make install",
        )  # fmt: skip

    def kill(self) -> None:
        """End it at once; an ``ask`` that waits returns None."""
        if self._process and self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # ssh may have started others to get there

    def close(self) -> None:
        """End it in order."""
        if self._process is None:
            return
        try:
            assert self._process.stdin
            self._process.stdin.close()
            self._process.wait(CLOSE_S)
        except (OSError, subprocess.TimeoutExpired):
            self.kill()
            self._process.wait()
        self._listener.join(CLOSE_S)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe:
                pipe.close()

    def _give_up(self, limit_s: float) -> None:
        self._late = limit_s
        self.kill()

    def _write(self, text: str) -> None:
        assert self._process and self._process.stdin
        try:
            self._process.stdin.write(text)
            self._process.stdin.flush()
        except OSError:  # it has ended: its status says why
            pass

    def _listen(self, errors: IO[str]) -> None:
        for line in errors:
            self._words.append(line.strip())


def _remote(place: Place) -> str:
    """A line for whatever shell is there: the program, or a word on what is missing for it."""
    python, prefix, checkout = (shlex.quote(str(path)) for path in (place.python, place.prefix, place.checkout))
    script = (
        f'w=python; if [ -x {python} ]; then {python} -c "{BOOT}"; s=$?; '
        "if [ $s -ne 126 ] && [ $s -ne 127 ]; then exit $s; fi; "
        f"elif [ -d {prefix} ]; then w=python; elif [ -d {checkout} ]; then w=environment; else w=checkout; fi; "
        f"echo {LACKS} $w $(getconf LONG_BIT 2>/dev/null || echo 64) $(uname -sm); "
        f"ls -d {OTHER_CHECKOUTS} 2>/dev/null; exit 0"
    )
    return f"exec /bin/sh -c {shlex.quote(script)}"


def explain_lack(host: str, place: Place, lacks: Sequence[str], elsewhere: Sequence[str]) -> Trouble:
    """What is missing there, and what to do. ``lacks`` are the shell's words: what, the bits of its numbers, its
    system; ``elsewhere`` are other checkouts that it found."""
    _, what, bits, *system = lacks
    if bits == "32":
        return too_narrow(host, " ".join(system))
    if what == "checkout":
        other = str(Path(elsewhere[0]).parent.parent) if elsewhere else ""
        there = f"; its checkout is in {other}, and must be" if other else ": the checkout must be"
        return Trouble(
            host=host, what=f"it has no {place.checkout}{there} at the same path on every host",
            cure=f"{'move it, or ' if other else ''}git clone it to {place.checkout} there, and make install",
        )  # fmt: skip
    if what == "environment":
        why, again = f"has no environment in {place.prefix}", ""
    else:
        why = f"cannot run {place.python}, which is not there or was made on another kind of machine"
        again = f"rm -r {place.prefix.name} && "
    return Trouble(host=host, what=f"it {why}", cure=f"there: cd {place.checkout} && {again}make install")


def explain_ssh(host: str, target: str, words: Sequence[str]) -> Trouble:
    """What ssh's words mean, and what to do."""
    known: tuple[tuple[str, str, str], ...] = (
        ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key is another one than ssh knows",
         f"if it was installed anew: ssh-keygen -R {host}, then ssh {target} once, and compare the fingerprint"),
        ("Host key verification failed", "ssh does not know its host key",
         f"ssh {target} once by hand, compare the fingerprint, and say yes"),
        ("Could not resolve hostname", "its name is not known here",
         f"correct it in the hostfile, or give {host} an address in /etc/hosts or ~/.ssh/config"),
        ("Permission denied", "it refuses this user's key",
         f"ssh-copy-id {target}, then `ssh {target} true` must be silent"),
        ("Connection refused", "it refuses ssh connections, though it is on",
         "start sshd there (sudo systemctl enable --now ssh; macOS: System Settings, Sharing, Remote Login)"),
        ("timed out|No route to host|Network is unreachable|Host is down", "it does not answer",
         f"is it on, awake, and in this network? ping {host}"),
        ("Too many authentication failures", "it refuses ssh after too many keys",
         f"name the key in ~/.ssh/config: Host {host}, IdentityFile, IdentitiesOnly yes"),
    )  # fmt: skip
    for pattern, what, cure in known:
        said = [word for word in words if re.search(pattern, word)]
        if said:
            quoted = said[-1].strip("@ ").removeprefix("ssh: ")
            return Trouble(host=host, what=f"{what} ({quoted})", cure=cure)
    last = words[-1] if words else "without a word"
    return Trouble(host=host, what=f"ssh does not reach it ({last})", cure=f"`ssh {target} true` must be silent")
