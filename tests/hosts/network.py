"""The network between the pretend hosts: what each cable can do, and what goes wrong on the way.

Knows: the switch (``switch.c``) and its commands. Must not know: how a host is made, or what it runs.
"""

from __future__ import annotations

import hashlib
import os
import select
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

SOURCE = Path(__file__).with_name("switch.c")
REPLY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Cable:
    """One host's cable to the switch; delay, rate and loss are those of each direction."""

    delay_ms: float = 0.05
    """One way, host to switch. Two cables make a path: its round trip is twice the sum of their delays."""
    rate_mbit: float = 1000.0
    loss: float = 0.0
    """Probability that this cable loses a frame; a path loses what either cable loses."""
    up: bool = True


ETHERNET = Cable()
"""Gigabit Ethernet: 0.2 ms round trip between two hosts."""
WIFI = Cable(delay_ms=1.25, rate_mbit=100.0)
"""Wi-Fi: 100 Mbit/s, 5 ms round trip between two hosts that both have it."""
PRESETS = {"ethernet": ETHERNET, "wifi": WIFI}


def build_switch(compiler: str, folder: Path) -> Path:
    """The compiled switch; compiled once for each version of its source."""
    binary = folder / f"switch-{hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]}"
    if not binary.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = binary.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-o", part, SOURCE], check=True)
        part.replace(binary)
    return binary


def read_line(pipe: IO[bytes], seconds: float) -> str:
    """The next line of an unbuffered pipe without its end, or '' at the end of the pipe or the time."""
    ready, _, _ = select.select([pipe], [], [], seconds)
    return pipe.readline().decode(errors="replace").rstrip("\n") if ready else ""


class Network:
    """A switch and one cable to each host. Starts as idle gigabit Ethernet, with nothing plugged in."""

    def __init__(self, switch: Path, hosts: Sequence[str], cable: Cable = ETHERNET) -> None:
        self._initial = cable
        self._cables = dict.fromkeys(hosts, cable)
        self._process = subprocess.Popen(
            [switch, *hosts], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0, start_new_session=True
        )
        self.realtime = self._read_reply() == "ok: real-time"
        """Whether delays are exact while the machine is busy."""
        self.reset()

    def close(self) -> None:
        """End the switch; every host loses its network."""
        assert self._process.stdin and self._process.stdout
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait(REPLY_S)
        self._process.stdout.close()

    @property
    def switch_pid(self) -> int:
        return self._process.pid

    def cable(self, host: str) -> Cable:
        """What the host's cable can do now."""
        return self._cables[host]

    def attach(self, host: str, pid: int) -> None:
        """Plug the host's cable into the network namespace of process ``pid``."""
        self._command(f"attach {host} {pid}")

    def detach(self, host: str) -> None:
        """Pull the host's cable out; a switch that has ended has none."""
        if self._process.poll() is None:
            self._command(f"detach {host}")

    def set(
        self, host: str, *, delay_ms: float | None = None, rate_mbit: float | None = None, loss: float | None = None,
        up: bool | None = None,
    ) -> None:  # fmt: skip
        """Change the host's cable; what is None stays. Frames that are on their way already are not changed."""
        given = {"delay_ms": delay_ms, "rate_mbit": rate_mbit, "loss": loss, "up": up}
        changes = {name: value for name, value in given.items() if value is not None}
        self._lay(host, replace(self._cables[host], **changes))  # type: ignore[arg-type]

    def ethernet(self, *hosts: str) -> None:
        """Gigabit Ethernet with 0.2 ms round trip, for these hosts or for all."""
        for host in hosts or self._cables:
            self._lay(host, ETHERNET)

    def wifi(self, *hosts: str) -> None:
        """Wi-Fi with 100 Mbit/s and 5 ms round trip, for these hosts or for all."""
        for host in hosts or self._cables:
            self._lay(host, WIFI)

    def cut(self, source: str, target: str) -> None:
        """Drop every frame from ``source`` to ``target``; the other direction stays."""
        self._command(f"cut {source} {target}")

    def heal(self) -> None:
        """Undo every cut."""
        self._command("heal")

    def drop_udp(self, drop: bool = True) -> None:
        """Drop all UDP between hosts, or no longer."""
        self._command(f"udp {'drop' if drop else 'pass'}")

    def firewall(self, host: str, on: bool = True) -> None:
        """Let nothing in to ``host`` but connections to port 22 and answers to its own."""
        self._command(f"firewall {host} {'on' if on else 'off'}")

    def reset(self) -> None:
        """As at the start: every cable up and as given, no cut, no filter."""
        for host in self._cables:
            self._lay(host, self._initial)
            self.firewall(host, False)
        self.heal()
        self.drop_udp(False)

    def _lay(self, host: str, cable: Cable) -> None:
        self._command(f"cable {host} {cable.delay_ms / 1e3:.9f} {cable.rate_mbit * 1e6} {cable.loss} {int(cable.up)}")
        self._cables[host] = cable

    def _command(self, line: str) -> None:
        assert self._process.stdin
        with suppress(BrokenPipeError):  # it has ended, and gives no reply
            self._process.stdin.write(line.encode() + b"\n")
        reply = self._read_reply()
        if reply != "ok":
            raise RuntimeError(f"switch: {line}: {reply or 'no reply'}")

    def _read_reply(self) -> str:
        assert self._process.stdout
        return read_line(self._process.stdout, REPLY_S)
