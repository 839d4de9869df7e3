"""Which files are a model's weights, and which of their tensors embedding and head: as transformers has it."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor

from mpgpt.cluster.bootstrap import negotiate
from mpgpt.cluster.ring import ANOTHER_HEAD, Ring
from mpgpt.cluster.ring_config import RingOptions
from mpgpt.errors import ModelError, PullError
from mpgpt.model.folder import INDEX, MARKER, WEIGHTS, seal
from mpgpt.model.footprint import shape_of
from mpgpt.model.pull import pull
from mpgpt.model.weights import Checkpoint, model_config
from mpgpt.transport.link import SoloWorld
from tests.model.test_slice import logits, random_ids, row, slices
from tests.support.models import VOCAB, build, save_random

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = random_ids(12)


def ours(folder: Path) -> Tensor:
    """Of two ranks: the embedding is on the first, the head on the last."""
    return logits(slices(folder, cuts=(2,)), [row(0, 0, IDS)])


@torch.inference_mode()
def theirs(folder: Path) -> Tensor:
    auto: Any = transformers.AutoModelForCausalLM
    said: Tensor = auto.from_pretrained(folder, dtype=torch.float32)(torch.tensor([IDS])).logits[0]
    return said


def same(folder: Path) -> None:
    expected = theirs(folder)
    assert (ours(folder) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.fixture
def folder(models: dict[str, Path], tmp_path: Path) -> Path:
    """A tied Llama that a test may change."""
    return Path(shutil.copytree(models["llama"], tmp_path / "model"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The same in several files."""
    return save_random("llama", tmp_path / "shards", max_shard_size="100KB")


def index(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the index's weight_map in place."""
    raw = json.loads((folder / INDEX).read_text())
    change(raw["weight_map"])
    (folder / INDEX).write_text(json.dumps(raw))


def scaled(source: Path, target: Path, by: float = 2.0) -> None:
    """The weights of another model of the same shape."""
    save_file({name: tensor * by for name, tensor in load_file(source).items()}, target, {"format": "pt"})


# Files


@pytest.mark.parametrize("name", ["another.safetensors", "consolidated.safetensors", "model-00001-of-00001.safetensors",
                                  "adapter_model.safetensors", "zzz.safetensors"])  # fmt: skip
def test_a_file_that_neither_names_is_not_read(folder: Path, shards: Path, name: str) -> None:
    truth = ours(folder)
    for place in (folder, shards):
        scaled(folder / WEIGHTS, place / name)
        assert torch.equal(ours(place), truth)
        same(place)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ModelError, match=rf"no safetensors \(there is {name}, which is not loaded here\)"):
        Checkpoint(folder)


def test_the_whole_file_counts_before_an_index(folder: Path, shards: Path) -> None:
    scaled(folder / WEIGHTS, shards / WEIGHTS)
    scaled(folder / WEIGHTS, folder / WEIGHTS)
    assert torch.equal(ours(shards), ours(folder))
    same(shards)
    (shards / INDEX).write_text("{")
    for shard in shards.glob("model-*.safetensors"):
        shard.write_bytes(b"?")
    same(shards)


def test_a_tensor_in_two_shards(shards: Path) -> None:
    """transformers reads the shards in order, whatever the index says of a single tensor."""
    first, *_, last = sorted(shards.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    weights = load_file(last) | {name: load_file(first)[name] * 3}
    save_file(weights, last, {"format": "pt"})
    before = ours(shards)
    same(shards)
    assert Checkpoint(shards).shapes().keys() >= weights.keys()
    weights[name] /= 3
    save_file(weights, last, {"format": "pt"})
    assert not torch.allclose(ours(shards), before, atol=1e-3)


def test_shards_in_a_folder_below(shards: Path, tmp_path: Path) -> None:
    (shards / "parts").mkdir()
    for shard in sorted(shards.glob("*.safetensors")):
        shard.rename(shards / "parts" / shard.name)
    index(shards, lambda names: names.update({name: f"parts/{file}" for name, file in names.items()}))
    same(shards)
    pulled = pull(str(shards), home=tmp_path / "home", report=lambda line: None)
    assert torch.equal(ours(pulled), ours(shards))
    assert all(name.startswith("parts/") for name in json.loads((pulled / MARKER).read_text())["tensors"])


def test_a_checkpoint_through_links(shards: Path, tmp_path: Path) -> None:
    """As the hub's own cache has it: every file is a link to one somewhere else."""
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in shards.iterdir():
        (linked / path.name).symlink_to(path)
    assert torch.equal(ours(linked), ours(shards))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "is damaged: it has no weight_map"),
        ('{"weight_map": null}', "is damaged: it has no weight_map"),
        ('{"weight_map": []}', "is damaged: it has no weight_map"),
        ('{"weight_map": "model.safetensors"}', "is damaged: it has no weight_map"),
        ('{"weight_map": {"a": null}}', "is damaged: it has no weight_map"),
        ('{"weight_map": {"a": ["b.safetensors"]}}', "is damaged: it has no weight_map"),
        ('{"weight_map": {}}', "its weight_map is empty"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "lacks gone.safetensors, named in its"),
        ('{"weight_map": {"a": "../x.safetensors"}}', r"names '../x.safetensors', which is not a file of this"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', r"names '/etc/x.safetensors', which is not a file of this"),
        ('{"weight_map": {"a": "b/../../x.safetensors"}}', "which is not a file of this"),
        ('{"weight_map": {"a": "b\\\\x.safetensors"}}', "which is not a file of this"),
        ('{"weight_map": {"a": ""}}', "which is no safetensors file"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "names 'pytorch_model.bin', which is no safetensors file"),
    ],
)
def test_a_malformed_index_is_named(shards: Path, tmp_path: Path, text: str, said: str) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (shards / INDEX).write_text(text)
    with pytest.raises(ModelError, match=said):
        Checkpoint(shards)
    with pytest.raises(PullError, match=said):
        pull(str(shards), home=tmp_path / "home", report=lambda line: None)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.fp16.safetensors"])
def test_other_weights_are_refused_by_name(folder: Path, name: str) -> None:
    (folder / WEIGHTS).rename(folder / name)
    with pytest.raises(ModelError, match=rf"there is {name}, which is not loaded here"):
        Checkpoint(folder)


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no safetensors"):
        Checkpoint(tmp_path / "none")


def test_a_file_without_tensors(folder: Path) -> None:
    save_file({}, folder / WEIGHTS)
    with pytest.raises(ModelError, match=r"model lacks the tensor"):
        slices(folder)


def test_another_name_for_the_weights_is_not_passed_over(folder: Path) -> None:
    scaled(folder / WEIGHTS, folder / "mine.safetensors")
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"transformers_weights": "mine.safetensors"}))
    with pytest.raises(ModelError, match=r"transformers_weights is 'mine.safetensors'"):
        model_config(folder)


# Checksums of a folder that was pulled


def test_only_what_is_used_is_pulled(folder: Path, shards: Path, tmp_path: Path) -> None:
    for source, names in ((folder, {WEIGHTS}), (shards, {path.name for path in shards.glob("*.safetensors")})):
        save_file({"x": torch.zeros(3)}, source / "stray.safetensors")
        pulled = pull(str(source), home=tmp_path / "home", report=lambda line: None)
        assert {path.name for path in pulled.glob("*.safetensors")} == names
        assert set(json.loads((pulled / MARKER).read_text())["tensors"]) == names
        same(pulled)


def test_checksums_are_of_the_file_that_is_read(folder: Path, shards: Path) -> None:
    """Shards were pulled, then somebody put a whole file beside them: it is another model, and not damaged."""
    seal(shards, "owner/name")
    scaled(folder / WEIGHTS, shards / WEIGHTS)
    same(shards)
    (shards / WEIGHTS).unlink()
    same(shards)
    damaged = sorted(shards.glob("*.safetensors"))[-1]
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(ModelError, match="checksum"):
        ours(shards)


def test_a_tensor_in_two_shards_has_the_checksum_of_the_last(shards: Path) -> None:
    first, *_, last = sorted(shards.glob("*.safetensors"))
    name = next(iter(load_file(first)))
    save_file(load_file(last) | {name: load_file(first)[name] * 3}, last, {"format": "pt"})
    seal(shards, "owner/name")
    same(shards)


@pytest.mark.parametrize("tensors", [None, [], {"model.safetensors": None}, {"model.safetensors": []}])
def test_a_marker_that_cannot_be_understood_is_none(folder: Path, tensors: Any) -> None:
    (folder / MARKER).write_text(json.dumps({"format": 1, "source": "x", "tensors": tensors}))
    same(folder)


# Embedding and head


def tie(folder: Path, tied: bool) -> None:
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"tie_word_embeddings": tied}))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def notes(folder: Path) -> list[str]:
    """What a ring of one says while it forms."""
    lines: list[str] = []
    world = SoloWorld()
    try:
        settings = negotiate(world, folder, RingOptions(dtype="float32", slots=1, context=32, threads=1))
        Ring(world, settings, folder, None, lines.append)
    finally:
        world.close()
    return lines


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_head_of_its_own_is_used_although_config_says_tied(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    folder = Path(shutil.copytree(models[name], tmp_path / "m"))
    before = ours(folder)
    rewrite(folder, lambda weights: weights.update({HEAD: torch.randn(VOCAB, 64)}))
    assert not torch.allclose(ours(folder), before, atol=0.1)
    same(folder)
    assert notes(folder) == [f"{folder}: {ANOTHER_HEAD}"]


def test_transformers_says_so_too(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody else's truth, as of the version that is installed."""
    rewrite(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING] * 2}))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger="transformers"):  # whatever another test has set
            theirs(folder)
    finally:
        logger.removeHandler(caplog.handler)
    assert "will NOT tie them" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_the_embedding_again_is_no_news(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING].to(torch.bfloat16).to(dtype),
                                                    EMBEDDING: weights[EMBEDDING].to(torch.bfloat16)}))  # fmt: skip
    same(folder)
    assert notes(folder) == []


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_head_alone_is_the_embedding_too(tmp_path: Path, models: dict[str, Path], name: str) -> None:
    """safetensors' own save_model keeps one of two names for a tensor, and not always the embedding's."""
    folder = Path(shutil.copytree(models[name], tmp_path / "m"))
    before = ours(folder)
    save_model(build(name), str(folder / WEIGHTS), {"format": "pt"})
    assert HEAD in load_file(folder / WEIGHTS) and len(load_file(folder / WEIGHTS)) < len(build(name).state_dict())
    assert torch.equal(ours(folder), before)
    same(folder)
    assert notes(folder) == []


def test_both_names_are_missing(folder: Path) -> None:
    rewrite(folder, lambda weights: weights.pop(EMBEDDING))
    with pytest.raises(ModelError, match=r"lacks the tensor embed_tokens.weight"):
        ours(folder)


@pytest.mark.parametrize("lost", [HEAD, EMBEDDING])
def test_what_is_not_tied_must_be_there(models: dict[str, Path], tmp_path: Path, lost: str) -> None:
    """transformers makes up random numbers for it, and warns: of no use to anybody who wants text."""
    folder = Path(shutil.copytree(models["qwen2"], tmp_path / "m"))
    rewrite(folder, lambda weights: weights.pop(lost))
    with pytest.raises(ModelError, match=f"lacks the tensor {lost.removeprefix('model.')}"):
        ours(folder)
    tie(folder, True)
    same(folder)


def test_a_head_is_counted_whether_tied_or_not(folder: Path, models: dict[str, Path]) -> None:
    """Placement counts a head for the last rank in any case, and no embedding: that stays in its file."""
    rewrite(folder, lambda weights: weights.update({HEAD: weights[EMBEDDING] * 2}))
    for place in (folder, models["llama"]):
        shape = shape_of(model_config(place), "float32", 1, 32)
        parts = slices(place, cuts=(2, 4))
        assert [part.nbytes for part in parts] == [
            2 * shape.layer_bytes, 2 * shape.layer_bytes, shape.layer_bytes + shape.head_bytes
        ]  # fmt: skip
        assert shape.head_bytes == 4 * 64 * VOCAB
