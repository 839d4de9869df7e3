"""The start of a ring, step by step: sizes and layers as rank 0 decides them, without any rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpgpt.cluster.bootstrap import choose_sizes, context_of, place_layers
from mpgpt.cluster.ring_config import RingConfig, RingOptions
from mpgpt.core import Span
from mpgpt.errors import UsageError
from mpgpt.machines import ClusterProfile, Edge, Node, Shape, Speed, Workload
from mpgpt.model.known_families import read_config

LAYERS, POSITIONS = 6, 128
RAW = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "max_position_embeddings": POSITIONS,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(RAW))
    return tmp_path


def sizes(
    folder: Path, ranks: int, limits: list[dict[str, Any] | None] | None = None, **options: Any
) -> tuple[dict[str, Any], list[str]]:
    lines: list[str] = []
    wanted = RingOptions(dtype="float32", **{"slots": 8, **options})
    return choose_sizes(folder, wanted, limits or [None] * ranks, ranks, lines.append), lines


def test_a_ring_of_one_has_all_layers(folder: Path) -> None:
    found, lines = sizes(folder, 1)
    assert found == {"config": RAW, "spans": [(0, LAYERS)], "room": {"slots": 8, "context": POSITIONS}} and not lines


def test_several_ranks_are_left_to_be_placed(folder: Path) -> None:
    found, _ = sizes(folder, 2, context=64)
    assert found["spans"] is None and found["room"] == {"slots": 8, "context": 64}


def test_spans_that_are_given(folder: Path) -> None:
    found, _ = sizes(folder, 3, spans=lambda config: (Span(start=0, stop=4), None, Span(start=4, stop=config.layers)))
    assert found["spans"] == [(0, 4), None, (4, LAYERS)]


def test_a_context_that_the_model_lacks(folder: Path) -> None:
    with pytest.raises(UsageError, match=f"--context 129 is more than the model's {POSITIONS} positions"):
        sizes(folder, 1, context=129)
    assert context_of(read_config(RAW), None) == POSITIONS


def held(start: int, stop: int, slots: int = 8, context: int = POSITIONS) -> dict[str, Any]:
    return {"span": (start, stop), "room": {"slots": slots, "context": context}}


def test_a_ring_takes_no_more_than_its_ipad_holds(folder: Path) -> None:
    found, lines = sizes(folder, 2, [None, held(2, 4, slots=2, context=32)])
    assert found["room"] == {"slots": 2, "context": 32}
    assert lines == ["rank 1's iPad has room for 2 sequences of 32 tokens: the ring takes no more"]
    found, lines = sizes(folder, 2, [None, held(2, 4)])
    assert found["room"] == {"slots": 8, "context": POSITIONS} and not lines


def test_layers_that_an_ipads_package_does_not_hold(folder: Path) -> None:
    spans = (Span(start=0, stop=3), Span(start=3, stop=6))
    with pytest.raises(UsageError, match="rank 1's iPad holds layers 2-3, but the rank is to have 3-5"):
        sizes(folder, 2, [None, held(2, 4)], spans=lambda config: spans)
    with pytest.raises(UsageError, match="holds layers 2-3, but the rank is to have none"):
        sizes(folder, 2, [None, held(2, 4)], spans=lambda config: (Span(start=0, stop=6), None))


def profile(*layer_ms: float, free: int = 0) -> ClusterProfile:
    shape = Shape(layers=LAYERS, layer_bytes=1000, head_bytes=100, kv_bytes=10, token_bytes=4)
    nodes = [
        Node(rank=rank, host=f"h{rank}", kind="cpu", memory=0, local_rank=0, threads=1, free=free,
             speed=Speed(layer_s=((1, ms / 1000), (256, ms / 10)), head_s=((1, 1e-5), (256, 1e-4))))
        for rank, ms in enumerate(layer_ms)
    ]  # fmt: skip
    edge = Edge(latency_s=1e-4, bytes_per_s=1e9)
    links = {(a, b): edge for a in range(len(nodes)) for b in range(len(nodes)) if a != b}
    return ClusterProfile(shape=shape, nodes=nodes, links=links, others={})


def placed(found: ClusterProfile, **options: Any) -> tuple[list[tuple[int, int] | None], list[str]]:
    lines: list[str] = []
    wanted = RingOptions(dtype="float32", slots=8, workload=Workload(prompt_tokens=16, new_tokens=16), **options)
    return place_layers(found, wanted, 8, len(found.nodes), lines.append), lines


def test_layers_go_where_they_are_fastest() -> None:
    assert placed(profile(1.0, 1.0)) == ([(0, 3), (3, 6)], [])
    assert placed(profile(2.0, 1.0)) == ([(0, 2), (2, 6)], [])


def test_a_rank_that_is_better_left_without() -> None:
    spans, lines = placed(profile(1.0, 100.0))
    assert spans == [(0, 6), None]
    assert lines == ["rank 1 on h1 has no layers: the ring is faster without it"]
    spans, lines = placed(profile(1.0, 100.0), everyone=True)
    assert spans[1] and not lines


def test_what_travels_to_every_rank() -> None:
    config = RingConfig(
        config=RAW, spans=[(0, 3), None, (3, 6)], dtype="int8", kv_dtype="float16", slots=2, context=32,
        threads=1,
        chosen=[{}, {}, {"x": "y"}],
    )  # fmt: skip
    assert config.members == [0, 2] and config.stages == 2
    assert [config.span(rank) for rank in range(3)] == [Span(start=0, stop=3), None, Span(start=3, stop=6)]
    assert config.kernels(2).dtype == "int8" and config.kernels(2).chosen == {"x": "y"}
    assert config.kernels(0).stored == torch.float16
