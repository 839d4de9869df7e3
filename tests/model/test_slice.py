"""The blocks against transformers on the same weights, and the promises that the cache and the batch make."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mpgpt.core import Row, Span
from mpgpt.errors import ModelError
from mpgpt.model.linear import NATIVE, Kernels
from mpgpt.model.native import library
from mpgpt.model.slice import Slice
from mpgpt.model.weights import Checkpoint, model_config
from tests.support.models import CONTEXT, RANDOM, VOCAB, build, save_random, save_tokenizer


@pytest.fixture(params=["torch", NATIVE])
def player(request: pytest.FixtureRequest) -> str:
    """What computes: torch's kernels, or the compiled ones where they are to be had."""
    if request.param == NATIVE and isinstance(library.find(), library.Absent):
        pytest.skip("there are no compiled kernels here")
    name: str = request.param
    return name


def slices(
    folder: Path, cuts: Sequence[int] = (), dtype: str = "float32", player: str = "torch",
    source: type[Checkpoint] = Checkpoint,
) -> list[Slice]:  # fmt: skip
    """The model in ``folder`` cut before each of the layers ``cuts``."""
    config, checkpoint = model_config(folder), source(folder)
    edges = [0, *cuts, config.layers]
    spans = [Span(start=a, stop=b) for a, b in itertools.pairwise(edges)]
    kernels = Kernels(dtype=dtype, chosen={"": NATIVE} if player == NATIVE else {})
    return [Slice(config, span, checkpoint, slots=4, context=CONTEXT, kernels=kernels) for span in spans]


@torch.inference_mode()
def logits(parts: Sequence[Slice], rows: Sequence[Row]) -> Tensor:
    """One step through all parts."""
    x = parts[0].embed(rows)
    for part in parts:
        x = part.forward(rows, x)
    return x


def row(slot: int, start: int, ids: Sequence[int], outputs: int | None = None) -> Row:
    return Row(slot=slot, start=start, ids=tuple(ids), outputs=len(ids) if outputs is None else outputs)


def random_ids(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = torch.randint(0, VOCAB, (count,), generator=generator).tolist()
    return drawn


@pytest.mark.parametrize("name", RANDOM)
def test_logits_are_transformers(player: str, models: dict[str, Path], name: str) -> None:
    """Chunks, single tokens, several ranks, strangers in the same step: within 1e-4 of one forward pass."""
    ids = random_ids(120)
    with torch.inference_mode():
        theirs = build(name)(torch.tensor([ids])).logits[0]
    parts = slices(models[name], cuts=(1, 3), player=player)
    got = []
    for start, stop in ((0, 50), (50, 51), (51, 52), (52, 119), (119, 120)):
        rows = [row(0, 0, random_ids(7, seed=stop), outputs=1), row(2, start, ids[start:stop])]
        got.append(logits(parts, rows)[1:])
    ours = torch.cat(got)
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.std() > 0.1, "a comparison of zeros would prove nothing"


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_row_does_not_depend_on_its_company(player: str, models: dict[str, Path], name: str, dtype: str) -> None:
    """Bit for bit, alone or with strangers: what makes the same tokens on any cluster more than likely."""
    ids = random_ids(60)
    alone, company = (
        slices(models[name], dtype=dtype, player=player),
        slices(models[name], cuts=(2,), dtype=dtype, player=player),
    )
    for start, stop in ((0, 48), (48, 58), (58, 59), (59, 60)):
        strangers = [row(slot, 0, random_ids(5 * slot + stop, seed=slot), outputs=1) for slot in (0, 3)]
        mine = row(1, start, ids[start:stop])
        a = logits(alone, [mine])
        b = logits(company, [strangers[0], mine, strangers[1]])[1:-1]
        assert torch.equal(a, b), f"positions {start} to {stop}"


@pytest.mark.parametrize("name", RANDOM)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_a_drafted_position_has_the_bits_that_it_has_alone(
    player: str, models: dict[str, Path], name: str, dtype: str
) -> None:
    """Otherwise a near tie might be decided by whether somebody guessed it."""
    ids, wrong = random_ids(90), random_ids(90, seed=1)
    alone, drafted = (
        slices(models[name], dtype=dtype, player=player),
        slices(models[name], cuts=(2, 3), dtype=dtype, player=player),
    )
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


def test_writing_over_positions_takes_tokens_back(player: str, models: dict[str, Path]) -> None:
    """Drafts that turn out wrong, and a slot that is used again, leave nothing behind."""
    ids, wrong = random_ids(40), random_ids(40, seed=1)
    fresh, used = slices(models["llama"], player=player), slices(models["llama"], player=player)
    expected = logits(fresh, [row(1, 0, ids)])
    logits(used, [row(1, 0, wrong)])
    logits(used, [row(1, 0, ids[:30], outputs=0)])
    logits(used, [row(1, 30, wrong[30:36])])
    got = logits(used, [row(1, 30, ids[30:])])
    assert torch.allclose(got, expected[30:], atol=1e-4)


BAD, HUGE = 7, 9


class Spoiled(Checkpoint):
    """The embedding of ``BAD`` is no number, and that of ``HUGE`` is none in float16; a tied head is as it was."""

    def mapped(self, name: str) -> Tensor:
        table = super().mapped(name).clone()
        table[BAD], table[HUGE] = math.nan, 1e5
        return table


@pytest.mark.parametrize("name", ["gpt2", "mistral", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int4"])
def test_a_token_that_is_not_finite_spoils_its_own_sequence_alone(
    player: str, models: dict[str, Path], name: str, dtype: str
) -> None:
    """Bit for bit: beside it in a step, in its slot after it, and before it in its own sequence."""
    bad = HUGE if dtype == "float16" and player == "torch" else BAD  # the compiled kernels' activations are float32
    ids = [id for id in random_ids(90) if id not in (BAD, HUGE)][:60]
    cuts = [(0, 40), (40, 52), (52, 53), (53, 60)]
    expected = [
        logits(parts, [row(1, a, ids[a:b])])
        for parts in [slices(models[name], dtype=dtype, player=player)]
        for a, b in cuts
    ]
    parts = slices(models[name], cuts=(2,), dtype=dtype, player=player, source=Spoiled)
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


def test_only_output_positions_come_out(player: str, models: dict[str, Path]) -> None:
    parts, ids = slices(models["gpt2"], cuts=(4,), player=player), random_ids(30)
    everything = logits(parts, [row(0, 0, ids)])
    some = logits(parts, [row(1, 0, ids, outputs=3), row(2, 0, ids[:9], outputs=0), row(3, 0, ids[:4], outputs=1)])
    assert some.shape == (4, VOCAB)
    assert torch.allclose(some[:3], everything[-3:], atol=1e-4)
    assert torch.allclose(some[3], everything[3], atol=1e-4)
    assert logits(parts, [row(0, 0, ids, outputs=0)]).shape[0] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near(player: str, models: dict[str, Path], dtype: str) -> None:
    ids = random_ids(40)
    exact = logits(slices(models["llama"], player=player), [row(0, 0, ids)])
    near = logits(slices(models["llama"], dtype=dtype, player=player), [row(0, 0, ids[:39], outputs=39)])
    last = logits(slices(models["llama"], dtype=dtype, player=player), [row(0, 0, ids)])[-1]
    assert (near - exact[:39]).abs().max() < 0.1 * exact.abs().max()
    assert (last - exact[39]).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "float16"])
def test_a_cache_in_16_bits_is_half_and_near(models: dict[str, Path], kv_dtype: str) -> None:
    if isinstance(library.find(), library.Absent):
        pytest.skip("there are no compiled kernels here")
    config, checkpoint, ids = model_config(models["llama"]), Checkpoint(models["llama"]), random_ids(100)
    kernels = [Kernels(dtype="float32", chosen={"": NATIVE}, kv_dtype=name) for name in ("auto", kv_dtype)]
    span = Span(start=0, stop=config.layers)
    whole, half = (Slice(config, span, checkpoint, slots=1, context=CONTEXT, kernels=k) for k in kernels)
    assert half.kv_nbytes * 2 == whole.kv_nbytes
    exact, near = (logits([part], [row(0, 0, ids)]) for part in (whole, half))
    assert 0 < (near - exact).square().mean().sqrt() < 0.01 * exact.square().mean().sqrt()


def test_shards_are_read(player: str, models: dict[str, Path], tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "sharded", max_shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ids = random_ids(10)
    assert torch.equal(
        logits(slices(folder, player=player), [row(0, 0, ids)]),
        logits(slices(models["llama"], player=player), [row(0, 0, ids)]),
    )


def test_bfloat16_files_serve_float32(player: str, tmp_path: Path) -> None:
    model = build("gpt2").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    ids = random_ids(10)
    with torch.inference_mode():
        theirs = model.float()(torch.tensor([ids])).logits[0]
    assert (logits(slices(tmp_path, player=player), [row(0, 0, ids)]) - theirs).abs().max() < 1e-4


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
def test_a_config_of_another_model_is_refused(player: str, tmp_path: Path, key: str, value: int) -> None:
    folder = save_random("llama-biased", tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {key: value, "head_dim": 16}))
    with pytest.raises(ModelError, match="two models"):
        slices(folder, player=player)


def test_integer_weights_are_refused(player: str, tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(weights | {name: weights[name].to(torch.int8)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="quantised"):
        slices(folder, player=player)
