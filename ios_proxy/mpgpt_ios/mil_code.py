"""A function of an ML program made ready to run: every value a register, every op a step.

Knows: names and types of a function's values, what is constant, when a value is needed for the last time, which values
may share memory, where a state may be updated in place.
Must not know: what an op computes, or how constants are stored.

Reading a state is no step, and neither is writing one: they say which register is the state from there on. What
remains to be decided is whether ``slice_update`` may write into its operand. It may where nothing that is still
wanted shares memory with it, the state that a later op reads or the end of the function keeps included; otherwise
the operand is copied first. A cache that is read, updated and written back is thus updated where it lies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpgpt.errors import ModelError
from mpgpt_ios.mil_call import Call, Compute, Operand
from mpgpt_ios.mil_file import Constant, Package, Type
from mpgpt_ios.mil_moves import MOVING
from mpgpt_ios.mil_ops import ARITHMETIC

OPSET = "CoreML8"
PINNED = -1  # the memory of constants
ALWAYS = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One op at run time. ``ends`` are the registers that nobody needs after it."""

    what: str
    compute: Compute
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    types: tuple[Type, ...]
    ends: tuple[int, ...]

    def results(self, operands: Sequence[Tensor | None]) -> list[Tensor]:
        """The op's results, rounded to what is declared; ``ModelError`` where they are of another shape or kind."""
        try:
            result = self.compute(*operands)
        except (RuntimeError, IndexError) as error:
            raise ModelError(f"{self.what} fails: {error}") from error
        results = []
        for tensor, type in zip((result,) if isinstance(result, Tensor) else result, self.types, strict=True):
            if not type.fits(tensor.shape):
                raise ModelError(f"{self.what} gives {tuple(tensor.shape)} and declares {type.shape}")
            if tensor.dtype == type.dtype:
                results.append(tensor)
            elif tensor.is_floating_point() == type.dtype.is_floating_point and tensor.dtype != torch.bool:
                results.append(tensor.to(type.dtype))
            else:
                raise ModelError(f"{self.what} gives {tensor.dtype} and declares {type.declared}")
        return results


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """A function that can run. Registers are numbers into a list that begins as ``constants``."""

    inputs: Mapping[str, tuple[int, Type]]
    outputs: Mapping[str, tuple[int, Type]]
    states: Mapping[str, tuple[int, Type]]
    kept: Mapping[str, tuple[int, bool]]
    """The register of each state at the end, and whether something else may share its memory."""
    constants: Sequence[Tensor | None]
    steps: Sequence[Step]
    copies: int
    """How many values are copied before they are updated."""

    def run(self, registers: list[Tensor | None]) -> None:
        for step in self.steps:
            results = step.results([registers[source] for source in step.sources])
            for target, result in zip(step.targets, results, strict=True):
                registers[target] = result
            for register in step.ends:
                registers[register] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Op:
    kind: str
    what: str
    inputs: Mapping[str, Sequence[int]]
    outputs: Sequence[int]


class _Values:
    """The values of a function: a register each, with a type (none for a text) and the constant if it is one."""

    def __init__(self, what: str) -> None:
        self._what = what
        self.types: list[Type | None] = []
        self.constants: dict[int, Constant] = {}
        self._registers: dict[str, int] = {}

    def new(self, name: str, type: Type | None, constant: Constant | None = None) -> int:
        """A register; an empty name is not remembered."""
        register = len(self.types)
        self.types.append(type)
        if constant is not None:
            self.constants[register] = constant
        if name:
            self.name(name, register)
        return register

    def name(self, name: str, register: int) -> None:
        if name in self._registers:
            raise ModelError(f"{self._what} defines {name!r} twice")
        self._registers[name] = register

    def of(self, name: str) -> int:
        if name not in self._registers:
            raise ModelError(f"{self._what} uses {name!r}, which is not defined before")
        return self._registers[name]

    def type(self, register: int) -> Type:
        type = self.types[register]
        if type is None:
            raise ModelError(f"{self._what} uses a text where a tensor is wanted")
        return type


def link(package: Package, name: str, function: Any) -> Code:
    """The function ``name`` of ``package``; ``ModelError`` for whatever in it is not understood."""
    linker = _Linker(package, f"{package.path}: function {name!r}", function)
    return _Binder(package, linker).code()


class _Linker:
    """The first half: names become registers, reading and writing a state vanish."""

    def __init__(self, package: Package, what: str, function: Any) -> None:
        self._package, self.what = package, what
        self.values = _Values(what)
        self.inputs: dict[str, int] = {}
        self.begin: dict[str, int] = {}
        """What each state is at the beginning."""
        self.ops: list[_Op] = []
        blocks = function.block_specializations
        if function.opset != OPSET or list(blocks) != [OPSET] or function.attributes:
            raise ModelError(f"{what} is of opset {function.opset}, or has attributes; {OPSET} alone is understood")
        for value in function.inputs:
            label = f"{what}: input {value.name!r}"
            if value.type.WhichOneof("type") == "stateType":
                type = package.type(value.type.stateType.wrappedType, label)
                self.begin[value.name] = self.values.new("", type)
            else:
                self.inputs[value.name] = self.values.new(value.name, package.type(value.type, label))
        self.kept = dict(self.begin)
        """What each state is at this point of the function, and finally at its end."""
        block = blocks[OPSET]
        if block.inputs or block.attributes:
            raise ModelError(f"{what} has a block with inputs or attributes, which are not understood")
        for op in block.operations:
            self._link(op)
        self.outputs = {output: self.values.of(output) for output in block.outputs}

    def _link(self, op: Any) -> None:
        label = op.outputs[0].name if op.outputs else ""
        what = f"{self.what}: op {op.type} {label!r}"
        if op.blocks or set(op.attributes) - {"name", "val"} or ("val" in op.attributes) != (op.type == "const"):
            raise ModelError(f"{what} has blocks or attributes that are not understood: {', '.join(op.attributes)}")
        if op.type == "const":
            self._constant(label, op.attributes["val"], what)
        elif op.type in ("read_state", "write_state"):
            self._state(op, what)
        elif op.type in ARITHMETIC or op.type in MOVING:
            inputs = {name: [self._register(b, what) for b in given.arguments] for name, given in op.inputs.items()}
            types = [self._package.type(output.type, what, fixed=False) for output in op.outputs]
            outputs = [self.values.new(o.name, type) for o, type in zip(op.outputs, types, strict=True)]
            self.ops.append(_Op(kind=op.type, what=what, inputs=inputs, outputs=outputs))
        else:
            raise ModelError(f"{what} is not understood: there is no such op here")

    def _constant(self, name: str, value: Any, what: str) -> int:
        constant = self._package.constant(value, what)
        type = self._package.type(value.type, what) if isinstance(constant, Tensor) else None
        return self.values.new(name, type, constant)

    def _register(self, binding: Any, what: str) -> int:
        if binding.WhichOneof("binding") == "name":
            return self.values.of(binding.name)
        return self._constant("", binding.value, what)

    def _state(self, op: Any, what: str) -> None:
        state, data = ([b.name for b in op.inputs[name].arguments] for name in ("input", "data"))
        reads = op.type == "read_state"
        if len(state) != 1 or state[0] not in self.kept or len(op.outputs) != reads or len(data) == reads:
            raise ModelError(f"{what} is not of one state and one value")
        now = self.kept[state[0]]
        declared = self._package.type(op.outputs[0].type, what) if reads else self.values.type(self.values.of(data[0]))
        if declared != self.values.type(now):
            raise ModelError(f"{what} is of another type than the state {state[0]!r}")
        if reads:
            self.values.name(op.outputs[0].name, now)
        else:
            self.kept[state[0]] = self.values.of(data[0])


class _Binder:
    """The second half: ops become steps, in their order; what is constant is computed at once."""

    def __init__(self, package: Package, linker: _Linker) -> None:
        self._package, self._linker, self._values = package, linker, linker.values
        self._last = dict.fromkeys(range(len(self._values.types)), -1)
        for at, op in enumerate(linker.ops):
            self._last.update((register, at) for given in op.inputs.values() for register in given)
        self._last.update((register, ALWAYS) for register in (*linker.outputs.values(), *linker.kept.values()))
        self._memory = {r: frozenset((r,)) for r in (*linker.inputs.values(), *linker.begin.values())}
        """For every register that is not constant, where its numbers may lie: a register stands for its own memory."""
        self._constants: dict[int, Tensor] = {}
        """Those that steps use."""
        self._steps: list[Step] = []
        self._copies = 0

    def code(self) -> Code:
        for at, op in enumerate(self._linker.ops):
            self._bind(at, op)
        outputs, kept = self._linker.outputs, self._linker.kept
        for register in (*outputs.values(), *kept.values()):
            self._source(register)
            if -1 in self._values.type(register).shape:
                raise ModelError(f"{self._linker.what} has an output of unknown shape")
        return Code(
            inputs={name: (register, self._values.type(register)) for name, register in self._linker.inputs.items()},
            outputs={name: (register, self._values.type(register)) for name, register in outputs.items()},
            states={name: (register, self._values.type(register)) for name, register in self._linker.begin.items()},
            kept={name: (register, self._shared(name)) for name, register in kept.items()},
            constants=[self._constants.get(register) for register in range(len(self._values.types))],
            steps=self._steps,
            copies=self._copies,
        )

    def _bind(self, at: int, op: _Op) -> None:
        types = tuple(self._values.type(register) for register in op.outputs)
        inputs = {name: [self._operand(register) for register in given] for name, given in op.inputs.items()}
        call = Call(op.what, inputs, types, self._package.single)
        compute = (ARITHMETIC.get(op.kind) or MOVING[op.kind])(call)
        call.finish()
        sources = [self._source(source) for source in call.sources]
        used = {register for given in op.inputs.values() for register in given} | set(op.outputs)
        ends = [r for r in used if self._last[r] <= at and r not in self._values.constants]
        step = Step(
            what=op.what,
            compute=compute,
            sources=tuple(sources),
            targets=tuple(op.outputs),
            types=types,
            ends=tuple(ends),
        )
        if all(source in self._values.constants for source in sources):
            self._fold(op, step)
            return
        memory = frozenset[int]()
        if op.kind == "slice_update":
            if not self._may_update(at, sources):
                step = self._copied(step)
            memory = self._memory[step.sources[0]]
        elif op.kind in MOVING:
            memory = memory.union(*(self._memory.get(source, {PINNED}) for source in sources))
        self._memory.update((register, memory | {register}) for register in op.outputs)
        self._steps.append(step)

    def _operand(self, register: int) -> Operand:
        values = self._values
        return Operand(register=register, type=values.types[register], constant=values.constants.get(register))

    def _source(self, source: int | Tensor) -> int:
        """The register of what a step wants; a constant is put there."""
        if isinstance(source, Tensor):
            source = self._values.new("", None, source)
        constant = self._values.constants.get(source)
        if isinstance(constant, Tensor):
            self._constants[source] = constant
        return source

    def _fold(self, op: _Op, step: Step) -> None:
        operands = [self._constants[source] for source in step.sources]
        compressed = op.kind.startswith("constexpr_")  # a weight, and large: once for all functions
        results = (
            self._package.once(op.kind, operands, lambda: step.results(operands))
            if compressed
            else step.results(operands)
        )
        self._values.constants.update(zip(step.targets, results, strict=True))

    def _may_update(self, at: int, sources: Sequence[int]) -> bool:
        target, *others = sources
        memory = self._memory.get(target, frozenset((PINNED,)))
        if PINNED in memory or self._last[target] > at or target in others:
            return False
        sharing = [r for r, its in self._memory.items() if r != target and its & memory]
        return all(self._last[register] <= at and register not in others for register in sharing)

    def _copied(self, step: Step) -> Step:
        """The same step on a copy of its first operand; the copy becomes a step before it."""
        self._copies += 1
        target, *others = step.sources
        copy = self._values.new("", step.types[0])
        self._last[copy] = -1
        self._memory[copy] = frozenset((copy,))
        self._steps.append(
            Step(what=step.what, compute=torch.clone, sources=(target,), targets=(copy,), types=step.types, ends=())
        )
        return replace(step, sources=(copy, *others), ends=(*step.ends, copy))

    def _shared(self, name: str) -> bool:
        """Whether the memory of the state at the end may be a constant's, or another state's."""
        pinned = frozenset((PINNED,))
        memory = {state: self._memory.get(register, pinned) for state, register in self._linker.kept.items()}
        return PINNED in memory[name] or any(memory[name] & its for state, its in memory.items() if state != name)
