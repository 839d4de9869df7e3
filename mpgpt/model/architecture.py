"""A model's sizes and options, as its layers, its cache and plans for it need them.

Knows: what can differ from model to model, and which activations are supported.
Must not know: how a config.json spells it, tensors' contents, layers, ranks, files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

ACTIVATIONS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "gelu_new": ("gelu", {"approximate": "tanh"}),
    "gelu_pytorch_tanh": ("gelu", {"approximate": "tanh"}),
    "gelu": ("gelu", {}),
    "relu": ("relu", {}),
    "silu": ("silu", {}),
    "swish": ("silu", {}),
}
"""By their names in config.json: the function of ``torch.nn.functional``, and its options."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The sizes and options of a model. Sizes in elements, frequencies as in its ``config.json``."""

    family: str
    """The name of its ``Family``."""
    vocab: int
    embed: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    positions: int
    """The longest sequence that the model was made for."""
    eps: float
    activation: str
    gated: bool
    """Whether the MLP multiplies the product ``up`` by the activation of another one, ``gate``."""
    tied: bool
    scales: tuple[float, ...]
    """Each layer's factor on attention scores."""
    windows: tuple[int, ...]
    """How many positions back each layer looks, itself included; 0 for all."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    inv_freq: tuple[float, ...] = ()
    """Rotary frequencies after scaling, head_dim / 2 of them; empty where positions are learned."""
    rope_gain: float = 1.0

    @property
    def layer_weights(self) -> int:
        """Weights of one layer's products, elements."""
        attention = self.embed * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + self.embed * self.inner * (3 if self.gated else 2)

    @property
    def head_weights(self) -> int:
        return self.embed * self.vocab

    def kv_bytes(self, layers: int, slots: int, context: int, itemsize: int) -> int:
        return 2 * layers * slots * context * self.kv_heads * self.head_dim * itemsize
