"""The blocks against transformers on the same weights, and the promises that the cache and the batch make."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mpgpt.core import Row, Span
from mpgpt.errors import ModelError
from mpgpt.model.attention import Attention, Batch
from mpgpt.model.known_families import read_config
from mpgpt.model.linear import Kernels
from mpgpt.model.slice import Slice
from mpgpt.model.weights import Checkpoint, model_config
from tests.support.models import CONTEXT, LINEAR, RANDOM, VOCAB, YARN, build, save_random, save_tokenizer


def slices(folder: Path, cuts: Sequence[int] = (), dtype: str = "float32") -> list[Slice]:
    """The model in ``folder`` cut before each of the layers ``cuts``."""
    config, checkpoint = model_config(folder), Checkpoint(folder)
    edges = [0, *cuts, config.layers]
    spans = [Span(start=a, stop=b) for a, b in itertools.pairwise(edges)]
    return [Slice(config, span, checkpoint, slots=4, context=CONTEXT, kernels=Kernels(dtype=dtype)) for span in spans]


@torch.inference_mode()
def logits(parts: Sequence[Slice], rows: Sequence[Row]) -> Tensor:
    """One step through all parts."""
    batch = parts[0].batch(rows)
    x = parts[0].embed(batch)
    for part in parts:
        x = part.run(x, batch, lambda: None)
    return parts[-1].logits(x) if len(x) else torch.empty(0, VOCAB)


def row(slot: int, start: int, ids: Sequence[int], outputs: int | None = None) -> Row:
    return Row(slot=slot, start=start, ids=tuple(ids), outputs=len(ids) if outputs is None else outputs)


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(0, VOCAB, (count,), generator=generator).tolist()
    return drawn


@pytest.mark.parametrize("name", RANDOM)
def test_logits_are_transformers(models: dict[str, Path], name: str) -> None:
    """Chunks, single tokens, several ranks, strangers in the same step: within 1e-4 of one forward pass."""
    ids = random_ids(120)
    with torch.inference_mode():
        theirs = build(name)(torch.tensor([ids])).logits[0]
    parts = slices(models[name], cuts=(1, 3))
    got = []
    for start, stop in ((0, 50), (50, 51), (51, 52), (52, 119), (119, 120)):
        rows = [row(0, 0, random_ids(7, seed=stop), outputs=1), row(2, start, ids[start:stop])]
        got.append(logits(parts, rows)[1:])
    ours = torch.cat(got)
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.std() > 0.1, "a comparison of zeros would prove nothing"


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_does_not_depend_on_its_company(models: dict[str, Path], name: str, dtype: str) -> None:
    """Bit for bit, alone or with strangers: what makes the same tokens on any cluster more than likely."""
    ids = random_ids(60)
    alone, company = slices(models[name], dtype=dtype), slices(models[name], cuts=(2,), dtype=dtype)
    for start, stop in ((0, 48), (48, 58), (58, 59), (59, 60)):
        strangers = [row(slot, 0, random_ids(5 * slot + stop, seed=slot), outputs=1) for slot in (0, 3)]
        mine = row(1, start, ids[start:stop])
        a = logits(alone, [mine])
        b = logits(company, [strangers[0], mine, strangers[1]])[1:-1]
        assert torch.equal(a, b), f"positions {start} to {stop}"


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_drafted_position_has_the_bits_that_it_has_alone(models: dict[str, Path], name: str, dtype: str) -> None:
    """Otherwise a near tie might be decided by whether somebody guessed it."""
    ids, wrong = random_ids(90), random_ids(90, seed=1)
    alone, drafted = slices(models[name], dtype=dtype), slices(models[name], cuts=(2, 3), dtype=dtype)
    for parts in (alone, drafted):
        logits(parts, [row(1, 0, ids[:30], outputs=1)])
    expected = torch.cat([logits(alone, [row(1, at, ids[at : at + 1])]) for at in range(30, 90)])
    start = 30
    for count in (2, 3, 1, 5, 8, 16, 2, 12, 11):
        mine = row(1, start, ids[start : start + count])
        strangers = [row(slot, 0, random_ids(4 * slot + count, seed=slot), outputs=1) for slot in (0, 3)]
        logits(drafted, [row(1, start, [ids[start], *wrong[start + 1 : start + 1 + count]])])  # to be written over
        company = count % 2
        got = logits(drafted, [strangers[0], mine, strangers[1]])[1:-1] if company else logits(drafted, [mine])
        assert torch.equal(got, expected[start - 30 : start - 30 + count]), f"{count} positions from {start}"
        start += count
    assert start == 90


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 12, 64), (9, 3, 64), (8, 1, 32), (4, 2, 24)])
@pytest.mark.parametrize("window", [0, 100])
def test_attention_over_long_slots_does_not_depend_on_drafts(
    heads: int, kv_heads: int, dim: int, window: int, dtype: torch.dtype
) -> None:
    """At every length near the edges of the kernel's blocks, for the head layouts of GPT-2, SmolLM2 and others."""
    raw = config_of("llama", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim)
    config = dataclasses.replace(read_config(raw), windows=(window,), scales=(dim**-0.5,))
    attention = Attention(config, 0, slots=2, context=1100, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    attention.kv.copy_(torch.randn(attention.kv.shape, generator=generator))
    for stop in (5, 16, 17, 33, 64, 70, 129, 256, 260, 511, 512, 513, 520, 1024, 1030):
        count = min(stop, 13)
        q_THD = torch.randn((count, heads, dim), generator=generator).to(dtype)
        rows = [row(1, stop - count, [0] * count)]
        batch = Batch(rows, dtype)
        together = attention.read(q_THD, batch.queries, batch)
        for i in range(count):
            single = Batch([row(1, rows[0].start + i, [0])], dtype)
            assert torch.equal(together[i : i + 1], attention.read(q_THD[i : i + 1], single.queries, single))
        exact = reference(q_THD.double(), attention.kv[:, 1].double(), stop, window, dim**-0.5)
        assert torch.allclose(together.double(), exact, atol=1e-5 if dtype == torch.float32 else 2e-2)


def reference(q_THD: Tensor, kv_2KSD: Tensor, stop: int, window: int, scale: float) -> Tensor:
    """Attention written out, position by position and head by head, [T, H x D]."""
    outs = []
    for at, q_HD in enumerate(q_THD, stop - len(q_THD)):
        low = max(0, at + 1 - window) if window else 0
        for head, q_D in enumerate(q_HD):
            key_SD, value_SD = kv_2KSD[:, head * kv_2KSD.shape[1] // len(q_HD), low : at + 1]
            outs.append((key_SD @ q_D * scale).softmax(0) @ value_SD)
    return torch.cat(outs).view(len(q_THD), -1)


def test_writing_over_positions_takes_tokens_back(models: dict[str, Path]) -> None:
    """Drafts that turn out wrong, and a slot that is used again, leave nothing behind."""
    ids, wrong = random_ids(40), random_ids(40, seed=1)
    fresh, used = slices(models["llama"]), slices(models["llama"])
    expected = logits(fresh, [row(1, 0, ids)])
    logits(used, [row(1, 0, wrong)])
    logits(used, [row(1, 0, ids[:30], outputs=0)])
    logits(used, [row(1, 30, wrong[30:36])])
    got = logits(used, [row(1, 30, ids[30:])])
    assert torch.allclose(got, expected[30:], atol=1e-4)


BAD, HUGE = 7, 9


def with_a_bad_token(parts: list[Slice]) -> list[Slice]:
    """The embedding of ``BAD`` is no number, and that of ``HUGE`` is none in float16."""
    embedding = parts[0]._embedding.clone()
    embedding[BAD], embedding[HUGE] = math.nan, 1e5
    parts[0]._embedding = embedding
    return parts


@pytest.mark.parametrize("name", ["gpt2", "mistral", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_token_that_is_not_finite_spoils_its_own_sequence_alone(
    models: dict[str, Path], name: str, dtype: str
) -> None:
    """Bit for bit: beside it in a step, in its slot after it, and before it in its own sequence."""
    bad = HUGE if dtype == "float16" else BAD
    ids = [id for id in random_ids(90) if id not in (BAD, HUGE)][:60]
    cuts = [(0, 40), (40, 52), (52, 53), (53, 60)]
    expected = [logits(parts, [row(1, a, ids[a:b])]) for parts in [slices(models[name], dtype=dtype)] for a, b in cuts]
    parts = with_a_bad_token(slices(models[name], cuts=(2,), dtype=dtype))
    for slot in (1, 0):  # the second time in the slot of a bad one
        for (a, b), want in zip(cuts, expected, strict=True):
            other, single = (s for s in (0, 1, 2, 3) if s not in (slot, 3)), row(3, 0, [bad], outputs=1)
            long = row(next(other), 0, [*ids[: b // 2], bad, *ids[b // 2 :]], outputs=1)
            got = logits(parts, [long, row(slot, a, ids[a:b]), single])
            assert not got[0].isfinite().any() and not got[-1].isfinite().any()
            assert torch.equal(got[1:-1], want), f"positions {a} to {b} in slot {slot}"
            if b < 60:  # drafts that were wrong, and are written over
                drafted = logits(parts, [row(slot, b, [ids[b], bad, *ids[b + 1 : b + 4]])])
                assert drafted[0].isfinite().all() and not drafted[1:].isfinite().any()


def test_only_wanted_positions_come_out(models: dict[str, Path]) -> None:
    parts, ids = slices(models["gpt2"], cuts=(4,)), random_ids(30)
    everything = logits(parts, [row(0, 0, ids)])
    some = logits(parts, [row(1, 0, ids, outputs=3), row(2, 0, ids[:9], outputs=0), row(3, 0, ids[:4], outputs=1)])
    assert some.shape == (4, VOCAB)
    assert torch.allclose(some[:3], everything[-3:], atol=1e-4)
    assert torch.allclose(some[3], everything[3], atol=1e-4)
    assert logits(parts, [row(0, 0, ids, outputs=0)]).shape[0] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(models: dict[str, Path], dtype: str) -> None:
    ids = random_ids(40)
    exact = logits(slices(models["llama"]), [row(0, 0, ids)])
    near = logits(slices(models["llama"], dtype=dtype), [row(0, 0, ids[:39], outputs=39)])
    last = logits(slices(models["llama"], dtype=dtype), [row(0, 0, ids)])[-1]
    assert (near - exact[:39]).abs().max() < 0.1 * exact.abs().max()
    assert (last - exact[39]).abs().max() < 0.1 * exact.abs().max()


def test_shards_are_read(models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids = random_ids(10)
    assert torch.equal(logits(slices(folder), [row(0, 0, ids)]), logits(slices(models["llama"]), [row(0, 0, ids)]))


def test_bfloat16_files_serve_float32(tmp_path: Path) -> None:
    model = build("gpt2").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    ids = random_ids(10)
    with torch.inference_mode():
        theirs = model.float()(torch.tensor([ids])).logits[0]
    assert (logits(slices(tmp_path), [row(0, 0, ids)]) - theirs).abs().max() < 1e-4


def config_of(name: str, **changes: Any) -> dict[str, Any]:
    kind, options = RANDOM[name]
    del kind
    model_type = "gpt2" if name.startswith("gpt2") else name.split("-")[0]
    return {"model_type": model_type, **options, **changes}


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


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_biases_that_an_architecture_does_not_have(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """transformers heeds these keys in Llama alone, and one of them in Qwen 3."""
    raw = json.loads((models[name] / "config.json").read_text())
    more = {"mlp_bias": True} | ({} if name == "qwen3" else {"attention_bias": True})
    assert read_config(raw | more) == read_config(raw)


def test_a_slice_reads_only_its_layers(models: dict[str, Path]) -> None:
    """Names are asked for one by one: record them."""
    asked: list[str] = []

    class Recorder(Checkpoint):
        def _find(self, name: str) -> str:
            asked.append(name)
            return super()._find(name)

    config = model_config(models["llama"])
    Slice(
        config, Span(start=1, stop=3), Recorder(models["llama"]), slots=1, context=8, kernels=Kernels(dtype="float32")
    )
    assert {name.split(".")[1] for name in asked} == {"1", "2"}
    asked.clear()
    Slice(
        config, Span(start=4, stop=5), Recorder(models["llama"]), slots=1, context=8, kernels=Kernels(dtype="float32")
    )
    assert {name for name in asked if not name.startswith("layers.4.")} == {"norm.weight", "embed_tokens.weight"}


@pytest.mark.parametrize(("key", "value"), [("intermediate_size", 96), ("vocab_size", 200), ("num_attention_heads", 8)])
def test_a_config_of_another_model_is_refused(tmp_path: Path, key: str, value: int) -> None:
    folder = save_random("llama-biased", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value, "head_dim": 16}))
    with pytest.raises(ModelError, match="two models"):
        slices(folder)


def test_integer_weights_are_refused(tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="quantised"):
        slices(folder)
