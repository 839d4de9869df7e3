"""Rotary positions: what ``config.json`` says of them, as the frequencies that a model's heads rotate by.

Knows: the kinds of scaling that are supported, and both spellings of their parameters.
Must not know: tables of cos and sin, heads, sequences, families.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from mpgpt.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

ROPES = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


def rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary parameters of a ``config.json`` in one table, put together as transformers does.

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
    waves = _waves(base, torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
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


def _waves(base: float, exponents: Tensor) -> Tensor:
    """``base ** exponents`` in float32, rounded once: no processor's own power, which may differ in the last bit."""
    import torch

    return torch.tensor([float(Decimal(base) ** Decimal(exponent)) for exponent in exponents.tolist()])


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

    def dimension(rotations: float) -> float:
        return dims * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

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
