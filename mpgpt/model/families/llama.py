"""Llama and its kin (Mistral, Qwen2, Qwen3, SmolLM): rotary positions, RMS norms, a gated MLP. (Touvron et al. 2023)

Knows: how their config.json is spelt, what their tensors are called here and in llama.cpp's files, their layer.
Must not know: other families, which layers a rank holds, where weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpgpt.errors import ModelError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.family import Family, GgufArchitecture, GgufFormat
from mpgpt.model.gguf_metadata import ROPE_FACTORS, GgufMetadata
from mpgpt.model.program import (
    Activate,
    Add,
    Attend,
    Buffer,
    Norm,
    Product,
    Program,
    Rotate,
    Write,
    head_leaves,
    inner_leaves,
)
from mpgpt.model.rope import rope_frequencies, rope_parameters


def _read_config(raw: Mapping[str, Any], kind: str, rotary: bool) -> ModelConfig:
    embed, layers, heads = int(raw["hidden_size"]), int(raw["num_hidden_layers"]), int(raw["num_attention_heads"])
    head_dim = int(raw.get("head_dim") or embed // heads)
    bias = kind in ("llama", "qwen3") and bool(raw.get("attention_bias", False))  # the others have theirs, or none
    inv_freq, gain = rope_frequencies(raw, head_dim) if rotary else ((), 1.0)
    return ModelConfig(
        family="llama", vocab=int(raw["vocab_size"]), embed=embed, layers=layers, heads=heads,
        kv_heads=int(raw.get("num_key_value_heads") or heads), head_dim=head_dim, inner=int(raw["intermediate_size"]),
        positions=int(raw["max_position_embeddings"]), eps=float(raw.get("rms_norm_eps", 1e-6)),
        activation=raw.get("hidden_act", "silu"), gated=LLAMA.gated, tied=bool(raw.get("tie_word_embeddings", False)),
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


def _program(config: ModelConfig, layer: int) -> Program:
    """RMS norm, rotary attention with grouped heads, RMS norm, gated MLP."""
    c, at, shapes = config, f"layers.{layer}", _shapes(config)

    def product(
        source: Buffer, target: Buffer, names: Sequence[str], biased: bool, leaves: tuple[int, ...] = ()
    ) -> Product:
        ours = [f"{name}_proj" for name in names]
        return Product(
            source=source, target=target, names=tuple(f"{at}.{name}" for name in ours),
            inputs=shapes[ours[0]][1], outputs=sum(shapes[name][0] for name in ours), biased=biased, leaves=leaves,
        )  # fmt: skip

    def norm(source: Buffer, target: Buffer, name: str, heads: tuple[int, int] | None = None) -> Norm:
        return Norm(source=source, target=target, name=f"{at}.{name}", centred=False, heads=heads)

    keys = c.heads + c.kv_heads
    over_heads = {"q": (0, c.heads), "k": (c.heads, keys)} if c.qk_norm else {}
    return Program(
        operations=(
            norm(Buffer.HIDDEN, Buffer.NORMED, "input_layernorm"),
            product(Buffer.NORMED, Buffer.QKV, [f"self_attn.{part}" for part in "qkv"], c.qkv_bias),
            *(norm(Buffer.QKV, Buffer.QKV, f"self_attn.{part}_norm", heads) for part, heads in over_heads.items()),
            Rotate(buffer=Buffer.QKV, heads=keys),
            Write(source=Buffer.QKV, layer=layer),
            Attend(source=Buffer.QKV, target=Buffer.MIXED, layer=layer, scale=c.scales[layer], window=c.windows[layer]),
            product(Buffer.MIXED, Buffer.CHANGE, ["self_attn.o"], c.out_bias, head_leaves(c.heads, c.head_dim)),
            Add(source=Buffer.CHANGE, target=Buffer.HIDDEN),
            norm(Buffer.HIDDEN, Buffer.NORMED, "post_attention_layernorm"),
            product(Buffer.NORMED, Buffer.INNER, ["mlp.gate", "mlp.up"], c.mlp_bias),
            Activate(source=Buffer.INNER, target=Buffer.ACTIVE, function=c.activation, gated=c.gated),
            product(Buffer.ACTIVE, Buffer.CHANGE, ["mlp.down"], c.mlp_bias, inner_leaves(c.inner)),
            Add(source=Buffer.CHANGE, target=Buffer.HIDDEN),
        )
    )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    embed, inner, dim = config.embed, config.inner, config.head_dim
    queries, keys = config.heads * dim, config.kv_heads * dim
    return {
        "self_attn.q_proj": (queries, embed),
        "self_attn.k_proj": (keys, embed),
        "self_attn.v_proj": (keys, embed),
        "self_attn.o_proj": (embed, queries),
        "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,),
        "mlp.gate_proj": (inner, embed),
        "mlp.up_proj": (inner, embed),
        "mlp.down_proj": (embed, inner),
    }


def _describe_gguf(writer: Any, raw: Mapping[str, Any], config: ModelConfig) -> None:
    writer.add_layer_norm_rms_eps(config.eps)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(float(rope_parameters(raw)["rope_theta"]))


def _read_gguf(metadata: GgufMetadata) -> dict[str, Any]:
    kind, embed, heads = metadata.kind, metadata.size("embedding_length"), metadata.size("attention.head_count")
    head_dim = metadata.size("attention.key_length", embed // heads)
    for key, what in (("attention.value_length", "values of another size than keys"),
                      ("rope.dimension_count", "rotary positions on only a part of each head")):  # fmt: skip
        if (size := metadata.size(key, head_dim)) != head_dim:
            raise ModelError(f"it has {what} ({kind}.{key} is {size}, a head {head_dim}), which is not supported")
    positions = metadata.size("context_length")
    if (window := metadata.size("attention.sliding_window", 0)) and window < positions:
        raise ModelError(f"it says {kind}.attention.sliding_window = {window}, which is not supported")
    scale = metadata.number("attention.scale", 0.0)
    if scale and not np.isclose(scale, head_dim**-0.5, rtol=1e-5):
        raise ModelError(f"it says {kind}.attention.scale = {scale}, which is not supported")
    biased = {part: any(n.endswith(f".{part}.bias") for n in metadata.shapes) for part in ("attn_q", "ffn_up")}
    return {
        "model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"], "hidden_act": "silu",
        "vocab_size": metadata.rows("token_embd.weight"), "hidden_size": embed, "head_dim": head_dim,
        "num_hidden_layers": metadata.size("block_count"), "intermediate_size": metadata.size("feed_forward_length"),
        "num_attention_heads": heads, "num_key_value_heads": metadata.size("attention.head_count_kv", heads),
        "max_position_embeddings": positions, "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _read_gguf_rope(metadata, positions, head_dim),
        "tie_word_embeddings": "output.weight" not in metadata.shapes,
        **({"attention_bias": biased["attn_q"]} if kind != "qwen2" else {}),
        **({"mlp_bias": biased["ffn_up"]} if kind == "llama" else {}),
    }  # fmt: skip


def _read_gguf_rope(metadata: GgufMetadata, positions: int, head_dim: int) -> dict[str, Any]:
    """As ``rope_parameters`` in ``config.json``."""
    base = metadata.number("rope.freq_base", 10000.0)
    kind = metadata.take("rope.scaling.type", "linear")  # llama.cpp's default, with a factor of 1
    old = metadata.number("rope.scale_linear", 0.0)
    factor = metadata.number("rope.scaling.factor", 0.0) or old or 1.0
    original = metadata.size("rope.scaling.original_context_length", 0) or positions
    betas = {f"beta_{speed}": metadata.number(f"rope.scaling.yarn_beta_{speed}", default)
             for speed, default in (("fast", 32.0), ("slow", 1.0))}  # fmt: skip
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"it says {metadata.kind}.rope.scaling.type = {kind!r}, which is not supported")
    scaled = kind != "none" and factor != 1.0
    if metadata.factors and (listed := _listed_factors(metadata.factors[0], head_dim)) is not None:
        if scaled:
            raise ModelError(f"it scales rotary positions twice: by {ROPE_FACTORS} and by {kind} scaling")
        # LongRoPE, with the same factors however long a sequence is: what transformers divides each frequency by.
        return {
            "rope_type": "longrope", "rope_theta": base, "short_factor": listed, "long_factor": listed, "factor": 1.0,
            "attention_factor": 1.0, "original_max_position_embeddings": positions,
        }  # fmt: skip
    if not scaled:
        return {"rope_type": "default", "rope_theta": base}
    yarn = {"original_max_position_embeddings": original, **betas} if kind == "yarn" else {}
    return {"rope_type": kind, "rope_theta": base, "factor": factor, **yarn}


def _listed_factors(factors: NDArray[np.float32], head_dim: int) -> list[float] | None:
    """The factors on rotary frequencies; None where all are 1."""
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelError(f"{ROPE_FACTORS} should hold {head_dim // 2} positive numbers; it has {factors.shape}")
    listed: list[float] = factors.astype(np.float64).tolist()
    return None if set(listed) == {1.0} else listed


def _gguf_tensors(metadata: GgufMetadata, config: Mapping[str, Any]) -> set[str]:
    kind, products = metadata.kind, ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    parts = [f"{part}.weight" for part in (*products, "attn_norm", "ffn_norm")]
    parts += ["attn_q_norm.weight", "attn_k_norm.weight"] if kind == "qwen3" else []
    biased = products[:3] if kind == "qwen2" else products[:4] if config["attention_bias"] else []
    parts += [f"{part}.bias" for part in (*biased, *(products[4:] if config.get("mlp_bias") else ()))]
    layers = {f"blk.{layer}.{part}" for layer in range(config["num_hidden_layers"]) for part in parts}
    return layers | {"token_embd.weight", "output_norm.weight"}


_GGUF_LLAMA = GgufArchitecture(name="llama", interleaved_rotary=True, rotary_factors=True)

LLAMA = Family(
    name="llama",
    architectures={
        "llama": _GGUF_LLAMA,
        "mistral": _GGUF_LLAMA,
        "qwen2": GgufArchitecture(name="qwen2"),
        "qwen3": GgufArchitecture(name="qwen3"),
    },
    read_config=_read_config,
    activation="silu",
    gated=True,
    embedding="embed_tokens.weight",
    positions=None,
    heads_reducible=True,
    final_norm=Norm(source=Buffer.HIDDEN, target=Buffer.NORMED, name="norm", centred=False),
    program=_program,
    shapes=_shapes,
    gguf=GgufFormat(
        activations=("silu", "swish"),
        superfluous=(".rotary_emb.inv_freq",),
        describe=_describe_gguf,
        read=_read_gguf,
        tensors=_gguf_tensors,
    ),
)
