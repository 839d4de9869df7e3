"""`mpgpt convert coreml`: some layers of a model as a Core ML package for an iPad, with a manifest and a self-test.

Knows: coremltools, what a device rejects, which files are written, and that none is there before it has passed.
Must not know: blocks' arithmetic (``blocks.py``), what is checked of a package (``verify.py``), the ring.

The three functions are converted one by one, their weights quantised (coremltools refuses that for a package of several
functions), and then merged, which shares their weights. coremltools 9 converts without an error what a device rejects,
several states or flexible shapes beside a state: so there is one state, and all shapes are fixed. It also drops some
cache writes without an error, those of one token at an index: so every package is executed before it is kept.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from mpgpt import __version__
from mpgpt.core import Row, Span, Step
from mpgpt.display import silent
from mpgpt.engine.stage import TorchStage
from mpgpt.errors import ModelError, UsageError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.linear import Kernels
from mpgpt.model.sampler import Sampler
from mpgpt.model.slice import Slice
from mpgpt.model.weights import Checkpoint, model_config
from mpgpt_ios.bundle import (
    MANIFEST,
    MAX_CHUNK,
    MAX_MASK,
    SELFTEST,
    SUFFIX,
    Bundle,
    MadeBy,
    Manifest,
    Rotary,
    slice_hash,
)
from mpgpt_ios.convert.blocks import Decode, Prefill, build
from mpgpt_ios.convert.verify import check
from mpgpt_ios.protocol.frames import MAX_ROWS, MAX_TOKENS
from mpgpt_ios.protocol.payloads import MAX_EMBED

GRAIN = 32
"""The Neural Engine takes head dimensions and contexts in multiples of this."""
TOLERANCES = {"float16": 0.02, "int8": 0.1}
"""The largest difference from float32, relative to a token's largest element where that is above 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackageOptions:
    """The sizes of a package's cache and chunks, and how it holds weights."""

    slots: int = 4
    context: int = 512
    chunk: int = 32
    """Tokens in one call, at most."""
    weights: Literal["float16", "int8"] = "float16"
    name: str = ""
    """The model's, for the manifest; that of its folder if it is empty."""


DEFAULTS = PackageOptions()


def convert(
    folder: Path,
    span: Span,
    out: Path,
    options: PackageOptions = DEFAULTS,
    report: Callable[[str], None] = silent,
) -> tuple[Bundle, float]:
    """Make ``out`` (``NAME.mlpackage``) and its two companions of layers of the model in ``folder``.

    Returns the bundle, and its self-test's largest difference from float32. An earlier package is replaced only when
    the new one has passed its checks. Raises ``UsageError`` for impossible options, ``ModelError`` for a package that
    fails, which is then not kept.
    """
    _need_tools()
    config = model_config(folder)
    refuse(config, span, out, options)
    checkpoint = Checkpoint(folder)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as part, quiet_libraries():
        fresh = Path(part) / out.name
        report(f"reading layers {span}")
        prefill, decode = build(config, span, checkpoint, slots=options.slots, context=options.context)
        _package(config, prefill, decode, options, fresh, report)
        report("making its self-test")
        _write_selftest(config, span, checkpoint, _beside(fresh, SELFTEST), options)
        manifest = _manifest(config, span, options, options.name or folder.name, slice_hash(config, checkpoint, span))
        _beside(fresh, MANIFEST).write_text(manifest.model_dump_json(indent=1) + "\n")
        report("checking what was saved")
        difference = check(Bundle.at(fresh))
        _move(fresh, out)
    return Bundle.at(out), difference


def _manifest(config: ModelConfig, span: Span, options: PackageOptions, name: str, model_hash: str) -> Manifest:
    return Manifest(
        format=1,
        model=name,
        model_hash=model_hash,
        family=config.family,
        model_layers=config.layers,
        layers=(span.start, span.stop),
        embed=config.embed,
        heads=config.heads,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        slots=options.slots,
        context=options.context,
        chunk=options.chunk,
        weights=options.weights,
        rotary=Rotary(inv_freq=config.inv_freq, gain=config.rope_gain) if config.inv_freq else None,
        tolerance=TOLERANCES[options.weights],
        made_by=MadeBy(mpgpt=__version__, coremltools=version("coremltools"), torch=torch.__version__),
    )


def refuse(config: ModelConfig, span: Span, out: Path, options: PackageOptions) -> None:
    """Raise ``UsageError`` for options that no package can have, before any work."""
    context, chunk = options.context, options.chunk
    if span.stop > config.layers:
        raise UsageError(f"--layers {span}: the model has layers 0 to {config.layers - 1}")
    if span.start == 0 or span.stop == config.layers:
        if config.layers < 3:
            raise UsageError(
                f"--layers {span}: a model of {config.layers} layers has none between its first and its last"
            )
        raise UsageError(
            f"--layers {span}: rank 0 embeds and the last rank samples, so an iPad has neither the first nor the last "
            f"layer; 1-{config.layers - 2} is the most"
        )
    for what, size in (("--context", context), ("the model's head dimension", config.head_dim)):
        if size % GRAIN:
            raise UsageError(f"{what} is {size}, and the Neural Engine takes multiples of {GRAIN}")
    if context > config.positions:
        raise UsageError(f"--context {context} is more than the model's {config.positions} positions")
    if not 1 < chunk <= min(context, MAX_TOKENS):
        raise UsageError(f"--chunk {chunk} is not between 2 and {min(context, MAX_TOKENS)}")
    if not 1 <= options.slots <= MAX_ROWS:
        raise UsageError(f"--slots {options.slots} is not between 1 and {MAX_ROWS}")
    for what, rows in (("--chunk", chunk), ("--slots", options.slots)):
        if rows * context > MAX_MASK:
            raise UsageError(f"{what} {rows} times --context {context} is more than {MAX_MASK}: take less of either")
    if config.embed > MAX_EMBED:
        raise UsageError(f"the model's hidden states are {config.embed} wide; an iPad is sent {MAX_EMBED} at most")
    if chunk * config.embed > MAX_CHUNK:
        raise UsageError(
            f"--chunk {chunk}: a request has room for {MAX_CHUNK // config.embed} of this model's hidden states at most"
        )
    if not out.name.endswith(SUFFIX) or out.name == SUFFIX:
        raise UsageError(f"--out {out}: a Core ML package is named NAME{SUFFIX}")
    if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out {out}: the directory {out.parent} is not there, or cannot be written to")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: that is there, and no package")


def _need_tools() -> None:
    """Raise ``UsageError`` when a conversion cannot work with the installed packages."""
    if tuple(int(part) for part in np.__version__.split(".")[:2]) >= (2, 4):
        raise UsageError(f'coremltools cannot work with numpy {np.__version__}: pip install "numpy<2.4"')


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence coremltools, which warns of expected things and draws progress bars."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    with warnings.catch_warnings(), contextlib.redirect_stderr(open(os.devnull, "w")):
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            gc.collect()  # its temporary folders, while their warnings are not shown
            logging.disable(before)


# -- the package


def _package(
    config: ModelConfig,
    prefill: Prefill,
    decode: Decode,
    options: PackageOptions,
    out: Path,
    report: Callable[[str], None],
) -> None:
    import coremltools as ct

    modules: dict[str, Prefill | Decode] = {"prefill": prefill, "step": prefill, "decode": decode}
    functions = ct.utils.MultiFunctionDescriptor()
    for name, inputs in _inputs(config, options).items():
        report(f"converting {name}")
        path = str(out.parent / f"{name}{SUFFIX}")
        program = _quantised(_converted(modules[name], inputs), options.weights)
        program.save(path)
        functions.add_function(path, "main", name)
    functions.default_function_name = "decode"
    report("putting them together")
    ct.utils.save_multifunction(functions, str(out))
    for name in modules:
        shutil.rmtree(out.parent / f"{name}{SUFFIX}")


def _inputs(config: ModelConfig, options: PackageOptions) -> dict[str, dict[str, Tensor]]:
    """What each function is traced with."""
    turns, slots, context = ("cos", "sin") if config.inv_freq else (), options.slots, options.context

    def one_slot(tokens: int) -> dict[str, Tensor]:
        return {
            "x": torch.zeros(1, config.embed, 1, tokens), "mask": torch.zeros(1, 1, tokens, context),
            "pos": torch.ones(1, dtype=torch.int32), "row": torch.zeros(1, dtype=torch.int32),
        } | {name: torch.zeros(1, 1, tokens, config.head_dim) for name in turns}  # fmt: skip

    any_slots = {
        "x": torch.zeros(slots, config.embed, 1, 1), "mask": torch.zeros(slots, 1, 1, context),
        "wmask": torch.zeros(slots, 1, context, 1),
    } | {name: torch.zeros(slots, 1, 1, config.head_dim) for name in turns}  # fmt: skip
    return {"prefill": one_slot(options.chunk), "step": one_slot(1), "decode": any_slots}


def _converted(module: Prefill | Decode, inputs: dict[str, Tensor]) -> Any:
    import coremltools as ct

    with torch.no_grad():
        traced = torch.jit.trace(module, tuple(inputs.values()), check_trace=False)  # type: ignore[no-untyped-call]
    module.kv.zero_()  # tracing has written to it
    half = ct.TensorType
    return ct.convert(
        traced,
        inputs=[
            half(name=name, shape=x.shape, dtype=np.int32 if x.dtype == torch.int32 else np.float16)
            for name, x in inputs.items()
        ],
        outputs=[half(name="y", dtype=np.float16)],
        states=[ct.StateType(wrapped_type=half(shape=module.kv.shape, dtype=np.float16), name="kv")],
        minimum_deployment_target=ct.target.iOS18, compute_units=ct.ComputeUnit.CPU_AND_NE, skip_model_load=True,
    )  # fmt: skip


def _quantised(program: Any, weights: str) -> Any:
    if weights != "int8":
        return program
    from coremltools.optimize import coreml as cto

    how = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")
    return cto.linear_quantize_weights(program, cto.OptimizationConfig(global_config=how))


# -- the self-test


Script = list[tuple[str, list[tuple[int, int, int]]]]


def script(slots: int, context: int, chunk: int) -> Script:
    """The calls of a self-test: (kind, [(slot, position, tokens)]).

    Prompts one after another, one of them longer than a chunk; tokens alone, which ``step`` computes, and beside
    others, which ``decode`` does, at different positions; in every slot both, since only a later one reads back a
    write; a slot used again, nearly all of which steps write, and one that decodes do, so that a lost write weighs more
    than rounding; and one token at the end of every slot.
    """
    calls: Script = []
    filled: dict[int, int] = {}

    def prefill(slot: int, tokens: int) -> None:
        calls.append(("prefill", [(slot, 0, tokens)]))
        filled[slot] = tokens

    def decode(*those: int) -> None:
        calls.append(("decode", [(slot, filled[slot], 1) for slot in those]))
        filled.update({slot: filled[slot] + 1 for slot in those})

    prefill(0, min(chunk + 3, context - 8))
    decode(0)
    decode(0)
    if slots > 1:
        prefill(1, 5)
        decode(0, 1)
        decode(1, 0)
    if slots > 2:
        prefill(2, 2)
        decode(2, 0, 1)
        decode(2)
    prefill(0, 1)
    for _ in range(8):
        decode(0)
    if slots > 1:
        prefill(1, 1)
        for _ in range(8):
            decode(0, 1)
    decode(*sorted(filled))
    return calls


def _write_selftest(
    config: ModelConfig, span: Span, checkpoint: Checkpoint, path: Path, options: PackageOptions
) -> None:
    """Write the self-test. Its inputs are the layers before on random tokens, so that they are as large as at work."""
    slots, context = options.slots, options.context
    before, truth = (
        torch_stage(config, part, checkpoint, slots, context) for part in (Span(start=0, stop=span.start), span)
    )
    dice, tensors, kinds = np.random.default_rng(0), dict[str, Any](), dict[str, str]()
    for at, (kind, parts) in enumerate(script(slots, context, options.chunk)):
        rows = tuple(
            Row(slot=slot, start=start, ids=tuple(dice.integers(0, config.vocab, tokens).tolist()))
            for slot, start, tokens in parts
        )
        x = hidden_states(before.forward(Step(epoch=0, number=at, rows=rows)), config.embed).astype(np.float16)
        step = Step(epoch=0, number=at, rows=rows, hidden=bytearray(x.astype(np.float32).tobytes()))
        y = hidden_states(truth.forward(step), config.embed)
        positions = [(row.slot, position) for row in rows for position in range(row.start, row.stop)]
        slot_N, pos_N = np.array(positions, np.int32).T
        tensors |= {f"{at}.slot": slot_N.copy(), f"{at}.pos": pos_N.copy(), f"{at}.x": x, f"{at}.y": y}
        kinds[f"kind.{at}"] = kind
    save_file(tensors, path, metadata=kinds)
    path.chmod(0o644)


def torch_stage(config: ModelConfig, span: Span, checkpoint: Checkpoint, slots: int, context: int) -> TorchStage:
    """The layers of ``span`` in float32, by torch."""
    model = Slice(config, span, checkpoint, slots=slots, context=context, kernels=Kernels(dtype="float32"))
    return TorchStage(model, Sampler(slots=slots, context=context, vocab=config.vocab), lambda: None)


def hidden_states(step: Any, embed: int) -> Any:
    """A step's hidden states, [T, E] float32."""
    assert isinstance(step, Step)
    return np.frombuffer(bytes(step.hidden), np.float32).reshape(-1, embed)


# -- files


def _beside(package: Path, what: str) -> Path:
    return package.with_name(f"{package.name.removesuffix(SUFFIX)}.{what}")


def _move(fresh: Path, out: Path) -> None:
    """Move all three files to their names; an earlier package is removed only when the new one can replace it."""
    old = fresh.with_name("old")
    try:
        if out.exists():
            os.replace(out, old)
        os.replace(fresh, out)
        for what in (MANIFEST, SELFTEST):
            os.replace(_beside(fresh, what), _beside(out, what))
    except OSError as error:
        raise ModelError(f"{out} cannot be written: {error.strerror}") from None
