"""The second half of binding a function of an ML program: ops become steps, what is constant is computed at once.

Knows: when a value is needed for the last time, which values may share memory, where a value may be updated in place.
Must not know: what an op computes, or how constants are stored.

Reading a state is no step, and neither is writing one: they say which register is the state from there on. What
remains to be decided is whether ``slice_update`` may write into its operand. It may where nothing that is still
wanted shares memory with it, the state that a later op reads or the end of the function keeps included; otherwise
the operand is copied first. A cache that is read, updated and written back is thus updated where it lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpgpt.errors import ModelError
from mpgpt_ios.mil.call import Call, Operand
from mpgpt_ios.mil.code import Code, Instruction
from mpgpt_ios.mil.ops_compute import ARITHMETIC, REUSING
from mpgpt_ios.mil.ops_layout import MOVING
from mpgpt_ios.mil.package_file import Package
from mpgpt_ios.mil.resolve import Linker, Op

PINNED = -1  # the memory of constants
ALWAYS = 1 << 60


def bind(package: Package, name: str, function: Any) -> Code:
    """The function ``name`` of ``package``; ``ModelError`` for whatever in it is not understood."""
    linker = Linker(package, f"{package.path}: function {name!r}", function, ARITHMETIC.keys() | MOVING.keys())
    return _Binder(package, linker).code()


class _Binder:
    """Makes the steps of one function."""

    def __init__(self, package: Package, linker: Linker) -> None:
        self._package, self._linker, self._values = package, linker, linker.values
        self._last = dict.fromkeys(range(len(self._values.types)), -1)
        """The op that needs a register last."""
        for at, op in enumerate(linker.ops):
            self._last.update((register, at) for given in op.inputs.values() for register in given)
        self._wanted = [*linker.outputs.values(), *linker.kept.values()]
        self._last.update((register, ALWAYS) for register in self._wanted)
        self._memory = {r: frozenset((r,)) for r in (*linker.inputs.values(), *linker.begin.values())}
        """For every register that is not constant, where its numbers may lie: a register stands for its own memory."""
        self._constants: dict[int, Tensor] = {}
        """Those that steps use."""
        self._wide: dict[int, int] = {}
        """The float32 of a register of float16."""
        self._steps: list[Instruction] = []
        self._copies = 0

    def code(self) -> Code:
        for at, op in enumerate(self._linker.ops):
            self._bind(at, op)
        type, outputs, kept = self._values.type, self._linker.outputs, self._linker.kept
        self._hold(self._wanted)
        for register in self._wanted:
            if -1 in type(register).shape:
                raise ModelError(f"{self._linker.what} has an output of unknown shape")
        return Code(
            inputs={name: (register, type(register)) for name, register in self._linker.inputs.items()},
            outputs={name: (register, type(register)) for name, register in outputs.items()},
            states={name: (register, type(register)) for name, register in self._linker.begin.items()},
            kept={name: (register, self._shared(name)) for name, register in kept.items()},
            constants=[self._constants.get(register) for register in range(len(self._values.types))],
            steps=self._freeing(),
            copies=self._copies,
        )

    def _bind(self, at: int, op: Op) -> None:
        values = self._values
        types = tuple(values.type(register) for register in op.outputs)
        inputs = {
            name: [Operand(register=r, type=values.types[r], constant=values.constants.get(r)) for r in given]
            for name, given in op.inputs.items()
        }
        call = Call(op.what, inputs, types, self._package.single)
        compute = (ARITHMETIC.get(op.kind) or MOVING[op.kind])(call)
        call.finish()
        sources = tuple(self._widened(register) if wide else register for register, wide in call.sources)
        step = Instruction(what=op.what, compute=compute, sources=sources, targets=tuple(op.outputs), types=types)
        if all(register in values.constants for register in sources):
            self._fold(op, step)
            return
        memory = frozenset[int]()
        if op.kind == "slice_update":
            if not self._may_update(at, sources):
                step = self._copied(step)
            memory = self._memory[step.sources[0]]
        elif op.kind in MOVING:
            memory = memory.union(*(self._memory.get(source, {PINNED}) for source in sources))
        self._add(replace(step, reuses=op.kind in REUSING and -1 not in types[0].shape), memory)

    def _add(self, step: Instruction, memory: frozenset[int] = frozenset()) -> None:
        self._memory.update((register, memory | {register}) for register in step.targets)
        self._hold(step.sources)
        self._steps.append(step)

    def _hold(self, registers: Iterable[int]) -> None:
        """Those of them that are constants are there at run time."""
        for register in registers:
            constant = self._values.constants.get(register)
            if isinstance(constant, Tensor):
                self._constants[register] = constant

    def _widened(self, register: int) -> int:
        """The register of the same value in float32."""
        type = self._values.type(register)
        if type.dtype != torch.float16:
            return register
        if register not in self._wide:
            single = replace(type, dtype=torch.float32)
            constant = self._values.constants.get(register)
            if isinstance(constant, Tensor):
                self._wide[register] = self._values.new("", single, self._package.single(constant))
            else:
                self._wide[register] = new = self._values.new("", single)
                step = Instruction(
                    what="widening", compute=_widen, sources=(register,), targets=(new,), types=(single,)
                )
                self._add(replace(step, reuses=-1 not in single.shape))
        return self._wide[register]

    def _fold(self, op: Op, step: Instruction) -> None:
        operands = [self._values.constants[source] for source in step.sources]
        tensors = [operand for operand in operands if isinstance(operand, Tensor)]
        if op.kind == "slice_update":  # which writes
            tensors[0] = tensors[0].clone()
        if op.kind.startswith("constexpr_"):  # a weight, and large: once for all functions
            results = self._package.once(op.kind, tensors, lambda: step.results(tensors))
        else:
            results = step.results(tensors)
        self._values.constants.update(zip(step.targets, results, strict=True))

    def _may_update(self, at: int, sources: Sequence[int]) -> bool:
        """Whether the op ``at`` may write into its first source."""
        target, *others = sources
        memory = self._memory.get(target, frozenset((PINNED,)))
        if PINNED in memory or self._last[target] > at or target in others:
            return False
        sharing = [r for r, its in self._memory.items() if r != target and its & memory]
        return all(self._last.get(register, -1) <= at and register not in others for register in sharing)

    def _copied(self, step: Instruction) -> Instruction:
        """The same step on a copy of its first operand; the copy becomes a step before it."""
        self._copies += 1
        target, *others = step.sources
        copy = self._values.new("", step.types[0])
        self._add(
            Instruction(what=step.what, compute=torch.clone, sources=(target,), targets=(copy,), types=step.types)
        )
        return replace(step, sources=(copy, *others))

    def _shared(self, name: str) -> bool:
        """Whether the memory of the state at the end may be a constant's, or another state's."""
        pinned = frozenset((PINNED,))
        memory = {state: self._memory.get(register, pinned) for state, register in self._linker.kept.items()}
        return PINNED in memory[name] or any(memory[name] & its for state, its in memory.items() if state != name)

    def _freeing(self) -> list[Instruction]:
        """The steps, each with the registers that end with it and with those whose memory can be used again."""
        last = {register: at for at, step in enumerate(self._steps) for register in (*step.targets, *step.sources)}
        last.update((register, ALWAYS) for register in self._wanted)
        last.update((register, ALWAYS) for register in self._constants)
        spares = {step.targets[0] for step in self._steps if step.reuses}
        for register, memory in self._memory.items():
            for spare in memory & spares:
                last[spare] = max(last[spare], last.get(register, -1))
        ending: dict[int, list[int]] = {at: [] for at in range(len(self._steps))}
        for register, at in last.items():
            if at != ALWAYS:
                ending[at].append(register)
        return [
            replace(step, ends=tuple(ending[at]), spares=tuple(r for r in ending[at] if r in spares))
            for at, step in enumerate(self._steps)
        ]


def _widen(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    return x.float() if out is None else out.copy_(x)
