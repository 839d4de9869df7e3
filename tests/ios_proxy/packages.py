"""Small Core ML packages, and the torch models that they were made from: the other side of the evaluator's tests.

Weights are whole numbers times 1/512 with 127 in every row: exact in float16, and exact in int8 with a scale a row.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS, EMBED, HEADS, CONTEXT, SLOTS, CHUNK = 2, 64, 4, 64, 4, 8
STEP = 1 / 512
NAMES = ("gpt2", "llama", "int8")
Array = np.ndarray[Any, Any]


def rows(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, EMBED)).astype(np.float16)


def zeros(program: Any) -> dict[str, Array]:
    """Inputs for a program's ``prefill``."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in program.functions["prefill"].inputs.items()}


class Recording:
    """A backend that keeps what it is given; y is x."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Array]]] = []

    def run(self, function: str, inputs: dict[str, Array]) -> Array:
        self.calls.append((function, inputs))
        return inputs["x"]

    def reset(self) -> None:
        self.calls.append(("reset", {}))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.calls]


@dataclass(frozen=True, slots=True, kw_only=True)
class Turning:
    inv_freq: tuple[float, ...]
    gain: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallSizes:
    embed: int = EMBED
    kv_heads: int = HEADS
    head_dim: int = EMBED // HEADS
    slots: int = SLOTS
    context: int = CONTEXT
    chunk: int = CHUNK
    rotary: Turning | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Small:
    """A package, the model in it, and its sizes."""

    path: Path
    model: Model
    sizes: SmallSizes


class Layer(nn.Module):
    """A block in the layout (B, C, 1, T): GPT-2's, or Llama's where there is rotary."""

    def __init__(self, sizes: SmallSizes) -> None:
        super().__init__()
        self.sizes = sizes
        keys, inner = sizes.kv_heads * sizes.head_dim, 2 * EMBED
        self.q, self.k, self.v = (nn.Conv2d(EMBED, size, 1) for size in (EMBED, keys, keys))
        self.out, self.up, self.down = (
            nn.Conv2d(EMBED, EMBED, 1),
            nn.Conv2d(EMBED, inner, 1),
            nn.Conv2d(inner, EMBED, 1),
        )
        self.gate = nn.Conv2d(EMBED, inner, 1)
        self.scales = nn.ParameterList(nn.Parameter(1 + torch.randint(-64, 65, (1, EMBED, 1, 1)) / 256) for _ in "12")
        for conv in (self.q, self.k, self.v, self.out, self.up, self.down, self.gate):
            weight = torch.randint(-126, 127, conv.weight.shape).float()
            weight[:, 0] = 127
            conv.weight.data = weight * STEP
            assert conv.bias is not None
            conv.bias.data = torch.randint(-127, 128, conv.bias.shape) * STEP

    def norm(self, x: Tensor, which: int) -> Tensor:
        if self.sizes.rotary is None:
            x = x - x.mean(1, keepdim=True)
        y: Tensor = x * torch.rsqrt((x * x).mean(1, keepdim=True) + 2**-16) * self.scales[which]
        return y

    def heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], -1, self.sizes.head_dim, x.shape[3]).transpose(2, 3)

    def keys(self, x: Tensor, turns: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        h = self.norm(x, 0)
        q, k, v = self.heads(self.q(h)), self.heads(self.k(h)), self.heads(self.v(h))
        return (turned(q, *turns), turned(k, *turns), v) if turns else (q, k, v)

    def rest(self, x: Tensor, q: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        B, E, _, T = x.shape
        K, D, S = self.sizes.kv_heads, self.sizes.head_dim, mask.shape[3]
        scores = (q.reshape(B, K, -1, D) @ key.transpose(2, 3)) * D**-0.5
        weights = torch.softmax(scores.view(B, HEADS, T, S) + mask, -1).view(B, K, -1, S)
        x = x + self.out((weights @ value).view(B, HEADS, T, D).transpose(2, 3).reshape(B, E, 1, T))
        h = self.norm(x, 1)
        gpt2 = self.sizes.rotary is None
        inner = F.gelu(self.up(h), approximate="tanh") if gpt2 else F.silu(self.gate(h)) * self.up(h)
        y: Tensor = x + self.down(inner)
        return y


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[3] // 2
    return x * cos + torch.cat((x[..., half:], x[..., :half]), -1) * sin


class Model(nn.Module):
    def __init__(self, sizes: SmallSizes) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.sizes = sizes
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(LAYERS))

    def turns(self, positions: Tensor) -> tuple[Tensor, ...]:
        """cos and signed sin, (1, 1, T, D); nothing where positions are not turned."""
        if self.sizes.rotary is None:
            return ()
        angles = positions[:, None] * torch.tensor(self.sizes.rotary.inv_freq)
        cos, sin = angles.cos() * self.sizes.rotary.gain, angles.sin() * self.sizes.rotary.gain
        return torch.cat((cos, cos), -1)[None, None], torch.cat((-sin, sin), -1)[None, None]

    @torch.no_grad()
    def whole(self, x_TE: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """A whole sequence at once in float32, without a cache: [T, E]."""
        x = torch.tensor(x_TE, dtype=torch.float32).T[None, :, None]
        T = x.shape[3]
        mask = torch.full((1, 1, T, T), -1e4).triu(1)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x = layer.rest(x, *layer.keys(x, self.turns(torch.arange(T).float())), mask)
        y: np.ndarray[Any, Any] = x[0, :, 0].T.numpy()
        return y


class Prefill(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.layers, self.sizes = model.layers, model.sizes
        self.register_buffer("kv", cache(model.sizes))

    def forward(self, x: Tensor, mask: Tensor, pos: Tensor, row: Tensor, *turns: Tensor) -> Tensor:
        kv: Any = self.kv
        p, r, T, K = pos[0], row[0], x.shape[3], self.sizes.kv_heads
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            q, k, v = layer.keys(x, turns)
            kv[2 * i : 2 * i + 1, r : r + K, p : p + T, :] = k
            kv[2 * i + 1 : 2 * i + 2, r : r + K, p : p + T, :] = v
            x = layer.rest(x, q, kv[2 * i : 2 * i + 1, r : r + K], kv[2 * i + 1 : 2 * i + 2, r : r + K], mask)
        return x


class Decode(nn.Module):
    def __init__(self, model: Model) -> None:
        super().__init__()
        self.layers, self.sizes = model.layers, model.sizes
        self.register_buffer("kv", cache(model.sizes))

    def forward(self, x: Tensor, mask: Tensor, wmask: Tensor, *turns: Tensor) -> Tensor:
        kv: Any = self.kv
        s, keep = self.sizes, 1 - wmask
        own, flat = (s.slots, s.kv_heads, s.context, s.head_dim), (1, s.slots * s.kv_heads, s.context, s.head_dim)
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, Layer)
            q, k, v = layer.keys(x, turns)
            keys = kv[2 * i : 2 * i + 1].view(own) * keep + k * wmask
            values = kv[2 * i + 1 : 2 * i + 2].view(own) * keep + v * wmask
            kv[2 * i : 2 * i + 1] = keys.view(flat)
            kv[2 * i + 1 : 2 * i + 2] = values.view(flat)
            x = layer.rest(x, q, keys, values, mask)
        return x


def cache(sizes: SmallSizes) -> Tensor:
    return torch.zeros(2 * LAYERS, sizes.slots * sizes.kv_heads, sizes.context, sizes.head_dim)


@contextmanager
def quiet() -> Iterator[None]:
    """Without coremltools' warnings, that of temporary folders that it leaves to the garbage collector included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        gc.collect()


def build(folder: Path, name: str, sizes: SmallSizes, *, int8: bool = False) -> Small:
    """Convert the three functions of a model and put them into one package."""
    import coremltools as ct
    import coremltools.optimize.coreml as cto

    model = Model(sizes).eval()
    S, T, B, D, integer = sizes.context, sizes.chunk, sizes.slots, sizes.head_dim, torch.int32
    at = {"pos": torch.ones(1, dtype=integer), "row": torch.zeros(1, dtype=integer)}
    one, some = ({"x": torch.zeros(1, EMBED, 1, n), "mask": torch.zeros(1, 1, n, S)} | at for n in (1, T))
    many = {"x": torch.zeros(B, EMBED, 1, 1), "mask": torch.zeros(B, 1, 1, S), "wmask": torch.zeros(B, 1, S, 1)}
    if sizes.rotary is not None:
        for inputs, table in ((one, (1, 1, 1, D)), (some, (1, 1, T, D)), (many, (B, 1, 1, D))):
            inputs |= {"cos": torch.zeros(table), "sin": torch.zeros(table)}
    functions: list[tuple[str, nn.Module, dict[str, Tensor]]] = [
        ("prefill", Prefill(model), some), ("step", Prefill(model), one), ("decode", Decode(model), many)
    ]  # fmt: skip
    descriptor = ct.utils.MultiFunctionDescriptor()
    with quiet():
        for function, module, inputs in functions:
            with torch.no_grad():
                trace: Any = torch.jit.trace
                traced = trace(module.eval(), tuple(inputs.values()), check_trace=False)
            kinds = {n: np.int32 if t.dtype == integer else np.float16 for n, t in inputs.items()}
            converted = ct.convert(
                traced,
                inputs=[ct.TensorType(n, shape=tuple(t.shape), dtype=kinds[n]) for n, t in inputs.items()],
                outputs=[ct.TensorType("y", dtype=np.float16)],
                states=[ct.StateType(ct.TensorType(shape=tuple(cache(sizes).shape), dtype=np.float16), name="kv")],
                minimum_deployment_target=ct.target.iOS18,
                skip_model_load=True,
            )
            if int8:
                config = cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype="int8", granularity="per_channel")
                converted = cto.linear_quantize_weights(converted, cto.OptimizationConfig(global_config=config))
            single = folder / f"{name}-{function}.mlpackage"
            converted.save(str(single))
            descriptor.add_function(str(single), "main", function)
        descriptor.default_function_name = "decode"
        path = folder / f"{name}.mlpackage"
        ct.utils.save_multifunction(descriptor, str(path))
        del converted
    return Small(path=path, model=model, sizes=sizes)


def build_all(folder: Path) -> dict[str, Small]:
    frequencies = tuple(10.0 ** -(i / 4) for i in range(EMBED // HEADS // 2))
    grouped = SmallSizes(kv_heads=2, rotary=Turning(inv_freq=frequencies, gain=1.125))
    return {
        "gpt2": build(folder, "gpt2", SmallSizes()),
        "llama": build(folder, "llama", grouped),
        "int8": build(folder, "int8", grouped, int8=True),
    }
