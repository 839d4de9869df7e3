"""The compiled player, operation by operation, against the same in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mpgpt.core import Row
from mpgpt.errors import ModelError
from mpgpt.model.architecture import ACTIVATIONS, ModelConfig
from mpgpt.model.kernels import spread
from mpgpt.model.linear import NATIVE, Kernels, key
from mpgpt.model.loader import Loader
from mpgpt.model.native import library
from mpgpt.model.native.player import NativePlayer
from mpgpt.model.program import (
    Activate,
    Add,
    Attend,
    Buffer,
    Norm,
    Operation,
    Product,
    Program,
    Rotate,
    Select,
    Write,
    inner_leaves,
)

pytestmark = pytest.mark.skipif(isinstance(library.find(), library.Absent), reason="there are no compiled kernels")

CONFIG = ModelConfig(
    family="llama", vocab=50, embed=96, layers=1, heads=6, kv_heads=2, head_dim=20, inner=160, positions=300, eps=1e-5,
    activation="silu", gated=True, tied=False, scales=(0.2,), windows=(0,), inv_freq=tuple(0.5**i for i in range(10)),
)  # fmt: skip
QKV = (CONFIG.heads + 2 * CONFIG.kv_heads) * CONFIG.head_dim
HEADS = CONFIG.heads * CONFIG.head_dim


class Tensors:
    """A ``Source`` of these tensors, in blocks of a few rows."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def blocks(self, name: str, *, transpose: bool = False) -> Iterator[Tensor]:
        whole = self._tensors[name].t() if transpose else self._tensors[name]
        return iter(torch.split(whole, 23))

    def holds(self, name: str) -> bool:
        return name in self._tensors

    def vector(self, name: str) -> Tensor:
        return self._tensors[name]

    def mapped(self, name: str) -> Tensor:
        return self._tensors[name]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def play(
    operations: Sequence[Operation], x_TE: Tensor, tensors: Mapping[str, Tensor], *, rows: Sequence[Row] | None = None,
    config: ModelConfig = CONFIG, dtype: str = "float32", kv_dtype: str = "auto", kernel: str = NATIVE,
) -> Tensor:  # fmt: skip
    """What the hidden states are after these operations; all products by the same ``kernel``."""
    shapes = [(op.inputs, op.outputs) for op in operations if isinstance(op, Product)]
    usual = Kernels(dtype=dtype)
    chosen = {"": NATIVE} | {key(usual.dtype_of(shape[0]), *shape): kernel for shape in shapes}
    kernels = Kernels(dtype=dtype, chosen=chosen, kv_dtype=kv_dtype)
    loader = Loader(config=config, source=Tensors(tensors), kernels=kernels)
    player = NativePlayer([Program(operations=tuple(operations))], None, loader, slots=4, context=300, threads=2)
    whole = [Row(slot=0, start=0, ids=(0,) * len(x_TE), outputs=len(x_TE))]
    return player.play(rows or whole, x_TE, lambda: None)


def product(source: Buffer, target: Buffer, name: str, inputs: int, outputs: int, **options: object) -> Product:
    return Product(
        source=source, target=target, names=(name,), inputs=inputs, outputs=outputs, biased=False, **options  # type: ignore[arg-type]
    )  # fmt: skip


def into(target: Buffer, width: int) -> tuple[Product, dict[str, Tensor]]:
    """Brings hidden states into a buffer of ``width``, and the weight for it."""
    return product(Buffer.HIDDEN, target, "into", CONFIG.embed, width), {
        "into.weight": random(width, CONFIG.embed, seed=9) / 8
    }


def back(source: Buffer, width: int) -> tuple[list[Operation], dict[str, Tensor]]:
    """Adds what is in a buffer to the hidden states, by way of a weight."""
    operations: list[Operation] = [
        product(source, Buffer.CHANGE, "back", width, CONFIG.embed),
        Add(source=Buffer.CHANGE, target=Buffer.HIDDEN),
    ]
    return operations, {"back.weight": random(CONFIG.embed, width, seed=10) / 8}


def through(
    buffer: Buffer,
    width: int,
    operations: Sequence[Operation],
    result: Buffer,
    out: int,
    x_TE: Tensor,
    **options: object,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(hidden states that the player gives, the buffer's contents in float64, the weights): the operations between
    bringing hidden states into ``buffer`` and adding those of ``result``."""
    first, one = into(buffer, width)
    last, two = back(result, out)
    tensors = {**one, **two, **options.pop("tensors", {})}  # type: ignore[dict-item]
    got = play([first, *operations, *last], x_TE, tensors, **options)  # type: ignore[arg-type]
    return got, x_TE.double() @ tensors["into.weight"].double().t(), tensors


def near(got: Tensor, expected: Tensor, bound: float = 2e-6) -> None:
    assert (got - expected).abs().max() <= bound * max(1.0, expected.abs().max().item())


@pytest.mark.parametrize("width", [96, 100, 15])
def test_norms(width: int) -> None:
    config, x_TE = replace(CONFIG, embed=width), random(5, width) * 3 + 1
    weight, bias = random(width, seed=1), random(width, seed=2)
    tensors = {"n.weight": weight, "n.bias": bias}
    for centred in (False, True):
        norm = Norm(source=Buffer.HIDDEN, target=Buffer.HIDDEN, name="n", centred=centred)
        x = x_TE.double()
        if centred:
            expected = F.layer_norm(x, (width,), weight.double(), bias.double(), config.eps)
        else:
            expected = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.eps) * weight
        near(play([norm], x_TE, tensors, config=config), expected)


def test_norms_of_heads() -> None:
    """Of queries and of keys, each head by itself; values stay."""
    x_TE, weight = random(4, CONFIG.embed), random(20, seed=1)
    norm = Norm(source=Buffer.QKV, target=Buffer.QKV, name="n", centred=False, heads=(6, 8))
    got, qkv, tensors = through(Buffer.QKV, QKV, [norm], Buffer.QKV, QKV, x_TE, tensors={"n.weight": weight})
    keys = qkv.view(4, 10, 20)[:, 6:8]
    keys.copy_(keys * torch.rsqrt(keys.square().mean(-1, keepdim=True) + CONFIG.eps) * weight)
    near(got, x_TE + qkv @ tensors["back.weight"].double().t())


@pytest.mark.parametrize("rows", [1, 2, 3, 9, 40])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 96), (100, 33), (7, 200), (1200, 80)])
def test_products_of_floats(rows: int, inputs: int, outputs: int) -> None:
    """Within the rounding of their format; with a bias, of weights that lie transposed."""
    config = replace(CONFIG, embed=inputs, inner=outputs, gated=False)
    weight, bias, x_TE = random(outputs, inputs, seed=1), random(outputs, seed=2), random(rows, inputs)
    out = random(inputs, outputs, seed=3) / 8
    tensors = {"w.weight": weight.t().contiguous(), "w.bias": bias, "back.weight": out}
    op = replace(product(Buffer.HIDDEN, Buffer.INNER, "w", inputs, outputs), biased=True, transposed=True)
    last: list[Operation] = [
        product(Buffer.INNER, Buffer.CHANGE, "back", outputs, inputs, leaves=inner_leaves(outputs)),
        Add(source=Buffer.CHANGE, target=Buffer.HIDDEN),
    ]
    for dtype in ("float32", "float16", "bfloat16"):
        held = getattr(torch, dtype)
        one, two = weight.to(held).double(), out.to(held).double()
        expected = x_TE + (x_TE.double() @ one.t() + bias) @ two.t()
        near(play([op, *last], x_TE, tensors, config=config, dtype=dtype), expected, 1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 9, 40])
@pytest.mark.parametrize("leaves", [(), (64, 128, 192), (32, 96, 192)])
def test_products_of_whole_numbers_are_exact(rows: int, leaves: tuple[int, ...]) -> None:
    """The largest numbers too: turned before, they are turned back to what they were."""
    dice = torch.Generator().manual_seed(rows)
    weight = torch.randint(-127, 128, (192, 192), generator=dice).float()
    x = torch.randint(-127, 128, (rows, 192), generator=dice).float()
    edges = [0, *(leaves or (192,))]
    block = min(64, *(edge & -edge for edge in edges[1:]))
    for start, stop in itertools.pairwise(edges):
        x[:, start] = 127  # of each leaf and output the largest, so that scales are whole
        x[0, start:stop], weight[0, start:stop] = 127, -127
    weight[:, 0] = 127
    config = replace(CONFIG, embed=192, inner=192)

    def turned(matrix: Tensor) -> Tensor:
        return spread(matrix.reshape(-1, block)).view(matrix.shape)

    operations: list[Operation] = [
        product(Buffer.HIDDEN, Buffer.CHANGE, "w", 192, 192, leaves=leaves),
        Add(source=Buffer.CHANGE, target=Buffer.HIDDEN),
    ]
    got = play(operations, turned(x), {"w.weight": turned(weight)}, config=config, dtype="int8")
    near(got, turned(x) + x.double() @ weight.double().t(), 1e-6)


@pytest.mark.parametrize("dtype", ["int8", "int8-group", "int4"])
@pytest.mark.parametrize("leaves", [(), (64, 128, 192), (40, 100, 192)])
def test_products_of_few_bits_are_near(dtype: str, leaves: tuple[int, ...]) -> None:
    weight, x_TE = random(192, 192, seed=1) / 14, random(9, 192)
    operations: list[Operation] = [
        product(Buffer.HIDDEN, Buffer.CHANGE, "w", 192, 192, leaves=leaves),
        Add(source=Buffer.CHANGE, target=Buffer.HIDDEN),
    ]
    got = play(operations, x_TE, {"w.weight": weight}, config=replace(CONFIG, embed=192), dtype=dtype)
    error = (got - (x_TE + x_TE.double() @ weight.double().t())).square().mean().sqrt()
    assert error < {"int8": 0.015, "int8-group": 0.015, "int4": 0.08}[dtype]


def test_rotary_positions() -> None:
    """At far positions too: the angle is rounded to float32 as in training, nothing else."""
    x_TE, start = random(6, CONFIG.embed), 250
    rows = [Row(slot=1, start=start, ids=(0,) * 6, outputs=6)]
    got, qkv, tensors = through(Buffer.QKV, QKV, [Rotate(buffer=Buffer.QKV, heads=8)], Buffer.QKV, QKV, x_TE, rows=rows)
    angles = (torch.arange(start, start + 6).float()[:, None] * torch.tensor(CONFIG.inv_freq)).double()[:, None]
    heads = qkv.view(6, 10, 20)[:, :8]
    a, b = heads.chunk(2, dim=-1)
    heads.copy_(torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1))
    near(got, x_TE + qkv @ tensors["back.weight"].double().t())


@pytest.mark.parametrize("window", [0, 1, 5, 16, 37])
@pytest.mark.parametrize("heads", [(6, 2), (6, 6), (6, 1), (2, 1)])
@pytest.mark.parametrize(("kv_dtype", "bound"), [("float32", 3e-6), ("float16", 1e-3), ("bfloat16", 1e-2)])
def test_attention(window: int, heads: tuple[int, int], kv_dtype: str, bound: float) -> None:
    """Of a chunk that crosses pages, by rows that see what is before them, a window or all."""
    count, kv = heads
    config, tokens = replace(CONFIG, heads=count, kv_heads=kv), 150
    width, x_TE = (count + 2 * kv) * 20, random(tokens, CONFIG.embed)
    operations: list[Operation] = [
        Write(source=Buffer.QKV, layer=0),
        Attend(source=Buffer.QKV, target=Buffer.MIXED, layer=0, scale=0.3, window=window),
    ]
    got, qkv, tensors = through(
        Buffer.QKV, width, operations, Buffer.MIXED, count * 20, x_TE, config=config, kv_dtype=kv_dtype
    )  # fmt: skip
    q, k, v = torch.split(qkv.view(tokens, -1, 20).transpose(0, 1), [count, kv, kv])
    hidden = torch.arange(tokens)[None, :] > torch.arange(tokens)[:, None]
    if window:
        hidden |= torch.arange(tokens)[None, :] <= torch.arange(tokens)[:, None] - window
    k, v = (side.repeat_interleave(count // kv, dim=0) for side in (k, v))
    weights = (0.3 * q @ k.transpose(1, 2)).masked_fill(hidden, -math.inf).softmax(-1)
    mixed = (weights @ v).transpose(0, 1).reshape(tokens, -1)
    near(got, x_TE + mixed @ tensors["back.weight"].double().t(), bound)


@pytest.mark.parametrize("function", ACTIVATIONS)
def test_activations(function: str) -> None:
    """Also of large numbers and of zero, plain and as a gate."""
    x_TE = random(4, CONFIG.embed)
    x_TE[0], x_TE[1] = 0, x_TE[1] * 40
    torch_function, options = ACTIVATIONS[function]
    for gated, width in ((False, 160), (True, 320)):
        op = Activate(source=Buffer.INNER, target=Buffer.ACTIVE, function=function, gated=gated)
        config = replace(CONFIG, gated=gated)
        got, inner, tensors = through(Buffer.INNER, width, [op], Buffer.ACTIVE, 160, x_TE, config=config)
        active = getattr(F, torch_function)(inner[:, :160], **options) * (inner[:, 160:] if gated else 1)
        near(got, x_TE + active @ tensors["back.weight"].double().t())


def test_select_keeps_the_positions_that_have_an_output() -> None:
    x_TE = random(9, CONFIG.embed)
    rows = [
        Row(slot=0, start=0, ids=(0,) * 4, outputs=2), Row(slot=1, start=0, ids=(0,) * 2, outputs=0),
        Row(slot=2, start=0, ids=(0,) * 3, outputs=1),
    ]  # fmt: skip
    got = play([Select(buffers=(Buffer.HIDDEN, Buffer.QKV))], x_TE, {}, rows=rows)
    assert torch.equal(got[:3], x_TE[[2, 3, 8]])


def test_a_weight_that_is_not_finite_is_refused() -> None:
    weight = random(96, 96)
    weight[50, 3] = math.nan
    with pytest.raises(ModelError, match="w has weights that are no finite numbers"):
        play([product(Buffer.HIDDEN, Buffer.CHANGE, "w", 96, 96)], random(1, 96), {"w.weight": weight})


def test_a_weight_of_another_size_is_refused_before_it_is_written() -> None:
    with pytest.raises(
        ModelError, match=r"w has \(96, 200\) features in and out where config.json asks for \(96, 96\)"
    ):
        play([product(Buffer.HIDDEN, Buffer.CHANGE, "w", 96, 96)], random(1, 96), {"w.weight": random(200, 96)})
