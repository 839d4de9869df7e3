"""The families of models that are supported, and the reading of a config.json by its family.

Knows: every family, by ``model_type``.
Must not know: what differs from family to family, files, ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mpgpt.errors import ModelError
from mpgpt.model.architecture import ACTIVATIONS, ModelConfig
from mpgpt.model.families.gpt2 import GPT2
from mpgpt.model.families.llama import LLAMA
from mpgpt.model.family import Family

_ALL = (GPT2, LLAMA)
FAMILIES: Mapping[str, Family] = {kind: family for family in _ALL for kind in family.architectures}
"""By ``model_type``."""


NAMED: Mapping[str, Family] = {family.name: family for family in _ALL}


def family_of(config: ModelConfig) -> Family:
    return NAMED[config.family]


def read_config(raw: Mapping[str, Any], *, rotary: bool = True) -> ModelConfig:
    """A Hugging Face ``config.json`` as a ModelConfig. Without its ``rotary`` frequencies it takes no torch, whose
    import takes seconds: enough for whoever wants sizes only.

    Raises ``ModelError`` when the architecture or one of its options is not supported, or a size is missing.
    """
    kind: Any = raw.get("model_type")
    if kind not in FAMILIES:
        raise ModelError(f"the architecture {kind!r} is not supported; supported are {', '.join(FAMILIES)}")
    if raw.get("quantization_config"):
        raise ModelError("the checkpoint is quantised, which is not supported: take the model's own float weights")
    if raw.get("transformers_weights"):
        raise ModelError(
            f"config.json has its weights in a file of another name (transformers_weights is "
            f"{raw['transformers_weights']!r}), which is not supported: call it model.safetensors and take that key out"
        )
    try:
        config = FAMILIES[kind].read_config(raw, kind, rotary)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(f"config.json lacks or garbles something that a {kind} model needs: {error!r}") from error
    if config.activation not in ACTIVATIONS:
        raise ModelError(
            f"the activation {config.activation!r} is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    if config.heads % config.kv_heads or min(config.vocab, config.embed, config.layers, config.head_dim) < 1:
        raise ModelError("config.json describes a model that cannot be: its head counts or sizes do not fit together")
    return config
