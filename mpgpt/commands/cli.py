"""The command line: the composition root, the only module that knows every kind of part.

Knows: options, exit statuses, what goes to standard output and error.
Must not know: how any part works, what mpirun gives its ranks (``launcher.py``), how a job runs and ends (``job.py``).

Standard output carries the result: text, or records. Everything else goes to standard error.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from mpgpt import __version__, stdio
from mpgpt.commands import options
from mpgpt.commands.job import run_job
from mpgpt.commands.launcher import detect, rank_of, set_mpi_defaults
from mpgpt.display import notify
from mpgpt.errors import MpgptError, ReaderGone, UsageError

if TYPE_CHECKING:
    from mpgpt.cluster.session import Session
    from mpgpt.commands.launcher import Launch
    from mpgpt.engine.stage import Device
    from mpgpt.transport.link import World

LAST_S = 0.3
"""How long rank 0 lets the others end first where its status is not 0."""


def main() -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed (at least in part), 2 misused, 130 or 143 interrupted, 141 if
    nobody reads on."""
    stdio.settle()
    rank = rank_of(os.environ)
    message, status = "", 0
    try:
        status = cli.main(standalone_mode=False) or 0
    except click.exceptions.Exit as error:
        status = error.exit_code
    except click.ClickException as error:
        status = error.exit_code
        if not rank:
            error.show()
    except (click.Abort, KeyboardInterrupt):
        message, status = "interrupted", 130
    except MpgptError as error:
        message, status = str(error), error.exit_status
    failed = stdio.finish()
    if failed and not status:
        message, status = str(failed), failed.exit_status
    if message and not rank:
        click.echo(f"mpgpt: {message}", err=True)
    if status == ReaderGone.exit_status and rank is not None:
        status = 0  # of any other, mpirun would make many words
    if status and rank is not None:
        if rank:
            os._exit(0)  # the run's status is rank 0's, and mpirun makes many words of two
        time.sleep(LAST_S)
    gc.freeze()  # what is left goes with the process; going through torch's modules once more takes most of a second
    sys.exit(status)


def show_version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """Print the version and this host's kernels, and exit."""
    if not asked or context.resilient_parsing:
        return
    from mpgpt.model.native import library

    found = library.find()
    kernels = f"torch's alone: {found.why}" if isinstance(found, library.Absent) else f"{found.kind}, {found.compiler}"
    click.echo(f"mpgpt, version {__version__}\nkernels: {kernels}")
    context.exit()


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=show_version,
    help="Show the version, and which kernels compute here.",
)  # fmt: skip
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
    from mpgpt.commands.generate import Generate, GenerateOptions

    launch = detect(os.environ)
    own = options.from_click(GenerateOptions, given)
    return run_job(Generate(_session(given, launch), own, interactive=launch.interactive), launch)


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

    Rank 0 listens: OpenAI's API under /v1, the page at /, the ring as it is at /cluster and /metrics. These options and
    the settings are a request's defaults.
    """
    from mpgpt_api.serve import Serve, ServeOptions

    launch = detect(os.environ)
    return run_job(Serve(_session(given, launch), options.from_click(ServeOptions, given)), launch)


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
@click.option(
    "--kernel", default="auto", show_default=True, help="What multiplies: auto, native, torch, or a kernel's name."
)
@options.fast
@click.option("--threads", type=click.IntRange(1), help="Threads a rank.  [default: the host's cores, shared]")
@click.option("--pin", is_flag=True, help="Bind each rank to cores of its own, one for each thread (1 by default).")
@click.option(
    "--rounds", type=click.IntRange(1), default=3, show_default=True, help="Repeat every measurement this many times."
)
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
    from mpgpt.bench.options import BenchArguments
    from mpgpt.bench.runner import Bench, RingMeasurement

    set_mpi_defaults(os.environ)
    launch, arguments = detect(os.environ), options.from_click(BenchArguments, given)
    if arguments.child or launch.by_mpirun:
        return run_job(RingMeasurement(arguments, home=_model_home(), device_factory=_device_factory), launch)
    for signum in (signal.SIGTERM, signal.SIGHUP):  # not at once: the ring that it has started must end too
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    return Bench(arguments, home=_model_home(), env=os.environ).run()


@cli.command("verify")
@click.option("--model", help="Compute all layers of this model, too, and compare hosts with rank 0's.")
@click.option("--prompt", help="The text that it computes.  [default: a sentence]")
@click.option("--dtype", type=click.Choice(options.DTYPES), help="Of the model.  [default: float32]")
@click.option("--threads", type=click.IntRange(1), help="Threads a rank.  [default: 1]")
def verify_command(**given: Any) -> int:
    """Verify that all hosts compute the same bits: those of the golden models that mpgpt brings, and of a model.

    Alone, this machine is tried; under mpirun every rank's, by itself and with a part of the model's layers each. A
    host that differs is named, with what differs, and the exit status is 1. Each host needs the compiled kernels. What
    is verified holds for rings without --fast.
    """
    from rich.console import Console

    from mpgpt.commands.verify import Verification, VerifyOptions

    wanted = VerifyOptions(**{name: value for name, value in given.items() if value is not None})
    launch = detect(os.environ)
    return run_job(Verification(wanted, home=_model_home(), console=Console(), report=notify), launch)


@cli.command("plan")
@click.option("--what-if", type=click.Path(path_type=Path), help="A description of machines; none is measured.")
@click.option("--model", help="A folder, a pulled model's name, or a config.json; weights are not needed.")
@click.option("--config", type=click.Path(path_type=Path), help="Settings.  [default: the .yaml beside the hostfile]")
@options.kv_dtype
@options.computing
@click.option("--context", type=click.IntRange(2), help="Tokens of a sequence at most.")
@options.workload_options
def plan_command(**given: Any) -> int:
    """Plan which rank runs which layers, and predict the speed.

    Under mpirun (or alone) the ranks and the links between them are measured, which takes a second or two; nothing is
    loaded. With --what-if nothing is measured: FILE describes machines and links (hostfiles/what-if has two such
    files), so that you can ask before you buy.
    """
    from rich.console import Console

    if given["what_if"] is None:
        from mpgpt.commands.plan import Planning, PlanOptions

        launch = detect(os.environ)
        planning = Planning(
            options.from_click(PlanOptions, given),
            home=_model_home(),
            config=launch.settings(given["config"]),
            console=Console(),
            device_factory=_device_factory,
        )
        return run_job(planning, launch)
    from mpgpt.commands.plan_report import WorkloadOptions, what_if

    for name in ("model", "config", "threads", "max_sequences", "context", "kernel", "fast", "kv_dtype"):
        if given[name] is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is for ranks that are there; --what-if FILE says it in the file"
            )
    if not rank_of(os.environ):
        what_if(given["what_if"], options.from_click(WorkloadOptions, given), Console())
    return 0


@cli.command("simulate")
@click.argument("file", type=click.Path(path_type=Path))
@options.workload_options
@click.option("--spans", help='Every machine\'s layers, such as "0-3,-,4-11"; - for none.  [default: the best plan]')
@click.option("--arrival", type=click.FloatRange(0, min_open=True), help="Requests a second.  [default: all at once]")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Of when requests come.")
def simulate_command(file: Path, **given: Any) -> None:
    """Simulate the ring of the machines that FILE describes, step by step.

    FILE is what `mpgpt plan --what-if` takes. --sequences is how many requests there are; as many run at once as FILE
    has slots.
    """
    from rich.console import Console

    from mpgpt.commands.plan_report import SimulationOptions, simulation

    if not rank_of(os.environ):
        simulation(file, options.from_click(SimulationOptions, given), Console(), Console(stderr=True))


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
    from mpgpt_ios.convert.package import PackageOptions

    sizes = PackageOptions(**{name: given[name] for name in ("slots", "context", "chunk", "weights")})
    run_convert(given["model"], given["layers"], given["out"], sizes, home=_model_home())


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


@cli.command("ipad-token")
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False), default="ipad.token")
@click.option("--force", is_flag=True, help="Make another token where there is one; whoever has the old is shut out.")
@click.option("--qr", is_flag=True, help="Print the token, as a code for the iPad's camera and as a link.")
def ipad_token_command(**given: Any) -> None:
    """Make the token that the iPad and its proxy rank share, and print its fingerprint.

    FILE is ipad.token where nothing else is said; one that is there is kept. The iPad shows the same fingerprint when
    it has the same token.
    """
    from mpgpt_ios.pairing import run_token

    run_token(given["file"], force=given["force"], qr=given["qr"])


def _need_coremltools() -> None:
    if importlib.util.find_spec("coremltools") is None:
        raise UsageError(
            'this needs coremltools: pip install "mpgpt[coreml]" (there is none for Linux on Arm: take a Mac or an '
            "x86-64 machine, and copy the package from there)"
        )


def _session(given: Mapping[str, Any], launch: Launch) -> Session:
    """The session of a command that has all of its options."""
    from mpgpt.cluster.session import Session, SessionOptions
    from mpgpt.commands.terminal import explain

    return Session(
        options.from_click(SessionOptions, given),
        home=_model_home(),
        file=launch.settings(given["config"]),
        device_factory=_device_factory,
        explain=explain,
        report=notify,
    )


def _device_factory(ipad: dict[str, Any], world: World) -> Device:
    """The iPad behind this rank."""
    from mpgpt_ios.proxy.device import IPadDevice

    return IPadDevice(ipad, world.bell, notify)


def _model_home() -> Path:
    from mpgpt.model.pull import model_home

    home = os.environ.get("MPGPT_HOME")
    return Path(home) / "models" if home else model_home()
