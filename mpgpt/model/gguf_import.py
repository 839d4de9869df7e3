"""A GGUF file's metadata as the configuration of the same model for transformers, or a sentence why it is not run.

Knows: llama.cpp's keys and tensors of the architectures that we run, and what each means to transformers.
Must not know: where a file comes from, how its tensors are stored, layers of ours, ranks.

transformers' own reading passes over what it does not know: factors of rotary frequencies, kinds of scaling, biases.
The model would run, and say something else. So every key and every tensor is either taken over here, or of no effect,
or the file is refused by the name of what cannot be done.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray
from tokenizers import decoders, pre_tokenizers

from mpgpt.errors import ModelError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gpt2")
"""Mistral's files call themselves llama."""
ROPE_FACTORS = "rope_freqs.weight"
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
"""What ``tokenizer.ggml.pre`` may say, by what is to be done: as GPT-2 splits; digits are split off first; as
transformers splits, but a whole piece that is a token stays one, and there is a token at the beginning; as transformers
splits. Compared with llama.cpp's own table."""

STOPS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
ENDS_OF_TURN = frozenset(("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>", "<end_of_utterance>"))
"""Control tokens that end an answer whatever the metadata says: many files name the end of a document only."""

UNCHANGED: Mapping[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "rope.scaling.attn_factor": (1.0,), "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0, -1.0), "residual_scale": (0.0, 1.0), "embedding_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
}  # fmt: skip
"""Values with which a key that we do not heed changes nothing; for other keys, all that are zero, false or empty."""
REMARKS = frozenset((
    "vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "pooling_type", "attention.layer_norm_epsilon",
))  # fmt: skip
"""Keys that change nothing, whatever they say. The epsilon is for GPT-2, which takes it over; others have another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufModel:
    """What a file says of its model."""

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
    about = _About(kind, fields)
    config = _gpt2(about, shapes) if kind == "gpt2" else _llama(about, shapes, factors)
    about.finish()
    for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{ours}_token_id"] = fields.get(f"tokenizer.ggml.{theirs}_token_id")
    _check_tensors(kind, config, shapes)
    split = _split(kind, fields)
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


class _About:
    """The keys of an architecture; those that nobody took over must be of no effect."""

    def __init__(self, kind: str, fields: Mapping[str, Any]) -> None:
        self.kind = kind
        self._left = {key.removeprefix(f"{kind}."): v for key, v in fields.items() if key.startswith(f"{kind}.")}

    def take(self, key: str, default: Any = None) -> Any:
        """The value; lists of one value for every layer are that value. ``ModelError`` when it must be there."""
        value = self._left.pop(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise ModelError(f"{self.kind}.{key} differs from layer to layer, which is not supported")
            value = value[0]
        if value is None:
            raise ModelError(f"it lacks {self.kind}.{key}")
        return value

    def size(self, key: str, default: int | None = None) -> int:
        return int(self.take(key, default))

    def number(self, key: str, default: float | None = None) -> float:
        """The shortest number that is this one in float32: what the model's makers wrote."""
        return float(str(np.float32(self.take(key, default))))

    def finish(self) -> None:
        for key, value in self._left.items():
            without_effect = value in UNCHANGED[key] if key in UNCHANGED else not value
            if key not in REMARKS and not without_effect:
                raise ModelError(f"it says {self.kind}.{key} = {value!r:.100}, which is not supported")


def _gpt2(about: _About, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    heads = about.size("attention.head_count")
    if about.size("attention.head_count_kv", heads) != heads:
        raise ModelError("a GPT-2 with fewer heads for keys than for queries is not supported")
    return {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": _rows("token_embd.weight", shapes),
        "n_positions": _rows("position_embd.weight", shapes, about.size("context_length")),
        "n_embd": about.size("embedding_length"), "n_layer": about.size("block_count"), "n_head": heads,
        "n_inner": about.size("feed_forward_length"), "activation_function": "gelu_new",
        "layer_norm_epsilon": about.number("attention.layer_norm_epsilon"),
        "tie_word_embeddings": "output.weight" not in shapes,
    }  # fmt: skip


def _llama(about: _About, shapes: Mapping[str, tuple[int, ...]], factors: list[NDArray[np.float32]]) -> dict[str, Any]:
    kind, embed, heads = about.kind, about.size("embedding_length"), about.size("attention.head_count")
    head_dim = about.size("attention.key_length", embed // heads)
    for key, what in (("attention.value_length", "values of another size than keys"),
                      ("rope.dimension_count", "rotary positions on only a part of each head")):  # fmt: skip
        if (size := about.size(key, head_dim)) != head_dim:
            raise ModelError(f"it has {what} ({kind}.{key} is {size}, a head {head_dim}), which is not supported")
    positions = about.size("context_length")
    if (window := about.size("attention.sliding_window", 0)) and window < positions:
        raise ModelError(f"it says {kind}.attention.sliding_window = {window}, which is not supported")
    scale = about.number("attention.scale", 0.0)
    if scale and not np.isclose(scale, head_dim**-0.5, rtol=1e-5):
        raise ModelError(f"it says {kind}.attention.scale = {scale}, which is not supported")
    biased = {part: any(n.endswith(f".{part}.bias") for n in shapes) for part in ("attn_q", "ffn_up")}
    return {
        "model_type": kind, "architectures": [f"{kind.capitalize()}ForCausalLM"], "hidden_act": "silu",
        "vocab_size": _rows("token_embd.weight", shapes), "hidden_size": embed, "head_dim": head_dim,
        "num_hidden_layers": about.size("block_count"), "intermediate_size": about.size("feed_forward_length"),
        "num_attention_heads": heads, "num_key_value_heads": about.size("attention.head_count_kv", heads),
        "max_position_embeddings": positions, "rms_norm_eps": about.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(about, positions, head_dim, factors),
        "tie_word_embeddings": "output.weight" not in shapes,
        **({"attention_bias": biased["attn_q"]} if kind != "qwen2" else {}),
        **({"mlp_bias": biased["ffn_up"]} if kind == "llama" else {}),
    }  # fmt: skip


def _rows(name: str, shapes: Mapping[str, tuple[int, ...]], expected: int | None = None) -> int:
    """Of a table."""
    if len(shape := shapes.get(name, ())) != 2:
        raise ModelError(f"it lacks the table {name}")
    if expected is not None and shape[0] != expected:
        raise ModelError(f"{name} has {shape[0]} rows where the metadata says {expected}")
    return shape[0]


def _rope(about: _About, positions: int, head_dim: int, factors: list[NDArray[np.float32]]) -> dict[str, Any]:
    """As ``rope_parameters`` in ``config.json``."""
    base = about.number("rope.freq_base", 10000.0)
    kind = about.take("rope.scaling.type", "linear")  # llama.cpp's default, with a factor of 1
    old = about.number("rope.scale_linear", 0.0)
    factor = about.number("rope.scaling.factor", 0.0) or old or 1.0
    original = about.size("rope.scaling.original_context_length", 0) or positions
    betas = {f"beta_{speed}": about.number(f"rope.scaling.yarn_beta_{speed}", default)
             for speed, default in (("fast", 32.0), ("slow", 1.0))}  # fmt: skip
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"it says {about.kind}.rope.scaling.type = {kind!r}, which is not supported")
    scaled = kind != "none" and factor != 1.0
    if factors and (listed := _factors(factors[0], head_dim)) is not None:
        if scaled:
            raise ModelError(f"it scales rotary positions twice: by {ROPE_FACTORS} and by {kind} scaling")
        # LongRoPE, with the same factors however long a sequence is: what transformers divides each frequency by.
        return {
            "rope_type": "longrope", "rope_theta": base, "short_factor": listed, "long_factor": listed, "factor": 1.0,
            "attention_factor": 1.0, "original_max_position_embeddings": positions,
        }  # fmt: skip
    if not scaled:
        return {"rope_type": "default", "rope_theta": base}
    yarn = {"original_max_position_embeddings": original, **betas} if kind == "yarn" else {}
    return {"rope_type": kind, "rope_theta": base, "factor": factor, **yarn}


def _factors(factors: NDArray[np.float32], head_dim: int) -> list[float] | None:
    """None where all are 1."""
    if factors.shape != (head_dim // 2,) or not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ModelError(f"{ROPE_FACTORS} should hold {head_dim // 2} positive numbers; it has {factors.shape}")
    listed: list[float] = factors.astype(np.float64).tolist()
    return None if set(listed) == {1.0} else listed


def _check_tensors(kind: str, config: Mapping[str, Any], shapes: Mapping[str, Any]) -> None:
    """ModelError naming a tensor that the model lacks, or one that would be passed over."""
    if kind == "gpt2":
        parts = [f"{part}.{end}" for part in ("attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down")
                 for end in ("weight", "bias")]  # fmt: skip
        needed = {"token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias"}
    else:
        products = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
        parts = [f"{part}.weight" for part in (*products, "attn_norm", "ffn_norm")]
        parts += ["attn_q_norm.weight", "attn_k_norm.weight"] if kind == "qwen3" else []
        biased = products[:3] if kind == "qwen2" else products[:4] if config["attention_bias"] else []
        parts += [f"{part}.bias" for part in (*biased, *(products[4:] if config.get("mlp_bias") else ()))]
        needed = {"token_embd.weight", "output_norm.weight"}
    layers = config.get("num_hidden_layers") or config.get("n_layer") or 0
    needed |= {f"blk.{layer}.{part}" for layer in range(layers) for part in parts}
    if missing := sorted(needed - set(shapes)):
        raise ModelError(f"it lacks the tensor {missing[0]}")
    allowed = needed | {"output.weight"} | ({ROPE_FACTORS} if kind == "llama" else set())
    if strange := sorted(set(shapes) - allowed):
        raise ModelError(f"it has the tensor {strange[0]}, which is not supported in a {kind} model")


def _split(kind: str, fields: Mapping[str, Any]) -> str:
    """How text is split before merges, a key of ``SPLITS``; empty where it is not split."""
    if fields.get("tokenizer.ggml.model") != "gpt2":
        return ""
    said = fields.get("tokenizer.ggml.pre", "gpt-2" if kind == "gpt2" else None)
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
