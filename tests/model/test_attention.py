"""Attention over the cache, against attention written out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from mpgpt.core import Row
from mpgpt.model.attention import Attention, Batch
from mpgpt.model.known_families import read_config
from tests.support.models import config_of


def row(slot: int, start: int, ids: Sequence[int]) -> Row:
    return Row(slot=slot, start=start, ids=tuple(ids), outputs=len(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(12, 12, 64), (9, 3, 64), (8, 1, 32), (4, 2, 24)])
@pytest.mark.parametrize("window", [0, 100])
def test_attention_over_long_slots_does_not_depend_on_drafts(
    heads: int, kv_heads: int, dim: int, window: int, dtype: torch.dtype
) -> None:
    """At every length near the edges of the kernel's blocks, for the head layouts of GPT-2, SmolLM2 and others."""
    raw = config_of("llama", num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=dim)
    config = dataclasses.replace(read_config(raw), windows=(window,), scales=(dim**-0.5,))
    attention = Attention(config, 0, slots=2, context=1100, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    attention.kv.copy_(torch.randn(attention.kv.shape, generator=generator))
    for stop in (5, 16, 17, 33, 64, 70, 129, 256, 260, 511, 512, 513, 520, 1024, 1030):
        count = min(stop, 13)
        q_THD = torch.randn((count, heads, dim), generator=generator).to(dtype)
        rows = [row(1, stop - count, [0] * count)]
        batch = Batch(rows, dtype)
        together = attention.read(q_THD, batch.queries, batch)
        for i in range(count):
            single = Batch([row(1, rows[0].start + i, [0])], dtype)
            assert torch.equal(together[i : i + 1], attention.read(q_THD[i : i + 1], single.queries, single))
        exact = reference(q_THD.double(), attention.kv[:, 1].double(), stop, window, dim**-0.5)
        assert torch.allclose(together.double(), exact, atol=1e-5 if dtype == torch.float32 else 2e-2)


def reference(q_THD: Tensor, kv_2KSD: Tensor, stop: int, window: int, scale: float) -> Tensor:
    """Attention written out, position by position and head by head, [T, H x D]."""
    outs = []
    for at, q_HD in enumerate(q_THD, stop - len(q_THD)):
        low = max(0, at + 1 - window) if window else 0
        for head, q_D in enumerate(q_HD):
            key_SD, value_SD = kv_2KSD[:, head * kv_2KSD.shape[1] // len(q_HD), low : at + 1]
            outs.append((key_SD @ q_D * scale).softmax(0) @ value_SD)
    return torch.cat(outs).view(len(q_THD), -1)
