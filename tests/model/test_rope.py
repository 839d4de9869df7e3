"""Rotary frequencies against transformers'."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mpgpt.errors import ModelError
from mpgpt.model.known_families import read_config
from tests.support.models import LINEAR, YARN, config_of


def test_the_old_spelling_of_rotary_scaling() -> None:
    """Checkpoints made before transformers 5 have rope_theta and rope_scaling side by side."""
    new = config_of("llama-biased")
    scaling = dict(new["rope_parameters"])
    old = {k: v for k, v in new.items() if k != "rope_parameters"} | {"rope_theta": scaling.pop("rope_theta")}
    old["rope_scaling"] = scaling
    assert read_config(old).inv_freq == read_config(new).inv_freq
    older = dict(scaling, type=scaling["rope_type"])
    del older["rope_type"]
    assert read_config(old | {"rope_scaling": older}).inv_freq == read_config(new).inv_freq


def rotary_of(raw: dict[str, Any], folder: Path) -> tuple[Tensor, float]:
    """transformers' frequencies, and its factor on cos and sin, for a ``config.json``."""
    (folder / "config.json").write_text(json.dumps(raw))
    rotary = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(folder))
    frequencies: Any = rotary.inv_freq
    return frequencies, float(rotary.attention_scaling)


PLAIN = {key: value for key, value in config_of("llama").items() if "eos" not in key}
HALF = [1.0, 1.5, 2.0, 8.0] * 2
SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "default"},
    {"type": "linear", "factor": 3},
    {"rope_type": "dynamic", "factor": 2.0},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0},
    {"type": "yarn", "factor": 4, "beta_fast": 16, "beta_slow": 2, "truncate": False},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 0.7, "mscale_all_dim": 1.0, "finetuned": True},
    {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.25},
    {"rope_type": "yarn", "factor": None},
    {"rope_type": "longrope", "short_factor": HALF, "long_factor": HALF},
    {"rope_type": "longrope", "short_factor": HALF, "long_factor": HALF, "factor": 4.0},
    {"rope_type": "longrope", "short_factor": HALF, "long_factor": HALF, "factor": 1.0, "attention_factor": 1.0},
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_rotary_frequencies_are_transformers(kind: str, scaling: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit, wherever in config.json they are said."""
    raw, seen = PLAIN | {"model_type": kind, "head_dim": 16}, set()
    for theta, original in itertools.product(({}, {"rope_theta": 5e5}), ({}, {"original_max_position_embeddings": 64})):
        beside = {"rope_theta": 7e4, "original_max_position_embeddings": 128}
        for key, more in (("rope_scaling", {}), ("rope_parameters", {}), ("rope_scaling", beside),
                          ("rope_parameters", beside), ("rope_scaling", {"rope_parameters": LINEAR})):  # fmt: skip
            whole = raw | {key: scaling | theta | original} | more
            inv_freq, gain = rotary_of(whole, tmp_path)
            config = read_config(json.loads((tmp_path / "config.json").read_text()))
            assert torch.equal(torch.tensor(config.inv_freq), inv_freq), whole
            assert config.rope_gain == pytest.approx(gain, rel=1e-12), whole
            seen.add(config.inv_freq)
    assert len(seen) > 1


def test_yarn_with_its_original_length_beside_the_table(tmp_path: Path) -> None:
    """As Qwen and others have it; without, the whole length would be taken for the original one."""
    raw = PLAIN | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 128}
    inside = PLAIN | {"rope_parameters": YARN}
    assert read_config(raw).inv_freq == read_config(inside).inv_freq
    del raw["original_max_position_embeddings"]
    assert read_config(raw).inv_freq != read_config(inside).inv_freq


@pytest.mark.parametrize(
    ("rope", "said"),
    [
        ({"rope_type": "longrope", "short_factor": HALF, "long_factor": HALF[::-1]}, "longrope"),
        ({"rope_type": "longrope", "short_factor": HALF[:4], "long_factor": HALF[:4]}, "longrope"),
        ({"rope_type": "longrope", "short_factor": HALF}, "longrope"),
        ({"full_attention": {"rope_type": "default"}}, "from layer to layer .full_attention."),
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "not finite"),
        ({"rope_type": None}, "None"),
        ({"rope_type": "mrope", "mrope_section": [1]}, "'mrope'"),
        ([1], "garbles"),
        ({"rope_theta": None}, "garbles"),
    ],
)
def test_rotary_positions_that_are_not_done_are_named(rope: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        read_config(PLAIN | {"rope_scaling": rope})
