"""Reading a config.json: which families and options are supported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mpgpt.errors import ModelError
from mpgpt.model.known_families import FAMILIES, family_of, read_config
from tests.support.models import RANDOM, config_of


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        ({"model_type": "mamba"}, "gpt2, llama, mistral, qwen2, qwen3"),
        ({}, "not supported"),
        (config_of("llama", quantization_config={"quant_method": "gptq"}), "quantised"),
        (config_of("llama", hidden_act="tanh"), "tanh"),
        (config_of("llama", rope_parameters={"rope_type": "longrope"}), "longrope"),
        (config_of("llama", partial_rotary_factor=0.5), "part of each head"),
        (config_of("llama", num_key_value_heads=3), "fit together"),
        (config_of("gpt2", n_layer="many"), "garbles"),
        ({"model_type": "gpt2", "n_embd": 4}, "n_layer"),
    ],
)
def test_unsupported_configs_are_named(raw: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        read_config(raw)


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_biases_that_an_architecture_does_not_have(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """transformers heeds these keys in Llama alone, and one of them in Qwen 3."""
    raw = json.loads((models[name] / "config.json").read_text())
    more = {"mlp_bias": True} | ({} if name == "qwen3" else {"attention_bias": True})
    assert read_config(raw | more) == read_config(raw)


@pytest.mark.parametrize("name", RANDOM)
def test_a_config_is_of_the_family_that_read_it(name: str) -> None:
    raw = config_of(name)
    assert family_of(read_config(raw)) is FAMILIES[raw["model_type"]]


def test_sizes_are_read_without_torch() -> None:
    code = """
import sys
from mpgpt.model.known_families import read_config

sizes = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 9, "n_positions": 4}
read_config({"model_type": "gpt2", **sizes}, rotary=False)
sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9, "intermediate_size": 16}
read_config({"model_type": "llama", "max_position_embeddings": 4, **sizes}, rotary=False)
sys.exit("torch" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
