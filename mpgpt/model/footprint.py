"""The bytes that a model takes in a dtype: weights, cache and hidden states.

Knows: how many bytes each dtype takes for a weight, scales included; which dtype the head is held in.
Must not know: torch, ranks, and the kernels that hold the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

from mpgpt.machines import Shape
from mpgpt.model.architecture import ModelConfig

MAX_CONTEXT = 4096
"""The context where none is given and the model would allow more."""
GROUP = 32
"""Input features that share a scale in int4: 64 are no faster on x86-64, and less exact."""
GROUP_BYTES = 4
"""The scale and the zero of a group, two bytes each; also the scale of an output channel in int8."""
SCALE_BYTES = 2
"""The scale of a group in int8."""
HIDDEN_BYTES = 4
"""Of a number of hidden states between ranks: float32 in every dtype, so that a Mac and a Pi may compute differently
inside and still agree on what lies between them."""
BITS: Mapping[str, int] = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8, "int8-group": 8, "int4": 4}
DTYPES: tuple[str, ...] = ("float32", "bfloat16", "int8", "int4")
"""The dtypes that are suggested where memory is short, from the largest to the smallest."""


def shape_of(config: ModelConfig, dtype: str, slots: int, context: int, kv_dtype: str = "auto") -> Shape:
    """A model's shape in a dtype, with a cache in ``kv_dtype``."""
    itemsize = cache_bytes(dtype, kv_dtype)
    return Shape(
        layers=config.layers,
        layer_bytes=weight_bytes(config.layer_weights, layer_outputs(config), dtype),
        head_bytes=weight_bytes(config.head_weights, config.vocab, head_dtype(dtype)),
        kv_bytes=config.kv_bytes(1, slots, context, itemsize),
        token_bytes=config.embed * HIDDEN_BYTES,
    )


def smaller_shapes(
    config: ModelConfig, dtype: str, slots: int, context: int, kv_dtype: str = "auto"
) -> dict[str, Shape]:
    """The model's shapes in the dtypes that take fewer bytes than ``dtype``, the largest first."""
    layer_bytes = shape_of(config, dtype, slots, context).layer_bytes
    shapes = {name: shape_of(config, name, slots, context, kv_dtype) for name in DTYPES}
    return {name: shape for name, shape in shapes.items() if shape.layer_bytes < layer_bytes}


def weight_bytes(weights: int, outputs: int, dtype: str) -> int:
    """The bytes of weights with their scales: in int8 for each of ``outputs`` channels, else for each group."""
    groups = -(-weights // GROUP)
    scales = {"int8": GROUP_BYTES * outputs, "int8-group": SCALE_BYTES * groups, "int4": GROUP_BYTES * groups}
    return weights * BITS[dtype] // 8 + scales.get(dtype, 0)


def bytes_per_weight(dtype: str) -> float:
    """The average bytes of a weight of a large product, with its share of the scales."""
    scales = {"int8": 0.01, "int4": GROUP_BYTES / GROUP}.get(dtype, 0.0)
    return BITS[dtype] / 8 + scales


def layer_outputs(config: ModelConfig) -> int:
    """Output channels of a layer's products."""
    attention = config.head_dim * (config.heads + 2 * config.kv_heads) + config.embed
    return attention + config.inner * (2 if config.gated else 1) + config.embed


def head_dtype(dtype: str) -> str:
    """The dtype of the head: 8 bit where the layers have 4, with a scale for each group (torch's kernels: int8)."""
    return "int8-group" if dtype == "int4" else dtype


def cache_bytes(dtype: str, kv_dtype: str = "auto") -> int:
    """The bytes of a number in the cache: 2 in 16 bit, else 4; auto is as ``dtype``."""
    return 2 if (dtype if kv_dtype == "auto" else kv_dtype) in ("bfloat16", "float16") else 4
