"""The blocks that are traced for Core ML against ``slice.py``'s on the same weights, before any conversion."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mpgpt.core import Row, Span, Step
from mpgpt.engine.stage import TorchStage
from mpgpt.errors import ModelError, UsageError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.attention import Rotary
from mpgpt.model.linear import Kernels
from mpgpt.model.sampler import Sampler
from mpgpt.model.slice import Slice
from mpgpt.model.weights import Checkpoint, model_config
from mpgpt_ios.convert.blocks import Decode, Norm, Prefill, build, linear

SLOTS, CONTEXT, CHUNK, SPAN = 3, 32, 8, Span(start=1, stop=3)
NAMES = ["gpt2", "gpt2-odd", "llama", "llama-biased", "llama-yarn", "llama-dynamic", "qwen3"]


class Traced:
    """The two modules as a node would call them, token by token or in chunks."""

    def __init__(self, config: ModelConfig, prefill: Prefill, decode: Decode) -> None:
        self.config, self._prefill, self._decode = config, prefill, decode
        decode.kv = prefill.kv  # one state
        self._rotary = Rotary(config, CONTEXT, torch.float32) if config.inv_freq else None

    def _turns(self, positions: list[int]) -> list[Tensor]:
        """cos and sin, [T, D]."""
        if self._rotary is None:
            return []
        return [table[:, 0] for table in self._rotary.at(torch.tensor(positions))]

    def _masks(self, positions: list[int]) -> Tensor:
        return torch.where(torch.arange(CONTEXT) <= torch.tensor(positions)[:, None], 0.0, -1e4)

    def prefill(self, slot: int, pos: int, x_TE: Tensor) -> Tensor:
        x = torch.zeros(1, x_TE.shape[1], 1, CHUNK)
        x[0, :, 0, : len(x_TE)] = x_TE.T
        positions = list(range(pos, pos + CHUNK))
        turns = [table[None, None] for table in self._turns(positions)]
        where = torch.tensor([pos], dtype=torch.int32), torch.tensor([slot * self.config.kv_heads], dtype=torch.int32)
        y: Tensor = self._prefill(x, self._masks(positions)[None, None], *where, *turns)
        return y[0, :, 0, : len(x_TE)].T

    def decode(self, places: list[tuple[int, int]], x_BE: Tensor) -> Tensor:
        slots, positions = [slot for slot, _ in places], [position for _, position in places]
        x, mask = torch.zeros(SLOTS, x_BE.shape[1], 1, 1), torch.full((SLOTS, 1, 1, CONTEXT), -1e4)
        wmask, everyone = torch.zeros(SLOTS, 1, CONTEXT, 1), [0] * SLOTS
        x[slots, :, 0, 0] = x_BE
        mask[slots, 0, 0] = self._masks(positions)
        for slot, position in places:
            wmask[slot, 0, position, 0], everyone[slot] = 1, position
        turns = [table[:, None, None] for table in self._turns(everyone)]
        y: Tensor = self._decode(x, mask, wmask, *turns)
        return y[slots, :, 0, 0]


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_they_compute_what_the_ring_computes(models: dict[str, Path], name: str) -> None:
    """Prompts at positions, single tokens at different positions beside one another, and a slot used again."""
    config, checkpoint = model_config(models[name]), Checkpoint(models[name])
    traced = Traced(config, *build(config, SPAN, checkpoint, slots=SLOTS, context=CONTEXT))
    model = Slice(config, SPAN, checkpoint, slots=SLOTS, context=CONTEXT, kernels=Kernels(dtype="float32"))
    truth = TorchStage(model, Sampler(slots=SLOTS, context=CONTEXT, vocab=config.vocab), lambda: None)
    torch.manual_seed(3)
    calls: list[list[tuple[int, int, int]]] = [
        [(0, 0, 8)], [(0, 8, 5)], [(2, 0, 3)], [(0, 13, 1), (2, 3, 1)], [(1, 0, 1), (0, 14, 1)], [(0, 15, 1)],
        [(0, 0, 4)], [(0, 4, 1), (1, 1, 1), (2, 4, 1)],
    ]  # fmt: skip
    for number, call in enumerate(calls):
        rows = tuple(Row(slot=slot, start=start, ids=(0,) * count) for slot, start, count in call)
        x_TE = torch.randn(sum(len(row.ids) for row in rows), config.embed)
        step = Step(epoch=0, number=number, rows=rows, hidden=bytearray(x_TE.numpy().tobytes()))
        wanted = truth.forward(step)
        assert isinstance(wanted, Step)
        if len(call) == 1 and call[0][2] > 1:
            got = traced.prefill(call[0][0], call[0][1], x_TE)
        else:
            got = traced.decode([(slot, start) for slot, start, _ in call], x_TE)
        y_TE = torch.from_numpy(np.frombuffer(bytes(wanted.hidden), np.float32).copy()).view(x_TE.shape)
        torch.testing.assert_close(got, y_TE, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [1e-3, 1.0, 3000.0, 30000.0])
@pytest.mark.parametrize("centred", [True, False])
def test_a_norm_survives_float16(size: float, centred: bool) -> None:
    """A row with an outlier, whose square is far beyond float16; and one whose squares float16 would lose."""
    torch.manual_seed(1)
    x = torch.randn(1, 256, 1, 2) * min(size, 1.0)
    x[0, 7] = size
    weight, bias = torch.rand(256) + 0.5, torch.randn(256) if centred else None
    norm = Norm(weight, bias, 1e-5, centred=centred, shape=(1, -1, 1, 1))
    half, whole = norm.half()(x.half()).float(), norm.float()(x.half().float())
    exact = x.half().double()
    exact = exact - exact.mean(1, keepdim=True) if centred else exact
    exact = exact / (exact.square().mean(1, keepdim=True) + 1e-5).sqrt()
    exact = exact * weight.double().view(1, -1, 1, 1) + (0 if bias is None else bias.double().view(1, -1, 1, 1))
    torch.testing.assert_close(whole.double(), exact, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(half, whole, atol=2e-2, rtol=5e-3)


def test_windows_shorter_than_the_context_are_refused(models: dict[str, Path]) -> None:
    config, checkpoint = model_config(models["mistral"]), Checkpoint(models["mistral"])
    with pytest.raises(UsageError, match=r"sees 20 positions back only.*--context 20 or less"):
        build(config, SPAN, checkpoint, slots=1, context=32)
    build(config, SPAN, checkpoint, slots=1, context=16)


def test_weights_that_float16_cannot_hold_are_refused(models: dict[str, Path]) -> None:
    class Large(Checkpoint):
        def vector(self, name: str) -> Tensor:
            return super().vector(name) * 1e6

    with pytest.raises(ModelError, match=r"h.1.attn.c_attn has weights beyond 65504"):
        linear(Large(models["gpt2"]), ["h.1.attn.c_attn"], biased=True, transpose=True)
    config = model_config(models["llama"])
    with pytest.raises(ModelError, match=r"layers.1.input_layernorm.weight has weights beyond 65504"):
        build(config, SPAN, Large(models["llama"]), slots=1, context=16)
