"""What mpirun is given: its hostfile, and the options before the program.

Knows: how a hostfile is written, which of mpirun's options take values, where its parameters may stand besides.
Must not know: ssh, what any host is, or what mpirun starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpgpt.errors import UsageError
from mpgpt.yamlfile import shown

MAX_BYTES = 256 * 1024
NAME = re.compile(r"(?:([^\s@:=^+]+)@)?([^\s@:=^+]+|[0-9A-Fa-f:]+:[0-9A-Fa-f:]*)")
NUMBER = re.compile(r"[0-9]{1,9}")
PARAMETERS = {
    "mca": "mca", "omca": "mca", "gmca": "mca", "gomca": "mca", "prtemca": "prtemca", "gprtemca": "prtemca",
    "pmixmca": "pmixmca", "gpmixmca": "pmixmca",
}  # fmt: skip
"""Options with a name and a value of a parameter, and whose it is: Open MPI's, its runtime's, PMIx's."""
ONE_VALUE = frozenset({
    "x", "tune", "am", "prefix", "app-prefix", "path", "wdir", "wd", "set-cwd-to-session-dir", "host", "H", "map-by",
    "rank-by", "bind-to", "output", "display", "rankfile", "rf", "timeout", "personality", "launch-agent", "stdin",
    "runtime-options", "cpu-set", "max-restarts", "pmixam", "stream-buffering", "memory-alloc-kind", "exec-agent", "N",
})  # fmt: skip
RANKS = frozenset({"n", "np", "c"})
HOSTFILES = frozenset({"hostfile", "machinefile", "default-hostfile"})
MAPPING = frozenset({"map-by", "rank-by", "bind-to", "rankfile", "rf", "N", "cpu-set"})
"""Options that say where ranks go: not for a run of one rank on each host."""
PLAN = frozenset({"display", "runtime-options"})
"""Options that have mpirun print what it does."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLine:
    """A host of a hostfile."""

    name: str
    user: str | None
    line: int

    @property
    def target(self) -> str:
        """Its name for ssh."""
        return f"{self.user}@{self.name}" if self.user else self.name

    @property
    def short(self) -> str:
        """What mpirun calls it: a name without its domain, or an address."""
        return self.name if re.fullmatch(r"[0-9.]+|.*:.*", self.name) else self.name.partition(".")[0]


def read_hostfile(path: Path) -> tuple[HostLine, ...]:
    """The hosts in their order; one that has several lines counts once. The ``UsageError`` holds all that is wrong."""
    try:
        data = path.read_bytes()[: MAX_BYTES + 1]
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: this hostfile cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: this is no hostfile, it is not UTF-8 text") from None
    if len(data) > MAX_BYTES:
        raise UsageError(f"{path}: this is no hostfile, it is larger than {MAX_BYTES // 1024} KiB")
    hosts: dict[str, HostLine] = {}
    wrong = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.partition("#")[0].split()
        if not words or words[0].startswith("//"):
            continue
        try:
            host = _host(words, number)
            before = hosts.setdefault(host.short, host)
            if before.name != host.name:
                raise ValueError(f"mpirun takes {before.name} (line {before.line}) and {host.name} for one host")
            if before.target != host.target:
                raise ValueError(f"{host.name} stands in line {before.line} with another user")
        except ValueError as error:
            wrong.append(f"{path}: line {number}: {error}")
    if wrong:
        raise UsageError("\n".join(wrong))
    if not hosts:
        raise UsageError(f"{path}: this hostfile names no host; write one a line, such as: mini2 slots=1")
    return tuple(hosts.values())


def _host(words: Sequence[str], line: int) -> HostLine:
    """A line's host; ``ValueError`` with what is wrong."""
    name, _, slots = words[0].rpartition(":")
    if name and ":" not in name and NUMBER.fullmatch(slots):
        raise ValueError(f"{shown(words[0])} is no host's name; write: {name} slots={slots}")
    match = NAME.fullmatch(words[0])
    if not match or match[2].startswith("-") or not words[0].isprintable():
        raise ValueError(f"{shown(words[0])} is no host's name; write for example: mini2 slots=1")
    rest = re.sub(r"\s*=\s*", "=", " ".join(words[1:])).split()
    for word in rest:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{shown(word)} stands behind {words[0]}; write one host a line")
        if key == "slots" and (not NUMBER.fullmatch(value) or int(value) == 0):
            raise ValueError(f"slots is {shown(value)}; it should be how many ranks {match[2]} may run, 1 or more")
    return HostLine(name=match[2], user=match[1], line=line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mpirun:
    """A command line of mpirun without the program: what is in it, and what of it any other run should have too."""

    hostfile: Path
    ranks: int | None
    """By -n."""
    words: tuple[str, ...]
    """All options but the hostfile's and -n."""
    elsewhere: tuple[str, ...]
    """Those of ``words`` that do not say where ranks go."""
    parameters: Mapping[str, str]
    """Of Open MPI (``mca NAME``), its runtime (``prtemca NAME``) and PMIx (``pmixmca NAME``)."""
    exported: Mapping[str, str | None]
    """-x: the environment of ranks; None for the value that the variable has here."""


def parse_mpirun(arguments: Sequence[str]) -> Mpirun:
    """mpirun's options as mpirun takes them, the hostfile as an option or by itself. ``UsageError`` where they are
    wrong."""
    words: list[str] = []
    elsewhere: list[str] = []
    hostfiles: list[str] = []
    ranks: int | None = None
    parameters: dict[str, str] = {}
    exported: dict[str, str | None] = {}
    for name, values, given in _options(arguments):
        if name in HOSTFILES:
            hostfiles.append(values[0])
        elif name in RANKS:
            ranks = _ranks(name, values[0])
        elif name not in PLAN:
            words += given
            elsewhere += given if name not in MAPPING else []
        if name in PARAMETERS:
            parameters[f"{PARAMETERS[name]} {values[0]}"] = values[1]
        elif name == "x":
            variable, equals, value = values[0].partition("=")
            exported[variable] = value if equals else None
    if len(hostfiles) != 1:
        told = f"there are {len(hostfiles)}: {', '.join(hostfiles)}" if hostfiles else "there is none"
        raise UsageError(f"one hostfile is needed, and {told}; for example: check_hosts.py hostfiles/standard")
    return Mpirun(
        hostfile=Path(hostfiles[0]), ranks=ranks, words=tuple(words), elsewhere=tuple(elsewhere),
        parameters=parameters, exported=exported,
    )  # fmt: skip


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each option's name, its values, and the words that it is made of. What is no option is a hostfile."""
    left = list(arguments)
    while left:
        word = left.pop(0)
        if not word.startswith("-") or word == "-":
            yield "hostfile", [word], [word]
            continue
        name, equals, inline = word.lstrip("-").partition("=")
        count = 2 if name in PARAMETERS else 1 if name in ONE_VALUE | RANKS | HOSTFILES else 0
        values, given = ([inline], [word]) if equals else ([], [word])
        while len(values) < count:
            if not left:
                raise UsageError(f"{word} needs {'a name and a value' if count == 2 else 'a value'}")
            values.append(left.pop(0))
            given.append(values[-1])
        yield name, values, given


def _ranks(name: str, value: str) -> int:
    if not NUMBER.fullmatch(value) or int(value) == 0:
        raise UsageError(f"-{name} is {shown(value)}; it should be the number of ranks, 1 or more")
    return int(value)
