"""Small random models, saved as transformers saves them: the other side of every comparison."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB = 300
CONTEXT = 512
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.2, "bos_token_id": None,
    "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCAB, "n_embd": 64, "n_layer": 5, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.2,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}

RANDOM: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT2),
    "gpt2-odd": ("GPT2", GPT2 | {"n_embd": 48, "n_head": 3, "n_layer": 4, "n_inner": 100, "activation_function": "relu",
                                 "scale_attn_by_inverse_layer_idx": True}),
    "llama": ("Llama", SMALL | {"tie_word_embeddings": True}),
    "llama-biased": ("Llama", SMALL | {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama-yarn": ("Llama", SMALL | {"num_key_value_heads": 1, "rope_parameters": YARN}),
    "llama-linear": ("Llama", SMALL | {"num_key_value_heads": 4, "rope_parameters": LINEAR}),
    "llama-dynamic": ("Llama", SMALL | {"head_dim": 24, "rope_parameters": DYNAMIC}),
    "mistral": ("Mistral", SMALL | {"head_dim": 32, "sliding_window": 20}),
    "qwen2": ("Qwen2", SMALL | {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen3": ("Qwen3", SMALL | {"head_dim": 32, "tie_word_embeddings": True}),
}  # fmt: skip


def build(name: str) -> Any:
    """The transformers model ``name``, with biases and norms that are not the identity."""
    kind, options = RANDOM[name]
    torch.manual_seed(sum(map(ord, name)))
    suffix = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**options)
    model = getattr(transformers, kind + suffix)(config).eval()
    for key, value in model.named_parameters():
        if value.dim() == 1:
            value.data += 0.2 * torch.randn_like(value)
        if key.endswith(("mlp.c_proj.weight", "down_proj.weight")):
            value.data *= 3  # so that layers matter more than the embedding, and texts do not run into a loop at once
    return model


def save_random(name: str, folder: Path, **options: Any) -> Path:
    """Save model and tokenizer as a hub folder would hold them."""
    build(name).save_pretrained(folder, **options)
    save_tokenizer(folder)
    return folder


def break_embedding(folder: Path, token: str, value: float = math.nan) -> Path:
    """Make every number of a token's embedding ``value``, in a folder whose head has weights of its own."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    assert "lm_head.weight" in weights, "tied, it would be damaged in every row's logits"
    (id,) = transformers.AutoTokenizer.from_pretrained(folder).encode(token)
    name = next(name for name in weights if name.endswith(("embed_tokens.weight", "wte.weight")))
    weights[name][id] = value
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def save_tokenizer(folder: Path, chat_template: str | None = None) -> None:
    """A tokenizer of bytes: ids 0 to 255, and <|end|> as 256."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|end|>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    kind: Any = transformers.PreTrainedTokenizerFast
    fast = kind(tokenizer_object=tokenizer, eos_token="<|end|>", additional_special_tokens=["<|end|>"])
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    """The ``config.json`` of a random model, with ``changes``."""
    _, options = RANDOM[name]
    model_type = "gpt2" if name.startswith("gpt2") else name.split("-")[0]
    return {"model_type": model_type, **options, **changes}
