"""The decoder's blocks as Core ML takes them: traced by torch, converted by coremltools.

Knows: the arithmetic of layers' programs in the layout and the operations that the Neural Engine likes; how a cache is
written so that the write survives the conversion.
Must not know: coremltools, files' names, the ring.

Hidden states are (B, E, 1, T): a linear layer is a 1x1 convolution. All numbers will be float16, whose largest is 65504
and whose squares get lost below 1e-4: norms divide by the largest element first, scores are scaled before the product.

The cache is one buffer, (2L, B*K, S, D), keys at 2i and values at 2i + 1. It is written by slice assignment alone: an
index or a scatter converts and silently drops the write, or does not convert (``verify.py`` would notice either).

Legend: B slots (1 in prefill and step), T tokens, E embed, H query heads, K key/value heads, G = H / K, D head
dimension, S positions, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mpgpt.core import Span
from mpgpt.errors import ModelError, UsageError
from mpgpt.model import program as program_of
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.known_families import family_of
from mpgpt.model.loader import Source, activation

LEAST = 0.01
"""A row whose largest element is smaller is not scaled up further: eps would leave float16."""
LARGEST = 65504.0


class Norm(nn.Module):
    """Layer norm, or RMS norm where ``centred`` is false, over ``dim``, safe in float16 for elements of any size."""

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool, shape: Sequence[int]) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.float().view(*shape), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.float().view(*shape), requires_grad=False)
        self._eps, self._centred, self._dim = eps, centred, 1 if shape[-1] == 1 else -1

    def forward(self, x: Tensor) -> Tensor:
        inverse = 1 / torch.clamp(x.abs().amax(self._dim, keepdim=True), min=LEAST)
        z = x * inverse
        if self._centred:
            z = z - z.mean(self._dim, keepdim=True)
        variance = (z * z).mean(self._dim, keepdim=True) + inverse * inverse * self._eps
        # Weight and bias apart: next to each other coremltools makes a batch norm of them, of two dtypes.
        y = z * self.weight * torch.rsqrt(variance)
        return y if self.bias is None else y + self.bias


def _norm(source: Source, op: program_of.Norm, eps: float, *, shape: Sequence[int]) -> Norm:
    bias = _vector(source, f"{op.name}.bias") if op.centred else None
    return Norm(_vector(source, f"{op.name}.weight"), bias, eps, centred=op.centred, shape=shape)


def _vector(source: Source, name: str) -> Tensor:
    vector = source.vector(name)
    _check_held(vector, name)
    return vector


def _check_held(tensor: Tensor, name: str) -> None:
    if not tensor.abs().max() <= LARGEST:  # nor what is no number
        raise ModelError(f"{name} has weights beyond {LARGEST:.0f}, the largest that float16 holds")


def linear(source: Source, names: Sequence[str], *, biased: bool, transpose: bool) -> nn.Conv2d:
    """The weights ``names``, one after another, as one 1x1 convolution."""
    weight_OI = torch.cat(
        [block.float() for name in names for block in source.blocks(f"{name}.weight", transpose=transpose)]
    )
    bias = torch.cat([source.vector(f"{name}.bias").float() for name in names]) if biased else None
    for tensor in (weight_OI, bias):
        if tensor is not None:
            _check_held(tensor, "/".join(names))
    conv = nn.Conv2d(weight_OI.shape[1], weight_OI.shape[0], 1, bias=biased)
    conv.weight = nn.Parameter(weight_OI[:, :, None, None], requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


class Block(nn.Module):
    """One layer, as its family's program says, without its cache: norm, attention, norm, MLP."""

    def __init__(self, config: ModelConfig, layer: int, source: Source) -> None:
        super().__init__()
        program = family_of(config).program(config, layer)
        self._heads, self._kv_heads, self._dim = config.heads, config.kv_heads, config.head_dim
        norms = [op for op in program.operations if isinstance(op, program_of.Norm)]
        (attend,) = (op for op in program.operations if isinstance(op, program_of.Attend))
        (active,) = (op for op in program.operations if isinstance(op, program_of.Activate))
        self._scale, self._gated, self._activation = attend.scale, active.gated, activation(active.function)
        self.norm_1, self.norm_2 = (
            _norm(source, op, config.eps, shape=(1, -1, 1, 1)) for op in norms if op.heads is None
        )  # fmt: skip
        self.qk_norms = nn.ModuleList(
            _norm(source, op, config.eps, shape=(1, 1, 1, config.head_dim)) for op in norms if op.heads
        )
        self.qkv, self.out, self.up, self.down = (
            linear(source, op.names, biased=op.biased, transpose=op.transposed) for op in program.products
        )

    def project(self, x: Tensor, turns: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, D), scaled; keys and values (B, K, T, D); turned by their positions where ``turns`` are."""
        heads, kv_heads, dim = self._heads, self._kv_heads, self._dim
        qkv = self.qkv(self.norm_1(x))
        sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        q, k, v = (
            part.view(x.shape[0], part.shape[1] // dim, dim, x.shape[3]).transpose(2, 3)
            for part in torch.split(qkv, sizes, dim=1)
        )
        if len(self.qk_norms):
            q, k = self.qk_norms[0](q), self.qk_norms[1](k)
        if turns:
            q, k = _turned(q, *turns), _turned(k, *turns)
        return q * self._scale, k, v

    def finish(self, x: Tensor, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention of ``q`` over the cache, (B, K, S, D) each, and the MLP."""
        batch, tokens, groups = x.shape[0], x.shape[3], self._heads // self._kv_heads
        if groups > 1:  # the queries that share a key lie one after another, as if they were more tokens
            q = q.reshape(batch, self._kv_heads, groups * tokens, self._dim)
            mask = torch.cat([mask] * groups, dim=2)
        scores = torch.softmax(q @ keys.transpose(2, 3) + mask, dim=-1)
        heads = (scores @ values).reshape(batch, self._heads, tokens, self._dim)
        x = x + self.out(heads.transpose(2, 3).reshape(batch, self._heads * self._dim, 1, tokens))
        h = self.up(self.norm_2(x))
        if self._gated:
            gate, up = torch.chunk(h, 2, dim=1)
            inner = self._activation(gate) * up
        else:
            inner = self._activation(h)
        y: Tensor = x + self.down(inner)
        return y


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Every head turned: element i with element i + D / 2; ``sin`` is signed for that."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), dim=-1) * sin


class Layers(nn.Module):
    """The blocks of a span, and the cache. ``Prefill`` and ``Decode`` share the blocks; each has a cache to trace."""

    kv: Tensor

    def __init__(self, blocks: nn.ModuleList, config: ModelConfig, slots: int, context: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.slots, self.context, self._kv_heads, self._dim = slots, context, config.kv_heads, config.head_dim
        shape = (2 * len(blocks), slots * config.kv_heads, context, config.head_dim)
        self.register_buffer("kv", torch.zeros(shape))


class Prefill(Layers):
    """T tokens of one slot: x (1,E,1,T), mask (1,1,T,S), pos (1,), row (1,), and where positions turn cos and sin
    (1,1,T,D). Traced with T = 1 it is the function ``step``."""

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor, row: Tensor, *turns: Tensor) -> Tensor:
        tokens, p, r, heads = x.shape[3], pos[0], row[0], self._kv_heads
        for i, block in enumerate(self.blocks):
            q, k, v = block.project(x, turns)  # type: ignore[operator]
            self.kv[2 * i : 2 * i + 1, r : r + heads, p : p + tokens, :] = k
            self.kv[2 * i + 1 : 2 * i + 2, r : r + heads, p : p + tokens, :] = v
            keys, values = (self.kv[j : j + 1, r : r + heads] for j in (2 * i, 2 * i + 1))
            x = block.finish(x, q, keys, values, mask)  # type: ignore[operator]
        return x


class Decode(Layers):
    """One token of every slot: x (B,E,1,1), mask (B,1,1,S), wmask (B,1,S,1), and cos and sin (B,1,1,D)."""

    def forward(self, x: Tensor, mask: Tensor, wmask: Tensor, *turns: Tensor) -> Tensor:
        keep, shape = 1 - wmask, (self.slots, self._kv_heads, self.context, self._dim)
        flat = (1, self.slots * self._kv_heads, self.context, self._dim)
        for i, block in enumerate(self.blocks):
            q, k, v = block.project(x, turns)  # type: ignore[operator]
            keys = self.kv[2 * i : 2 * i + 1].view(shape) * keep + k * wmask
            values = self.kv[2 * i + 1 : 2 * i + 2].view(shape) * keep + v * wmask
            self.kv[2 * i : 2 * i + 1] = keys.view(flat)
            self.kv[2 * i + 1 : 2 * i + 2] = values.view(flat)
            x = block.finish(x, q, keys, values, mask)  # type: ignore[operator]
        return x


def build(config: ModelConfig, span: Span, source: Source, *, slots: int, context: int) -> tuple[Prefill, Decode]:
    """What the three functions are traced from, over the same blocks; nothing but the span's tensors is read. Raises
    ``UsageError`` where a package of fixed shape cannot do what a layer does, and ``ModelError`` for weights that
    float16 cannot hold."""
    for layer in range(span.start, span.stop):
        if 0 < config.windows[layer] < context:
            raise UsageError(
                f"layer {layer} sees {config.windows[layer]} positions back only, which a package cannot do; "
                f"take --context {config.windows[layer]} or less"
            )
    blocks = nn.ModuleList(Block(config, layer, source) for layer in range(span.start, span.stop))
    prefill, decode = (kind(blocks, config, slots, context).eval() for kind in (Prefill, Decode))
    assert isinstance(prefill, Prefill) and isinstance(decode, Decode)
    return prefill, decode
