"""Products by the compiled player alone, for whoever times kernels.

Knows: how a player of nothing but products of one shape is made. Must not know: what is timed, or which is chosen.

Legend: T tokens, I input features, O output features.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpgpt.core import Row
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.linear import Kernels, key
from mpgpt.model.loader import Loader
from mpgpt.model.native.player import NativePlayer, team_size
from mpgpt.model.program import Buffer, Product, Program


class Products:
    """``count`` products of one shape, one after another, by the kernels of this ``name``; ``dtype`` is a held one."""

    def __init__(self, name: str, dtype: str, inputs: int, outputs: int, *, count: int, rows: int) -> None:
        """A call has ``rows`` rows at most."""
        self.in_features, self.dtype, self._outputs = inputs, torch.float32, outputs
        product = Product(
            source=Buffer.HIDDEN, target=Buffer.INNER, names=("w",), inputs=inputs, outputs=outputs, biased=False
        )  # fmt: skip
        config = ModelConfig(
            family="gpt2", vocab=1, embed=inputs, layers=count, heads=1, kv_heads=1, head_dim=1, inner=outputs,
            positions=rows, eps=1e-5, activation="relu", gated=False, tied=True, scales=(1.0,) * count,
            windows=(0,) * count,
        )  # fmt: skip
        kernels = Kernels(dtype=dtype, chosen={key(dtype, inputs, outputs): name})
        loader = Loader(config=config, source=_Drawn(inputs, outputs), kernels=kernels)
        self._player = NativePlayer(
            [Program(operations=(product,))] * count, None, loader, slots=1, context=rows, threads=team_size()
        )  # fmt: skip

    def __call__(self, x_TI: Tensor) -> Tensor:
        """The rows times the last of the weights, [T, O]."""
        ids = (0,) * len(x_TI)
        self._player.play([Row(slot=0, start=0, ids=ids, outputs=0)], x_TI, lambda: None)
        return self._player.rows(Buffer.INNER, len(x_TI), self._outputs).clone()


class _Drawn:
    """A ``Source`` with one weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self._weight_OI = torch.randn(outputs, inputs)

    def blocks(self, name: str, *, transpose: bool = False) -> Iterator[Tensor]:
        return iter([self._weight_OI])

    def holds(self, name: str) -> bool:
        return True

    def vector(self, name: str) -> Tensor:
        raise NotImplementedError

    def mapped(self, name: str) -> Tensor:
        raise NotImplementedError
