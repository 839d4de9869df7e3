"""A GGUF file's metadata, key by key: every key is either taken over, or must be of no effect.

Knows: which values of a key change nothing; the shapes of a file's tensors.
Must not know: what a key means to a family, how a file is stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpgpt.errors import ModelError

ROPE_FACTORS = "rope_freqs.weight"
"""The tensor of factors on rotary frequencies."""

UNCHANGED: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "rope.scaling.attn_factor": (1.0,), "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0), "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
}  # fmt: skip
"""Values with which a key that is not read changes nothing; of other keys, all that are zero, false or empty."""
REMARKS = frozenset((
    "vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type", "attention.layer_norm_epsilon",
))  # fmt: skip
"""Keys that change nothing, whatever they say. The epsilon is for GPT-2, which takes it over; others have another."""


class GgufMetadata:
    """The keys of a file's architecture, the shapes of its tensors, and its factors on rotary frequencies."""

    def __init__(
        self,
        kind: str,
        fields: Mapping[str, Any],
        shapes: Mapping[str, tuple[int, ...]],
        factors: Sequence[NDArray[np.float32]],
    ) -> None:
        """``kind`` is the architecture; ``factors`` are none or one."""
        self.kind, self.shapes, self.factors = kind, shapes, factors
        self._left = {key.removeprefix(f"{kind}."): v for key, v in fields.items() if key.startswith(f"{kind}.")}

    def take(self, key: str, default: Any = None) -> Any:
        """The value; lists of one value for every layer are that value. ``ModelError`` when it must be there."""
        value = self._left.pop(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelError(f"{self.kind}.{key} differs from layer to layer, which is not supported")
            value = value[0]
        if value is None:
            raise ModelError(f"it lacks {self.kind}.{key}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        return int(self.take(key, default))

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest number that is this one in float32: what the model's makers wrote."""
        return float(str(np.float32(self.take(key, default))))

    def finish(self) -> None:
        for key, value in self._left.items():
            without_effect = value in UNCHANGED[key] if key in UNCHANGED else not value
            if key not in REMARKS and not without_effect:
                raise ModelError(f"it says {self.kind}.{key} = {value!r:.100}, which is not supported")

    def rows(self, table: str, expected: int | None = None) -> int:
        """The rows of the tensor ``table``; ``ModelError`` when they are not the ``expected`` ones."""
        if len(shape := self.shapes.get(table, ())) != 2:
            raise ModelError(f"it lacks the table {table}")
        if expected is not None and shape[0] != expected:
            raise ModelError(f"{table} has {shape[0]} rows where the metadata says {expected}")
        return shape[0]
