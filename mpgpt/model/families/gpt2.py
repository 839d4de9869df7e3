"""GPT-2: learned positions, layer norms, an MLP without a gate. (Radford et al. 2019)

Knows: how its config.json is spelt, what its tensors are called here and in llama.cpp's files, its layer.
Must not know: other families, which layers a rank holds, where weights come from.

Legend: T tokens of a step, E embed, H heads, D head dimension, O output features, I input features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mpgpt.errors import ModelError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.family import Family, GgufArchitecture, GgufFormat
from mpgpt.model.gguf_metadata import GgufMetadata

if TYPE_CHECKING:
    from torch import Tensor

    from mpgpt.model.attention import Attention, Batch
    from mpgpt.model.linear import Linear
    from mpgpt.model.loader import Loader


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
        gated=False, tied=bool(raw.get("tie_word_embeddings", True)),
        scales=tuple(scale / (i + 1 if inverse else 1) for i in range(layers)), windows=(0,) * layers,
        qkv_bias=True, out_bias=True, mlp_bias=True,
    )  # fmt: skip


class GPT2Block:
    """Layer norm, attention, layer norm, MLP; learned positions are added before layer 0."""

    def __init__(self, config: ModelConfig, layer: int, loader: Loader, attention: Attention) -> None:
        at, shapes = f"h.{layer}", _shapes(config)

        def linear(name: str) -> Linear:
            (outputs, inputs), label = shapes[name], f"{at}.{name}"
            return loader.linear([label], inputs, outputs, label=label, biased=True, transpose=True)

        self._attention = attention
        self._shape = (config.heads, config.head_dim)
        self._norm_1, self._norm_2 = (loader.layer_norm(f"{at}.{name}") for name in ("ln_1", "ln_2"))
        self._qkv, self._out = linear("attn.c_attn"), linear("attn.c_proj")
        self._up, self._down = linear("mlp.c_fc"), linear("mlp.c_proj")
        self._activation = loader.activation()
        self.nbytes = sum(layer.nbytes for layer in (self._qkv, self._out, self._up, self._down))

    def __call__(self, x_TE: Tensor, batch: Batch, *, outputs_only: bool = False) -> Tensor:
        qkv_T3HD = self._qkv(self._norm_1(x_TE)).view(-1, 3, *self._shape)
        self._attention.write(qkv_T3HD[:, 1:], batch)
        q_THD, queries = qkv_T3HD[:, 0], batch.queries
        if outputs_only:
            x_TE, q_THD, queries = x_TE[batch.output_positions], q_THD[batch.output_positions], batch.output_queries
            if not queries:
                return x_TE
        x_TE = x_TE + self._out(self._attention.read(q_THD, queries, batch))
        return x_TE + self._down(self._activation(self._up(self._norm_2(x_TE))))


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
    final_norm=lambda loader: loader.layer_norm("ln_f"),
    block=GPT2Block,
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
