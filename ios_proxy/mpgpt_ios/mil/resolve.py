"""The first half of binding a function of an ML program: names become registers, reading and writing a state vanish.

Knows: what a program says of a function, its values and their types.
Must not know: what an op computes or needs, which memory values lie in.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpgpt.errors import ModelError
from mpgpt_ios.mil.package_file import Constant, Package, Type

OPSET = "CoreML8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """An op with registers for names."""

    kind: str
    what: str
    inputs: Mapping[str, Sequence[int]]
    outputs: Sequence[int]


class Values:
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


class Linker:
    """Reads one function. ``ModelError`` for whatever in it is not understood."""

    def __init__(self, package: Package, what: str, function: Any, ops: Container[str]) -> None:
        """``ops`` are those that are understood."""
        self._package, self.what, self._ops = package, what, ops
        self.values = Values(what)
        self.inputs: dict[str, int] = {}
        self.begin: dict[str, int] = {}
        """The register of each state at the beginning."""
        self.ops: list[Op] = []
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
        """The register of each state at this point of the function, and finally at its end."""
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
        elif op.type in self._ops:
            inputs = {name: [self._register(b, what) for b in given.arguments] for name, given in op.inputs.items()}
            types = [self._package.type(output.type, what, fixed=False) for output in op.outputs]
            outputs = [self.values.new(o.name, type) for o, type in zip(op.outputs, types, strict=True)]
            self.ops.append(Op(kind=op.type, what=what, inputs=inputs, outputs=outputs))
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
