"""The simulated ring, against sums by hand, against the plan's prediction, and one way of keeping time against the
other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from even_split import divide
from mpgpt.core import Span
from mpgpt.machines import ClusterProfile, Edge, Links, Node, Shape, Speed, Workload
from mpgpt.placement.costs import chunks, stage_seconds
from mpgpt.placement.plan import predict
from mpgpt.placement.simulator import Report, Traffic, run
from mpgpt.placement.virtual_ring import SharedCoreRing, Tandem

Spans = tuple[Span | None, ...]


def shape(layers: int, token_bytes: int = 1000) -> Shape:
    return Shape(layers=layers, layer_bytes=1, head_bytes=1, kv_bytes=0, token_bytes=token_bytes)


def node(rank: int = 0, layer_s: float = 1e-3, more_s: float = 0.0, cold: float = 1.0, **other: Any) -> Node:
    """A layer takes ``layer_s``, and ``more_s`` for each row more."""
    speed = Speed(
        layer_s=((1, layer_s), (96, layer_s + 95 * more_s)), head_s=((1, layer_s), (96, layer_s + 95 * more_s / 2)),
        attend_s=more_s / 1e4, attend_chunk_s=more_s / 2e4, step_s=layer_s / 10, cold=cold,
    )  # fmt: skip
    one = Node(rank=rank, host=f"h{rank}", kind="cpu", memory=0, local_rank=0, threads=1, speed=speed)
    return replace(one, **other)


def wires(count: int, latency_s: float = 0.0, bytes_per_s: float = 1e12) -> dict[tuple[int, int], Edge]:
    edge = Edge(latency_s=latency_s, bytes_per_s=bytes_per_s)
    return {(a, b): edge for a in range(count) for b in range(count) if a != b}


def profile_of(shape: Shape, nodes: Sequence[Node], links: Links) -> ClusterProfile:
    return ClusterProfile(shape=shape, nodes=nodes, links=links)


def simulate(
    spans: Spans, nodes: list[Node], links: dict[tuple[int, int], Edge], workload: Workload, **more: Any
) -> Report:
    layers = max(span.stop for span in spans if span)
    given = {name: more.pop(name) for name in ("arrival", "seed") if name in more}
    traffic = Traffic(workload=workload, **given)
    return run(spans, profile_of(shape(layers), nodes, links), traffic, **{"slots": 64, "context": 4096} | more)


def test_one_stage_is_a_sum() -> None:
    """One request on one rank: its chunks one after the other, then a step a token."""
    one, workload = node(more_s=1e-5), Workload(sequences=1, prompt_tokens=250, new_tokens=9)
    report = simulate((Span(start=0, stop=4),), [one], {}, workload)
    first, start, cut = 0.0, 0, chunks(250, 96)
    for at, size in enumerate(cut):
        last = at == len(cut) - 1
        first += stage_seconds(one, 4, rows=size, outputs=int(last), context=start + (size - 1) / 2, chunk=True)
        start += size
    rest = [stage_seconds(one, 4, rows=1, outputs=1, context=250 + n) for n in range(8)]
    assert report.ttft_s == pytest.approx((first, first))
    assert report.seconds == pytest.approx(first + sum(rest))
    assert report.decode_tokens_per_s == pytest.approx(8 / sum(rest))
    assert report.tpot_s == pytest.approx((sum(rest) / 8,) * 2)
    assert (report.steps, report.new_tokens, report.waited_s) == (len(cut) + 8, 9, (0, 0))
    assert report.stages[0].utilisation == pytest.approx(1.0) and report.stages[0].queue == 0


def test_equal_stages_make_the_ideal_pipeline() -> None:
    """Four stages and four steps in flight: a step comes out as often as a stage takes for it."""
    nodes = [node(rank, speed=Speed(layer_s=((1, 1e-3),), head_s=((1, 0.0),))) for rank in range(4)]
    spans: Spans = divide(8, 4)
    report = simulate(spans, nodes, wires(4), Workload(sequences=4, prompt_tokens=1, new_tokens=200))
    assert report.decode_tokens_per_s == pytest.approx(500, rel=0.01)
    assert all(stage.utilisation > 0.97 for stage in report.stages)
    alone = simulate(spans, nodes, wires(4), Workload(sequences=1, prompt_tokens=1, new_tokens=200))
    assert alone.decode_tokens_per_s == pytest.approx(125, rel=0.01)
    assert all(stage.utilisation == pytest.approx(0.25, abs=0.01) for stage in alone.stages)


def test_a_hop_takes_its_latency_and_its_bytes() -> None:
    nodes = [node(0), node(1)]
    spans, workload = (
        (Span(start=0, stop=1), Span(start=1, stop=2)),
        Workload(sequences=1, prompt_tokens=1, new_tokens=2),
    )
    near = simulate(spans, nodes, wires(2), workload)
    far = simulate(spans, nodes, wires(2, 5e-3, 1e5), workload)
    nbytes = 32 + 88 + 4 + 1000 + 32 + 4
    assert far.seconds - near.seconds == pytest.approx(2 * (10e-3 + nbytes / 1e5))


def test_rank_0_without_layers_hands_ids_on() -> None:
    nodes, workload = [node(0), node(1)], Workload(sequences=1, prompt_tokens=1, new_tokens=2)
    report = simulate((None, Span(start=0, stop=2)), nodes, wires(2, 5e-3, 1e5), workload)
    steps = [1e-4 + stage_seconds(nodes[1], 2, rows=1, outputs=1, context=n) for n in range(2)]
    assert report.seconds == pytest.approx(sum(steps) + 2 * (10e-3 + (32 + 88 + 4 + 32 + 4) / 1e5))
    assert [(stage.rank, stage.layers) for stage in report.stages] == [(0, 0), (1, 2)]


def test_ranks_that_slept_are_slower_for_one_sequence_alone() -> None:
    nodes = [node(rank, cold=1.5) for rank in range(2)]
    alone, many = (Workload(sequences=n, prompt_tokens=1, new_tokens=100) for n in (1, 2))
    both, one = divide(4, 2), (Span(start=0, stop=4),)
    hot = [stage_seconds(nodes[0], 4, rows=1, outputs=1, context=50.5)]
    split = [stage_seconds(n, 2, rows=1, outputs=at, context=50.5) for at, n in enumerate(nodes)]
    for spans, seconds in ((one, sum(hot)), (both, 1.5 * sum(split))):
        ring = nodes[: len(spans)]
        assert predict(spans, profile_of(shape(4), ring, wires(2)), alone, "latency").single_rate == pytest.approx(
            1 / seconds, rel=0.02
        )
        assert simulate(spans, ring, wires(2), alone).decode_tokens_per_s == pytest.approx(1 / seconds, rel=0.02)
    # With two sequences both ranks have work all the time.
    awake = [node(rank) for rank in range(2)]
    slept, never = (simulate(both, ring, wires(2), many).decode_tokens_per_s for ring in (nodes, awake))
    assert slept == pytest.approx(never, rel=0.03)


def test_a_slow_rank_is_the_bottleneck() -> None:
    nodes = [node(0), node(1, 3e-3), node(2)]
    report = simulate(divide(9, 3), nodes, wires(3, 1e-4), Workload(sequences=12, prompt_tokens=8, new_tokens=64))
    busy = [stage.utilisation for stage in report.stages]
    assert busy[1] > 0.95 and busy[0] < 0.5 and busy[2] < 0.5
    assert report.stages[1].queue > 1 > report.stages[2].queue


def test_a_link_can_be_the_bottleneck() -> None:
    nodes, workload = [node(0), node(1)], Workload(sequences=8, prompt_tokens=4, new_tokens=64)
    spans: Spans = divide(2, 2)
    plan = predict(spans, profile_of(shape(2), nodes, wires(2, 0, 1e5)), workload, "throughput")
    report = simulate(spans, nodes, wires(2, 0, 1e5), workload)
    assert report.decode_tokens_per_s == pytest.approx(plan.decode_rate, rel=0.05)
    assert report.decode_tokens_per_s == pytest.approx(4 / ((32 + 4 * 1068) / 1e5), rel=0.05)


rings = st.tuples(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 200), st.integers(2, 40), st.sampled_from([0.0, 1e-4, 3e-3]),
    st.lists(st.sampled_from([0.5e-3, 1e-3, 2e-3, 2.5e-3]), min_size=5, max_size=5), st.sampled_from([1e5, 1e7, 1e9]),
    st.booleans(),
)  # fmt: skip


def ring_of(case: tuple[Any, ...]) -> tuple[Spans, list[Node], dict[tuple[int, int], Edge], Workload]:
    ranks, sequences, prompt, new, latency_s, layers, bytes_per_s, skip = case
    nodes = [node(rank, layers[rank], layers[rank] / 20, cold=1.2) for rank in range(ranks)]
    have = ranks - 1 if skip and ranks > 1 else ranks
    spans: Spans = (*([None] * (ranks - have)), *divide(2 * have + 1, have, 1.0))
    workload = Workload(sequences=sequences, prompt_tokens=prompt, new_tokens=new)
    return spans, nodes, wires(ranks, latency_s, bytes_per_s), workload


@settings(max_examples=120, deadline=None, derandomize=True)
@given(rings, st.sampled_from([None, 30.0]), st.sampled_from([3, 64]))
def test_both_ways_of_keeping_time_agree(case: tuple[Any, ...], arrival: float | None, slots: int) -> None:
    """The closed form for ranks with cores of their own, and the one that goes event by event."""
    quick, slow = (
        simulate(*ring_of(case), arrival=arrival, slots=slots, ring=ring) for ring in (Tandem, SharedCoreRing)
    )
    assert quick.steps == slow.steps and quick.new_tokens == slow.new_tokens
    for name in ("seconds", "ttft_s", "tpot_s", "waited_s", "decode_tokens_per_s"):
        assert getattr(quick, name) == pytest.approx(getattr(slow, name)), name
    for a, b in zip(quick.stages, slow.stages, strict=True):
        assert (a.utilisation, a.queue) == pytest.approx((b.utilisation, b.queue), abs=1e-9)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(rings, st.sampled_from([None, 30.0]), st.sampled_from([3, 64]))
def test_every_token_is_accounted_for(case: tuple[Any, ...], arrival: float | None, slots: int) -> None:
    spans, nodes, links, workload = ring_of(case)
    heard: list[int] = []
    report = simulate(spans, nodes, links, workload, arrival=arrival, slots=slots, progress=heard.append)
    assert report.new_tokens == workload.sequences * workload.new_tokens == heard[-1]
    assert report.requests == workload.sequences and heard == sorted(set(heard))
    assert report.new_tokens_per_s == pytest.approx(report.new_tokens / report.seconds)
    assert report.tokens_per_s == pytest.approx(
        workload.sequences * (workload.prompt_tokens + workload.new_tokens) / report.seconds
    )
    assert all(0 < stage.utilisation <= 1 + 1e-9 for stage in report.stages)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 4), st.integers(1, 6), st.sampled_from([0.5e-3, 1e-3, 4e-3]), st.sampled_from([0.0, 1e-4, 2e-3]),
    st.lists(st.integers(1, 4), min_size=4, max_size=4),
)  # fmt: skip
def test_the_plan_predicts_what_the_simulation_gives(
    ranks: int, rows: int, layer_s: float, latency_s: float, speeds: list[int]
) -> None:
    """As many sequences as fill all steps alike; ranks of any speed."""
    nodes = [node(rank, layer_s * speeds[rank], layer_s / 50, cold=1.2) for rank in range(ranks)]
    spans: Spans = divide(3 * ranks, ranks)
    links, workload = wires(ranks, latency_s, 1e8), Workload(sequences=ranks * rows, prompt_tokens=32, new_tokens=300)
    plan = predict(spans, profile_of(shape(3 * ranks), nodes, links), workload, "throughput")
    report = simulate(spans, nodes, links, workload)
    assert report.decode_tokens_per_s == pytest.approx(plan.decode_rate, rel=0.10)
    if speeds[0] < max(speeds[:ranks]):  # else those that came first are served first, and the last end alone
        assert report.new_tokens_per_s == pytest.approx(plan.overall_rate, rel=0.15)
    single = Workload(sequences=1, prompt_tokens=32, new_tokens=300)
    assert simulate(spans, nodes, links, single).decode_tokens_per_s == pytest.approx(plan.single_rate, rel=0.03)
    assert simulate(spans, nodes, links, single).ttft_s[0] == pytest.approx(plan.first_token_s, rel=0.03)


@pytest.mark.parametrize(("cores", "slower"), [(1, 3.0), (2, 1.5), (3, 1.0)])
def test_ranks_of_one_host_share_its_cores(cores: int, slower: float) -> None:
    """Three stages of like work on so many cores."""
    nodes = [
        node(rank, host="one", cores=cores, speed=Speed(layer_s=((1, 1e-3), (96, 1e-3)), head_s=((1, 0.0),)))
        for rank in range(3)
    ]
    spans: Spans = divide(6, 3)
    workload = Workload(sequences=12, prompt_tokens=4, new_tokens=200)
    report = simulate(spans, nodes, wires(3), workload)
    assert report.decode_tokens_per_s == pytest.approx(4 / (2e-3 * slower), rel=0.05)
    plan = predict(spans, profile_of(shape(6), nodes, wires(3)), workload, "throughput")
    assert report.decode_tokens_per_s == pytest.approx(plan.decode_rate, rel=0.05)


def test_a_seed_is_a_run() -> None:
    nodes, workload = [node(rank) for rank in range(2)], Workload(sequences=30, prompt_tokens=20, new_tokens=10)

    def once(seed: int) -> Report:
        return simulate(divide(8, 2), nodes, wires(2, 1e-4), workload, arrival=20.0, seed=seed)

    assert once(1) == once(1) != once(2)
    assert once(1).seconds > 1.0, "thirty requests, twenty a second"
    assert once(1).decode_tokens_per_s is None


def test_more_requests_than_slots_wait_for_one() -> None:
    report = simulate(
        (Span(start=0, stop=2),), [node()], {}, Workload(sequences=9, prompt_tokens=4, new_tokens=8), slots=3
    )
    assert report.decode_tokens_per_s is None
    assert report.waited_s[1] > report.ttft_s[1]
    assert report.steps == 3 * 8, "three at a time"


def test_300_ranks_and_many_sequences() -> None:
    nodes = [node(rank, more_s=1e-5) for rank in range(300)]
    spans: Spans = (*divide(126, 126), *[None] * 174)
    report = simulate(
        spans, nodes, wires(300, 1e-4), Workload(sequences=600, prompt_tokens=40, new_tokens=8), slots=600
    )
    assert report.new_tokens == 4800 and len(report.stages) == 126
