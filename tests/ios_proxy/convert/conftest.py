"""What tests of the converter share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mpgpt.core import Span
from mpgpt_ios.bundle import Bundle
from mpgpt_ios.convert.package import PackageOptions, convert

SPAN, OPTIONS = Span(start=1, stop=3), PackageOptions(slots=3, context=64, chunk=8)


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


@pytest.fixture(scope="session")
def bundles(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Bundle, float]]:
    """Layers ``SPAN`` of each model as they are converted with ``OPTIONS``, and the self-test's difference."""
    pytest.importorskip("coremltools")
    out = tmp_path_factory.mktemp("packages")
    made = {name: convert(folder, SPAN, out / f"{name}.mlpackage", OPTIONS) for name, folder in folders.items()}
    return made | {"int8": convert(folders["gpt2"], SPAN, out / "int8.mlpackage", replace(OPTIONS, weights="int8"))}
