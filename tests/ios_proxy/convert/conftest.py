"""What tests of the converter share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random models whose heads are as wide as the Neural Engine wants them."""
    root = tmp_path_factory.mktemp("wide")
    torch.manual_seed(5)
    small: dict[str, Any] = {"vocab_size": 300, "bos_token_id": None, "eos_token_id": None}
    gpt2 = transformers.GPT2Config(n_embd=64, n_layer=4, n_head=2, n_positions=128, initializer_range=0.2, **small)
    llama = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=128, initializer_range=0.2, **small,
    )  # fmt: skip
    for name, model in (
        ("gpt2", transformers.GPT2LMHeadModel(gpt2)), ("llama", transformers.LlamaForCausalLM(llama))
    ):  # fmt: skip
        for value in model.parameters():
            if value.dim() == 1:  # norms and biases that are no identity: coremltools leaves those out, or merges them
                value.data += 0.2 * torch.randn_like(value)
        model.save_pretrained(root / name)
    return {name: root / name for name in ("gpt2", "llama")}
