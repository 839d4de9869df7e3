"""The type of a family: its config.json, its tensors' names, its layers, its files for llama.cpp.

Knows: every question that another module has about a family, so that no other module knows its name.
Must not know: any family (``families/`` has one file for each, ``known_families.py`` the table of them).

A family's file imports no torch at run time: that takes seconds, and sizes are read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mpgpt.model.architecture import ModelConfig
from mpgpt.model.gguf_metadata import GgufMetadata
from mpgpt.model.program import Buffer, Norm, Product, Program


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufArchitecture:
    """One of llama.cpp's architectures."""

    name: str
    """As in a file's ``general.architecture``."""
    interleaved_rotary: bool = False
    """Whether an element of a head is rotated with the next one, and not with the one half a head further."""
    rotary_factors: bool = False
    """Whether a file may hold a factor for each rotary frequency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFormat:
    """A family's files in llama.cpp's format."""

    activations: tuple[str, ...]
    """Names in config.json of the only activation that llama.cpp computes."""
    superfluous: tuple[str, ...]
    """Ends of the names of tensors that old checkpoints hold beside their weights."""
    input_first: tuple[str, ...] = ()
    """Ends of the names of weights that are stored [I, O]."""
    split: str | None = None
    """The pre-tokenizer of a file that names none; None where a file must name it."""
    describe: Callable[[Any, Mapping[str, Any], ModelConfig], None]
    """Write the family's own keys with a ``gguf.GGUFWriter``, of a config.json and what was read from it."""
    read: Callable[[GgufMetadata], dict[str, Any]]
    """A file's metadata as a config.json; raises ``ModelError`` for an option that is not supported."""
    tensors: Callable[[GgufMetadata, Mapping[str, Any]], set[str]]
    """The names of the tensors that a file must hold, of its metadata and the config.json read from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models: how a config.json is read, what tensors are called, what a layer computes."""

    name: str
    architectures: Mapping[str, GgufArchitecture]
    """By the ``model_type`` in config.json; models of each are of this family."""
    read_config: Callable[[Mapping[str, Any], str, bool], ModelConfig]
    """Of a config.json, its ``model_type``, and whether to compute rotary frequencies; raises ``ModelError``,
    ``KeyError``, ``TypeError``, ``ValueError`` or ``ZeroDivisionError`` when it is not supported or garbled."""
    activation: str
    """The activation of most of its models, for sizes without a config.json."""
    gated: bool
    """Whether its MLPs have a gate."""
    embedding: str
    """The name of the token embedding."""
    positions: str | None
    """The name of the embedding of learned positions; None where positions are rotary."""
    heads_reducible: bool
    """Whether a layer may have fewer heads than fill the width of the hidden states."""
    final_norm: Norm
    """What follows the last layer, before the head."""
    program: Callable[[ModelConfig, int], Program]
    """A layer, by its number."""
    shapes: Callable[[ModelConfig], dict[str, tuple[int, ...]]]
    """Of a layer's tensors, by their names in the layer without ``.weight``: [O, I] of a product, and of each norm
    that is not as wide as the hidden states."""
    gguf: GgufFormat

    def programs(self, config: ModelConfig, layers: range) -> list[Program]:
        """Of these layers, in order; the model's last one is for outputs only."""
        programs = [self.program(config, layer) for layer in layers]
        if layers.stop == config.layers:
            programs[-1] = programs[-1].outputs_only()
        return programs

    def closing(self, config: ModelConfig, head: str) -> Program:
        """What follows the last layer: its norm, and the product with the weight ``head`` that gives the logits."""
        product = Product(
            source=Buffer.NORMED, target=Buffer.LOGITS, names=(head.removesuffix(".weight"),), inputs=config.embed,
            outputs=config.vocab, biased=False, head=True,
        )  # fmt: skip
        return Program(operations=(self.final_norm, product))
