"""One op of a program as the code that binds it sees it: inputs by name, constants as Python values, refusals.

Knows: registers, which of them are constants, and which inputs have been asked for. An input that nobody asked for is
refused: whatever an op says is either done or not accepted.
Must not know: what any op does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from mpgpt.errors import ModelError
from mpgpt_ios.mil.package_file import Constant, Type

Number = int | float | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """The value of an op's input: its register; its type, or None for a text; the constant if it is one."""

    register: int
    type: Type | None
    constant: Constant | None = None


class Call:
    """An op that is being bound.

    ``sources`` are the registers that it wants at every run, in order, and whether in float32 if they are of float16.
    """

    def __init__(
        self,
        what: str,
        inputs: Mapping[str, Sequence[Operand]],
        outputs: Sequence[Type],
        widen: Callable[[Tensor], Tensor],
    ) -> None:
        """``what`` names the op and its package in a refusal; ``widen`` gives a constant in float32."""
        self.outputs = outputs
        self.sources: list[tuple[int, bool]] = []
        self._what, self._inputs, self._widen, self._asked = what, inputs, widen, set[str]()

    def refusal(self, why: str) -> ModelError:
        return ModelError(f"{self._what} {why}")

    def has(self, name: str) -> bool:
        return name in self._inputs

    def take(self, name: str, kinds: str = "fiub", *, wide: bool = False) -> Type:
        """Have the input's tensor handed over at every run; its type.

        ``kinds`` are those of numpy's that it may have. ``wide``: float16 comes as float32.
        """
        operand = self._operand(name)
        return self._take(name, operand, kinds, wide)

    def take_all(self, name: str, kinds: str = "fiub", *, wide: bool = False) -> list[Type]:
        """The same for an input that is a list."""
        self._asked.add(name)
        return [self._take(name, operand, kinds, wide) for operand in self._inputs.get(name, ())]

    def weight(self, name: str) -> Tensor:
        """A constant of floats, in float32."""
        found = self._known(name)
        if not isinstance(found, Tensor) or not found.is_floating_point():
            raise self.refusal(f"has an input {name!r} that is not floats")
        return self._widen(found)

    def numbers(self, name: str, default: Sequence[Number] = ()) -> list[Any]:
        """A constant's elements."""
        if not self.has(name):
            return list(default)
        found = self._known(name)
        assert isinstance(found, Tensor), "a text is not numbers"
        elements: list[Any] = found.flatten().tolist()
        return elements

    def number(self, name: str, default: Number | None = None) -> Any:
        """A constant's one element."""
        elements = self.numbers(name, () if default is None else (default,))
        if len(elements) != 1:
            raise self.refusal(f"has {len(elements)} values for its input {name!r}; one is understood")
        return elements[0]

    def text(self, name: str, default: str) -> str:
        found = self._known(name) if self.has(name) else default
        if not isinstance(found, str):
            raise self.refusal(f"has an input {name!r} that is not a text")
        return found

    def only(self, name: str, wanted: Number) -> None:
        """Refuse unless all elements of this input, if it is there, are ``wanted``: nothing else is done here."""
        if any(element != wanted for element in self.numbers(name)):
            raise self.refusal(f"has {name} = {self.numbers(name)}; only {wanted} is understood")

    def finish(self) -> None:
        """Refuse an op with inputs that were not asked for."""
        unknown = sorted(set(self._inputs) - self._asked)
        if unknown:
            raise self.refusal(f"has inputs that are not understood: {', '.join(unknown)}")

    def _operand(self, name: str) -> Operand:
        self._asked.add(name)
        operands = self._inputs.get(name, ())
        if len(operands) != 1:
            raise self.refusal(f"has {len(operands)} values for its input {name!r}; one is understood")
        return operands[0]

    def _known(self, name: str) -> Constant:
        operand = self._operand(name)
        if operand.constant is None:
            raise self.refusal(f"has an input {name!r} that is computed; only a constant is understood")
        return operand.constant

    def _take(self, name: str, operand: Operand, kinds: str, wide: bool) -> Type:
        if operand.type is None:
            raise self.refusal(f"has a text for its input {name!r}")
        if operand.type.declared.kind not in kinds:
            raise self.refusal(f"has an input {name!r} of type {operand.type.declared}, which is not understood")
        self.sources.append((operand.register, wide))
        return operand.type


Compute = Callable[..., Tensor | Sequence[Tensor]]
"""From the tensors that were taken, in that order, to the result or the results."""
Bind = Callable[[Call], Compute]


def same_type(call: Call, *types: Type) -> np.dtype[Any]:
    """The dtype that all of these have."""
    declared = {type.declared for type in types}
    if len(declared) != 1:
        raise call.refusal(f"mixes types: {', '.join(sorted(map(str, declared)))}")
    return declared.pop()
