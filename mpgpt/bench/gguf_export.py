"""A model folder as a GGUF file, so that llama.cpp runs the same weights.

Knows: how llama.cpp lays out and types tensors, and which of a model's options it has no key for.
Must not know: what differs from family to family (``families/`` has it), who runs the file, ranks, tokenizers (the file
has none: only speed is measured with it).

A file is finished or it is not there: it is written beside its place and renamed. Its name says of which weights it
is made, so that it is used again as long as they are what they were. One tensor at a time is in memory.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType, quants
from numpy.typing import NDArray

from mpgpt.display import silent
from mpgpt.errors import ModelError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.family import GgufArchitecture
from mpgpt.model.folder import read_json, weight_files
from mpgpt.model.known_families import FAMILIES, family_of, read_config
from mpgpt.model.rope import rope_parameters
from mpgpt.model.slice import HEAD, has_another_head, tables
from mpgpt.model.weights import Checkpoint

TYPES = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "int8": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "int4": (GGMLQuantizationType.Q4_0, LlamaFileType.MOSTLY_Q4_0),
}


def gguf_file(folder: Path, dtype: str, home: Path, report: Callable[[str], None] = silent) -> Path:
    """The GGUF file of the model in ``folder``, made under ``home`` if it is not there yet.

    ``dtype`` is one of ours: int8 is Q8_0 and int4 is Q4_0, for every matrix that they fit, the head's too; vectors
    and learned positions stay in float32, as llama.cpp has them. A sliding window is not said, so it is as if the
    context were not longer. ``report`` gets a line when there is work to do. Raises ``ModelError`` for a model that
    llama.cpp would not run as we do, and for a disk that does not play along.
    """
    path = home / f"{folder.resolve().name}-{_digest(folder):08x}-{dtype}.gguf"
    if path.is_file():
        return path
    raw = read_json(folder / "config.json")
    config = read_config(raw)
    _check(raw, config, folder)
    report(f"writing {path}")
    try:
        home.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            _write(Checkpoint(folder), raw, config, dtype, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ModelError(f"{path} cannot be written: {error.strerror or error}") from error
    return path


def _digest(folder: Path) -> int:
    """Of where the weights are, and of their files' sizes and times."""
    files = sorted([folder / "config.json", *weight_files(folder)])
    stats = [(str(file.resolve()), *(file.stat().st_size, file.stat().st_mtime_ns)) for file in files if file.exists()]
    return zlib.crc32(repr(stats).encode())


def _check(raw: dict[str, Any], config: ModelConfig, folder: Path) -> None:
    if config.activation not in family_of(config).gguf.activations:
        what = f"the activation {config.activation}"
    elif len(set(config.scales)) > 1 or config.scales[0] != config.head_dim**-0.5:
        what = "attention scores that are scaled in another way than by the heads' size"
    elif config.rope_gain != 1.0:
        what = "YaRN's rotary positions"
    elif not _architecture(raw).rotary_factors and _factors(raw, config) is not None:
        what = f"scaled rotary positions for {raw['model_type']}"
    else:
        return
    raise ModelError(f"{folder}: llama.cpp cannot be told of {what}, so it would not run the same model")


def _architecture(raw: dict[str, Any]) -> GgufArchitecture:
    kind = raw["model_type"]
    return FAMILIES[kind].architectures[kind]


def _id(raw: dict[str, Any]) -> Any:
    """The architecture's constant in ``gguf``."""
    return getattr(gguf.MODEL_ARCH, _architecture(raw).name.upper())


def _theta(raw: dict[str, Any]) -> float:
    return float(rope_parameters(raw)["rope_theta"])


def _factors(raw: dict[str, Any], config: ModelConfig) -> NDArray[np.float32] | None:
    """llama.cpp's divisor of each rotary frequency, [head_dim / 2]; None where all are unscaled."""
    plain = _theta(raw) ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
    factors = (plain / np.array(config.inv_freq)).astype(np.float32) if config.inv_freq else np.ones(1, np.float32)
    return None if np.allclose(factors, 1.0, rtol=1e-5) else factors


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tensor:
    """Where a tensor of the file comes from."""

    source: str
    shape: tuple[int, ...]
    """As llama.cpp has it, [O, I] for a product."""
    type: GGMLQuantizationType
    transpose: bool
    heads: int
    """Heads whose rotary pairs are a half apart here and adjacent in llama.cpp's file; 0 where none are."""

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        return tuple(quants.quant_shape_to_byte_shape(self.shape, self.type))

    def read(self, checkpoint: Checkpoint) -> NDArray[Any]:
        tensor = checkpoint.mapped(self.source).to(torch.float32)
        array = (tensor.t() if self.transpose else tensor).numpy()
        if self.heads:
            array = array.reshape(self.heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return np.ascontiguousarray(quants.quantize(np.ascontiguousarray(array), self.type))


def _tensors(checkpoint: Checkpoint, raw: dict[str, Any], config: ModelConfig, dtype: str) -> dict[str, _Tensor]:
    """By their names in the file, in its order."""
    names = gguf.get_tensor_name_map(_id(raw), config.layers)
    layout, interleaved = family_of(config).gguf, _architecture(raw).interleaved_rotary
    tensors = {}
    one = tables(config, checkpoint)[0] == HEAD
    """Whether what the checkpoint calls its head is the embedding too, which is how llama.cpp has them both."""
    superfluous = config.tied and not one and not has_another_head(config, checkpoint)
    for source, stored in checkpoint.shapes().items():
        if source.endswith(layout.superfluous) or (source == HEAD and superfluous):
            continue
        known = names.get_name(source, try_suffixes=(".weight", ".bias"))
        name = "token_embd.weight" if source == HEAD and one else known
        if name is None:
            raise ModelError(f"llama.cpp has no place for the tensor {source}, so it would not run the same model")
        transpose = source.endswith(layout.input_first)
        shape = stored[::-1] if transpose else stored
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(name.split(".")[-2], 0) if interleaved else 0
        tensors[name] = _Tensor(
            source=source, shape=shape, type=_type(name, shape, dtype), transpose=transpose, heads=heads
        )
    return tensors


def _type(name: str, shape: tuple[int, ...], dtype: str) -> GGMLQuantizationType:
    if len(shape) < 2 or name.startswith("position_embd"):
        return GGMLQuantizationType.F32
    usual: GGMLQuantizationType = TYPES[dtype][0]
    return usual if shape[-1] % gguf.GGML_QUANT_SIZES[usual][0] == 0 else GGMLQuantizationType.F16


def _write(checkpoint: Checkpoint, raw: dict[str, Any], config: ModelConfig, dtype: str, path: Path) -> None:
    writer: Any = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_id(raw)])
    try:
        _describe(writer, raw, config)
        writer.add_file_type(TYPES[dtype][1])
        factors = _factors(raw, config)
        tensors = _tensors(checkpoint, raw, config, dtype)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        for name, tensor in tensors.items():
            nbytes = int(np.prod(tensor.bytes_shape))
            writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), nbytes, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in (factors,) if factors is not None else ():
            writer.write_tensor_data(array)
        for tensor in tensors.values():
            writer.write_tensor_data(tensor.read(checkpoint))
    finally:
        writer.close()


def _describe(writer: Any, raw: dict[str, Any], config: ModelConfig) -> None:
    writer.add_name("mpgpt")
    writer.add_context_length(config.positions)
    writer.add_embedding_length(config.embed)
    writer.add_block_count(config.layers)
    writer.add_feed_forward_length(config.inner)
    writer.add_head_count(config.heads)
    writer.add_vocab_size(config.vocab)
    writer.add_tokenizer_model("no_vocab")
    family_of(config).gguf.describe(writer, raw, config)
