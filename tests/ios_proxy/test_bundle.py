"""A bundle's bytes and hashes, its manifest, and the hash of a model's layers."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpgpt.core import Span
from mpgpt.errors import ModelError
from mpgpt.model.weights import Checkpoint, model_config
from mpgpt_ios.bundle import Bundle, slice_hash
from tests.ios_proxy.rig import make_bundle
from tests.support.models import save_random


@pytest.fixture(scope="module")
def bundle(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(models["llama"], tmp_path_factory.mktemp("bundle"), padding=5000)


def test_its_bytes_are_its_files_one_after_another(bundle: Bundle) -> None:
    whole = b"".join(entry.path.read_bytes() for entry in bundle.entries)
    assert bundle.length == len(whole) and bundle.read(0, 1 << 20) == whole
    ends = [0]
    for entry in bundle.entries:
        ends.append(ends[-1] + entry.length)
    for start in {max(0, end + by) for end in ends for by in (-1, 0, 1)}:
        for count in (0, 1, 2, 4000, 1 << 20):
            assert bundle.read(start, count) == whole[start : start + count]


def test_its_hash_is_what_the_protocol_says(bundle: Bundle) -> None:
    total = hashlib.sha256()
    for name in sorted((entry.name for entry in bundle.entries), key=str.encode):
        (entry,) = [entry for entry in bundle.entries if entry.name == name]
        data = entry.path.read_bytes()
        total.update(name.encode() + b"\0" + len(data).to_bytes(8, "little") + hashlib.sha256(data).digest())
    assert bundle.hash == total.digest()
    assert [entry.name for entry in bundle.entries] == [
        "manifest.json", "model.mlpackage/Data/weight.bin", "model.mlpackage/Manifest.json", "selftest.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 2}, "format is 2"), ({"layers": [3, 3]}, "layers [3, 3) of a model of 5"),
        ({"layers": [2, 6]}, "of a model of 5"), ({"tolerance": 0}, "tolerance is 0"), ({"slots": "4"}, "slots is '4'"),
        ({"slotz": 4}, "slotz is not a known key; did you mean slots?"), ({"model_hash": "xyz"}, "model_hash is 'xyz'"),
        ({"chunk": None}, "chunk is empty"), ({"slots": 65}, "slots is 65"), ({"embed": 16385}, "embed is 16385"),
        ({"chunk": 513, "context": 1024}, "chunk is 513"), ({"chunk": 300}, "chunks of 300 in a context of 256"),
        ({"rotary": {"inv_freq": [1.0], "gain": 1.0}}, "1 frequencies for heads of"),
        ({"chunk": 512, "context": 32769}, "has chunk times context 16777728; at most 16777216 is taken"),
        ({"chunk": 256, "embed": 4096}, "has chunk times embed 1048576; at most 1048572 is taken"),
        ({"slots": 64, "context": 262145}, "has slots times context 16777280; at most 16777216 is taken"),
    ],
)  # fmt: skip
def test_a_manifest_that_is_none(bundle: Bundle, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    folder = shutil.copytree(bundle.package.parent, tmp_path / "copy")
    path = folder / "small.manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError) as caught:
        Bundle.at(folder / "small.mlpackage")
    assert words in str(caught.value) and str(path) in str(caught.value)


@pytest.mark.parametrize("gone", ["small.mlpackage", "small.manifest.json", "small.selftest.safetensors"])
def test_a_part_that_is_absent(bundle: Bundle, tmp_path: Path, gone: str) -> None:
    folder = shutil.copytree(bundle.package.parent, tmp_path / "copy")
    path = folder / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match="mpgpt convert coreml"):
        Bundle.at(folder / "small.mlpackage")


def test_layers_are_named_by_their_weights_and_nothing_else(models: dict[str, Path], tmp_path: Path) -> None:
    folder = models["gpt2"]
    config, checkpoint = model_config(folder), Checkpoint(folder)
    first = slice_hash(config, checkpoint, Span(start=1, stop=3))
    assert first == slice_hash(config, checkpoint, Span(start=1, stop=3)) and len(first) == 64
    assert first != slice_hash(config, checkpoint, Span(start=1, stop=4))
    assert first != slice_hash(config, checkpoint, Span(start=2, stop=4))
    from safetensors.torch import load_file, save_file

    for layer, same in ((1, False), (4, True)):
        copy = shutil.copytree(folder, tmp_path / str(layer))
        for path in copy.glob("*.safetensors"):
            tensors = load_file(path)
            for name in tensors:
                if f"h.{layer}.mlp.c_proj.bias" in name:
                    tensors[name][3] += 0.5
            save_file(tensors, path, metadata={"format": "pt"})
        assert (slice_hash(config, Checkpoint(copy), Span(start=1, stop=3)) == first) is same
    other = model_config(save_random("gpt2-odd", tmp_path / "odd"))
    assert slice_hash(other, checkpoint, Span(start=1, stop=3)) != first, "other numbers of the architecture"
