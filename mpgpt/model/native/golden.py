"""Small models whose logits are the same bytes everywhere: their weights are made of whole numbers, by name.

Knows: the models, their prompts, and how the bytes of their logits are summed up.
Must not know: the golden digests themselves (``golden.json``), ranks, what is done when they differ.

Legend: T tokens, V vocabulary.
"""

from __future__ import annotations

import ctypes
import hashlib
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpgpt.core import Row
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.known_families import family_of, read_config
from mpgpt.model.linear import NATIVE, Kernels
from mpgpt.model.loader import Loader
from mpgpt.model.native.player import NativePlayer

_LLAMA: Mapping[str, Any] = {
    "vocab_size": 200, "hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 320, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip
MODELS: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 200, "n_positions": 512, "n_embd": 192, "n_layer": 3, "n_head": 6,
        "activation_function": "gelu_new",
    },
    "llama": {**_LLAMA, "model_type": "llama", "rope_theta": 10000.0},
    "mistral": {**_LLAMA, "model_type": "mistral", "rope_theta": 10000.0, "sliding_window": 37},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "rope_theta": 1e6, "head_dim": 40},
}  # fmt: skip
"""As their config.json would be."""
PROMPT = 150
DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")


class WholeWeights:
    """A ``Source`` of weights that are whole numbers times a power of two: the same on every machine."""

    def __init__(self, config: ModelConfig) -> None:
        shapes = family_of(config).shapes(config)
        self._config = config
        self._shapes: dict[str, tuple[int, ...]] = shapes
        self._transposed = family_of(config).gguf.input_first

    def blocks(self, name: str, *, transpose: bool = False) -> Iterator[Tensor]:
        part = ".".join(name.removesuffix(".weight").split(".")[2:])
        yield self._drawn(name, self._shapes.get(part, (self._config.vocab, self._config.embed)), 2.0**-28)

    def holds(self, name: str) -> bool:
        return True

    def vector(self, name: str) -> Tensor:
        c = self._config
        if name == family_of(c).positions:
            return self._drawn(name, (c.positions, c.embed), 2.0**-26)
        part, bias = ".".join(name.rpartition(".")[0].split(".")[2:]), name.endswith(".bias")
        shape = self._shapes.get(part, (c.embed,))
        return self._drawn(name, shape[:1], 2.0**-27) + (0.0 if bias else 1.0)

    def mapped(self, name: str) -> Tensor:
        return self._drawn(name, (self._config.vocab, self._config.embed), 2.0**-24)

    def _drawn(self, name: str, shape: tuple[int, ...], scale: float) -> Tensor:
        """Whole numbers below 2^24, of either sign, times ``scale``: exact in float32."""
        generator = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
        return torch.from_numpy((generator.integers(-(2**24), 2**24, shape) * scale).astype(np.float32))


class GoldenModel:
    """One of ``MODELS``, in a dtype, loaded by a library of compiled kernels; its embedding is computed here."""

    def __init__(
        self, name: str, dtype: str, *, calls: ctypes.CDLL | None = None, threads: int = 1, kv_dtype: str = "auto",
        cuts: Sequence[int] = (),
    ) -> None:  # fmt: skip
        """``calls`` is the library, where it is not this processor's own. ``cuts`` are layers at which another
        player begins, as another rank's would."""
        self.config = config = read_config(MODELS[name])
        source, family = WholeWeights(config), family_of(config)
        loader = Loader(
            config=config, source=source, kernels=Kernels(dtype=dtype, chosen={"": NATIVE}, kv_dtype=kv_dtype)
        )  # fmt: skip
        closing = family.closing(config, "head.weight")
        bounds = pairwise([0, *cuts, config.layers])
        self.players = [
            NativePlayer(
                family.programs(config, range(start, stop)), closing if stop == config.layers else None, loader,
                slots=70, context=256, threads=threads, calls=calls,
            )
            for start, stop in bounds
        ]  # fmt: skip
        self._embedding = source.mapped("embedding")
        self._positions = source.vector(family.positions) if family.positions else None

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Of the rows' outputs, [outputs, V]."""
        x_TE = self.embed(rows)
        for player in self.players:
            x_TE = player.play(rows, x_TE, lambda: None)
        return x_TE

    def embed(self, rows: Sequence[Row]) -> Tensor:
        """The embeddings of the rows' tokens and positions, [T, E]."""
        x_TE = self._embedding[torch.tensor([i for row in rows for i in row.ids])]
        if self._positions is not None:
            x_TE = x_TE + self._positions[torch.tensor([p for row in rows for p in range(row.start, row.stop)])]
        return x_TE

    def prompt(self, seed: int = 0) -> list[int]:
        """``PROMPT`` token ids."""
        drawn: list[int] = (np.random.Generator(np.random.PCG64(seed)).integers(0, self.config.vocab, PROMPT)).tolist()
        return drawn

    def whole(self, slot: int = 0) -> Tensor:
        """The logits of every position of the prompt, in one step."""
        ids = self.prompt()
        return self.logits([Row(slot=slot, start=0, ids=tuple(ids), outputs=len(ids))])


def digest(logits_TV: Tensor) -> str:
    """Of the bytes of logits, little endian."""
    return hashlib.sha256(logits_TV.contiguous().numpy().astype("<f4").tobytes()).hexdigest()[:16]
