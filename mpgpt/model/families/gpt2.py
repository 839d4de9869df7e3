"""GPT-2: learned positions, layer norms, an MLP without a gate. (Radford et al. 2019)

Knows: how its config.json is spelt, what its tensors are called here and in llama.cpp's files, its layer.
Must not know: other families, which layers a rank holds, where weights come from.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpgpt.errors import ModelError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.family import Family, GgufArchitecture, GgufFormat
from mpgpt.model.gguf_metadata import GgufMetadata
from mpgpt.model.program import (
    Activate,
    Add,
    Attend,
    Buffer,
    Norm,
    Product,
    Program,
    Write,
    head_leaves,
    inner_leaves,
)


def _read_config(raw: Mapping[str, Any], kind: str, rotary: bool) -> ModelConfig:
    embed, layers, heads = int(raw["n_embd"]), int(raw["n_layer"]), int(raw["n_head"])
    if raw.get("add_cross_attention"):
        raise ModelError("a GPT-2 with cross attention is not supported")
    scale = (embed // heads) ** -0.5 if raw.get("scale_attn_weights", True) else 1.0
    inverse = bool(raw.get("scale_attn_by_inverse_layer_idx", False))
    return ModelConfig(
        family="gpt2", vocab=int(raw["vocab_size"]), embed=embed, layers=layers, heads=heads, kv_heads=heads,
        head_dim=embed // heads, inner=int(raw.get("n_inner") or 4 * embed), positions=int(raw["n_positions"]),
        eps=float(raw.get("layer_norm_epsilon", 1e-5)), activation=raw.get("activation_function", "gelu_new"),
        gated=GPT2.gated, tied=bool(raw.get("tie_word_embeddings", True)),
        scales=tuple(scale / (i + 1 if inverse else 1) for i in range(layers)), windows=(0,) * layers,
        qkv_bias=True, out_bias=True, mlp_bias=True,
    )  # fmt: skip


def _program(config: ModelConfig, layer: int) -> Program:
    """Layer norm, attention, layer norm, MLP."""
    c, at, shapes = config, f"h.{layer}", _shapes(config)

    def product(source: Buffer, target: Buffer, name: str, leaves: tuple[int, ...] = ()) -> Product:
        outputs, inputs = shapes[name]
        return Product(
            source=source, target=target, names=(f"{at}.{name}",), inputs=inputs, outputs=outputs, biased=True,
            transposed=True, leaves=leaves,
        )  # fmt: skip

    def norm(name: str) -> Norm:
        return Norm(source=Buffer.HIDDEN, target=Buffer.NORMED, name=f"{at}.{name}", centred=True)

    return Program(
        operations=(
            norm("ln_1"),
            product(Buffer.NORMED, Buffer.QKV, "attn.c_attn"),
            Write(source=Buffer.QKV, layer=layer),
            Attend(source=Buffer.QKV, target=Buffer.MIXED, layer=layer, scale=c.scales[layer], window=c.windows[layer]),
            product(Buffer.MIXED, Buffer.CHANGE, "attn.c_proj", head_leaves(c.heads, c.head_dim)),
            Add(source=Buffer.CHANGE, target=Buffer.HIDDEN),
            norm("ln_2"),
            product(Buffer.NORMED, Buffer.INNER, "mlp.c_fc"),
            Activate(source=Buffer.INNER, target=Buffer.ACTIVE, function=c.activation, gated=c.gated),
            product(Buffer.ACTIVE, Buffer.CHANGE, "mlp.c_proj", inner_leaves(c.inner)),
            Add(source=Buffer.CHANGE, target=Buffer.HIDDEN),
        )
    )


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    embed, inner = config.embed, config.inner
    return {
        "attn.c_attn": (3 * embed, embed),
        "attn.c_proj": (embed, embed),
        "mlp.c_fc": (inner, embed),
        "mlp.c_proj": (embed, inner),
    }


def _describe_gguf(writer: Any, raw: Mapping[str, Any], config: ModelConfig) -> None:
    writer.add_layer_norm_eps(config.eps)


def _read_gguf(metadata: GgufMetadata) -> dict[str, Any]:
    heads = metadata.size("attention.head_count")
    if metadata.size("attention.head_count_kv", heads) != heads:
        raise ModelError("a GPT-2 with fewer heads for keys than for queries is not supported")
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": metadata.rows("token_embd.weight"),
        "n_positions": metadata.rows("position_embd.weight", metadata.size("context_length")),
        "n_embd": metadata.size("embedding_length"), "n_layer": metadata.size("block_count"), "n_head": heads,
        "n_inner": metadata.size("feed_forward_length"), "activation_function": "gelu_new",
        "layer_norm_epsilon": metadata.number("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in metadata.shapes,
    }  # fmt: skip


def _gguf_tensors(metadata: GgufMetadata, config: Mapping[str, Any]) -> set[str]:
    parts = ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
    layers = {
        f"blk.{layer}.{part}.{end}"
        for layer in range(config["n_layer"])
        for part in parts
        for end in ("weight", "bias")
    }
    return layers | {"token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias"}


GPT2 = Family(
    name="gpt2",
    architectures={"gpt2": GgufArchitecture(name="gpt2")},
    read_config=_read_config,
    activation="gelu_new",
    gated=False,
    embedding="wte.weight",
    positions="wpe.weight",
    heads_reducible=False,
    final_norm=Norm(source=Buffer.HIDDEN, target=Buffer.NORMED, name="ln_f", centred=True),
    program=_program,
    shapes=_shapes,
    gguf=GgufFormat(
        activations=("gelu_new", "gelu_pytorch_tanh"),
        superfluous=(".attn.bias", ".attn.masked_bias"),
        input_first=(".c_attn.weight", ".c_proj.weight", ".c_fc.weight"),
        split="gpt-2",
        describe=_describe_gguf,
        read=_read_gguf,
        tensors=_gguf_tensors,
    ),
)
