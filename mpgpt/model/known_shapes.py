"""Models whose sizes are known by name, as the values of their ``config.json``.

Knows: the keys that decide how large a model is.
Must not know: what is made of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
_LLAMA = {"model_type": "llama"}

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "gpt2": _GPT2 | {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": _GPT2 | {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": _GPT2 | {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": _GPT2 | {"n_embd": 1600, "n_layer": 48, "n_head": 25},
    "smollm2-135m": _LLAMA
    | {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
    "llama-3.1-8b": _LLAMA
    | {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
    },
}
"""From their makers' ``config.json``."""

INVENTED: Mapping[str, Mapping[str, Any]] = {
    "llama-small": _LLAMA
    | {
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
    },
}
"""Of a size that suits measurements, and of nobody's making."""
