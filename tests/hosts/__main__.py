"""Pretend hosts for people and benchmarks: `python -m tests.hosts`, as root, from the checkout."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from tests.hosts.cluster import ADDRESSES, Cluster, obstacle
from tests.hosts.network import PRESETS

SCRIPTS = "mpgpt-hosts-"


@click.group(invoke_without_command=True)
@click.option("--network", type=click.Choice(list(PRESETS)), default="ethernet", show_default=True)
@click.pass_context
def main(context: click.Context, network: str) -> None:
    """Boot the hosts and keep them until Ctrl-C."""
    reason = obstacle()
    if reason:
        raise click.ClickException(f"no pretend hosts: {reason}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    context.obj = PRESETS[network]
    if context.invoked_subcommand is None:
        with Cluster(PRESETS[network]) as cluster, scripts(cluster) as folder:
            click.echo(f"{network}: {', '.join(f'{host.name} {host.address}' for host in cluster)}")
            click.echo(f"Run a command on a host:  {folder}/mini1 mpgpt --version    (without one: a shell)")
            click.echo("Ctrl-C switches them off.")
            signal.sigwait({signal.SIGINT, signal.SIGTERM})


@main.command()
@click.argument("host", type=click.Choice(list(ADDRESSES)))
@click.argument("command", nargs=-1, required=True)
@click.pass_context
def run(context: click.Context, host: str, command: tuple[str, ...]) -> None:
    """Boot the hosts, run COMMAND as the user on HOST, and end with its status."""
    with Cluster(context.obj) as cluster:
        process = cluster[host].start(command, stdin=None, stdout=None, stderr=None)
        signal.signal(signal.SIGINT, lambda *_: cluster[host].interrupt(process))
        status = process.wait()
    sys.exit(status if status >= 0 else 128 - status)


@contextmanager
def scripts(cluster: Cluster) -> Iterator[Path]:
    """A folder with one program for each host, which runs its arguments there."""
    temporary = Path(tempfile.gettempdir())
    for stale in temporary.glob(f"{SCRIPTS}*"):
        if not Path("/proc", stale.name.removeprefix(SCRIPTS)).exists():
            shutil.rmtree(stale, ignore_errors=True)
    folder = temporary / f"{SCRIPTS}{os.getpid()}"
    folder.mkdir(mode=0o700)
    try:
        for host in cluster:
            path = folder / host.name
            path.write_text(f'#!/bin/sh\n[ $# -gt 0 ] || set -- bash\nexec {shlex.join(host.command_line([]))} "$@"\n')
            path.chmod(0o700)
        yield folder
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
