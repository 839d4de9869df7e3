"""Descriptions of machines: what is read from them, and what is wrong with bad ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mpgpt.config import DtypeName
from mpgpt.core import Span
from mpgpt.errors import UsageError
from mpgpt.machines import Edge, Workload
from mpgpt.model.footprint import shape_of, weight_bytes
from mpgpt.placement.plan import place
from mpgpt.placement.what_if import Machine, Numbers, WhatIf, load_cluster, numbers_of, speed_of
from tests.support.launch import ROOT

GOOD: dict[str, Any] = {
    "model": "gpt2",
    "machines": [{"name": "a", "memory_gb": 8, "read_gb_s": 50, "gflops": 100, "cores": 4}],
    "links": {"default": {"latency_ms": 0.5, "gbit_s": 0.8}},
}


def written(tmp_path: Path, tree: Any) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


def refused(tmp_path: Path, tree: Any) -> str:
    with pytest.raises(UsageError) as caught:
        load_cluster(written(tmp_path, tree))
    return str(caught.value)


def machine(**more: Any) -> Machine:
    return Machine.model_validate(GOOD["machines"][0] | more)


def config(name: str) -> Any:
    return Numbers.model_validate(numbers_of(name)).config


def test_a_small_file(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, GOOD))
    scene = cluster.scene(None, cluster.work, 16)
    (node,) = scene.profile.nodes
    assert (node.host, node.kind, node.cores, node.threads, node.can_be_first_or_last) == ("a", "cpu", 4, 4, True)
    assert (node.memory, node.free) == (8_000_000_000, 6_000_000_000)
    assert (scene.context, scene.slots, scene.profile.shape.layers, scene.profile.links) == (1024, 16, 12, {})


def test_counts_links_and_kinds(tmp_path: Path) -> None:
    machines = [
        GOOD["machines"][0] | {"count": 2},
        GOOD["machines"][0] | {"name": "i", "kind": "ipad", "pinned_layers": "4-7", "free_gb": 2.5},
        GOOD["machines"][0] | {"name": "b", "allowed_layers": 3, "threads": 2},
    ]
    between = [
        {"machines": ["a", "a"], "latency_ms": 0.1, "gbit_s": 8},
        {"machines": ["b", "i"], "latency_ms": 2, "gbit_s": 0.08, "source": "said"},
    ]
    tree = GOOD | {"machines": machines, "links": GOOD["links"] | {"between": between}}
    cluster = load_cluster(written(tmp_path, tree))
    scene = cluster.scene("bfloat16", cluster.work, 4)
    assert [
        (n.rank, n.host, n.can_be_first_or_last, n.pinned_span, n.allowed_span, n.threads) for n in scene.profile.nodes
    ] == [
        (0, "a-1", True, None, None, 4), (1, "a-2", True, None, None, 4),
        (2, "i", False, Span(start=4, stop=8), None, 4), (3, "b", True, None, Span(start=3, stop=4), 2),
    ]  # fmt: skip
    assert scene.profile.nodes[2].free == 2_500_000_000
    assert len(scene.profile.links) == 12
    assert scene.profile.links[0, 1] == scene.profile.links[1, 0] == Edge(latency_s=1e-4, bytes_per_s=1e9)
    assert scene.profile.links[2, 3] == scene.profile.links[3, 2] == Edge(latency_s=2e-3, bytes_per_s=1e7)
    assert scene.profile.links[0, 3] == Edge(latency_s=5e-4, bytes_per_s=1e8)
    assert scene.profile.shape.token_bytes == 3072 and list(scene.profile.others) == ["int8", "int4"]


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2", 124), ("gpt2-medium", 355), ("gpt2-large", 774), ("gpt2-xl", 1558), ("smollm2-135m", 135),
     ("llama-3.1-8b", 8030)],
)  # fmt: skip
def test_the_models_are_as_large_as_their_makers_say(name: str, millions: int) -> None:
    """Weights of all products and the embedding; norms, biases and learned positions are under a hundredth."""
    c = config(name)
    weights = c.layers * c.layer_weights + c.head_weights * (2 if name.startswith("llama") else 1)
    assert weights / 1e6 == pytest.approx(millions, rel=0.01)


def test_bytes_by_dtype() -> None:
    given: dict[DtypeName, int] = {"float32": 4096, "bfloat16": 2048, "float16": 2048, "int8": 1024 + 128, "int4": 640}
    assert {dtype: weight_bytes(1024, 32, dtype) for dtype in given} == given
    shape = shape_of(config("gpt2"), "float32", slots=2, context=100)
    assert shape.layer_bytes == 4 * 12 * 768 * 768
    assert shape.head_bytes == 4 * 768 * 50257
    assert shape.kv_bytes == 2 * 2 * 100 * 768 * 4
    assert shape.token_bytes == 4 * 768
    int8 = shape_of(config("gpt2"), "int8", slots=2, context=100)
    assert int8.layer_bytes == 12 * 768 * 768 + 4 * 9 * 768
    assert (int8.kv_bytes, int8.token_bytes) == (shape.kv_bytes, shape.token_bytes), "activations are float32"
    half = shape_of(config("gpt2"), "bfloat16", slots=2, context=100)
    assert (half.kv_bytes, half.token_bytes) == (shape.kv_bytes // 2, shape.token_bytes)
    int4 = shape_of(config("gpt2"), "int4", slots=2, context=100)
    assert int4.head_bytes == 50257 * 768 + 2 * 50257 * 768 // 32, "the head of int4 is in 8 bit, in groups of 32"


def test_keys_are_read_by_their_earlier_names_too(tmp_path: Path) -> None:
    old = GOOD["machines"][0] | {"reaches": 0.5, "within": "1-3", "fixed": "2"}
    new = GOOD["machines"][0] | {"efficiency": 0.5, "allowed_layers": "1-3", "pinned_layers": "2"}
    scenes = []
    for machine in (old, new):
        cluster = load_cluster(written(tmp_path, GOOD | {"machines": [machine]}))
        scenes.append(cluster.scene(None, cluster.work, 1))
    assert scenes[0].profile.nodes == scenes[1].profile.nodes


def test_speed_is_bandwidth_or_arithmetic_whichever_is_slower() -> None:
    weights = 12 * 768 * 768
    speed = speed_of(machine(efficiency=0.5, step_ms=2), config("gpt2"), "float32")
    seconds = dict(speed.layer_s)
    assert seconds[1] == seconds[2] == pytest.approx(4 * weights / 25e9)
    assert seconds[96] == pytest.approx(2 * 96 * weights / 50e9)
    assert speed.step_s == 2e-3
    assert dict(speed.head_s)[1] == pytest.approx(4 * 768 * 50257 / 25e9)
    assert speed.attend_s == pytest.approx(2 * 768 * 4 / 25e9)
    assert dict(speed_of(machine(gflops=1000), config("gpt2"), "int4").layer_s)[1] == pytest.approx(
        weights * 5 / 8 / 50e9
    )


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    tree = """
model: gtp2
model: gpt2-x
dtype: float8
machines:
  - {name: a, memory_gb: 8, read_gb_s: 0, gflops: 100, nmae: b}
  - {name: "x\\e[2J", memory_gb: 8, read_gb_s: .inf, gflops: yes, fixed: 7-4}
links: {default: {latency_ms: 1}, betwen: []}
"""
    said = refused(tmp_path, tree)
    for words in (
        "model is given twice", "did you mean gpt2-xl?", "dtype is 'float8'", "machines.0.read_gb_s is 0",
        "machines.0.nmae is not a known key; did you mean name?", "machines.1.name is", "machines.1.read_gb_s",
        "machines.1.gflops is true", "machines.1.fixed is '7-4'", "links.default.gbit_s",
        "links.betwen is not a known key; did you mean between?",
    ):  # fmt: skip
        assert words in said, words
    assert "\x1b" not in said and all(line.startswith(str(tmp_path)) for line in said.splitlines())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "nobody-knows"}, "known are gpt2, gpt2-medium"),
        ({"model": {"layers": 12}}, "model.embed is"),
        ({"machines": []}, "machines"),
        ({"machines": [GOOD["machines"][0]] * 2}, "more than one is called 'a'"),
        ({"context": 2000}, "2000, more than the model's 1024 positions"),
        ({"links": GOOD["links"] | {"between": [{"machines": ["a", "z"], "latency_ms": 1, "gbit_s": 1}]}}, "'z'"),
        ({"links": GOOD["links"] | {"between": [{"machines": ["a"], "latency_ms": 1, "gbit_s": 1}]}}, "machines.1"),
        ({"machines": [GOOD["machines"][0] | {"within": "x"}]}, "machines.0.within is 'x'; it should be a range"),
        ({"machines": [GOOD["machines"][0] | {"within": True}]}, "machines.0.within is true"),
        ({"workload": {"sequences": 0}}, "workload.sequences is 0"),
    ],
)
def test_what_cannot_be(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    assert words in refused(tmp_path, GOOD | change)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        load_cluster(tmp_path / "absent.yaml")
    assert "machines" in refused(tmp_path, "")
    assert "should be a mapping" in refused(tmp_path, "- 1")


def test_more_tokens_than_the_context(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, GOOD | {"context": 300}))
    with pytest.raises(UsageError, match=r"256 prompt tokens and 128 new ones are 384, more than the context of 300"):
        cluster.scene(None, cluster.work, 16)


def test_own_numbers(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, GOOD | {"model": numbers_of("gpt2") | {"layers": 3}}))
    assert cluster.model.layers == 3


@pytest.mark.parametrize("name", ["standard", "hybrid"])
def test_the_files_that_are_shipped(name: str) -> None:
    cluster: WhatIf = load_cluster(ROOT / "hostfiles" / "what-if" / f"{name}.yaml")
    scene = cluster.scene(None, cluster.work, 16)
    hosts = [
        line.split()[0] for line in (ROOT / "hostfiles" / name).read_text().splitlines() if line and line[0] != "#"
    ]
    assert len(scene.profile.nodes) == len(hosts) == 3
    assert all(one.source for one in cluster.machines) and cluster.links.default.source
    plan = place(scene.profile, Workload(), "throughput")
    if name == "hybrid":
        assert plan.spans[1] == Span(start=4, stop=8) and scene.profile.nodes[1].kind == "ipad"
    else:
        assert plan.spans[2] is None, "the Pi holds the others up"
