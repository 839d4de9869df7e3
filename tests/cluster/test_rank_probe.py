"""What a probe multiplies, counts and reports; never how fast it is."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mpgpt.cluster import rank_probe
from mpgpt.cluster.rank_probe import ROWS, Probe, SyntheticWeights, node_from, probe_ranks
from mpgpt.config import DtypeName
from mpgpt.core import Row, Span
from mpgpt.engine.scheduler import CHUNK
from mpgpt.machines import Node, Speed
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.footprint import GROUP, HIDDEN_BYTES, shape_of
from mpgpt.model.linear import Kernels
from mpgpt.model.slice import Slice, weights_of
from mpgpt.model.weights import Checkpoint, model_config
from mpgpt.transport.link import SoloWorld
from tests.support.models import RANDOM

FREE = 8 << 30


@pytest.mark.parametrize("name", sorted(RANDOM))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_weights_fit_every_architecture(models: dict[str, Path], name: str, dtype: str) -> None:
    """A whole model of them has the real one's bytes, and its logits are numbers."""
    config = model_config(models[name])
    span = Span(start=0, stop=config.layers)
    made = Slice(config, span, SyntheticWeights(config), slots=1, context=64, kernels=Kernels(dtype=dtype))
    real = Slice(config, span, Checkpoint(models[name]), slots=1, context=64, kernels=Kernels(dtype=dtype))
    assert (made.nbytes, made.kv_nbytes) == (real.nbytes, real.kv_nbytes)
    with torch.inference_mode():
        rows = [Row(slot=0, start=0, ids=(1, 2, 3), outputs=3)]
        logits = made.forward(rows, made.embed(rows))
    assert logits.shape == (3, config.vocab) and logits.isfinite().all()


def test_no_weight_is_small() -> None:
    config = replace(model_config_of_8b(), embed=64, inner=96, vocab=300, heads=8, kv_heads=2, head_dim=8)
    for block in SyntheticWeights(config).blocks("layers.3.mlp.up_proj.weight"):
        assert block.shape[1] == 64 and block.abs().min() > 1e-4 and (block < 0).any() and (block > 0).any()


def model_config_of_8b() -> ModelConfig:
    return ModelConfig(
        family="llama", vocab=128256, embed=4096, layers=32, heads=32, kv_heads=8, head_dim=128, inner=14336,
        positions=8192, eps=1e-5, activation="silu", gated=True, tied=False, scales=(128**-0.5,) * 32,
        windows=(0,) * 32, inv_freq=tuple(10000 ** (-i / 64) for i in range(64)),
    )  # fmt: skip


def test_a_large_model_is_measured_within_a_quarter_of_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of 436 MB where 1.4 GB are free: thinner ones, and a part of the head, scaled up again."""
    built: list[Slice] = []

    def build(*arguments: object, **options: object) -> Slice:
        built.append(Slice(*arguments, **options))  # type: ignore[arg-type]
        return built[-1]

    monkeypatch.setattr(rank_probe, "Slice", build)
    config, free = model_config_of_8b(), 1400 << 20
    probe = Probe(config, Kernels(dtype="bfloat16"), 128, free)
    assert built[0].nbytes + built[0].kv_nbytes < free / 4
    monkeypatch.setattr(rank_probe, "time", ticking())
    step = probe.decode(1)
    head_bytes = config.head_weights * 2
    layer_bytes = config.layer_weights * 2
    # Each mark of the clock is a second later than the one before: what is reported is the factor alone.
    layers = len(range(built[0].span.start, built[0].span.stop))
    assert step["head"] * built[0].head_nbytes == pytest.approx(head_bytes)
    assert step["layer"] * (built[0].nbytes - built[0].head_nbytes) / layers == pytest.approx(layer_bytes)


def ticking() -> SimpleNamespace:
    """The module ``time`` with clocks on which every look takes a second."""
    wall, cpu = itertools.count(), itertools.count()
    return SimpleNamespace(perf_counter=lambda: float(next(wall)), thread_time=lambda: float(next(cpu)))


@pytest.mark.parametrize("name", ["gpt2", "qwen3", "mistral"])
def test_a_step_is_taken_apart(models: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock on which every layer takes a second: so do the head and what comes before the first layer's end,
    of which nothing is left for the rest. A model that is small is measured whole, so nothing is scaled."""
    probe = Probe(model_config(models[name]), Kernels(dtype="float32"), 512, FREE)
    monkeypatch.setattr(rank_probe, "time", ticking())
    expected = {"layer": 1.0, "head": 1.0, "rest": 0.0}
    assert probe.decode(4).items() >= expected.items()
    assert probe.prompt().items() >= expected.items()
    assert probe.alone()["attend"] == 0.0


class Rehearsed:
    """A probe whose every step has the processor for a third of the time; alone for all of it."""

    def decode(self, rows: int) -> dict[str, float]:
        return {"layer": 0.1 * rows, "head": 0.01 * rows, "rest": 0.001, "wall": 3.0, "cpu": 1.0}

    def alone(self) -> dict[str, float]:
        return self.decode(1) | {"attend": 0.5, "wall": 2.0, "cpu": 2.0}

    def cold(self) -> float:
        return 1.25

    def prompt(self) -> dict[str, float]:
        return self.decode(CHUNK) | {"attend": 0.25}

    def short_prompt(self) -> dict[str, float]:
        return self.decode(CHUNK // 2)


def test_what_others_take_is_counted(monkeypatch: pytest.MonkeyPatch, models: dict[str, Path]) -> None:
    """Processor time is stretched to time by the clock, apart for a rank alone and for all of them together; but not
    by the half again that three threads on two cores take from each other."""
    monkeypatch.setattr(rank_probe, "Probe", lambda *arguments: Rehearsed())
    world = SoloWorld()
    speed = rank_probe.measure_speed(
        world,
        model_config(models["gpt2"]),
        kernels=Kernels(dtype="float32"),
        context=64,
        share=rank_probe.HostShare(free=1, local_rank=0, crowd=1.5),
    )
    world.close()
    assert speed.cold == 1.25 and [rows for rows, _ in speed.layer_s[-2:]] == [CHUNK // 2, CHUNK]
    assert speed.attend_s == 0.5 and speed.step_s == pytest.approx(0.002) and speed.attend_chunk_s == pytest.approx(0.5)
    for points, one in ((speed.layer_s, 0.1), (speed.head_s, 0.01)):
        assert dict(points)[1] == pytest.approx(one)
        assert all(seconds == pytest.approx(2 * one * rows) for rows, seconds in points if rows > 1)


def test_a_survey_of_one(models: dict[str, Path]) -> None:
    world = SoloWorld()
    nodes, links = probe_ranks(
        world,
        model_config(models["llama"]),
        kernels=Kernels(dtype="float32"),
        threads=1,
        context=256,
    )
    world.close()
    assert not links and len(nodes) == 1
    node = nodes[0]
    assert 0 < node.free < node.memory and node.cores >= 1 and node.host == world.hosts[0] and node.speed
    assert [rows for rows, _ in node.speed.layer_s] == [1, *ROWS, CHUNK // 2, CHUNK] and node.speed.cold >= 1
    assert [rows for rows, _ in node.speed.head_s] == [1, *ROWS]
    assert all(0 < seconds < 10 for _, seconds in node.speed.layer_s + node.speed.head_s)


@pytest.mark.parametrize("pinned_span", [None, Span(start=1, stop=3)])
@pytest.mark.parametrize(
    "speed", [None, Speed(layer_s=((1, 0.1), (8, 0.3)), head_s=((1, 0.5),), attend_s=1e-7, step_s=1e-4)]
)
def test_a_node_survives_json(pinned_span: Span | None, speed: Speed | None) -> None:
    node = Node(
        rank=3,
        host="pi",
        kind="cpu",
        memory=8,
        local_rank=1,
        threads=2,
        cores=4,
        free=5,
        speed=speed,
        pinned_span=pinned_span,
    )
    assert node_from(json.loads(json.dumps(asdict(node)))) == node


DTYPES: list[DtypeName] = ["float32", "bfloat16", "int8", "int4"]


@pytest.mark.parametrize("name", sorted(RANDOM))
def test_a_shape_is_what_a_slice_holds(models: dict[str, Path], name: str) -> None:
    """A plan counts the bytes that will be there."""
    config = model_config(models[name])
    whole_groups = all(weight.inputs % GROUP == 0 for weight in weights_of(config))
    for dtype in DTYPES if whole_groups else DTYPES[:-1]:
        shape = shape_of(config, dtype, 3, 48)
        whole, middle = (
            Slice(config, span, SyntheticWeights(config), slots=3, context=48, kernels=Kernels(dtype=dtype))
            for span in (Span(start=0, stop=config.layers), Span(start=1, stop=2))
        )
        assert shape.layers == config.layers
        assert (shape.layer_bytes, shape.kv_bytes) == (middle.nbytes, middle.kv_nbytes)
        assert shape.layers * shape.layer_bytes + shape.head_bytes == whole.nbytes
        assert shape.token_bytes == config.embed * HIDDEN_BYTES
