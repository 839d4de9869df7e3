"""The bundle that is sent to an iPad: a Core ML package, its manifest, and its self-test.

Knows: the files of a bundle, its manifest, the hashes that name a bundle and the layers in it.
Must not know: how a package is made or run, sockets.

On disk they lie side by side, ``NAME.mlpackage``, ``NAME.manifest.json``, ``NAME.selftest.safetensors``; where a node
keeps them, in a folder of their own as ``model.mlpackage``, ``manifest.json`` and ``selftest.safetensors``, which are
also the names on the wire. A bundle's bytes are its files' bytes one after another, in the order of their names.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, Field, ValidationError, model_validator

from mpgpt.core import Span
from mpgpt.errors import ModelError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.weights import Checkpoint
from mpgpt.yamlfile import problems
from mpgpt_ios.protocol.frames import MAX_REQUEST, MAX_ROWS, MAX_TOKENS
from mpgpt_ios.protocol.payloads import MAX_EMBED, PAIR

SUFFIX = ".mlpackage"
MANIFEST, PACKAGE, SELFTEST = "manifest.json", "model.mlpackage", "selftest.safetensors"
MAX_MANIFEST = 1 << 20
MAX_MASK = 1 << 24
"""Elements of a mask: a row for each token or slot, as long as the context."""
MAX_CHUNK = (MAX_REQUEST - PAIR.size) // 4
"""Elements of a chunk's hidden states: as many as a request has room for in float32."""
LAYER = re.compile(r"(?:.*\.)?(?:h|layers)\.([0-9]+)\.(.+)")

Count = Annotated[int, Field(strict=True, ge=1, le=1 << 20)]
Name = Annotated[str, Field(strict=True, max_length=200)]


class Strict(BaseModel):
    model_config = {"frozen": True, "extra": "forbid"}


class Rotary(Strict):
    """Where positions turn the heads: frequencies, head_dim / 2 of them, and what the tables are multiplied by."""

    inv_freq: tuple[float, ...]
    gain: float


class MadeBy(Strict):
    mpgpt: Name
    coremltools: Name
    torch: Name


class Manifest(Strict):
    """The description of a package. Sizes in elements."""

    format: Literal[1]
    model: Name
    model_hash: Annotated[str, Field(strict=True, pattern="^[0-9a-f]{64}$")]
    """``slice_hash`` of the layers' weights."""
    family: Name
    model_layers: Count
    """Of the whole model."""
    layers: tuple[Annotated[int, Field(strict=True, ge=0)], Annotated[int, Field(strict=True, ge=1)]]
    """[start, stop)"""
    embed: Annotated[int, Field(strict=True, ge=1, le=MAX_EMBED)]
    heads: Count
    kv_heads: Count
    head_dim: Count
    slots: Annotated[int, Field(strict=True, ge=1, le=MAX_ROWS)]
    context: Count
    chunk: Annotated[int, Field(strict=True, ge=1, le=MAX_TOKENS)]
    weights: Literal["float16", "int8"]
    rotary: Rotary | None
    tolerance: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    """How far the self-test's outputs may be from float32, at most; of a token's largest element where that is above
    1."""
    made_by: MadeBy

    @model_validator(mode="after")
    def _fits_together(self) -> Manifest:
        start, stop = self.layers
        if not start < stop <= self.model_layers:
            raise ValueError(f"has layers [{start}, {stop}) of a model of {self.model_layers}")
        if self.chunk > self.context:
            raise ValueError(f"has chunks of {self.chunk} in a context of {self.context}")
        for name, count in (("chunk", self.chunk), ("slots", self.slots)):
            if count * self.context > MAX_MASK:
                raise ValueError(f"has {name} times context {count * self.context}; at most {MAX_MASK} is taken")
        if self.chunk * self.embed > MAX_CHUNK:
            raise ValueError(f"has chunk times embed {self.chunk * self.embed}; at most {MAX_CHUNK} is taken")
        if self.rotary and 2 * len(self.rotary.inv_freq) != self.head_dim:
            raise ValueError(f"has {len(self.rotary.inv_freq)} frequencies for heads of {self.head_dim}")
        return self

    @property
    def span(self) -> Span:
        return Span(start=self.layers[0], stop=self.layers[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One file of a bundle."""

    name: str
    """On the wire, with forward slashes."""
    length: int
    sha256: bytes
    path: Path


class Bundle:
    """The three parts of a bundle, as they lie on disk."""

    def __init__(self, package: Path, manifest: Path, selftest: Path) -> None:
        """Raises ``ModelError`` when one of them is absent or is not what it should be."""
        self.package, self.selftest = package, selftest
        self.manifest = read_manifest(manifest)
        self.entries = tuple(sorted(_entries(package, manifest, selftest), key=lambda entry: entry.name.encode()))
        self.hash = bundle_hash([(entry.name, entry.length, entry.sha256) for entry in self.entries])
        self.length = sum(entry.length for entry in self.entries)

    @classmethod
    def at(cls, package: Path) -> Bundle:
        """``NAME.mlpackage`` with its two companions, or a folder in which a node keeps all three."""
        package = package.expanduser()
        if package.name.endswith(SUFFIX):
            stem = package.name.removesuffix(SUFFIX)
            return cls(package, package.with_name(f"{stem}.{MANIFEST}"), package.with_name(f"{stem}.{SELFTEST}"))
        return cls(package / PACKAGE, package / MANIFEST, package / SELFTEST)

    def read(self, offset: int, count: int) -> bytes:
        """``count`` of the bundle's bytes from ``offset`` on; fewer at its end."""
        parts, at = [], 0
        for entry in self.entries:
            first, last = max(offset, at), min(offset + count, at + entry.length)
            if first < last:
                with entry.path.open("rb") as file:
                    file.seek(first - at)
                    parts.append(file.read(last - first))
                if len(parts[-1]) != last - first:
                    raise ModelError(f"{entry.path} was cut while it was sent")
            at += entry.length
        return b"".join(parts)


def read_manifest(path: Path) -> Manifest:
    """Raises ``ModelError`` that says all that is wrong with it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_MANIFEST + 1)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; `mpgpt convert coreml` writes it") from None
    if len(data) > MAX_MANIFEST:
        raise ModelError(f"{path} is no manifest: it is larger than {MAX_MANIFEST >> 20} MiB")
    try:
        return Manifest.model_validate_json(data)
    except ValidationError as error:
        raise ModelError("\n".join(f"{path}: {sentence}" for sentence in problems(error, Manifest))) from None


def bundle_hash(files: list[tuple[str, int, bytes]]) -> bytes:
    """Of (name, length, SHA-256) of every file, in the order of the names: the name of a bundle on the wire."""
    total = hashlib.sha256()
    for name, length, digest in files:
        total.update(name.encode() + b"\0" + length.to_bytes(8, "little") + digest)
    return total.digest()


def slice_hash(config: ModelConfig, checkpoint: Checkpoint, span: Span) -> str:
    """The name of these layers of this checkpoint: SHA-256, in hex, of the numbers of the architecture that matter to
    them, and of every tensor's name, dtype, shape and stored bytes, layer by layer in the order of the names."""
    numbers = {
        "family": config.family, "embed": config.embed, "heads": config.heads, "kv_heads": config.kv_heads,
        "head_dim": config.head_dim, "inner": config.inner, "eps": config.eps, "activation": config.activation,
        "scales": config.scales[span.start : span.stop], "windows": config.windows[span.start : span.stop],
        "inv_freq": config.inv_freq, "rope_gain": config.rope_gain,
    }  # fmt: skip
    total = hashlib.sha256(json.dumps(numbers, sort_keys=True).encode() + b"\n")
    tensors: dict[int, list[tuple[str, str]]] = {}
    for full in checkpoint.shapes():
        if (match := LAYER.fullmatch(full)) and span.start <= int(match[1]) < span.stop:
            tensors.setdefault(int(match[1]), []).append((match[2], full))
    for layer in range(span.start, span.stop):
        if layer not in tensors:
            raise ModelError(f"the checkpoint has no layer {layer}")
        for name, full in sorted(tensors[layer]):
            for at, piece in enumerate(checkpoint.blocks(full)):
                if not at:
                    shape = "x".join(map(str, checkpoint.shapes()[full]))
                    dtype = str(piece.dtype).removeprefix("torch.")
                    total.update(f"{layer}:{name}\0{dtype}{shape}\0".encode())
                total.update(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _entries(package: Path, manifest: Path, selftest: Path) -> Iterator[Entry]:
    if not package.is_dir():
        raise ModelError(f"{package} is no Core ML package; `mpgpt convert coreml` makes one")
    for path in sorted(package.rglob("*")):
        if path.is_file():
            yield _entry(f"{PACKAGE}/{path.relative_to(package).as_posix()}", path)
    yield _entry(MANIFEST, manifest)
    yield _entry(SELFTEST, selftest)


def _entry(name: str, path: Path) -> Entry:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").digest()
        return Entry(name=name, length=path.stat().st_size, sha256=digest, path=path)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; `mpgpt convert coreml` writes it") from None
