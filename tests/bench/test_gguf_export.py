"""GGUF files of small random models, read back by somebody else: transformers, and gguf's own reader."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader, quants
from safetensors.torch import load_file, save_file

from mpgpt.bench.gguf_export import gguf_file
from mpgpt.errors import ModelError

TYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "int8": "Q8_0", "int4": "Q4_0"}


def read_back(path: Path, folder: Path) -> Any:
    """The model as transformers makes it of a GGUF file. It takes some sizes and biases of it only if told of them."""
    auto: Any = transformers.AutoModelForCausalLM
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    config.sliding_window = None  # which the file does not say
    known = {"config": config} if folder.name in ("gpt2", "llama-biased", "qwen3") else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return auto.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, **known)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-biased", "llama-linear", "mistral", "qwen2", "qwen3"])
def test_transformers_reads_the_same_weights(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    said: list[str] = []
    path = gguf_file(models[name], "float32", tmp_path, said.append)
    assert said == [f"writing {path}"]
    theirs = read_back(path, models[name]).state_dict()
    ours = load_file(models[name] / "model.safetensors")
    assert set(ours) <= set(theirs)
    for key, tensor in ours.items():
        assert torch.equal(theirs[key], tensor), key
    assert gguf_file(models[name], "float32", tmp_path, said.append) == path and len(said) == 1, "used again"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_it_is_the_same_model(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Sizes, norms' epsilon, rotary base: what transformers makes of the file gives the same logits."""
    auto: Any = transformers.AutoModelForCausalLM
    ids = torch.arange(40)[None] * 7 % 300
    with torch.inference_mode():
        theirs = read_back(gguf_file(models[name], "float32", tmp_path), models[name])(ids).logits
        config: Any = transformers.AutoConfig.from_pretrained(models[name])
        config.sliding_window = None
        ours = auto.from_pretrained(models[name], config=config, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_types(models: dict[str, Path], tmp_path: Path, name: str, dtype: str) -> None:
    """Matrices as asked, vectors in float32; what is stored is near what was there."""
    whole = {t.name: t for t in GGUFReader(gguf_file(models[name], "float32", tmp_path)).tensors}
    stored = {t.name: t for t in GGUFReader(gguf_file(models[name], dtype, tmp_path)).tensors}
    assert stored.keys() == whole.keys()
    for key, tensor in stored.items():
        fits = dtype not in ("int8", "int4") or tensor.shape[0] % 32 == 0
        plain = len(tensor.shape) < 2 or key.startswith("position")
        assert tensor.tensor_type.name == ("F32" if plain else TYPES[dtype] if fits else "F16"), key
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        truth = quants.dequantize(whole[key].data, whole[key].tensor_type)
        step = {"int8": 1 / 127, "int4": 1 / 8, "bfloat16": 1 / 256, "float16": 1 / 2048}.get(dtype, 0.0)
        assert np.abs(values - truth).max() <= 1.01 * step * np.abs(truth).max(), key


def test_scaled_rotary_positions_are_factors(models: dict[str, Path], tmp_path: Path) -> None:
    reader = GGUFReader(gguf_file(models["llama-linear"], "float32", tmp_path))
    (factors,) = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    np.testing.assert_allclose(factors, np.full(8, 2.0), rtol=1e-5)
    reader = GGUFReader(gguf_file(models["llama-biased"], "float32", tmp_path))
    (factors,) = [t.data for t in reader.tensors if t.name == "rope_freqs.weight"]
    assert factors[0] == pytest.approx(1.0) and factors[-1] == pytest.approx(8.0), "llama3: short waves stay"


@pytest.mark.parametrize("kept", [["lm_head"], ["embed_tokens", "lm_head"], ["embed_tokens", "another"]])
def test_embedding_and_head(models: dict[str, Path], tmp_path: Path, kept: list[str]) -> None:
    """A head alone is the embedding too, one that is the same is left out, and another is llama.cpp's output."""
    folder = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    table = weights.pop("model.embed_tokens.weight")
    names = {"embed_tokens": ("model.embed_tokens.weight", table), "lm_head": ("lm_head.weight", table.clone()),
             "another": ("lm_head.weight", table * 2)}  # fmt: skip
    save_file(weights | dict(names[name] for name in kept), folder / "model.safetensors", {"format": "pt"})
    tensors = {t.name: t.data for t in GGUFReader(gguf_file(folder, "float32", tmp_path)).tensors}
    np.testing.assert_array_equal(tensors["token_embd.weight"], table.numpy())
    assert ("output.weight" in tensors) is ("another" in kept)
    if "another" in kept:
        np.testing.assert_array_equal(tensors["output.weight"], 2 * table.numpy())


@pytest.mark.parametrize(("name", "said"), [("gpt2-odd", "relu"), ("llama-yarn", "YaRN")])
def test_what_llama_cpp_cannot_be_told(models: dict[str, Path], tmp_path: Path, name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        gguf_file(models[name], "float32", tmp_path)
    assert not list(tmp_path.iterdir())


def test_other_weights_are_another_file(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    first = gguf_file(folder, "float32", tmp_path / "home")
    os.utime(folder / "model.safetensors", (1, 1))
    assert gguf_file(folder, "float32", tmp_path / "home") != first


def test_nothing_is_left_of_a_file_that_was_not_finished(models: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(models["llama"], tmp_path / "model"))
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        gguf_file(folder, "float32", tmp_path / "home")
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        gguf_file(models["llama"], "float32", tmp_path / "file")
    assert not list(tmp_path.glob("home/*"))
