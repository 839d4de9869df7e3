"""A job on all ranks: how it begins, runs, and ends, in order or all at once.

Knows: ranks, the guard beside mpirun, signals, exit statuses, last words on standard error.
Must not know: options, what a job does, or how mpirun is found (``launcher.py``).
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar

import click

from mpgpt import stdio
from mpgpt.commands.launcher import Launch, rank_of, set_mpi_defaults
from mpgpt.errors import LinkError, MpgptError, RequestError, UsageError

if TYPE_CHECKING:
    from mpgpt.transport.guard import Guard
    from mpgpt.transport.link import World

GRACE_S = 3.0
"""How long a rank that failed waits for rank 0 to end the run."""
FORWARD_S = 0.3
"""How long mpirun may take to forward the last words before it is ended, where they cannot be given to it directly."""
SIGNAL_S = 0.15
"""How long rank 0 waits for the signal that ended another rank: mpirun sends it to all at once when it is interrupted,
and 0.25 s later when a rank has died of somebody else's."""


class Started(Protocol):
    """A job's ring, once it is formed."""

    def serve(self) -> None:
        """The life of every rank but rank 0."""


S = TypeVar("S", bound=Started)


class Job(Protocol[S]):
    """Work for all ranks together."""

    def start(self, world: World) -> S:
        """Form the ring, on every rank. Raises on every rank what fails on any."""

    def run_rank0(self, ring: S) -> int:
        """Rank 0's part, while the others serve; the exit status."""


def run_job(job: Job[S], launch: Launch) -> int:
    """The exit status of ``job`` on all ranks of the launch. Every rank comes through here."""
    set_mpi_defaults(os.environ)
    if not launch.by_mpirun:
        from mpgpt.transport.link import SoloWorld

        return run_in_world(job, SoloWorld(), None)
    from mpgpt.transport.guard import Guard, dial_guard
    from mpgpt.transport.mpi import MPIWorld

    threading.Thread(target=_end_with_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()
    rank = rank_of(launch.environment)
    first, name = rank == 0, f"rank {rank} on {platform.node()}"
    above = launch.launcher if first else None
    guard = Guard(above, name) if above else dial_guard(launch.environment, name) if first else None
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # nothing is left behind
    if guard:
        signal.set_wakeup_fd(guard.wakeup, warn_on_full_buffer=False)
    if above and launch.several_hosts:
        _check_defaults()
    try:
        world = MPIWorld(guard.beat if guard else None)
    except MpgptError as error:  # the same on every rank
        if not first:
            time.sleep(GRACE_S)
            os._exit(1)
        _print(f"mpgpt: {error}", guard)
        _abandon(guard, lambda: None, 1)
    except OSError as error:
        _print(f"mpgpt: {name}: {error}", guard)
        _abandon(guard, lambda: None, 1)
    if guard:
        world.told_to_end = guard.stopping
    if not first:
        # rank 0 answers for all; a signal from mpirun ends this one whatever it computes
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda signum, frame: None)
        signal.set_wakeup_fd(world.wakeup, warn_on_full_buffer=False)
    try:
        return run_in_world(job, world, guard)
    finally:  # only an end in order comes here: by _end this process is gone
        if guard:
            guard.done()


def _check_defaults() -> None:
    """A hint where mpirun lacks our defaults, yet the ranks began: the program was named by its whole path."""
    from mpgpt.commands import setup

    if not setup.present():
        click.echo("mpgpt: this mpirun lacks mpgpt's defaults for several hosts: run `mpgpt setup` here", err=True)


def run_in_world(job: Job[S], world: World, guard: Guard | None) -> int:
    """Form the ring, do the job, and end: in order, or all ranks at once."""
    if world.rank == 0:
        signal.signal(signal.SIGTERM, lambda signum, frame: _terminated(signum, world, guard))
    try:
        ring = job.start(world)
    except LinkError as error:
        _end(world, guard, str(error), 1)
    except MpgptError:  # the same on every rank
        world.close()
        raise
    except KeyboardInterrupt:
        _end(world, guard, "", 130)
    except Exception as error:
        _fail(world, guard, error)
    try:
        status = 0 if world.rank else job.run_rank0(ring)
        if world.rank:
            ring.serve()
    except KeyboardInterrupt:
        _end(world, guard, "interrupted", 130)
    except (RequestError, UsageError):
        world.close()  # rank 0 has stopped the ring in order; no other rank raises these
        raise
    except Exception as error:
        _fail(world, guard, error)
    world.close()
    return status


def _fail(world: World, guard: Guard | None, error: Exception) -> NoReturn:
    """The end because of this rank's ``error``."""
    if "MPGPT_TRACEBACK" in os.environ:
        traceback.print_exc()
    cause = str(error) if isinstance(error, MpgptError) else f"{type(error).__name__}: {error}"
    here = world.size == 1 or isinstance(error, LinkError)
    _end(world, guard, cause if here else f"rank {world.rank} on {world.hosts[world.rank]}: {cause}", 1, error)


def _end_with_launcher(launcher: int) -> None:
    """A rank must not outlive the mpirun that started it: a server would keep its port, and nobody would end it."""
    while os.getppid() == launcher:
        time.sleep(1.0)
    os._exit(1)


def _end(world: World, guard: Guard | None, message: str, status: int, error: Exception | None = None) -> NoReturn:
    """The end of every rank, now, with one message."""
    by_signal = bool(world.loss and world.loss.by_signal)
    if world.rank == 0:
        if by_signal:
            time.sleep(SIGNAL_S)  # if it was mpirun's, ours comes now, and ends this
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # mpirun may be at it too
    if world.rank and isinstance(error, LinkError):
        time.sleep(1.0)  # rank 0 knows better which rank is lost, and ends the run
    if world.loss and ((world.loss.said and not by_signal) or world.rank):
        message = ""  # it stands there already, or rank 0 prints it
    _finish_output()
    if message:
        _print(f"mpgpt: {message}", guard)
    world.part(message)
    if world.rank:
        time.sleep(GRACE_S)  # rank 0 ends the run; if it cannot, this rank's status does
        os._exit(status)
    if world.loss and world.loss.said and not by_signal:
        time.sleep(FORWARD_S)  # what the other rank has printed goes through mpirun
    _abandon(guard, lambda: world.abort(status), status)


def _finish_output() -> None:
    with contextlib.suppress(RuntimeError):  # a signal came while something was written, which waits for its reader
        stdio.finish()


def _print(sentence: str, guard: Guard | None) -> None:
    """The last words before mpirun is ended."""
    if guard and guard.say(sentence):
        return
    click.echo(sentence, err=True)
    sys.stderr.flush()
    if guard:
        time.sleep(FORWARD_S)


def _abandon(guard: Guard | None, abort: Callable[[], None], status: int) -> NoReturn:
    """End mpirun by the guard, or from within, where that is not to be or mpirun runs on another host."""
    if guard and "MPGPT_TRACEBACK" not in os.environ:
        guard.end()
    abort()
    os._exit(status)


def _terminated(signum: int, world: World, guard: Guard | None) -> NoReturn:
    """SIGTERM on rank 0: somebody ends it, or mpirun does, because of the user or of a rank that it saw die. What was
    written stays written."""
    world.told_to_end()
    if world.lost_soon():
        assert world.loss
        _end(world, guard, world.loss.sentence, 1)
    _finish_output()
    os._exit(128 + signum)
