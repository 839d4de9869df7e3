"""The evaluator: runs a saved .mlpackage from its program and weights alone, where there is no Core ML.

Knows: which functions a package has, what goes in and out of them, and the states that they share.
Must not know: transformers, slots, positions; how an op is computed (``ops_compute``, ``ops_layout``) or bound
(``resolve``, ``compile``), how a package lies on disk (``package_file``).

It proves graph, weights and rounding: each op's result is rounded to its declared dtype, while inside an op floats are
float32. An Apple device may keep less inside an op (the Neural Engine accumulates in float16 in places), and other
sums have other orders: what it computes differs from this by a few units of float16's last place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mpgpt.errors import ModelError
from mpgpt_ios.mil.code import Code
from mpgpt_ios.mil.compile import bind
from mpgpt_ios.mil.package_file import Package, Type

Precision = Literal["declared", "float32"]
Array = np.ndarray[Any, Any]
Shaped = tuple[tuple[int, ...], np.dtype[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """The declarations of one function: shapes and dtypes by name."""

    inputs: Mapping[str, Shaped]
    outputs: Mapping[str, Shaped]
    states: Mapping[str, Shaped]
    copies: int
    """How many values are copied at every run because they are updated while the old ones are still wanted."""


class State:
    """The state of a package between calls, by name. It begins as zeros; ``Program.run`` updates it."""

    def __init__(self, types: Mapping[str, Type]) -> None:
        self.tensors = {name: torch.zeros(type.shape, dtype=type.dtype) for name, type in types.items()}

    def array(self, name: str) -> Array:
        """A copy of one state."""
        copy: Array = self.tensors[name].numpy().copy()
        return copy


class Program:
    """A package that can run. Not for two threads at a time."""

    def __init__(self, codes: Mapping[str, Code], counts: Mapping[str, Counter[str]], states: Mapping[str, Type]):
        """See ``read``."""
        self.codes, self._counts, self._states = codes, counts, states
        self.functions: Mapping[str, Function] = {
            name: Function(
                inputs=_declared(code.inputs),
                outputs=_declared(code.outputs),
                states=_declared(code.states),
                copies=code.copies,
            )
            for name, code in codes.items()
        }

    @classmethod
    def read(cls, package: Path, *, precision: Precision = "declared") -> Program:
        """The program of the .mlpackage at ``package``.

        ``precision``: "declared", or "float32" for float32 throughout, states included; weights that are stored in
        float16 or fewer bits are what they are. Raises ``ModelError`` for a package that is absent or damaged, and for
        ops, types, inputs and attributes of ops that are not understood, in any function, by name.
        """
        file = Package(package, torch.float16 if precision == "declared" else torch.float32)
        functions = file.spec.mlProgram.functions
        codes = {name: bind(file, name, functions[name]) for name in sorted(functions)}
        if not codes:
            raise ModelError(f"{package} has no function")
        _check_interface(file, codes)
        states: dict[str, Type] = {}
        for code in codes.values():
            for name, (_, type) in code.states.items():
                if states.setdefault(name, type) != type:
                    raise ModelError(f"{package}: two functions declare the state {name!r} in two types")
        counts = {name: Counter(op.type for op in _operations(functions[name])) for name in codes}
        return cls(codes, counts, states)

    def count(self, function: str, op: str) -> int:
        """How often ``op`` stands in a function. A state's update (coreml_update_state) is saved as write_state."""
        return self._counts[function][op]

    def state(self) -> State:
        """Every state of every function, zeros."""
        return State(self._states)

    def run(self, function: str, inputs: Mapping[str, Array], state: State) -> dict[str, Array]:
        """The outputs of one call, by name; ``state`` is updated.

        Inputs are cast to the dtype in which they are held (float32 for all floats if the precision is). Raises
        ``ModelError`` for inputs that are missing, too many or of another shape, and when an op gives something other
        than it declares; then what is in ``state`` is of no use any more.
        """
        if function not in self.codes:
            raise ModelError(f"there is no function {function!r}, but {', '.join(self.codes)}")
        code = self.codes[function]
        if inputs.keys() != code.inputs.keys():
            raise ModelError(f"{function} takes {', '.join(code.inputs)}; given: {', '.join(inputs)}")
        registers = list(code.constants)
        for name, (register, type) in code.inputs.items():
            registers[register] = _tensor(f"{function}'s input {name!r}", inputs[name], type)
        for name, (register, _) in code.states.items():
            registers[register] = state.tensors[name]
        code.run(registers)
        for name, (register, shared) in code.kept.items():
            kept = _present(registers[register])
            state.tensors[name] = kept.clone() if shared else kept.contiguous()
        return {name: _present(registers[register]).numpy().copy() for name, (register, _) in code.outputs.items()}


def _present(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "a register that is wanted at the end has been emptied"
    return tensor


def _tensor(what: str, array: Array, type: Type) -> Tensor:
    """A copy of ``array`` as the type holds it."""
    array = np.asarray(array)
    if array.shape != type.shape:
        raise ModelError(f"{what} is {type.shape}; given: {array.shape}")
    if not np.can_cast(array.dtype, type.declared, "same_kind"):
        raise ModelError(f"{what} is of {type.declared}; given: {array.dtype}")
    return torch.tensor(array).to(type.dtype)


def _declared(values: Mapping[str, tuple[int, Type]]) -> dict[str, Shaped]:
    return {name: (type.shape, type.declared) for name, (_, type) in values.items()}


def _operations(function: Any) -> Any:
    return function.block_specializations[function.opset].operations


def _check_interface(file: Package, codes: Mapping[str, Code]) -> None:
    """Core ML goes by the description beside the program: it must name the same tensors, in the same shapes."""
    description = file.spec.description
    described = {function.name: function for function in description.functions} or {"main": description}
    if described.keys() != codes.keys():
        raise ModelError(f"{file.path} describes {', '.join(described)} and holds {', '.join(codes)}")
    for name, code in codes.items():
        for part, values in (("input", code.inputs), ("output", code.outputs), ("state", code.states)):
            shapes = {feature.name: _shape(feature.type) for feature in getattr(described[name], part)}
            if shapes != {name: type.shape for name, (_, type) in values.items()}:
                raise ModelError(f"{file.path}: the {part}s that function {name!r} is described with are not its own")


def _shape(type: Any) -> tuple[int, ...]:
    array = type.stateType.arrayType if type.WhichOneof("Type") == "stateType" else type.multiArrayType
    return tuple(array.shape)
