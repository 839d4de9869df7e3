"""A GGUF file's metadata as the configuration of the same model for transformers, or a sentence why it is not run.

Knows: llama.cpp's keys that all architectures share, tokenizers' above all, and what each means to transformers.
Must not know: families' own keys, where a file comes from, how its tensors are stored, layers of ours, ranks.

transformers' own reading passes over what it does not know: factors of rotary frequencies, kinds of scaling, biases.
The model would run, and write other text. So every key and every tensor is either taken over here, or of no effect,
or the file is refused by the name of what cannot be done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFReader, dequantize
from tokenizers import decoders, pre_tokenizers

from mpgpt.errors import ModelError
from mpgpt.model.family import Family
from mpgpt.model.gguf_metadata import ROPE_FACTORS, GgufMetadata
from mpgpt.model.known_families import FAMILIES

ARCHITECTURES: Mapping[str, Family] = {
    architecture.name: family for family in FAMILIES.values() for architecture in family.architectures.values()
}
"""Families by the architecture that a file names. Mistral's files call themselves llama."""
CONTROL = 3
"""The type of tokens that are no text."""

SPLITS: Mapping[str, frozenset[str]] = {
    "gpt-2": frozenset((
        "gpt-2", "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
        "modern-bert", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4",
    )),
    "digits": frozenset((
        "smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2",
    )),
    "whole words": frozenset((
        "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
        "tekken",
    )),
    "by transformers": frozenset((
        "dbrx", "smaug-bpe", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "qwen35", "gpt-4o", "llama4",
        "kanana2", "talkie",
    )),
}  # fmt: skip
"""Values of ``tokenizer.ggml.pre``, by how text is split: as GPT-2 splits; digits are split off first; as
transformers splits, but a whole piece that is a token stays one, and there is a token at the beginning; as transformers
splits. Compared with llama.cpp's own table."""

STOPS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
ENDS_OF_TURN = frozenset(("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<end_of_utterance>"))
"""Control tokens that end an answer whatever the metadata says: many files name the end of a document only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """The description of a model in its file."""

    config: dict[str, Any]
    """As in ``config.json``."""
    stop_ids: tuple[int, ...]
    """Every token that ends a text; the first is the one that the file calls so."""
    split: str
    """A key of ``SPLITS``; empty for SentencePiece."""
    space_first: bool
    """Whether SentencePiece puts a space before a text."""
    begins: bool | None
    """Whether a text begins with a token of its own; None where the file leaves it to the kind of tokenizer."""


def read_gguf(path: Path) -> GgufModel:
    """Raises ``ModelError`` naming what of the file cannot be done here."""
    reader = GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    factors = [dequantize(t.data, t.tensor_type) for t in reader.tensors if t.name == ROPE_FACTORS]
    kind = str(fields.get("general.architecture"))
    if kind not in ARCHITECTURES:
        raise ModelError(f"the architecture {kind!r} is not supported; supported are {', '.join(ARCHITECTURES)}")
    if fields.get("general.type", "model") != "model":
        raise ModelError(f"it holds no model: it says that it is of the type {fields['general.type']!r}")
    if (parts := int(fields.get("split.count", 1))) > 1:
        raise ModelError(f"it is one of {parts} parts of a model: join them with llama-gguf-split --merge")
    for key in ("bos", "eos", "unknown", "padding"):
        if isinstance(ids := fields.get(name := f"tokenizer.ggml.{key}_token_id"), list):
            raise ModelError(f"{name} should be one number; it is {ids!r:.100}")
    family, metadata = ARCHITECTURES[kind], GgufMetadata(kind, fields, shapes, factors)
    config = family.gguf.read(metadata)
    metadata.finish()
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{ours}_token_id"] = fields.get(f"tokenizer.ggml.{theirs}_token_id")
    _check_tensors(family, metadata, config)
    split = _split(family, fields)
    whole = split == "whole words" and fields.get("tokenizer.ggml.bos_token_id") is not None
    begins = fields.get("tokenizer.ggml.add_bos_token", whole or None)
    space_first = bool(fields.get("tokenizer.ggml.add_space_prefix", True))
    return GgufModel(config=config, stop_ids=_stop_ids(fields), split=split, begins=begins, space_first=space_first)


def mend_tokenizer(tokenizer: Any, model: GgufModel) -> None:
    """Give transformers' tokenizer of the file what its reading leaves out, in place."""
    backend = tokenizer.backend_tokenizer
    if model.split == "digits":
        steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    elif model.split == "whole words":
        backend.model.ignore_merges = True
    elif not model.split and not model.space_first:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])


def _check_tensors(family: Family, metadata: GgufMetadata, config: Mapping[str, Any]) -> None:
    """ModelError naming a tensor that the model lacks, or one that would be passed over."""
    kind, held = metadata.kind, set(metadata.shapes)
    needed = family.gguf.tensors(metadata, config)
    if missing := sorted(needed - held):
        raise ModelError(f"it lacks the tensor {missing[0]}")
    allowed = needed | {"output.weight"} | ({ROPE_FACTORS} if family.architectures[kind].rotary_factors else set())
    if strange := sorted(held - allowed):
        raise ModelError(f"it has the tensor {strange[0]}, which is not supported in a {kind} model")


def _split(family: Family, fields: Mapping[str, Any]) -> str:
    """How text is split before merges, a key of ``SPLITS``; empty where it is not split."""
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return ""
    said = fields.get("tokenizer.ggml.pre", family.gguf.split)
    for split, names in SPLITS.items():
        if said in names:
            return split
    known = ", ".join(sorted(name for names in SPLITS.values() for name in names))
    what = f"by the rules {said!r}" if said is not None else "by rules that it does not name"
    raise ModelError(f"it splits text {what} (tokenizer.ggml.pre), which are not known here; known are {known}")


def _stop_ids(fields: Mapping[str, Any]) -> tuple[int, ...]:
    """All tokens that the file names as ends, and those that are ends by their own names, in that order."""
    tokens = fields.get("tokenizer.ggml.tokens") or []
    types = fields.get("tokenizer.ggml.token_type") or []
    named = [fields.get(f"tokenizer.ggml.{stop}_token_{ids}") for stop in STOPS for ids in ("id", "ids")]
    ends = [id for id, (token, type) in enumerate(zip(tokens, types, strict=False))
            if type == CONTROL and token in ENDS_OF_TURN]  # fmt: skip
    flat = [int(id) for value in (*named, ends) if value is not None for id in _listed(value)]
    return tuple(dict.fromkeys(id for id in flat if 0 <= id < len(tokens)))


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, list) else [value]
