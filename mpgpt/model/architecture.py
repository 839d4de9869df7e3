"""A model's ``config.json`` as the numbers that the blocks need.

Knows: which architectures and options are supported, and how the checkpoints of each spell them.
Must not know: tensors' contents, blocks, ranks, files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpgpt.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = {"gpt2": "gpt2", "llama": "llama", "mistral": "llama", "qwen2": "llama", "qwen3": "llama"}
ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu", "relu", "silu", "swish")
ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What the blocks need to know of a model. Sizes in elements, frequencies as in its ``config.json``."""

    family: str
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
    tied: bool
    scales: tuple[float, ...]
    """What each layer's attention scores are multiplied by."""
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
        return attention + self.embed * self.inner * (2 if self.family == "gpt2" else 3)

    @property
    def head_weights(self) -> int:
        return self.embed * self.vocab

    def kv_bytes(self, layers: int, slots: int, context: int, itemsize: int) -> int:
        return 2 * layers * slots * context * self.kv_heads * self.head_dim * itemsize


def read_config(raw: Mapping[str, Any], *, rotary: bool = True) -> ModelConfig:
    """A Hugging Face ``config.json`` as a ModelConfig. Without its ``rotary`` frequencies it takes no torch, whose
    import takes seconds: enough for whoever wants sizes only.

    Raises ``ModelError`` when the architecture or one of its options is not supported, or a size is missing.
    """
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(f"the architecture {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        raise ModelError("the checkpoint is quantised, which is not supported: take the model's own float weights")
    if raw.get("transformers_weights"):
        raise ModelError(
            f"config.json has its weights in a file of another name (transformers_weights is "
            f"{raw['transformers_weights']!r}), which is not supported: call it model.safetensors and take that key out"
        )
    try:
        config = _read_gpt2(raw) if kind == "gpt2" else _read_llama(raw, kind, rotary)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"config.json lacks or garbles something that a {kind} model needs: {error!r}") from error
    if config.activation not in ACTIVATIONS:
        raise ModelError(
            f"the activation {config.activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    if config.heads % config.kv_heads or min(config.vocab, config.embed, config.layers, config.head_dim) < 1:
        raise ModelError("config.json describes a model that cannot be: its head counts or sizes do not fit together")
    return config


def _read_gpt2(raw: Mapping[str, Any]) -> ModelConfig:
    embed, layers, heads = int(raw["n_embd"]), int(raw["n_layer"]), int(raw["n_head"])
    if raw.get("add_cross_attention"):
        raise ModelError("a GPT-2 with cross attention is not supported")
    scale = (embed // heads) ** -0.5 if raw.get("scale_attn_weights", True) else 1.0
    inverse = bool(raw.get("scale_attn_by_inverse_layer_idx", False))
    return ModelConfig(
        family="gpt2", vocab=int(raw["vocab_size"]), embed=embed, layers=layers, heads=heads, kv_heads=heads,
        head_dim=embed // heads, inner=int(raw.get("n_inner") or 4 * embed), positions=int(raw["n_positions"]),
        eps=float(raw.get("layer_norm_epsilon", 1e-5)), activation=raw.get("activation_function", "gelu_new"),
        tied=bool(raw.get("tie_word_embeddings", True)),
        scales=tuple(scale / (i + 1 if inverse else 1) for i in range(layers)), windows=(0,) * layers,
        qkv_bias=True, out_bias=True, mlp_bias=True,
    )  # fmt: skip


def _read_llama(raw: Mapping[str, Any], kind: str, rotary: bool) -> ModelConfig:
    embed, layers, heads = int(raw["hidden_size"]), int(raw["num_hidden_layers"]), int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or embed // heads)
    bias = kind in ("llama", "qwen3") and bool(raw.get("attention_bias", False))  # the others have theirs, or none
    inv_freq, gain = rope_frequencies(raw, head_dim) if rotary else ((), 1.0)
    return ModelConfig(
        family="llama", vocab=int(raw["vocab_size"]), embed=embed, layers=layers, heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads), head_dim=head_dim, inner=int(raw["intermediate_size"]),
        positions=int(raw["max_position_embeddings"]), eps=float(raw.get("rms_norm_eps", 1e-6)),
        activation=raw.get("hidden_act", "silu"), tied=bool(raw.get("tie_word_embeddings", False)),
        scales=(head_dim**-0.5,) * layers, windows=_windows(raw, kind, layers),
        qkv_bias=bias or kind == "qwen2", out_bias=bias, mlp_bias=kind == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=kind == "qwen3", inv_freq=inv_freq, rope_gain=gain,
    )  # fmt: skip


def _windows(raw: Mapping[str, Any], kind: str, layers: int) -> tuple[int, ...]:
    window = raw.get("sliding_window")
    if not window or kind == "llama" or (kind.startswith("qwen") and not raw.get("use_sliding_window", False)):
        return (0,) * layers
    kinds = raw.get("layer_types")
    if kinds is None:
        first = int(raw.get("max_window_layers", layers)) if kind.startswith("qwen") else 0
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    return tuple(int(window) if k == "sliding_attention" else 0 for k in kinds)


def rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says of rotary positions, in one table, as transformers puts it together.

    ``rope_scaling``, where it is given, stands for all of ``rope_parameters``; keys beside the table count where it
    lacks them, but ``original_max_position_embeddings`` counts before the table's own.
    """
    rope: dict[str, Any] = {**(raw.get("rope_scaling") or raw.get("rope_parameters") or {})}
    nested = sorted(key for key, value in rope.items() if isinstance(value, Mapping))
    if nested:
        raise ModelError(f"rotary positions that differ from layer to layer ({', '.join(nested)}) are not supported")
    rope.setdefault("rope_type", rope.get("type", "default"))
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    if raw.get("original_max_position_embeddings") is not None:
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    elif rope.get("original_max_position_embeddings") is None:
        rope["original_max_position_embeddings"] = raw.get("max_position_embeddings")
    return rope


def rope_frequencies(raw: Mapping[str, Any], head_dim: int) -> tuple[tuple[float, ...], float]:
    """Rotary frequencies in radians a position, [head_dim / 2], and the factor on cos and sin.

    Understands both spellings of ``config.json`` (``rope_theta`` with ``rope_scaling``; ``rope_parameters``).
    ``dynamic`` is as ``default``, because no sequence here outgrows the length that the model was made for.
    Sources: Su et al. 2021 (RoPE), Chen et al. 2023 (linear), Peng et al. 2023 (YaRN), Ding et al. 2024 (LongRoPE),
    the Llama 3.1 release.
    """
    import torch

    rope = rope_parameters(raw)
    kind = rope["rope_type"]
    if kind not in ROPES:
        raise ModelError(f"rotary scaling of the kind {kind!r} is not supported; supported are {', '.join(ROPES)}")
    parts = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor"))
    if parts is not None and float(parts) != 1.0:
        raise ModelError("rotary positions on only a part of each head are not supported")
    base = float(rope["rope_theta"])
    waves = base ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
    inv_freq, gain = 1.0 / waves, 1.0
    if kind == "linear":
        inv_freq = inv_freq / float(rope["factor"])
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif kind == "yarn":
        inv_freq, gain = _yarn(waves, rope, base, raw)
    elif kind == "longrope":
        inv_freq, gain = _longrope(waves, rope, raw)
    if not inv_freq.isfinite().all():
        raise ValueError(f"rotary frequencies of the kind {kind} are not finite")
    return tuple(inv_freq.tolist()), gain


def _llama3(inv_freq: Tensor, rope: Mapping[str, Any]) -> Tensor:
    """Long waves are stretched, short ones kept, those between blended."""
    import torch

    factor, low, high = (float(rope[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    original = int(rope["original_max_position_embeddings"])
    wavelength = 2 * math.pi / inv_freq
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, blended, scaled)


def _yarn(waves: Tensor, rope: Mapping[str, Any], base: float, raw: Mapping[str, Any]) -> tuple[Tensor, float]:
    import torch

    original, dims = int(rope["original_max_position_embeddings"]), 2 * len(waves)
    factor = _stretch(rope["factor"], rope, raw)

    def dimension(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(float(rope.get("beta_fast") or 32)), dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    keep = 1 - ((torch.arange(dims // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    gain = rope.get("attention_factor")
    if gain is None:
        mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")
        gain = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1.0)
    return 1.0 / (factor * waves) * (1 - keep) + 1.0 / waves * keep, float(gain)


def _longrope(waves: Tensor, rope: Mapping[str, Any], raw: Mapping[str, Any]) -> tuple[Tensor, float]:
    """A factor for each frequency, where they are the same for short sequences and long ones."""
    import torch

    factors, original = rope.get("short_factor"), int(rope["original_max_position_embeddings"])
    if not isinstance(factors, list) or len(factors) != len(waves) or factors != rope.get("long_factor"):
        raise ModelError(
            "rotary scaling of the kind 'longrope' is supported only with a short_factor for each frequency, and a "
            "long_factor that is the same: all positions of a sequence would change as it grows"
        )
    factor, gain = _stretch(rope.get("factor"), rope, raw), rope.get("attention_factor")
    if gain is None:
        gain = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * waves), float(gain)


def _stretch(factor: Any, rope: Mapping[str, Any], raw: Mapping[str, Any]) -> float:
    """By how much the model's length grew beyond the one that it was first made for, where ``factor`` is not said."""
    if factor is not None:
        return float(factor)
    return int(raw["max_position_embeddings"]) / int(rope["original_max_position_embeddings"])


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * float(weight) * math.log(factor) + 1.0 if factor > 1 else 1.0
