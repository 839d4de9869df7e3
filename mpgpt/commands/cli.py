"""The command line: the composition root, the only module that knows every kind of part.

Knows: options, the environment, the launcher, signals, exit statuses, what goes to standard output and error.
Must not know: how any part works.

Standard output carries what was asked for: text, or records. Everything else goes to standard error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mpgpt import __version__, stdio
from mpgpt.commands import options
from mpgpt.errors import LinkError, MpgptError, ReaderGone, RequestError, UsageError

if TYPE_CHECKING:
    from mpgpt.engine.stage import Device
    from mpgpt.transport.guard import Guard
    from mpgpt.transport.link import World
    from mpgpt.transport.mpirun import Launcher, SettingsFile

GRACE_S = 3.0
"""How long a rank that failed waits for rank 0 to end the run."""
LAST_S = 0.3
"""How long rank 0 lets the others end first where its status is not 0."""
FORWARD_S = 0.3
"""How long mpirun may take to forward the last words before it is ended, where they cannot be given to it directly."""
SIGNAL_S = 0.15
"""How long rank 0 waits for the signal that ended another rank: mpirun sends it to all at once when it is interrupted,
and 0.25 s later when a rank has died of somebody else's."""
LOST_S = 0.05
"""How long after mpirun's signal, which is a quarter of a second late, it may take to see that a rank died."""

MPI_DEFAULTS = {
    # The plain TCP and shared-memory transport: starts in a tenth of the time, and is what macOS has anyway.
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl": "self,sm,tcp",
    # Without it MPI ends a process, with a page of text, as soon as another one's connection closes.
    "OMPI_MCA_mpi_ft_enable": "1",
    # A frame goes out in one piece, without waiting for the receiver to say that it is ready.
    "OMPI_MCA_btl_tcp_eager_limit": "4194304",
    "OMPI_MCA_btl_tcp_rndv_eager_limit": "4194304",
    "OMPI_MCA_btl_tcp_max_send_size": "4194304",
}


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed (at least in part), 2 misused, 130 or 143 interrupted, 141 if
    nobody reads on."""
    stdio.settle()
    rank = int(os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
    message, status = "", 0
    try:
        status = cli.main(standalone_mode=False) or 0
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.ClickException as error:
        status = error.exit_code
        if rank == 0:
            error.show()
    except (click.Abort, KeyboardInterrupt):
        message, status = "interrupted", 130
    except MpgptError as error:
        message, status = str(error), error.exit_status
    failed = stdio.finish()
    if failed and not status:
        message, status = str(failed), failed.exit_status
    if message and rank == 0:
        click.echo(f"mpgpt: {message}", err=True)
    if status == ReaderGone.exit_status and "OMPI_COMM_WORLD_RANK" in os.environ:
        status = 0  # of any other, mpirun would make many words
    if status and "OMPI_COMM_WORLD_RANK" in os.environ:
        if rank:
            os._exit(0)  # the run's status is rank 0's, and mpirun makes many words of two
        time.sleep(LAST_S)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="mpgpt")
def cli() -> None:
    """GPT inference over the machines you own.

    Run alone, or on many machines at once: mpirun -hostfile hostfiles/NAME -n 3 mpgpt generate.
    """


@cli.command("setup")
def setup_command() -> None:
    """Give this environment's mpirun the defaults that mpgpt wants; `make install` does it.

    With them mpirun finds a bare `mpgpt` on other hosts, names a host that is down within seconds, and takes more
    ranks than a host has cores. They are written into the environment's etc/.
    """
    from mpgpt.commands.setup import write

    click.echo(f"mpirun's defaults: {', '.join(map(str, write()))}")


@cli.command("pull")
@click.argument("name")
@click.option("--dir", "folder", type=click.Path(path_type=Path), help="Where to put it.  [default: the model cache]")
def pull_command(name: str, folder: Path | None) -> None:
    """Fetch a model and print its folder.

    NAME is gpt2, smollm2-135m, any Hugging Face id (owner/name), a local folder, or a .gguf file. The folder
    holds the configuration, the tokenizer and safetensors. A finished folder is never touched again.
    """
    from mpgpt.model.pull import pull

    click.echo(os.fsencode(pull(name, folder=folder, home=_model_home())))  # a name is bytes, not this terminal's text


@cli.command("generate")
@options.source
@click.option("--prompt", "prompts", multiple=True, help="A prompt; may be repeated.")
@click.option(
    "--prompts", "prompts_file", type=click.Path(path_type=Path),
    help="A file: text, a prompt a line; or .jsonl or .ndjson, an object a line.",
)  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), help="Write records here; run again, it does what is missing.")
@options.decoding
@click.option("--stop", "stops", multiple=True, help="End the text before this; may be repeated.")
@options.prompting
@options.ring
def generate_command(**given: Any) -> int:
    """Generate text.

    Prompts come from --prompt, --prompts or standard input; on a terminal it is a conversation. One prompt
    streams its text; several give a JSON record each, to standard output or --out.

    A line of a .jsonl file has "prompt" or "messages", and any of id, max_new_tokens, temperature, top_k, top_p,
    min_p, repetition_penalty, seed, stop.
    """
    from mpgpt.commands.generate import Generate

    launcher, config = _launched(given)
    interactive = launcher.terminal if launcher else sys.stdin is not None and sys.stdin.isatty()
    return _run(
        Generate(given, home=_model_home(), config=config, interactive=interactive, device_factory=_device_factory)
    )


@cli.command("serve")
@options.source
@click.option("--host", help="Where to listen.  [default: the file's, or 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="0: any that is free.  [default: the file's, or 8000]")
@click.option("--api-key-file", type=click.Path(path_type=Path), help="Holds the keys of who may use it, one a line.")
@click.option("--insecure", is_flag=True, help="Listen to other machines without any key.")
@click.option(
    "--origin", "origins", multiple=True,
    help="An origin whose pages may use it, of any scheme (app://obsidian.md), or null; may be repeated.",
)  # fmt: skip
@click.option("--queue", type=click.IntRange(0, 100_000), help="Answers that may wait for a slot.  [default: 64]")
@click.option("--time-limit", type=click.FloatRange(0, 86_400, min_open=True), help="Seconds an answer may take.")
@options.decoding
@options.prompting
@options.ring
def serve_command(**given: Any) -> int:
    """Serve the model over HTTP, and a page to chat with it.

    Rank 0 listens: OpenAI's API under /v1, the page at /, the ring as it is at /cluster and /metrics. What a request
    does not say is as these options and the settings say.
    """
    from mpgpt.commands.terminal import explain
    from mpgpt_api.serve import Serve

    return _run(
        Serve(given, home=_model_home(), config=_launched(given)[1], device_factory=_device_factory, explain=explain)
    )


@cli.command("bench")
@click.option("--model", help="A folder, or a name that `mpgpt pull` knows; pulled where it is absent.")
@click.option(
    "--random", help="Random weights instead: gpt2, gpt2-medium, smollm2-135m, llama-small, or a config.json."
)
@click.option(
    "--ranks", help="Numbers of ranks, such as 1,2,3; all get layers.  [default: 1; under mpirun what is there]"
)
@click.option("--concurrency", default="1,8", show_default=True, help="Numbers of sequences at once.")
@click.option("--prompt-tokens", type=click.IntRange(1, 1_000_000), default=64, show_default=True)
@click.option("--new-tokens", type=click.IntRange(2, 1_000_000), default=64, show_default=True)
@click.option("--dtype", default="float32", show_default=True, help="One or several, such as float32,bfloat16.")
@click.option("--kernel", default="auto", show_default=True, help="How weights are held and multiplied.")
@click.option("--threads", type=click.IntRange(1), help="Threads a rank.  [default: the host's cores, shared]")
@click.option("--pin", is_flag=True, help="Bind each rank to cores of its own, one for each thread (1, if not said).")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Do everything so often, in turn.")
@click.option("--layers", help='Every rank\'s layers, such as "0-3,4-7,8-11".  [default: shared evenly]')
@click.option("--max-sequences", type=click.IntRange(1, 65535), help="Slots.  [default: the greatest concurrency]")
@click.option("--context", type=click.IntRange(2), help="Tokens of a slot.  [default: prompt and new tokens]")
@click.option("--drafts/--no-drafts", default=False, help="Guess tokens from the text.  [default: no]")
@click.option("--hostfile", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="For mpirun.")
@click.option("--config", type=click.Path(path_type=Path), help="Settings, of which the iPad's alone count.")
@click.option(
    "--against", multiple=True, type=click.Choice(["transformers", "llama-rpc"]),
    help="Run it too, on the same weights and cores, in turn with ours, and print the ratio; may be repeated.",
)  # fmt: skip
@click.option("--llama-bin", type=click.Path(path_type=Path), help="The folder of llama.cpp's programs, for llama-rpc.")
@click.option("--json", type=click.Path(path_type=Path), help="Write all figures here, anew after every run.")
@click.option("--plot", type=click.Path(path_type=Path), help="Draw them here: .png, .svg or .pdf.")
@click.option("--child", is_flag=True, hidden=True)
def bench_command(**given: Any) -> int:
    """Measure: tokens a second, time to the first token, and where each stage's time goes.

    Alone, it starts the rings itself, in turn, several rounds. Under mpirun it measures the ring that it is in.
    """
    from mpgpt.bench.runner import Bench, RingMeasurement

    _set_mpi_defaults()
    if given["child"] or "OMPI_COMM_WORLD_SIZE" in os.environ:
        return _run(RingMeasurement(given, home=_model_home(), device_factory=_device_factory))
    for signum in (signal.SIGTERM, signal.SIGHUP):  # not at once: the ring that it has started must end too
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    return Bench(given, home=_model_home(), env=os.environ).run()


@cli.command("plan")
@click.option("--what-if", type=click.Path(path_type=Path), help="A description of machines; no machine is asked.")
@click.option("--model", help="A folder, a pulled model's name, or a config.json; weights are not needed.")
@click.option("--config", type=click.Path(path_type=Path), help="Settings.  [default: the .yaml beside the hostfile]")
@click.option("--kernel", help="How weights are held and multiplied: a name from --explain, or auto.  [default: auto]")
@click.option("--explain", is_flag=True, help="Show which kernels were tried, and how fast they were.")
@click.option("--threads", type=click.IntRange(1), help="Threads a rank.  [default: the host's cores, shared]")
@click.option("--max-sequences", type=click.IntRange(1, 65535), help="Sequences at once.  [default: 16]")
@click.option("--context", type=click.IntRange(2), help="Tokens of a sequence at most.")
@options.asked
def plan_command(**given: Any) -> int:
    """Say which rank should run which layers, and what that will give.

    Under mpirun (or alone) the ranks and the links between them are measured, which takes a second or two; nothing is
    loaded. With --what-if nothing is measured: FILE describes machines and links (hostfiles/what-if has two such
    files), so that you can ask before you buy.
    """
    from rich.console import Console

    if given["what_if"] is None:
        from mpgpt.commands.plan import Planning

        config = _launched(given)[1]
        return _run(
            Planning(given, home=_model_home(), config=config, console=Console(), device_factory=_device_factory)
        )
    from mpgpt.commands.plan_report import what_if

    for name in ("model", "config", "threads", "max_sequences", "context", "kernel"):
        if given[name] is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for ranks that are there; --what-if FILE says it in the file"
            )
    if os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0":
        what_if(given["what_if"], given, Console())
    return 0


@cli.command("simulate")
@click.argument("file", type=click.Path(path_type=Path))
@options.asked
@click.option("--spans", help='Every machine\'s layers, such as "0-3,-,4-11"; - for none.  [default: the best plan]')
@click.option("--arrival", type=click.FloatRange(0, min_open=True), help="Requests a second.  [default: all at once]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of when requests come.")
def simulate_command(file: Path, **given: Any) -> None:
    """Simulate the ring of the machines that FILE describes, step by step.

    FILE is what `mpgpt plan --what-if` takes. --sequences is how many requests there are; as many run at once as FILE
    has slots.
    """
    from rich.console import Console

    from mpgpt.commands.plan_report import simulation

    if os.environ.get("OMPI_COMM_WORLD_RANK", "0") == "0":
        simulation(file, given, Console(), Console(stderr=True))


@cli.group("convert")
def convert_group() -> None:
    """Turn layers of a model into what another machine runs."""


@convert_group.command("coreml")
@click.option("--model", required=True, help="A folder, or a name that `mpgpt pull` knows; pulled where it is absent.")
@click.option("--layers", required=True, help="Which layers, such as 4-7.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="NAME.mlpackage")
@click.option("--slots", type=click.IntRange(1, 64), default=4, show_default=True, help="Sequences at once.")
@click.option("--context", type=click.IntRange(1), default=512, show_default=True, help="Tokens of a sequence at most.")
@click.option("--chunk", type=click.IntRange(1), default=32, show_default=True, help="Tokens of a prompt in one go.")
@click.option("--weights", type=click.Choice(["float16", "int8"]), default="float16", show_default=True)
def convert_coreml_command(**given: Any) -> None:
    """Make a Core ML package of some layers, for an iPad in the ring.

    Beside it are written a manifest, which names the weights, and a self-test, with which the iPad proves that it
    computes them rightly. Nothing is written that fails its own checks.
    """
    _need_coremltools()
    from mpgpt_ios.convert.command import run_convert

    run_convert(home=_model_home(), **given)


@cli.command("ipad-node")
@click.option(
    "--package", type=click.Path(path_type=Path), help="What `mpgpt convert coreml` wrote.  [default: none yet]"
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--token-file", type=click.Path(path_type=Path), help="Holds the token that the proxy rank has too.")
@click.option("--store", type=click.Path(path_type=Path), help="Keeps the packages that a proxy sends.")
@click.option(
    "--precision", type=click.Choice(["declared", "float32"]), default="declared", show_default=True,
    help="Round as the package declares, or compute in float32 throughout.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
def ipad_node_command(store: Path | None, **given: Any) -> None:
    """Stand in for the iPad: run a Core ML package for the proxy rank that dials.

    On macOS 15 the package runs in Core ML; elsewhere an evaluator executes it. Without --package it waits for one that
    the proxy sends, and keeps it.
    """
    _need_coremltools()
    from mpgpt_ios.node.command import run_node

    run_node(store=store or _model_home().parent / "ipad", **given)


def _need_coremltools() -> None:
    if importlib.util.find_spec("coremltools") is None:
        raise UsageError(
            'this needs coremltools: pip install "mpgpt[coreml]" (there is none for Linux on Arm: take a Mac or an '
            "x86-64 machine, and copy the package from there)"
        )


def _device_factory(ipad: dict[str, Any], world: World) -> Device:
    """The iPad behind this rank."""
    from mpgpt_ios.proxy.device import IPad

    return IPad(ipad, world.bell, lambda line: click.echo(line, err=True))


def _set_mpi_defaults() -> None:
    os.environ.update({key: value for key, value in MPI_DEFAULTS.items() if key not in os.environ})


def _launched(given: Mapping[str, Any]) -> tuple[Launcher | None, SettingsFile | None]:
    """The launcher above this process, and the settings: the file given, or the one beside its hostfile."""
    from mpgpt.transport.mpirun import SettingsFile, find, settings

    _set_mpi_defaults()
    above = find(os.environ)
    return above, SettingsFile(path=given["config"]) if given["config"] else settings(above, os.environ)


def _run(job: Any) -> int:
    """Form a ring of whatever ranks there are and do ``job`` in it. Every rank comes through here."""
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        from mpgpt.transport.link import SoloWorld

        return _work(job, SoloWorld(), None)
    from mpgpt.transport.guard import Guard, dial_guard
    from mpgpt.transport.mpi import MPIWorld
    from mpgpt.transport.mpirun import find

    threading.Thread(target=_end_with_launcher, args=(os.getppid(),), name="launcher", daemon=True).start()
    rank = os.environ["OMPI_COMM_WORLD_RANK"]
    first, name = rank == "0", f"rank {rank} on {platform.node()}"
    above = find(os.environ) if first else None
    guard = Guard(above, name) if above else dial_guard(os.environ, name) if first else None
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # nothing is left behind
    if guard:
        signal.set_wakeup_fd(guard.wakeup, warn_on_full_buffer=False)
    if above and os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") != os.environ["OMPI_COMM_WORLD_SIZE"]:
        _check_defaults()
    try:
        world = MPIWorld(guard.beat if guard else None)
    except MpgptError as error:  # the same on every rank
        if not first:
            time.sleep(GRACE_S)
            os._exit(1)
        _say(f"mpgpt: {error}", guard)
        _abandon(guard, lambda: None, 1)
    except OSError as error:
        _say(f"mpgpt: {name}: {error}", guard)
        _abandon(guard, lambda: None, 1)
    if guard:
        world.told_to_end = guard.stopping
    if not first:
        # rank 0 answers for all; a signal from mpirun ends this one whatever it computes
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda signum, frame: None)
        signal.set_wakeup_fd(world.wakeup, warn_on_full_buffer=False)
    status = _work(job, world, guard)
    if guard:
        guard.done()
    return status


def _check_defaults() -> None:
    """For whoever got as far without them, such as by the program's whole path: otherwise no rank would have begun."""
    from mpgpt.commands import setup

    if not setup.present():
        click.echo("mpgpt: this mpirun lacks mpgpt's defaults for several hosts: run `mpgpt setup` here", err=True)


def _work(job: Any, world: World, guard: Guard | None) -> int:
    """Form the ring, do the job, and end: in order, or all ranks at once."""
    if world.rank == 0:
        signal.signal(signal.SIGTERM, lambda signum, frame: _terminated(signum, world, guard))
    try:
        ring = job.start(world)
    except LinkError as error:
        _end(world, guard, str(error), 1)
    except MpgptError:  # the same on every rank
        world.close()
        if guard:
            guard.done()
        raise
    except KeyboardInterrupt:
        _end(world, guard, "", 130)
    except Exception as error:
        _fail(world, guard, error)
    try:
        status: int = 0 if world.rank else job.run_rank0(ring)
        if world.rank:
            ring.serve()
    except KeyboardInterrupt:
        _end(world, guard, "interrupted", 130)
    except (RequestError, UsageError):
        world.close()  # rank 0 has stopped the ring in order; no other rank raises these
        if guard:
            guard.done()
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
        message = ""  # it stands there already, or rank 0 says it
    _finish_output()
    if message:
        _say(f"mpgpt: {message}", guard)
    world.part(message)
    if world.rank:
        time.sleep(GRACE_S)  # rank 0 ends the run; if it cannot, this rank's status does
        os._exit(status)
    if world.loss and world.loss.said and not by_signal:
        time.sleep(FORWARD_S)  # what the other rank has said goes through mpirun
    _abandon(guard, lambda: world.abort(status), status)


def _finish_output() -> None:
    with contextlib.suppress(RuntimeError):  # a signal came while something was written, which waits for its reader
        stdio.finish()


def _say(sentence: str, guard: Guard | None) -> None:
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
    if world.lost_soon(LOST_S):
        assert world.loss
        _end(world, guard, world.loss.sentence, 1)
    _finish_output()
    os._exit(128 + signum)


def _model_home() -> Path:
    from mpgpt.model.pull import model_home

    home = os.environ.get("MPGPT_HOME")
    return Path(home) / "models" if home else model_home()
