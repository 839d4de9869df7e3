"""A package with its slots: hidden states at positions of slots go in, the slice's hidden states come out.

Knows: the inputs of a package's three functions (masks, positions, rotary tables), chunks and their padding, what each
slot holds; which backends can run a package.
Must not know: bundles, the wire, connections.

A package has ``prefill`` (one slot, T positions in a row), ``step`` (one slot, one position) and ``decode`` (one
position in any of B slots), and a state with S positions of keys and values for each slot:

    prefill   x (1,E,1,T)  mask (1,1,T,S)  pos (1,)  row (1,)              Llama: cos, sin (1,1,T,D)    y (1,E,1,T)
    step      x (1,E,1,1)  mask (1,1,1,S)  pos (1,)  row (1,)              Llama: cos, sin (1,1,1,D)    y (1,E,1,1)
    decode    x (B,E,1,1)  mask (B,1,1,S)  wmask (B,1,S,1)                 Llama: cos, sin (B,1,1,D)    y (B,E,1,1)

A mask is 0 where a position is seen and -1e4 where it is not; ``row`` is slot x K; ``wmask`` is 1 at the position that
is written, and all 0 for a slot that is left alone. A prefill of fewer than T positions is padded: what it writes
behind them is overwritten before anyone sees it. One token of one slot is a step, whatever it is part of: a decode
reads and writes the cache of every slot.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors
import torch

from mpgpt.errors import ModelError, MpgptError
from mpgpt_ios.mil.program import Precision, Program

Array = np.ndarray[Any, Any]
HIDDEN = -1e4
FUNCTIONS = ("prefill", "step", "decode")
COMPUTE_UNITS = ("CPU_AND_NE", "CPU_AND_GPU", "CPU_ONLY", "ALL")


class BadPosition(ModelError):
    """A row that does not begin where its slot can go on, or that ends behind the context. BAD_POS on the wire."""


class Rotary(Protocol):
    """The parameters of the rotary tables, from the model's config."""

    @property
    def inv_freq(self) -> Sequence[float]: ...
    @property
    def gain(self) -> float: ...


class Sizes(Protocol):
    """The sizes of a package, as a bundle's manifest has them."""

    @property
    def embed(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def context(self) -> int: ...
    @property
    def chunk(self) -> int: ...
    @property
    def rotary(self) -> Rotary | None: ...


TROUBLES = (MpgptError, RuntimeError, ValueError, MemoryError)
"""What a backend may raise."""


class Backend(Protocol):
    """A runtime of one package, with its state."""

    def run(self, function: str, inputs: dict[str, Array]) -> Array:
        """The output y. Floats of ``inputs`` may be float32: the backend rounds them to what the package takes."""

    def reset(self) -> None:
        """Forget the state."""


class EvaluatorBackend:
    """Runs a package in the evaluator, anywhere."""

    def __init__(self, package: Path, precision: Precision = "declared") -> None:
        """Raises ``ModelError`` for a package that the evaluator does not understand, or that lacks a function."""
        self.program = Program.read(package, precision=precision)
        absent = [name for name in FUNCTIONS if name not in self.program.functions]
        if absent:
            raise ModelError(
                f"{package} has no function {' nor '.join(absent)}: an earlier mpgpt made it; "
                "`mpgpt convert coreml` makes it anew"
            )
        self.state = self.program.state()

    def run(self, function: str, inputs: dict[str, Array]) -> Array:
        return self.program.run(function, inputs, self.state)["y"]

    def reset(self) -> None:
        self.state = self.program.state()


class CoreMLBackend:
    """Runs a package in Core ML, on macOS 15 or later.

    Written from coremltools' and Apple's documentation and **not run on Apple hardware so far**. The package is loaded
    once for each function; a state that one of them has made is handed to all, as their states are declared alike.
    Whether it runs right is for the self-test to say (``run_selftest``).
    """

    def __init__(self, package: Path, compute_units: str = "CPU_AND_NE") -> None:
        """``compute_units`` is one of ``COMPUTE_UNITS``. Raises ``ModelError`` where there is no Core ML."""
        assert compute_units in COMPUTE_UNITS, "there is no such unit"
        version = platform.mac_ver()[0]
        if platform.system() != "Darwin" or int(version.split(".")[0] or 0) < 15:
            raise ModelError(
                "Core ML keeps states on macOS 15 or later only; elsewhere run the package in the evaluator"
            )
        try:
            import coremltools as ct
        except ImportError:
            raise ModelError('a package is run with coremltools: pip install "mpgpt[coreml]"') from None
        units = ct.ComputeUnit[compute_units]
        try:
            self._functions = {
                name: ct.models.MLModel(str(package), compute_units=units, function_name=name) for name in FUNCTIONS
            }
            self._state = self._functions["prefill"].make_state()
        except (RuntimeError, ValueError, OSError) as error:
            raise ModelError(f"Core ML does not load {package} on {compute_units}: {error}") from error

    def run(self, function: str, inputs: dict[str, Array]) -> Array:
        y: Array = np.asarray(self._functions[function].predict(inputs, state=self._state)["y"])
        return y

    def reset(self) -> None:
        self._state = self._functions["prefill"].make_state()


class Executor:
    """A package with its slots. Not for two threads at a time.

    Hidden states are token-major, [n, E] of ``dtype``. A row may begin at any position up to where its slot is filled:
    what was behind is written over. Raises ``BadPosition`` for one that begins later or that goes past the context, and
    ``ModelError`` for slots that do not exist or come twice, and for hidden states of another shape; nothing has
    happened then. Where the backend fails the slot is filled up to where the row begins.
    """

    def __init__(self, backend: Backend, sizes: Sizes, dtype: Any = np.float16) -> None:
        """``dtype`` is that of hidden states: float16, or float32 for a backend that computes in it."""
        self._backend, self._sizes, self.dtype = backend, sizes, np.dtype(dtype)
        self._filled = [0] * sizes.slots
        self._turns = None if sizes.rotary is None else _turns(sizes.rotary, sizes.context)

    @property
    def filled(self) -> tuple[int, ...]:
        """How many positions each slot holds."""
        return tuple(self._filled)

    def reset(self) -> None:
        """A new epoch: every slot is empty."""
        self._backend.reset()
        self._filled = [0] * self._sizes.slots

    def prefill(self, slot: int, pos: int, x_TE: Array) -> Array:
        """The hidden states of n >= 1 tokens of one slot at ``pos`` and behind, [n, E]."""
        x_TE = self._checked(x_TE, [slot], [pos])
        parts, at = [], 0
        self._filled[slot] = pos  # what is written may be there in part, should this fail
        while at < len(x_TE):
            # A padded chunk must not end behind the context.
            fits = pos + at + self._sizes.chunk <= self._sizes.context
            parts.append(self._one_slot(slot, pos + at, x_TE[at : at + (self._sizes.chunk if fits else 1)]))
            at += len(parts[-1])
        self._filled[slot] = pos + at
        return np.concatenate(parts)

    def decode(self, slots: Sequence[int], positions: Sequence[int], x_BE: Array) -> Array:
        """The hidden states of one token in each of n different slots, [n, E]. Other slots stay as they are."""
        if len(slots) != len(positions) or len(slots) != len(x_BE) or len(set(slots)) != len(slots):
            raise ModelError(f"a decode of {len(x_BE)} tokens for slots {list(slots)} at {list(positions)}")
        x_BE = self._checked(x_BE, slots, positions)
        for slot, position in zip(slots, positions, strict=True):
            self._filled[slot] = position  # as above
        if len(x_BE) == 1:
            y_BE = self._one_slot(slots[0], positions[0], x_BE)
        else:
            y_BE = self._any_slots(slots, positions, x_BE)
        for slot, position in zip(slots, positions, strict=True):
            self._filled[slot] = position + 1
        return y_BE

    def _checked(self, x_TE: Array, slots: Sequence[int], positions: Sequence[int]) -> Array:
        sizes, tokens = self._sizes, len(x_TE) if len(slots) == 1 else 1
        if x_TE.ndim != 2 or x_TE.shape[1] != sizes.embed or not len(x_TE) or x_TE.dtype != self.dtype:
            raise ModelError(
                f"hidden states of {x_TE.shape} {x_TE.dtype}; [n, {sizes.embed}] {self.dtype} are understood"
            )
        for slot, position in zip(slots, positions, strict=True):
            if not 0 <= slot < sizes.slots:
                raise ModelError(f"there is no slot {slot}; there are {sizes.slots}")
            if not 0 <= position <= self._filled[slot] or position + tokens > sizes.context:
                raise BadPosition(
                    f"slot {slot} holds {self._filled[slot]} of {sizes.context} positions: "
                    f"{tokens} at {position} cannot follow"
                )
        return x_TE

    def _one_slot(self, slot: int, pos: int, x_CE: Array) -> Array:
        """Run ``step`` for one token, ``prefill`` for up to T."""
        sizes = self._sizes
        function, width = ("step", 1) if len(x_CE) == 1 else ("prefill", sizes.chunk)
        x = np.zeros((1, sizes.embed, 1, width), self.dtype)
        x[0, :, 0, : len(x_CE)] = x_CE.T
        positions = np.arange(pos, pos + width)
        inputs = {
            "x": x,
            "mask": _mask(positions, sizes.context)[None, None],
            "pos": np.array([pos], np.int32),
            "row": np.array([slot * sizes.kv_heads], np.int32),
        }
        if self._turns is not None:
            inputs |= {name: table[positions][None, None] for name, table in self._turns.items()}
        y = self._run(function, inputs, x.shape)
        return np.ascontiguousarray(y[0, :, 0, : len(x_CE)].T)

    def _any_slots(self, slots: Sequence[int], positions: Sequence[int], x_BE: Array) -> Array:
        """Run ``decode`` for a token in each of some slots."""
        sizes, at = self._sizes, list(slots)
        x = np.zeros((sizes.slots, sizes.embed, 1, 1), self.dtype)
        x[at, :, 0, 0] = x_BE
        mask = np.full((sizes.slots, 1, 1, sizes.context), HIDDEN, np.float16)
        mask[at, 0, 0] = _mask(np.array(positions), sizes.context)
        wmask = np.zeros((sizes.slots, 1, sizes.context, 1), np.float16)
        wmask[at, 0, list(positions), 0] = 1
        inputs = {"x": x, "mask": mask, "wmask": wmask}
        if self._turns is not None:
            everyones = np.zeros(sizes.slots, np.int64)
            everyones[at] = positions
            inputs |= {name: table[everyones][:, None, None] for name, table in self._turns.items()}
        return self._run("decode", inputs, x.shape)[at, :, 0, 0]

    def _run(self, function: str, inputs: dict[str, Array], shape: tuple[int, ...]) -> Array:
        y = self._backend.run(function, inputs)
        if y.shape != shape:
            raise ModelError(f"{function} gives {y.shape} for {shape}")
        with np.errstate(
            over="ignore"
        ):  # a backend in float32 may exceed float16: it becomes infinite, as on the device
            return y.astype(self.dtype)


def _mask(positions: Array, context: int) -> Array:
    """The mask of each position, [n, S] float16: 0 for itself and the positions before it."""
    return np.where(np.arange(context) <= positions[:, None], 0, HIDDEN).astype(np.float16)


def _turns(rotary: Rotary, context: int) -> Mapping[str, Array]:
    """cos and signed sin of every position, [S, D] float32: x * cos + roll(x, D / 2) * sin turns a head."""
    angles = torch.arange(context).float()[:, None] * torch.tensor(rotary.inv_freq, dtype=torch.float32)[None, :]
    cos, sin = angles.cos() * rotary.gain, angles.sin() * rotary.gain
    return {"cos": torch.cat((cos, cos), dim=-1).numpy(), "sin": torch.cat((-sin, sin), dim=-1).numpy()}


def run_selftest(executor: Executor, path: Path, tolerance: float) -> float:
    """Replay the self-test at ``path`` on a fresh state; the largest difference between what comes and what should, of
    a token's largest element where that is above 1.

    Raises ``ModelError`` when that is above ``tolerance`` or not finite, and for a file that is not a self-test. The
    executor is reset before and after.
    """
    executor.reset()
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            largest = _largest_difference(executor, path, file)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"{path} is not a self-test: {error}") from None
    finally:
        executor.reset()
    if not largest <= tolerance:
        raise ModelError(f"the package fails its self-test: off by {largest:.4g}, where {tolerance:.4g} is allowed")
    return largest


def _largest_difference(executor: Executor, path: Path, file: Any) -> float:
    kinds: Mapping[str, str] = file.metadata() or {}
    count = sum(name.startswith("kind.") for name in kinds)
    if not count or set(file.keys()) != {f"{i}.{part}" for i in range(count) for part in ("slot", "pos", "x", "y")}:
        raise ModelError(f"{path} is not a self-test: its tensors are not those of {count} calls")
    largest = 0.0
    for i in range(count):
        slots, positions, x, y = (file.get_tensor(f"{i}.{part}") for part in ("slot", "pos", "x", "y"))
        got = _replay(executor, kinds.get(f"kind.{i}", ""), slots, positions, x)
        if got.shape != y.shape:
            raise ModelError(f"{path}: call {i} expects {y.shape} of {got.shape}")
        scale = np.maximum(1.0, np.abs(y).max(axis=1))  # some tokens' elements are of the size of 10000
        with np.errstate(invalid="ignore"):
            difference = float((np.abs(got.astype(np.float32) - y).max(axis=1) / scale).max())
        largest = max(largest, difference if np.isfinite(difference) else np.inf)
    return largest


def _replay(executor: Executor, kind: str, slots: Array, positions: Array, x: Array) -> Array:
    x = x.astype(executor.dtype)
    if kind == "decode":
        return executor.decode(slots.tolist(), positions.tolist(), x)
    rising = len(positions) == len(x) > 0 and (positions == positions[0] + np.arange(len(x))).all()
    if kind != "prefill" or not rising or len(set(slots.tolist())) != 1:
        raise ModelError(f"a self-test with a {kind or 'nameless'} call of slots {slots} and positions {positions}")
    return executor.prefill(int(slots[0]), int(positions[0]), x)
