"""GGUF files that say more than transformers reads: run as their makers meant, or refused by the name of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from tokenizers.pre_tokenizers import ByteLevel

from mpgpt.bench.gguf_export import gguf_file
from mpgpt.errors import ModelError, PullError
from mpgpt.model.gguf_import import read_gguf
from mpgpt.model.pull import find, pull
from mpgpt.model.tokenizer import Tokenizer
from mpgpt.model.weights import model_config
from tests.model.test_slice import logits, random_ids, row, slices
from tests.support.models import LLAMA3, VOCAB, YARN, build

SPECIALS = ["<|begin|>", "<|end_of_text|>", "<|eot_id|>", "<|eom_id|>", "<|stop|>"]
TOKENS = [*sorted(ByteLevel.alphabet()), *SPECIALS, "Ġt", "Ġte", "ĠĠ", "Ġ1", "12", "hello"]
TOKENS += [f"Ġfill{n}" for n in range(VOCAB - len(TOKENS))]
BEGIN, END, EOT, EOM, STOP = (TOKENS.index(token) for token in SPECIALS)
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token in TOKENS],
    "tokenizer.ggml.merges": ["Ġ t", "Ġt e", "Ġ Ġ", "Ġ 1", "1 2"], "tokenizer.ggml.bos_token_id": BEGIN,
    "tokenizer.ggml.eos_token_id": END,
}  # fmt: skip
TYPES = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}


def write(
    folder: Path, path: Path, fields: Mapping[str, Any] = {}, tensors: Mapping[str, Any] = {}
) -> Path:  # fmt: skip
    """The model in ``folder`` as a file with a vocabulary; a field or tensor that is None is left out."""
    reader = GGUFReader(gguf_file(folder, "float32", path.parent / "exported"))
    said = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    said |= {**VOCABULARY, **fields}
    writer: Any = GGUFWriter(path, said.pop("general.architecture"))
    for key, value in said.items():
        if value is not None:
            writer.add_key_value(key, value, GGUFValueType[TYPES[type(value)]])
    for name, data in ({tensor.name: tensor.data for tensor in reader.tensors} | dict(tensors)).items():
        if data is not None:
            writer.add_tensor(name, np.array(data, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pulled(path: Path) -> Path:
    return pull(str(path), home=path.parent / "home", report=lambda line: None, progress=False)


def plain(folder: Path, target: Path) -> Path:
    """The same weights with rotary positions as they are without scaling: what a file's tensors know of a model."""
    shutil.copytree(folder, target)
    raw = json.loads((target / "config.json").read_text())
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": raw["rope_parameters"]["rope_theta"]}
    (target / "config.json").write_text(json.dumps(raw))
    return target


@torch.inference_mode()
def check(folder: Path, theirs: Any, count: int) -> None:
    """We, and transformers on the same folder, say what ``theirs`` says."""
    auto: Any = transformers.AutoModelForCausalLM
    ids = random_ids(count)
    truth = theirs(torch.tensor([ids])).logits[0]
    assert truth.std() > 0.1
    assert (logits(slices(folder), [row(0, 0, ids)]) - truth).abs().max() < 1e-3
    again = auto.from_pretrained(folder, dtype=torch.float32)
    assert (again(torch.tensor([ids])).logits[0] - truth).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("name", "count"),
    [("gpt2", 100), ("llama", 100), ("llama-biased", 100), ("llama-linear", 100), ("mistral", 20), ("qwen2", 20),
     ("qwen3", 100)],
)  # fmt: skip
def test_it_is_the_same_model(models: dict[str, Path], tmp_path: Path, name: str, count: int) -> None:
    """Sizes, biases, heads of their own size, factors of rotary frequencies (Llama 3.1's, and others')."""
    theirs = build(name)
    folder = pulled(write(models[name], tmp_path / "m.gguf"))
    check(folder, theirs, count)
    theta = json.loads((models[name] / "config.json").read_text()).get("rope_parameters", {}).get("rope_theta")
    if theta:
        ours, truth = model_config(folder), model_config(models[name])
        np.testing.assert_allclose(ours.inv_freq, truth.inv_freq, rtol=1e-6)
        assert ours.rope_gain == truth.rope_gain and ours.eps == truth.eps


def test_factors_are_needed_for_that(models: dict[str, Path], tmp_path: Path) -> None:
    """As a test of the one above: a file whose factors are left out is another model."""
    folder = pulled(write(models["llama-biased"], tmp_path / "m.gguf", tensors={"rope_freqs.weight": None}))
    with pytest.raises(AssertionError):
        check(folder, build("llama-biased"), 100)
    ones = write(models["llama-biased"], tmp_path / "ones.gguf", tensors={"rope_freqs.weight": np.ones(8)})
    assert json.loads((pulled(ones) / "config.json").read_text())["rope_parameters"]["rope_type"] == "default"
    assert LLAMA3["factor"] == 8.0


@pytest.mark.parametrize(
    ("name", "scaling"),
    [
        ("llama-linear", {"type": "linear", "factor": 2.0}),
        ("llama-linear", {"factor": 2.0}),  # linear, where no type is said
        ("llama-yarn", {"type": "yarn", "factor": 4.0, "original_context_length": 128, "finetuned": True}),
    ],
)
def test_scaling_in_the_metadata(
    models: dict[str, Path], tmp_path: Path, name: str, scaling: dict[str, Any]
) -> None:  # fmt: skip
    fields = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    folder = pulled(write(plain(models[name], tmp_path / "plain"), tmp_path / "m.gguf", fields))
    assert model_config(folder).inv_freq == model_config(models[name]).inv_freq
    assert model_config(folder).rope_gain == model_config(models[name]).rope_gain
    check(folder, build(name), 100)


def test_more_of_yarn(models: dict[str, Path], tmp_path: Path) -> None:
    """Of the betas; without an original length it is the model's own; of scaling that is none."""

    def rope(**scaling: Any) -> Any:
        fields = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
        return read_gguf(write(models["llama"], tmp_path / "m.gguf", fields)).config["rope_parameters"]

    said = rope(type="yarn", factor=4.0, yarn_beta_fast=16.0, yarn_beta_slow=2.0)
    assert said == {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 512,
                    "beta_fast": 16.0, "beta_slow": 2.0}  # fmt: skip
    assert rope(type="none", factor=4.0) == rope(type="yarn", factor=1.0) == rope(type="linear")
    assert rope(type="linear") == {"rope_type": "default", "rope_theta": 1e4}
    old = write(models["llama"], tmp_path / "m.gguf", {"llama.rope.scale_linear": 3.0})
    assert read_gguf(old).config["rope_parameters"]["factor"] == 3.0
    assert YARN["factor"] == 4.0


EIGHT = np.linspace(1, 2, 8)


@pytest.mark.parametrize(
    ("fields", "tensors", "said"),
    [
        ({"general.architecture": "gemma2"}, {}, "architecture 'gemma2' is not supported"),
        ({"general.type": "adapter"}, {}, "'adapter'"),
        ({"split.count": 3}, {}, "one of 3 parts"),
        ({"llama.rope.scaling.type": "longrope"}, {}, "'longrope'"),
        ({"llama.rope.scaling.type": "wild", "llama.rope.scaling.factor": 2.0}, {}, "'wild'"),
        ({"llama.rope.scaling.factor": 2.0}, {"rope_freqs.weight": EIGHT}, "twice"),
        ({"llama.rope.scaling.attn_factor": 1.5}, {}, "rope.scaling.attn_factor = 1.5"),
        ({"llama.rope.scaling.yarn_log_multiplier": 0.1}, {}, "yarn_log_multiplier"),
        ({"llama.rope.dimension_count": 8}, {}, "part of each head"),
        ({"llama.attention.value_length": 8}, {}, "values of another size"),
        ({"llama.attention.sliding_window": 128}, {}, "sliding_window = 128"),
        ({"llama.attention.scale": 0.5}, {}, "attention.scale = 0.5"),
        ({"llama.attention.causal": False}, {}, "attention.causal = False"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 2}, {}, "expert_count = 8"),
        ({"llama.final_logit_softcapping": 30.0}, {}, "final_logit_softcapping"),
        ({"llama.attn_logit_softcapping": 50.0}, {}, "attn_logit_softcapping"),
        ({"llama.logit_scale": 0.25}, {}, "logit_scale = 0.25"),
        ({"llama.attention.head_count_kv": [2, 2, 4, 2, 2]}, {}, "differs from layer to layer"),
        ({"llama.never_heard_of": 7}, {}, "llama.never_heard_of = 7"),
        ({"llama.block_count": None}, {}, "lacks llama.block_count"),
        ({"llama.block_count": 4}, {}, "tensor blk.4."),
        ({"llama.block_count": 6}, {}, "lacks the tensor blk.5."),
        ({}, {"rope_freqs.weight": np.ones(4)}, "8 positive numbers"),
        ({}, {"rope_freqs.weight": np.zeros(8)}, "8 positive numbers"),
        ({}, {"rope_factors_long.weight": EIGHT, "rope_factors_short.weight": EIGHT}, "rope_factors_long.weight"),
        ({}, {"blk.3.attn_q_norm.weight": np.ones(16)}, "blk.3.attn_q_norm.weight"),
        ({}, {"blk.3.attn_v.bias": np.ones(32)}, "blk.3.attn_v.bias"),
        ({}, {"blk.0.attn_q.bias": np.ones(64)}, "lacks the tensor blk.0.attn_k.bias"),
        ({}, {"blk.1.ffn_up.weight": None}, "lacks the tensor blk.1.ffn_up.weight"),
        ({}, {"token_embd.weight": None}, "lacks the table token_embd.weight"),
        ({}, {"output_norm.weight": None}, "lacks the tensor output_norm.weight"),
    ],
)
def test_what_would_be_passed_over_is_refused(
    models: dict[str, Path], tmp_path: Path, fields: dict[str, Any], tensors: dict[str, Any], said: str
) -> None:
    path = write(models["llama"], tmp_path / "m.gguf", fields, tensors)
    with pytest.raises(PullError, match=said) as caught:
        pulled(path)
    assert str(caught.value).startswith("m.gguf: ")
    assert not list((tmp_path / "home").iterdir())


def test_what_is_without_effect_is_not(models: dict[str, Path], tmp_path: Path) -> None:
    fields = {
        "attention.sliding_window": 512, "attention.scale": 0.25, "attention.causal": True, "expert_count": 0,
        "rope.scaling.attn_factor": 1.0, "logit_scale": 1.0, "attn_logit_softcapping": 0.0, "vocab_size": VOCAB,
        "attention.head_count_kv": [2] * 5, "rope.scaling.finetuned": True,
    }  # fmt: skip
    path = write(models["llama"], tmp_path / "m.gguf", {f"llama.{key}": value for key, value in fields.items()})
    assert read_gguf(path).config == read_gguf(write(models["llama"], tmp_path / "plain.gguf")).config


def test_a_head_of_its_own(models: dict[str, Path], tmp_path: Path) -> None:
    """``output.weight`` is the head, whatever the model's makers had in their configuration."""
    head = torch.randn(VOCAB, 64) * 0.2
    theirs = build("llama")
    theirs.lm_head.weight = torch.nn.Parameter(head)
    check(pulled(write(models["llama"], tmp_path / "m.gguf", tensors={"output.weight": head.numpy()})), theirs, 50)


# Tokenizers


@pytest.mark.parametrize("pre", ["frobnicate", "default", "bloom", "deepseek-llm", "roberta-bpe", None])
def test_unknown_splitting_is_refused(models: dict[str, Path], tmp_path: Path, pre: str | None) -> None:
    path = write(models["llama"], tmp_path / "m.gguf", {"tokenizer.ggml.pre": pre})
    with pytest.raises(
        PullError, match=f"{pre!r} .tokenizer.ggml.pre." if pre else r"does not name .*known are .*smollm"
    ):
        pulled(path)
    assert not list((tmp_path / "home").iterdir())


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["t", "12", "Ġ", "Ġ1"]),
        ("smollm", ["t", "1", "2", "ĠĠ", "1"]),
        ("qwen2", ["t", "1", "2", "Ġ", "Ġ", "1"]),
        ("llama-bpe", ["t", "12", "Ġ", "Ġ", "1"]),
        ("tekken", ["t", "1", "2", "Ġ", "Ġ", "1"]),
    ],
)
def test_known_splitting(models: dict[str, Path], tmp_path: Path, pre: str, pieces: list[str]) -> None:
    """Digits together or each by itself; a space before a digit with it, alone, or with the one before."""
    folder = pulled(write(models["llama"], tmp_path / "m.gguf", {"tokenizer.ggml.pre": pre}))
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("t12  1") == pieces


@pytest.mark.parametrize(("pre", "whole"), [("llama-bpe", True), ("tekken", True), ("qwen2", False), ("smollm", False)])
def test_a_token_that_no_merge_leads_to(models: dict[str, Path], tmp_path: Path, pre: str, whole: bool) -> None:
    """Llama 3's kind takes a word that is a token as it is, and begins every text."""
    folder = pulled(write(models["llama"], tmp_path / "m.gguf", {"tokenizer.ggml.pre": pre}))
    ids = Tokenizer(folder).encode("hello")
    letters = [TOKENS.index(letter) for letter in "hello"]
    assert ids == ([BEGIN, TOKENS.index("hello")] if whole else letters)
    said = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": not whole}
    folder = pulled(write(models["llama"], tmp_path / "said.gguf", said))
    assert (Tokenizer(folder).encode("hello")[0] == BEGIN) is not whole


@pytest.mark.parametrize("first", [True, False])
def test_sentencepiece_is_not_split_and_may_have_a_space_before(
    models: dict[str, Path], tmp_path: Path, first: bool
) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "▁", "ab", "▁ab"]
    tokens += [f"fill{n}" for n in range(VOCAB - len(tokens))]
    fields = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.pre": "default", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(n) for n in range(VOCAB)], "tokenizer.ggml.merges": None,
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (VOCAB - 259)], "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_space_prefix": None if first else False,
    }  # fmt: skip
    folder = pulled(write(models["llama"], tmp_path / "m.gguf", fields))
    kind: Any = transformers.PreTrainedTokenizerFast
    tokenizer = kind(tokenizer_file=str(folder / "tokenizer.json"))
    assert tokenizer.tokenize("ab ab") == (["▁ab", "▁ab"] if first else ["ab", "▁ab"])
    assert tokenizer.decode([tokens.index("▁ab"), tokens.index("ab")]) == ("abab" if first else " abab")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {END, EOT, EOM}),  # by their names
        ({"eot_token_id": STOP}, {END, STOP, EOT, EOM}),
        ({"eom_token_id": STOP, "eot_token_id": EOT}, {END, STOP, EOT, EOM}),
        ({"eot_token_id": [EOT, STOP]}, {END, STOP, EOT, EOM}),
        ({"eos_token_ids": [END, STOP]}, {END, STOP, EOT, EOM}),
        ({"eos_token_id": None, "eot_token_id": STOP}, {STOP, EOT, EOM}),
        ({"eot_token_id": 4_000_000}, {END, EOT, EOM}),
        ({"token_type": [1] * VOCAB, "eot_token_id": STOP}, {END, STOP}),
        ({"token_type": [1] * VOCAB}, {END}),
    ],
)
def test_every_end_is_an_end(
    models: dict[str, Path], tmp_path: Path, fields: dict[str, Any], expected: set[int]
) -> None:
    said = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    folder = pulled(write(models["llama"], tmp_path / "m.gguf", said))
    assert Tokenizer(folder).stop_ids == expected
    assert json.loads((folder / "config.json").read_text())["bos_token_id"] == BEGIN
    auto: Any = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(folder).generation_config.eos_token_id
    assert {*theirs} == expected if isinstance(theirs, list) else {theirs} == expected


def test_a_list_where_llama_cpp_has_a_number_is_named(models: dict[str, Path], tmp_path: Path) -> None:
    path = write(models["llama"], tmp_path / "m.gguf", {"tokenizer.ggml.eos_token_id": [END, STOP]})
    with pytest.raises(PullError, match=r"tokenizer.ggml.eos_token_id should be one number; it is \[257, 260\]"):
        pulled(path)


def test_an_ending_in_capitals(models: dict[str, Path], tmp_path: Path) -> None:
    path = write(models["llama"], tmp_path / "My.GGUF")
    folder = pulled(path)
    assert folder == tmp_path / "home" / "My" == find(str(path), tmp_path / "home")
    check(folder, build("llama"), 20)
    with pytest.raises(ModelError, match=r"There is no file .*none\.Gguf"):
        pulled(tmp_path / "none.Gguf")
