"""The decoder's blocks, and the KV cache they write.

Knows: the arithmetic of the GPT-2 and Llama families (Llama, Mistral, Qwen2, Qwen3, SmolLM).
Must not know: which layers other ranks hold, where weights come from (it is handed a ``Source``), or what a
frame, link or request is.

A step's rows lie one after another in one [T, E] tensor, so that a weight is read once for all of them.
Attention alone looks at each row by itself, over its own slot of the cache, in place: the cache is never copied.
Only positions below a row's end are read, so a slot needs no clearing.

Legend: T tokens of a step, E embed, H query heads, K key/value heads, G = H / K, D head dimension,
F inner features of the MLP, V vocabulary, B slots, S positions of the cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mpgpt.core import Row, Span
from mpgpt.errors import ModelError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.kernels import Kernels, Linear, Weight

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
}


HEAD = "lm_head.weight"


class Source(Protocol):
    """Where a block gets its tensors from; names are the checkpoint's own."""

    def blocks(self, name: str, *, transpose: bool = False) -> Iterator[Tensor]:
        """The [O, I] weight ``name`` in blocks of output features; ``transpose`` if it is stored [I, O]."""

    def holds(self, name: str) -> bool:
        """Whether the checkpoint has it."""

    def vector(self, name: str) -> Tensor:
        """A small tensor, whole."""

    def mapped(self, name: str) -> Tensor:
        """A large table of which only some rows will be read: a view into the file."""


@dataclass(frozen=True, slots=True)
class Query:
    """Rows ``first`` to ``last`` of a step's tensor: the last positions of ``slot``, which then ends at ``stop``."""

    first: int
    last: int
    slot: int
    stop: int
    apart: bool
    """Whether each position is computed as if it were alone: in decoding, with drafts and without."""

    @property
    def start(self) -> int:
        return self.stop - (self.last - self.first)


class Batch:
    """What all layers need to know of a step's rows, worked out once.

    ``tail`` is the same for those positions only of which a token is wanted, and ``kept`` where they stand.
    """

    def __init__(self, rows: Sequence[Row], dtype: torch.dtype, rotary: Rotary | None = None) -> None:
        self._dtype = dtype
        self._masks: dict[tuple[Query, int], Tensor] = {}
        ends = _running([len(row.ids) for row in rows])
        outs = _running([row.outputs for row in rows])
        spans = zip(rows, ends, strict=True)
        self.queries = [_query(row, end, len(row.ids)) for row, end in spans]
        wanted = [(row, out) for row, out in zip(rows, outs, strict=True) if row.outputs]
        self.tail = [_query(row, out, row.outputs) for row, out in wanted]
        self.kept = torch.tensor(
            [i for row, end in zip(rows, ends, strict=True) for i in range(end - row.outputs, end)], dtype=torch.int64
        )
        self.ids = torch.tensor([i for row in rows for i in row.ids], dtype=torch.int64)
        self.positions = torch.tensor([p for row in rows for p in range(row.start, row.stop)], dtype=torch.int64)
        self.turns = rotary.turns(self.positions) if rotary else None
        scattered = len(rows) > 1 and all(query.apart for query in self.queries)
        self.slots = torch.tensor([row.slot for row in rows for _ in row.ids]) if scattered else None
        """Each position's slot, where many sequences bring a few positions each."""

    def mask(self, query: Query, window: int, low: int) -> Tensor:
        """What is added to the scores of a query of several positions, [T, stop - low]: 0 where seen, else -inf."""
        key = (query, window)
        if key not in self._masks:
            rows = torch.arange(query.start, query.stop)[:, None]
            columns = torch.arange(low, query.stop)[None, :]
            hidden = columns > rows
            if window:
                hidden |= columns <= rows - window
            self._masks[key] = torch.zeros(hidden.shape, dtype=self._dtype).masked_fill_(hidden, -math.inf)
        return self._masks[key]


def _query(row: Row, end: int, count: int) -> Query:
    """The last ``count`` positions of ``row``, which end at ``end`` of a tensor."""
    # A function of the row alone, and the same for a position whether it is drafted or not.
    return Query(end - count, end, row.slot, row.stop, apart=count == 1 or row.outputs > 1)


def _running(counts: Sequence[int]) -> list[int]:
    total, sums = 0, []
    for count in counts:
        total += count
        sums.append(total)
    return sums


class Attention:
    """One layer's KV cache, [2, B, K, S, D], and the products over it."""

    def __init__(self, config: ModelConfig, layer: int, slots: int, context: int, dtype: torch.dtype) -> None:
        self._heads, self._kv_heads, self._dim = config.heads, config.kv_heads, config.head_dim
        self._scale, self._window = config.scales[layer], config.windows[layer]
        self.kv = torch.empty((2, slots, config.kv_heads, context, config.head_dim), dtype=dtype)
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}

    def _slot(self, slot: int) -> tuple[Tensor, Tensor]:
        """Views of a slot's keys and values, [1, K, S, D] each, made once."""
        if slot not in self._slots:
            key_1KSD, value_1KSD = self.kv[:, slot : slot + 1]
            self._slots[slot] = key_1KSD, value_1KSD
        return self._slots[slot]

    def write(self, kv_T2KD: Tensor, batch: Batch) -> None:
        if batch.slots is not None:
            self.kv[:, batch.slots, :, batch.positions] = kv_T2KD
            return
        for q in batch.queries:
            self.kv[:, q.slot, :, q.start : q.stop] = kv_T2KD[q.first : q.last].permute(1, 2, 0, 3)

    def read(self, q_THD: Tensor, queries: Sequence[Query], batch: Batch) -> Tensor:
        """Each query over its own slot: softmax(q k / sqrt(D)) v, [T, H x D]."""
        if all(q.apart for q in queries):
            return self._singles(q_THD, queries)
        outs = []
        for q in queries:
            mine_THD = q_THD[q.first : q.last]
            outs.append(self._singles(mine_THD, [q]) if q.apart else self._chunk(mine_THD, q, batch))
        return torch.cat(outs)

    def _chunk(self, q_THD: Tensor, q: Query, batch: Batch) -> Tensor:
        low = max(0, q.start - self._window + 1) if self._window else 0
        key_1KSD, value_1KSD = (whole[:, :, low : q.stop] for whole in self._slot(q.slot))
        causal = low == q.start == 0 and not self._window
        mask = None if causal else batch.mask(q, self._window, low)
        out_1HTD = F.scaled_dot_product_attention(
            q_THD.transpose(0, 1)[None], key_1KSD, value_1KSD, attn_mask=mask, is_causal=causal,
            scale=self._scale, enable_gqa=self._heads != self._kv_heads,
        )  # fmt: skip
        return out_1HTD[0].transpose(0, 1).flatten(1)

    def _singles(self, q_THD: Tensor, queries: Sequence[Query]) -> Tensor:
        """Position by position, so that a drafted one has the bits that it has alone: [T, H x D].

        A position sees all of its slot up to itself, so the heads of a group are rows of one product, without a mask.
        """
        groups, window = self._heads // self._kv_heads, self._window
        q_T1KGD = q_THD.view(-1, 1, self._kv_heads, groups, self._dim)
        if groups < 4 and q_THD.dtype != torch.float32:
            # torch multiplies one row of half precision twice as slowly as four
            q_T1KGD = q_T1KGD.repeat(1, 1, 1, 4, 1)
        rows, outs = iter(q_T1KGD.unbind()), []
        for q in queries:
            keys, values = self._slot(q.slot)
            for stop in range(q.start + 1, q.stop + 1):
                seen = min(stop, window) if window else stop
                key, value = keys.narrow(2, stop - seen, seen), values.narrow(2, stop - seen, seen)
                outs.append(F.scaled_dot_product_attention(next(rows), key, value, scale=self._scale))
        return torch.cat(outs)[:, :, :groups].reshape(len(outs), -1)


class Block(Protocol):
    """One layer. ``tail`` computes only the wanted positions after the cache is written: for the very last layer."""

    nbytes: int

    def __call__(self, x_TE: Tensor, batch: Batch, *, tail: bool = False) -> Tensor: ...


class GPT2Block:
    """Layer norm, attention, layer norm, MLP; learned positions are added before layer 0. (Radford et al. 2019)"""

    def __init__(self, config: ModelConfig, layer: int, source: Source, attention: Attention, kernels: Kernels):
        def linear(name: str, inputs: int, outputs: int) -> Linear:
            blocks = source.blocks(f"{at}.{name}.weight", transpose=True)
            bias_O = source.vector(f"{at}.{name}.bias")
            return kernels.linear(_fitting(blocks, f"{at}.{name}", inputs, outputs), bias_O, inputs, outputs)

        at, dtype = f"h.{layer}", kernels.activations
        self._attention = attention
        self._shape = (config.heads, config.head_dim)
        self._norm_1, self._norm_2 = (_layer_norm(source, f"{at}.{ln}", config, dtype) for ln in ("ln_1", "ln_2"))
        embed, inner = config.embed, config.inner
        self._qkv, self._out = linear("attn.c_attn", embed, 3 * embed), linear("attn.c_proj", embed, embed)
        self._up, self._down = linear("mlp.c_fc", embed, inner), linear("mlp.c_proj", inner, embed)
        self._activation = ACTIVATIONS[config.activation]
        self.nbytes = sum(layer.nbytes for layer in (self._qkv, self._out, self._up, self._down))

    def __call__(self, x_TE: Tensor, batch: Batch, *, tail: bool = False) -> Tensor:
        qkv_T3HD = self._qkv(self._norm_1(x_TE)).view(-1, 3, *self._shape)
        self._attention.write(qkv_T3HD[:, 1:], batch)
        q_THD, queries = qkv_T3HD[:, 0], batch.queries
        if tail:
            x_TE, q_THD, queries = x_TE[batch.kept], q_THD[batch.kept], batch.tail
            if not queries:
                return x_TE
        x_TE = x_TE + self._out(self._attention.read(q_THD, queries, batch))
        return x_TE + self._down(self._activation(self._up(self._norm_2(x_TE))))


class LlamaBlock:
    """RMS norm, rotary attention with grouped heads, RMS norm, gated MLP. (Touvron et al. 2023)"""

    def __init__(self, config: ModelConfig, layer: int, source: Source, attention: Attention, kernels: Kernels):
        def linear(part: str, names: Sequence[str], biased: bool, inputs: int, outputs: int) -> Linear:
            blocks = (block for name in names for block in source.blocks(f"{at}.{part}.{name}_proj.weight"))
            bias = [source.vector(f"{at}.{part}.{name}_proj.bias") for name in names] if biased else []
            fitting = _fitting(blocks, f"{at}.{part}.{'/'.join(names)}_proj", inputs, outputs)
            return kernels.linear(fitting, torch.cat(bias) if bias else None, inputs, outputs)

        at, dtype = f"layers.{layer}", kernels.activations
        self._attention = attention
        self._heads, self._kv_heads, self._dim = config.heads, config.kv_heads, config.head_dim
        self._norm_1 = _rms_norm(source, f"{at}.input_layernorm", config, dtype)
        self._norm_2 = _rms_norm(source, f"{at}.post_attention_layernorm", config, dtype)
        self._qk_norms = (
            [_rms_norm(source, f"{at}.self_attn.{n}_norm", config, dtype) for n in "qk"] if config.qk_norm else []
        )
        embed, inner, queries, keys = config.embed, config.inner, self._heads * self._dim, self._kv_heads * self._dim
        self._qkv = linear("self_attn", "qkv", config.qkv_bias, embed, queries + 2 * keys)
        self._out = linear("self_attn", "o", config.out_bias, queries, embed)
        self._gate_up = linear("mlp", ("gate", "up"), config.mlp_bias, embed, 2 * inner)
        self._down = linear("mlp", ("down",), config.mlp_bias, inner, embed)
        self._activation = ACTIVATIONS[config.activation]
        self.nbytes = sum(layer.nbytes for layer in (self._qkv, self._out, self._gate_up, self._down))

    def __call__(self, x_TE: Tensor, batch: Batch, *, tail: bool = False) -> Tensor:
        heads, keys = self._heads, self._heads + self._kv_heads
        qkv_TXD = self._qkv(self._norm_1(x_TE)).view(-1, keys + self._kv_heads, self._dim)
        if self._qk_norms:
            for norm, a, b in zip(self._qk_norms, (0, heads), (heads, keys), strict=True):
                qkv_TXD[:, a:b] = norm(qkv_TXD[:, a:b])
        assert batch.turns is not None
        turn_(qkv_TXD[:, :keys], batch.turns)
        self._attention.write(qkv_TXD[:, heads:].view(-1, 2, self._kv_heads, self._dim), batch)
        q_THD, queries = qkv_TXD[:, :heads], batch.queries
        if tail:
            x_TE, q_THD, queries = x_TE[batch.kept], q_THD[batch.kept], batch.tail
            if not queries:
                return x_TE
        x_TE = x_TE + self._out(self._attention.read(q_THD, queries, batch))
        gate_TF, up_TF = self._gate_up(self._norm_2(x_TE)).chunk(2, dim=-1)
        return x_TE + self._down(self._activation(gate_TF).mul_(up_TF))


class Rotary:
    """Rotary positions: tables of cos and sin for every position, [S, D]; a head's halves differ in sign alone."""

    def __init__(self, config: ModelConfig, context: int, dtype: torch.dtype) -> None:
        angles = torch.arange(context).float()[:, None] * torch.tensor(config.inv_freq)[None, :]
        cos, sin = angles.cos() * config.rope_gain, angles.sin() * config.rope_gain
        self._cos = torch.cat((cos, cos), dim=-1).to(dtype)[:, None]
        self._sin = torch.cat((-sin, sin), dim=-1).to(dtype)[:, None]

    def turns(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """The cos and sin of these positions, [T, 1, D] each."""
        return self._cos[positions_T], self._sin[positions_T]


def turn_(x_THD: Tensor, turns: tuple[Tensor, Tensor]) -> None:
    """Turn every head by its position, in place: element i with element i + D / 2."""
    cos, sin = turns
    swapped = torch.roll(x_THD, x_THD.shape[-1] // 2, dims=-1)
    x_THD.mul_(cos).addcmul_(swapped, sin)


Norm = Callable[[Tensor], Tensor]


def _layer_norm(source: Source, name: str, config: ModelConfig, dtype: torch.dtype) -> Norm:
    weight, bias = (source.vector(f"{name}.{part}").to(dtype) for part in ("weight", "bias"))
    return lambda x: F.layer_norm(x, (config.embed,), weight, bias, config.eps)


def _rms_norm(source: Source, name: str, config: ModelConfig, dtype: torch.dtype) -> Norm:
    weight = source.vector(f"{name}.weight").to(dtype)
    if dtype == torch.float32:
        # x / sqrt(mean(x^2) + eps), written with the length of x: half as long as F.rms_norm for a row
        width = weight.numel()
        longer, epsilon = weight * math.sqrt(width), torch.tensor(math.sqrt(config.eps * width))
        return lambda x: (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(epsilon)).mul_(longer)

    def norm(x: Tensor) -> Tensor:
        """In float32 for all that; the weight is applied after rounding back, as the checkpoints expect."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True).add_(config.eps))
        return weight * y.to(x.dtype)

    return norm


def _fitting(blocks: Iterable[Tensor], name: str, inputs: int, outputs: int) -> Iterator[Tensor]:
    """The same blocks; ``ModelError`` when they are of another model than config.json describes."""
    seen = 0
    for block_OI in blocks:
        seen += block_OI.shape[0]
        if block_OI.shape[1] != inputs:
            raise ModelError(_misfit(name, inputs, outputs, block_OI.shape[1], seen))
        yield block_OI
    if seen != outputs:
        raise ModelError(_misfit(name, inputs, outputs, inputs, seen))


def _misfit(name: str, *sizes: int) -> str:
    wanted, found = sizes[:2], sizes[2:]
    return f"{name} has {found} features in and out where config.json asks for {wanted}: they are of two models"


def tables(config: ModelConfig, source: Source) -> tuple[str, str]:
    """The names of the tensors that are the embedding and the head.

    Where the configuration says that both are one, the checkpoint still has the last word, as in transformers: a head
    of its own is used, and a head alone is the embedding too.
    """
    embedding = "wte.weight" if config.family == "gpt2" else "embed_tokens.weight"
    if not config.tied:
        return embedding, HEAD
    held = [name for name in (embedding, HEAD) if source.holds(name)] or [embedding]
    return held[0], held[-1]


def has_another_head(config: ModelConfig, source: Source) -> bool:
    """Whether the configuration says that head and embedding are one, and the checkpoint has two that differ."""
    embedding, head = tables(config, source)
    if not config.tied or embedding == head:
        return False
    both = zip(source.blocks(embedding), source.blocks(head), strict=False)
    return not all(torch.equal(a.float(), b.float()) for a, b in both)


def weights_of(config: ModelConfig) -> list[Weight]:
    """The shapes of all weights that a model multiplies with, each once."""
    c, queries, keys = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    up = c.inner if c.family == "gpt2" else 2 * c.inner
    shapes = [(c.embed, queries + 2 * keys), (queries, c.embed), (c.embed, up), (c.inner, c.embed)]
    layers = [Weight(inputs=inputs, outputs=outputs) for inputs, outputs in shapes]
    return [*layers, Weight(inputs=c.embed, outputs=c.vocab, head=True)]


class Slice:
    """The layers of ``span``, with the embedding if they are the first and the head if they are the last.

    Nothing else of the model is ever read. The embedding stays in its file and is looked up there through the
    page cache, so that a tied embedding is not held twice even where first and last are one.
    """

    def __init__(
        self, config: ModelConfig, span: Span, source: Source, *, slots: int, context: int, kernels: Kernels
    ) -> None:
        self.config, self.span = config, span
        self.dtype = dtype = kernels.activations
        self.first, self.last = span.start == 0, span.stop == config.layers
        gpt2 = config.family == "gpt2"
        self._rotary = None if gpt2 else Rotary(config, context, dtype)
        kind = GPT2Block if gpt2 else LlamaBlock
        self.blocks: list[Block] = []
        self.attentions = []
        for layer in range(span.start, span.stop):
            attention = Attention(config, layer, slots, context, dtype)
            self.attentions.append(attention)
            self.blocks.append(kind(config, layer, source, attention, kernels))
        embedding, head = tables(config, source)
        if self.first:
            self._embedding = source.mapped(embedding)
            if self._embedding.shape != (config.vocab, config.embed):
                raise ModelError(_misfit(embedding, config.embed, config.vocab, *reversed(self._embedding.shape)))
            self._positions = source.vector("wpe.weight") if gpt2 else None
        if self.last:
            self._norm = (_layer_norm if gpt2 else _rms_norm)(source, "ln_f" if gpt2 else "norm", config, dtype)
            blocks = _fitting(source.blocks(head), head, config.embed, config.vocab)
            self._head = kernels.linear(blocks, None, config.embed, config.vocab, head=True)

    @property
    def nbytes(self) -> int:
        """Bytes of weights that this slice multiplies with."""
        return sum(block.nbytes for block in self.blocks) + (self._head.nbytes if self.last else 0)

    @property
    def kv_nbytes(self) -> int:
        return sum(attention.kv.nbytes for attention in self.attentions)

    def batch(self, rows: Sequence[Row]) -> Batch:
        """What the layers need to know of a step's rows."""
        return Batch(rows, self.dtype, self._rotary)

    def embed(self, batch: Batch) -> Tensor:
        """Token (and learned position) embeddings, [T, E]."""
        x_TE = self._embedding[batch.ids].to(self.dtype)
        if self._positions is not None:
            x_TE = x_TE + self._positions[batch.positions].to(self.dtype)
        return x_TE

    def run(self, x_TE: Tensor, batch: Batch, between: Callable[[], None]) -> Tensor:
        """The layers, with ``between`` called after each; the last slice keeps only the wanted positions."""
        for i, block in enumerate(self.blocks):
            x_TE = block(x_TE, batch, tail=self.last and i == len(self.blocks) - 1)
            between()
        return x_TE

    def logits(self, x_TE: Tensor) -> Tensor:
        """[T, V] float32."""
        return self._head(self._norm(x_TE)).float()
