"""Pretend hosts for people and benchmarks: `python -m tests.hosts`, as root, from the checkout."""

from __future__ import annotations

import signal
import sys

import click

from tests.hosts.cluster import ADDRESSES, Cluster, obstacle
from tests.hosts.network import PRESETS


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
        with Cluster(PRESETS[network]) as cluster:
            folder = cluster.write_scripts()
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


@main.command()
def check() -> None:
    """Say whether this machine can have pretend hosts; fetch what they want."""
    click.echo("this machine can have pretend hosts")


if __name__ == "__main__":
    main()
