"""Attention: a step's queries, the KV cache that they read, rotary positions, and norms.

Knows: how rows of a step become queries over slots, and the products over the cache.
Must not know: layers, families, weights' names, or what a frame, link or request is.

A step's rows lie one after another in one [T, E] tensor, so that a weight is read once for all of them.
Attention alone looks at each row by itself, over its own slot of the cache, in place: the cache is never copied.
Only positions below a row's end are read, so a slot needs no clearing.

Legend: T tokens of a step, E embed, H query heads, K key/value heads, G = H / K, D head dimension,
B slots, S positions of the cache, X heads of all kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpgpt.core import Row
from mpgpt.model.architecture import ModelConfig

Norm = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Query:
    """Rows ``first`` to ``last`` of a step's tensor: the last positions of ``slot``, which then ends at ``stop``."""

    first: int
    last: int
    slot: int
    stop: int
    one_by_one: bool
    """Whether each position is computed as if it were alone: in decoding, with drafts and without."""

    @property
    def start(self) -> int:
        return self.stop - (self.last - self.first)


class Batch:
    """A step's rows as every layer needs them, worked out once.

    ``output_queries`` are those of ``queries``, shortened to the positions that have an output, and
    ``output_positions`` are these positions' indices in the step's tensor.
    """

    def __init__(self, rows: Sequence[Row], dtype: torch.dtype, rotary: Rotary | None = None) -> None:
        self._dtype = dtype
        self._masks: dict[tuple[Query, int], Tensor] = {}
        ends = _running([len(row.ids) for row in rows])
        outs = _running([row.outputs for row in rows])
        spans = zip(rows, ends, strict=True)
        self.queries = [_query(row, end, len(row.ids)) for row, end in spans]
        sampled = [(row, out) for row, out in zip(rows, outs, strict=True) if row.outputs]
        self.output_queries = [_query(row, out, row.outputs) for row, out in sampled]
        self.output_positions = torch.tensor(
            [i for row, end in zip(rows, ends, strict=True) for i in range(end - row.outputs, end)], dtype=torch.int64
        )
        self.positions = torch.tensor([p for row in rows for p in range(row.start, row.stop)], dtype=torch.int64)
        self._rotary = rotary.at(self.positions) if rotary else None
        scattered = len(rows) > 1 and all(query.one_by_one for query in self.queries)
        self.slots = torch.tensor([row.slot for row in rows for _ in row.ids]) if scattered else None
        """Each position's slot, where many sequences bring a few positions each."""

    def apply_rotary_(self, x_TXD: Tensor) -> None:
        """Rotate every head by its position, in place: element i with element i + D / 2."""
        assert self._rotary is not None
        cos, sin = self._rotary
        swapped = torch.roll(x_TXD, x_TXD.shape[-1] // 2, dims=-1)
        x_TXD.mul_(cos).addcmul_(swapped, sin)

    def mask(self, query: Query, window: int, low: int) -> Tensor:
        """The addend to the scores of a query of several positions, [T, stop - low]: 0 where seen, else -inf."""
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
    return Query(end - count, end, row.slot, row.stop, one_by_one=count == 1 or row.outputs > 1)


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
        if all(q.one_by_one for q in queries):
            return self._singles(q_THD, queries)
        outs = []
        for q in queries:
            mine_THD = q_THD[q.first : q.last]
            outs.append(self._singles(mine_THD, [q]) if q.one_by_one else self._chunk(mine_THD, q, batch))
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


class Rotary:
    """Rotary positions: tables of cos and sin for every position, [S, D]; a head's halves differ in sign alone."""

    def __init__(self, config: ModelConfig, context: int, dtype: torch.dtype) -> None:
        angles = torch.arange(context).float()[:, None] * torch.tensor(config.inv_freq)[None, :]
        cos, sin = angles.cos() * config.rope_gain, angles.sin() * config.rope_gain
        self._cos = torch.cat((cos, cos), dim=-1).to(dtype)[:, None]
        self._sin = torch.cat((-sin, sin), dim=-1).to(dtype)[:, None]

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """The cos and sin of these positions, [T, 1, D] each."""
        return self._cos[positions_T], self._sin[positions_T]


def layer_norm(weight: Tensor, bias: Tensor, eps: float) -> Norm:
    return lambda x: F.layer_norm(x, weight.shape, weight, bias, eps)


def rms_norm(weight: Tensor, eps: float) -> Norm:
    if weight.dtype == torch.float32:
        # x / sqrt(mean(x^2) + eps) by way of x's Euclidean norm: half the time of F.rms_norm for one row
        width = weight.numel()
        longer, epsilon = weight * math.sqrt(width), torch.tensor(math.sqrt(eps * width))
        return lambda x: (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot_(epsilon)).mul_(longer)

    def norm(x: Tensor) -> Tensor:
        """Computed in float32, rounded to x's dtype before the weight is applied, as checkpoints expect."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True).add_(eps))
        return weight * y.to(x.dtype)

    return norm
