"""A function of an ML program that is ready to run: every value a register, every op a step.

Knows: how steps are run one after another, what a result must be, and which memory is used again.
Must not know: names of values, what an op computes, how steps were found.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpgpt.errors import ModelError
from mpgpt_ios.mil.call import Compute
from mpgpt_ios.mil.package_file import Type


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One op at run time."""

    what: str
    compute: Compute
    sources: tuple[int, ...]
    targets: tuple[int, ...]
    types: tuple[Type, ...]
    reuses: bool = False
    """Whether ``compute`` takes memory for its one result as ``out``."""
    ends: tuple[int, ...] = ()
    """Registers that nobody needs after it."""
    spares: tuple[int, ...] = ()
    """Registers whose memory nobody needs after it."""

    def results(self, operands: Sequence[Tensor | None], out: Tensor | None = None) -> list[Tensor]:
        """The op's results, rounded to what is declared; ``ModelError`` where they are of another shape or kind."""
        try:
            result = self.compute(*operands, out=out) if self.reuses else self.compute(*operands)
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
    steps: Sequence[Instruction]
    copies: int
    """How many values are copied before they are updated."""
    pool: dict[tuple[torch.dtype, tuple[int, ...]], list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    """Memory that was a result's. New pages for the megabytes of a cache cost more than what is written there."""

    def run(self, registers: list[Tensor | None]) -> None:
        for step in self.steps:
            out = None
            if step.reuses:
                spare = self.pool[step.types[0].dtype, step.types[0].shape]
                out = spare.pop() if spare else None
            results = step.results([registers[source] for source in step.sources], out)
            for target, result in zip(step.targets, results, strict=True):
                registers[target] = result
            for register in step.spares:
                tensor = registers[register]
                assert tensor is not None, "memory is given up once"
                self.pool[tensor.dtype, tuple(tensor.shape)].append(tensor)
            for register in step.ends:
                registers[register] = None
