"""Placing layers, against every way there is; and what is predicted of a plan, against sums done another way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from even_split import divide
from mpgpt.core import Request, Span
from mpgpt.engine.scheduler import CHUNK, Scheduler
from mpgpt.errors import UsageError
from mpgpt.machines import ClusterProfile, Edge, Links, Node, Shape, Speed, Workload
from mpgpt.placement.costs import chunks, interpolate, needs, stage_seconds
from mpgpt.placement.plan import HEAD_SHARE, Plan, alternatives, choose, head_in_layers, place, predict

Spans = tuple[Span | None, ...]
MB = 1_000_000


def span(start: int, stop: int) -> Span:
    return Span(start=start, stop=stop)


def costs(spans: tuple[Span, ...], head: float) -> list[float]:
    return [len(span) + (head if rank == len(spans) - 1 else 0.0) for rank, span in enumerate(spans)]


def every_way(layers: int, ranks: int) -> list[tuple[Span, ...]]:
    cuts = ((0, *inner, layers) for inner in combinations(range(1, layers), ranks - 1))
    return [tuple(Span(start=a, stop=b) for a, b in pairwise(cut)) for cut in cuts]


sizes = st.integers(1, 60).flatmap(lambda layers: st.tuples(st.just(layers), st.integers(1, layers)))
heads = st.floats(0, 40, allow_nan=False)


# -- equal ranks, nothing measured


@settings(max_examples=150, deadline=None, derandomize=True)
@given(sizes, heads)
def test_spans_are_contiguous_disjoint_and_complete(size: tuple[int, int], head: float) -> None:
    layers, ranks = size
    spans = divide(layers, ranks, head)
    assert len(spans) == ranks
    assert [layer for span in spans for layer in range(span.start, span.stop)] == list(range(layers))


@pytest.mark.parametrize("head", [0.0, 0.5, 1.0, 2.7, 6.0, 50.0])
@pytest.mark.parametrize(("layers", "ranks"), [(n, r) for n in range(1, 11) for r in range(1, n + 1)])
def test_no_other_way_is_better(layers: int, ranks: int, head: float) -> None:
    """The busiest rank has the least that it can have, and among those ways the squares add up to the least."""
    best = min((max(c), sum(x * x for x in c)) for c in (costs(way, head) for way in every_way(layers, ranks)))
    ours = costs(divide(layers, ranks, head), head)
    assert (max(ours), sum(x * x for x in ours)) == pytest.approx(best)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes)
def test_without_a_head_no_rank_has_two_layers_more_than_another(size: tuple[int, int]) -> None:
    lengths = [len(span) for span in divide(*size)]
    assert max(lengths) - min(lengths) <= 1


@settings(max_examples=100, deadline=None, derandomize=True)
@given(sizes, heads, heads)
def test_a_heavier_head_never_gives_the_last_rank_more_layers(size: tuple[int, int], a: float, b: float) -> None:
    light, heavy = sorted((a, b))
    assert len(divide(*size, heavy)[-1]) <= len(divide(*size, light)[-1])


def test_gpt2_on_three_ranks() -> None:
    assert [str(span) for span in divide(12, 3, 2.7)] == ["0-4", "5-9", "10-11"]


def test_a_head_heavier_than_all_layers_leaves_its_rank_one_layer() -> None:
    assert [len(span) for span in divide(9, 3, 100.0)] == [4, 4, 1]


def test_one_rank_takes_all_and_as_many_ranks_as_layers_take_one_each() -> None:
    assert divide(7, 1, 3.0) == (Span(start=0, stop=7),)
    assert [str(span) for span in divide(4, 4, 3.0)] == ["0", "1", "2", "3"]


def test_a_large_model_on_many_ranks_is_no_problem() -> None:
    assert {len(span) for span in divide(126, 64)} == {1, 2}


@pytest.mark.parametrize(("layers", "ranks"), [(1, 2), (12, 13), (12, 1000)])
def test_more_ranks_than_layers_is_the_users_mistake(layers: int, ranks: int) -> None:
    with pytest.raises(UsageError, match=rf"\b{ranks} ranks.*\b{layers} layers.*-n {layers}\b"):
        divide(layers, ranks, 1.0)


def test_the_head_counts_a_little() -> None:
    """Enough to spare the last rank a layer where layers do not come out even, not so much as to upset an even cut."""
    gpt2 = head_in_layers(50257 * 768, 7_087_872)
    assert gpt2 == pytest.approx(HEAD_SHARE * 5.4456, abs=1e-4)
    assert [str(span) for span in divide(12, 2, gpt2)] == ["0-5", "6-11"]
    assert [len(span) for span in divide(13, 2, gpt2)] == [7, 6]
    assert head_in_layers(0, 10) == 0


def unmeasured(count: int, free: int = 0) -> list[Node]:
    return [Node(rank=r, host=f"h{r}", kind="cpu", memory=0, local_rank=0, threads=1, free=free) for r in range(count)]


def profile_of(
    shape: Shape, nodes: Sequence[Node], links: Links, others: Mapping[str, Shape] | None = None
) -> ClusterProfile:
    return ClusterProfile(shape=shape, nodes=nodes, links=links, others=others or {})


def tiny(layers: int, **sizes: int) -> Shape:
    return Shape(**{"layers": layers, "layer_bytes": 10 * MB, "head_bytes": 10 * MB,
                    "kv_bytes": MB, "token_bytes": 1000} | sizes)  # fmt: skip


def test_where_nobody_measured_layers_are_shared_evenly_and_too_many_ranks_are_left_out() -> None:
    plan = place(profile_of(tiny(12), unmeasured(3), {}), Workload(), "throughput")
    assert plan.spans == divide(12, 3, HEAD_SHARE)
    assert (plan.single_rate, plan.decode_rate, plan.overall_rate, plan.first_token_s) == (0, 0, 0, 0)
    plan = place(profile_of(tiny(2), unmeasured(4), {}), Workload(), "latency")
    assert plan.spans == (span(0, 1), span(1, 2), None, None)
    assert place(profile_of(tiny(12), unmeasured(3), {}), Workload(), "latency", ranks=1).spans == (
        span(0, 12),
        None,
        None,
    )


# -- measured ranks, against every way


@dataclass(frozen=True, kw_only=True)
class Case:
    shape: Shape
    nodes: tuple[Node, ...]
    links: dict[tuple[int, int], Edge]
    workload: Workload

    @property
    def profile(self) -> ClusterProfile:
        return profile_of(self.shape, self.nodes, self.links)


def seconds_of(points: tuple[tuple[int, float], ...], rows: int) -> float:
    if rows > points[-1][0]:
        return points[-1][1] / points[-1][0] * rows
    return float(np.interp(rows, [r for r, _ in points], [s for _, s in points])) if rows else 0.0


def steps_of(workload: Workload, k: int, chunk: int) -> list[tuple[float, int, int, int, float]]:
    """(how many, tokens, rows, outputs, context) of a request's steps, its part of those that it shares."""
    steps, start = [], 0
    for size in chunks(workload.prompt_tokens, chunk):
        steps.append((1.0, size, 1, int(start + size == workload.prompt_tokens), start + (size - 1) / 2))
        start += size
    left, rows = workload.sequences, math.ceil(workload.sequences / k)
    while left:
        share = (workload.new_tokens - 1) / workload.sequences
        steps.append((share, min(rows, left), min(rows, left), min(rows, left), start + workload.new_tokens / 2))
        left -= min(rows, left)
    return steps


def one_token(workload: Workload) -> list[tuple[float, int, int, int, float]]:
    return [(1.0, 1, 1, 1, workload.prompt_tokens + workload.new_tokens / 2)]


def parts(case: Case, spans: Spans, steps: list[tuple[float, int, int, int, float]]) -> tuple[list[float], ...]:
    """(stages' seconds, links' seconds for bytes alone, links' seconds with latency), spelled out."""
    way = [(r, len(s) if s else 0) for r, s in enumerate(spans) if s or r == 0]
    stages, sending, hops = [], [], []
    for place_, (rank, layers) in enumerate(way):
        speed, last = case.nodes[rank].speed, place_ == len(way) - 1
        assert speed
        stages.append(sum(
            n * (speed.step_s + layers * (seconds_of(speed.layer_s, tokens) + speed.attend_s * tokens * context)
                 + (seconds_of(speed.head_s, outputs) if last else 0.0))
            for n, tokens, _, outputs, context in steps
        ))  # fmt: skip
        after = 0 if last else way[place_ + 1][0]
        if after == rank:
            continue
        edge, wide = case.links[rank, after], case.shape.token_bytes if layers else 0
        sizes = [32 + 4 * outputs if last else 32 + 88 * rows + (4 + wide) * tokens
                 for _, tokens, rows, outputs, _ in steps]  # fmt: skip
        sending.append(sum(step[0] * size / edge.bytes_per_s for step, size in zip(steps, sizes, strict=True)))
        hops.append(sending[-1] + sum(step[0] for step in steps) * edge.latency_s)
    return stages, sending, hops


def ways(case: Case) -> Iterator[Spans]:
    """All that the constraints leave, tried one by one."""
    layers, ranks = case.shape.layers, len(case.nodes)
    for bars in combinations(range(layers + ranks - 1), ranks - 1):
        counts = [b - a - 1 for a, b in pairwise((-1, *bars, layers + ranks - 1))]
        starts = [sum(counts[:r]) for r in range(ranks)]
        spans = tuple(span(s, s + n) if n else None for s, n in zip(starts, counts, strict=True))
        if all(may(case.shape, node, s) for node, s in zip(case.nodes, spans, strict=True)):
            yield spans


def may(shape: Shape, node: Node, s: Span | None) -> bool:
    if s is None:
        return node.pinned_span is None
    first, last = s.start == 0, s.stop == shape.layers
    held = len(s) * (shape.layer_bytes + shape.kv_bytes) + last * shape.head_bytes
    layers = set(range(s.start, s.stop))
    return (
        (not node.free or held * 1.1 + 64 * MB <= node.free + 1)
        and (node.can_be_first_or_last or not (first or last))
        and (node.pinned_span is None or s == node.pinned_span)
        and (node.allowed_span is None or layers <= set(range(node.allowed_span.start, node.allowed_span.stop)))
    )


def count(spans: Spans) -> int:
    return sum(s is not None for s in spans)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    layers, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    unit = st.integers(1, 6)

    def speed() -> Speed:
        a, b, c = sorted((draw(unit), draw(unit), draw(unit)))
        h = draw(unit)
        return Speed(
            layer_s=((1, a * 1e-3), (4, b * 1e-3), (8, c * 1.5e-3)), head_s=((1, h * 1e-3), (4, h * 1.5e-3)),
            attend_s=draw(st.sampled_from([0.0, 1e-6])), step_s=draw(st.sampled_from([0.0, 5e-4, 1e-2])),
        )  # fmt: skip

    def some() -> Span:
        start = draw(st.integers(0, layers - 1))
        return span(start, draw(st.integers(start + 1, layers)))

    def node(rank: int) -> Node:
        kind = draw(st.sampled_from(["free", "free", "free", "within", "fixed", "inner"]))
        return Node(
            rank=rank, host=f"h{rank}", kind="cpu", memory=0, local_rank=0, threads=1, speed=speed(),
            free=draw(st.sampled_from([0, 0, 0, 80, 90, 110])) * MB, can_be_first_or_last=kind != "inner",
            allowed_span=some() if kind == "within" else None, pinned_span=some() if kind == "fixed" else None,
        )  # fmt: skip

    links = {
        (a, b): Edge(latency_s=draw(unit) * 1e-4, bytes_per_s=draw(st.sampled_from([1e3, 1e4, 1e6, 1e7])))
        for a in range(ranks)
        for b in range(ranks)
        if a != b
    }
    workload = Workload(sequences=draw(st.integers(1, 9)), prompt_tokens=draw(st.integers(1, 20)),
                        new_tokens=draw(st.integers(1, 12)))  # fmt: skip
    shape = tiny(layers, token_bytes=draw(st.sampled_from([2, 1000])))
    return Case(shape=shape, nodes=tuple(node(r) for r in range(ranks)), links=links, workload=workload)


def best(case: Case, k: int) -> tuple[float, float]:
    """(least greatest, least sum among those) for requests, over all ways with k ranks."""
    steps, found = steps_of(case.workload, k, 8), []
    for spans in ways(case):
        if count(spans) == k:
            stages, sending, hops = parts(case, spans, steps)
            found.append((max(stages + sending), sum(stages) + sum(hops)))
    least = min(greatest for greatest, _ in found)
    return least, min(total for greatest, total in found if greatest <= least * (1 + 1e-9))


def check_form(case: Case, plan: Plan) -> None:
    have = [s for s in plan.spans if s]
    assert [layer for s in have for layer in range(s.start, s.stop)] == list(range(case.shape.layers))
    assert plan.spans in set(ways(case))
    assert [share.span for share in plan.shares] == list(plan.spans)
    assert [share.rank for share in plan.shares] == list(range(len(case.nodes)))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_throughput_is_the_best_of_all_ways(case: Case) -> None:
    possible = {count(spans) for spans in ways(case)}
    if not possible:
        with pytest.raises(UsageError):
            place(case.profile, case.workload, "throughput")
        return
    plans = alternatives(case.profile, case.workload, "throughput")
    assert [plan.ranks for plan in plans] == sorted(possible)
    for plan in plans:
        check_form(case, plan)
        stages, sending, hops = parts(case, plan.spans, steps_of(case.workload, plan.ranks, 8))
        ours = max(stages + sending), sum(stages) + sum(hops)
        assert ours == pytest.approx(best(case, plan.ranks), rel=1e-7)
    chosen = place(case.profile, case.workload, "throughput")
    top = max(plan.overall_rate for plan in plans)
    assert chosen == max((p for p in plans if p.overall_rate >= 0.99 * top), key=lambda p: p.ranks) == choose(plans)
    for k in range(1, len(case.nodes) + 1):
        if k in possible:
            exactly = place(case.profile, case.workload, "throughput", ranks=k)
            assert exactly in plans and exactly.ranks == k
        else:
            with pytest.raises(UsageError):
                place(case.profile, case.workload, "throughput", ranks=k)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_latency_is_the_best_of_all_ways(case: Case) -> None:
    seconds: dict[int, list[float]] = {}
    for spans in ways(case):
        stages, _, hops = parts(case, spans, one_token(case.workload))
        seconds.setdefault(count(spans), []).append(sum(stages) + sum(hops))
    if not seconds:
        with pytest.raises(UsageError):
            place(case.profile, case.workload, "latency")
        return
    plans = alternatives(case.profile, case.workload, "latency")
    assert {plan.ranks: pytest.approx(1 / plan.single_rate, rel=1e-7) for plan in plans} == {
        k: min(found) for k, found in seconds.items()
    }
    for plan in plans:
        check_form(case, plan)
    chosen = place(case.profile, case.workload, "latency")
    fastest = min(min(found) for found in seconds.values())
    assert 1 / chosen.single_rate <= fastest / 0.989
    assert all(plan.single_rate < 0.991 / fastest for plan in plans if plan.ranks < chosen.ranks), (
        "fewer would do as well"
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(cases())
def test_what_is_predicted_is_what_the_parts_add_up_to(case: Case) -> None:
    w = case.workload
    for spans in list(ways(case))[:4]:
        plan, k = predict(spans, case.profile, w, "latency"), count(spans)
        stages, _, hops = parts(case, spans, one_token(w))
        assert plan.single_rate == pytest.approx(1 / (sum(stages) + sum(hops)))
        assert sum(share.single_s for share in plan.shares) == pytest.approx(sum(stages))
        rows, context = math.ceil(w.sequences / k), w.prompt_tokens + w.new_tokens / 2
        split = [rows] * (w.sequences // rows) + [w.sequences % rows] * bool(w.sequences % rows)
        stages, sending, _ = parts(case, spans, [(1.0, n, n, n, context) for n in split])
        around, _, hops = parts(case, spans, [(1.0, rows, rows, rows, context)])
        assert plan.decode_rate == pytest.approx(w.sequences / max([*stages, *sending, sum(around) + sum(hops)]))
        stages, sending, _ = parts(case, spans, steps_of(w, k, 8))
        assert max(share.busy_s for share in plan.shares) * w.new_tokens == pytest.approx(max(stages))
        assert plan.overall_rate <= w.new_tokens / max(stages + sending) * (1 + 1e-9)
        assert plan.first_token_s >= sum(parts(case, spans, steps_of(w, k, 8)[:1])[0]) * (1 - 1e-9)


# -- single figures, by hand


def flat(layer_s: float, *, head_s: float = 0.0, step_s: float = 0.0, rank: int = 0, **more: Any) -> Node:
    """A rank to which a row more costs nothing."""
    speed = Speed(layer_s=((1, layer_s), (96, layer_s)), head_s=((1, head_s), (96, head_s)), step_s=step_s)
    node = Node(rank=rank, host=f"h{rank}", kind="cpu", memory=0, local_rank=0, threads=1, speed=speed)
    return replace(node, **more)


def wires(count: int, latency_s: float = 0.0) -> dict[tuple[int, int], Edge]:
    edge = Edge(latency_s=latency_s, bytes_per_s=1e12)
    return {(a, b): edge for a in range(count) for b in range(count) if a != b}


def test_interpolation() -> None:
    points = ((2, 1.0), (4, 2.0), (8, 3.0))
    assert [interpolate(points, rows) for rows in (0, 1, 2, 3, 4, 6, 8, 16)] == [0, 1, 1, 1.5, 2, 2.5, 3, 6]
    assert [interpolate(((4, 2.0),), rows) for rows in (1, 4, 6)] == [2, 2, 3]


def test_stage_seconds() -> None:
    speed = Speed(layer_s=((1, 2.0), (3, 4.0)), head_s=((1, 10.0),), attend_s=0.5, step_s=0.25)
    node = replace(flat(1.0), speed=speed)
    assert stage_seconds(node, 4, rows=2, outputs=0, context=6.0) == 0.25 + 4 * (3.0 + 0.5 * 2 * 6)
    assert stage_seconds(node, 1, rows=1, outputs=1, context=0.0) == 0.25 + 2 + 10
    assert stage_seconds(node, 0, rows=3, outputs=0, context=9.0) == 0.25


@pytest.mark.parametrize("length", [1, 47, 48, 95, 96, 97, 144, 145, 200, 256, 1000])
def test_a_prompt_is_cut_as_the_scheduler_cuts_it(length: int) -> None:
    scheduler = Scheduler(slots=1, context=2000, stages=4)
    scheduler.add(Request(ids=tuple(range(length)), max_new_tokens=1))
    cut = []
    while flight := scheduler.next():
        cut.append(flight.step.tokens)
    assert chunks(length, CHUNK) == cut


def test_two_equal_ranks_by_hand() -> None:
    """8 sequences in two steps of 4 on stages of 4 ms each, hops of 1 ms."""
    nodes, links = [flat(1e-3, rank=0), flat(1e-3, rank=1)], wires(2, 1e-3)
    plan = predict(
        (span(0, 4), span(4, 8)),
        profile_of(tiny(8), nodes, links),
        Workload(prompt_tokens=96, new_tokens=11),
        "latency",
    )
    assert 1 / plan.single_rate == pytest.approx(10e-3, rel=1e-3)
    assert plan.decode_rate == pytest.approx(8 / 10e-3, rel=1e-3), "two steps of 4 ms do not fill 10 ms"
    # A prompt of 96 is two chunks of 48, one behind the other: 4 + 4 + 1 + 4 + 1.
    assert plan.first_token_s == pytest.approx(14e-3, rel=1e-3)
    assert [share.busy_s for share in plan.shares] == pytest.approx([(2 + 10 * 2 / 8) * 4e-3 / 11] * 2)
    # Seven more prompts of 8 ms behind it, then ten ways around.
    assert plan.overall_rate == pytest.approx(8 * 11 / (14e-3 + 7 * 8e-3 + 10 * 10e-3), rel=1e-3)


def test_ranks_that_share_too_few_cores_are_stretched() -> None:
    spans, workload = (span(0, 2), span(2, 8)), Workload(prompt_tokens=1, new_tokens=1000)
    apart = [flat(1e-3, rank=0), flat(1e-3, rank=1)]
    shared = [replace(node, host="one", cores=1) for node in apart]
    enough = [replace(node, host="one", cores=2) for node in apart]
    plans = [
        predict(spans, profile_of(tiny(8), nodes, wires(2)), workload, "throughput")
        for nodes in (apart, enough, shared)
    ]
    assert plans[0] == plans[1]
    assert plans[0].single_rate == plans[2].single_rate, "one at a time they do not meet"
    assert plans[0].decode_rate == pytest.approx(8 / 12e-3, rel=1e-3)
    assert plans[2].decode_rate == pytest.approx(8 / 16e-3, rel=1e-3)
    busy = [share.busy_s for share in plans[2].shares]
    assert busy[1] / plans[0].shares[1].busy_s == pytest.approx(8 / 6)
    assert busy[0] / busy[1] == pytest.approx(2 / 6)


def test_two_ranks_on_one_core_are_no_better_than_one() -> None:
    nodes = [flat(1e-3, rank=r, host="one", cores=1, step_s=1e-4) for r in range(2)]
    plan = place(profile_of(tiny(8), nodes, wires(2)), Workload(), "throughput")
    assert plan.spans == (span(0, 8), None)


def test_ranks_that_share_a_core_get_half_as_much() -> None:
    nodes = [flat(1e-3, rank=0, host="one"), flat(1e-3, rank=1, host="one"), flat(1e-3, rank=2)]
    plan = place(profile_of(tiny(12), nodes, wires(3)), Workload(sequences=24), "throughput", ranks=3)
    assert [len(s) for s in plan.spans if s] == [3, 3, 6]
    plan = place(profile_of(tiny(12), nodes, wires(3)), Workload(sequences=24), "throughput", ranks=2)
    assert plan.spans == (span(0, 6), None, span(6, 12)), (
        "they are as slow as each other, but not if only one takes part"
    )


def test_a_slow_rank_is_left_out_when_that_is_faster() -> None:
    nodes = [flat(1e-3, rank=0), flat(50e-3, rank=1), flat(1e-3, rank=2)]
    assert place(profile_of(tiny(8), nodes, wires(3, 1e-4)), Workload(sequences=32), "throughput").spans[1] is None
    assert place(profile_of(tiny(8), nodes, wires(3, 1e-4)), Workload(sequences=32), "latency").spans[1] is None
    assert place(profile_of(tiny(8), nodes, wires(3)), Workload(sequences=32), "throughput").spans == (
        span(0, 4),
        None,
        span(4, 8),
    )


def test_a_link_is_never_busier_than_the_busiest_must_be() -> None:
    """Rank 1 would do all in no time, but a frame to it takes longer than a third of the layers elsewhere."""
    nodes = [flat(1e-3, rank=0), flat(1e-4, rank=1, can_be_first_or_last=False), flat(1e-3, rank=2), flat(1e-3, rank=3)]
    links = wires(4) | {(0, 1): Edge(latency_s=0, bytes_per_s=1100 / 5e-3)}
    once = Workload(sequences=1, prompt_tokens=1, new_tokens=1)
    plan = place(profile_of(tiny(12), nodes, links), once, "throughput", ranks=3)
    assert plan.spans == (span(0, 4), None, span(4, 8), span(8, 12))


def test_rank_0_without_layers_costs_a_hop_more() -> None:
    nodes = [flat(50e-3, rank=0, step_s=0.5e-3), flat(1e-3, rank=1, step_s=0.5e-3)]
    plan = place(profile_of(tiny(8), nodes, wires(2, 1e-3)), Workload(), "latency")
    assert plan.spans == (None, span(0, 8))
    assert 1 / plan.single_rate == pytest.approx(0.5e-3 + 1e-3 + 8.5e-3 + 1e-3, rel=1e-3)
    assert plan.shares[0].memory == 0 and plan.shares[0].single_s == pytest.approx(0.5e-3)


def test_more_ranks_for_throughput_fewer_for_latency_when_as_good() -> None:
    nodes = [flat(1e-3, rank=r) for r in range(2)]
    free = place(profile_of(tiny(8), nodes, wires(2)), Workload(sequences=1, prompt_tokens=1), "throughput")
    assert free.ranks == 2, "one sequence, and nothing gained by the second rank; but its owner brought it"
    assert place(profile_of(tiny(8), nodes, wires(2)), Workload(), "latency").spans == (span(0, 8), None)


def test_a_faster_rank_never_makes_the_plan_worse() -> None:
    values = []
    for factor in (4.0, 2.0, 1.0, 0.5, 0.25):
        nodes = [flat(1e-3, rank=0), flat(1e-3 * factor, rank=1), flat(2e-3, rank=2, head_s=3e-3)]
        plan = place(profile_of(tiny(16), nodes, wires(3, 1e-4)), Workload(sequences=24), "throughput")
        values.append(plan.overall_rate)
        assert plan.first_token_s > 0
    assert values == sorted(values)


def test_large_rings_are_planned() -> None:
    nodes = [flat(1e-3 * (1 + r % 3), rank=r) for r in range(40)]
    plans = alternatives(profile_of(tiny(48), nodes, wires(40, 1e-5)), Workload(sequences=40), "throughput")
    ranks = [plan.ranks for plan in plans]
    assert ranks[0] == 1 and ranks[-1] == 40 and ranks == sorted(set(ranks)) and len(ranks) < 32
    fast = place(profile_of(tiny(48), nodes, wires(40, 1e-5)), Workload(sequences=40), "throughput", ranks=14)
    assert {rank % 3 for rank, s in enumerate(fast.spans) if s} == {0}


# -- what there is no plan for


def refused(shape: Shape, nodes: Sequence[Node], others: Mapping[str, Shape] | None = None, **more: Any) -> str:
    with pytest.raises(UsageError) as caught:
        place(profile_of(shape, nodes, wires(len(nodes)), others), Workload(), "throughput", **more)
    unknown = [replace(node, speed=None) for node in nodes]
    with pytest.raises(UsageError) as again:
        place(profile_of(shape, unknown, {}, others), Workload(), "throughput", **more)
    assert str(again.value) == str(caught.value), "the same sentence where nobody measured"
    return str(caught.value)


def test_a_model_that_is_too_large_says_what_would_fit() -> None:
    shape = tiny(32, layer_bytes=130 * MB, head_bytes=100 * MB)
    nodes = [flat(1e-3, rank=r, free=1400 * MB) for r in range(3)]
    half = replace(shape, layer_bytes=100 * MB)
    small = replace(shape, layer_bytes=33 * MB)
    assert needs(shape) == round((32 * 131 + 100) * MB * 1.1) + 64 * MB
    assert refused(shape, nodes) == "the model needs 4.8 GB, the ranks have 4.2 GB"
    said = refused(shape, nodes, others={"bfloat16": half, "int8": small, "int4": small})
    assert said == "the model needs 4.8 GB, the ranks have 4.2 GB; bfloat16 would need 3.7 GB"
    nodes = [flat(1e-3, rank=r, free=1000 * MB) for r in range(3)]
    said = refused(shape, nodes, others={"bfloat16": half, "int8": small})
    assert said == "the model needs 4.8 GB, the ranks have 3.0 GB; int8 would need 1.4 GB"
    assert refused(shape, nodes, others={"bfloat16": half}).endswith("no other dtype would fit either")
    assert refused(shape, nodes[:1]) == "the model needs 4.8 GB, the only rank has 1.0 GB"


def test_a_model_that_fits_in_sum_but_not_in_pieces() -> None:
    shape = tiny(2, layer_bytes=1000 * MB)
    said = refused(shape, [flat(1e-3, rank=r, free=1100 * MB) for r in range(4)])
    assert "cannot be cut" in said and "rank 3 has room for 0 of 2 layers" in said
    assert (
        place(
            profile_of(shape, [flat(1e-3, rank=r, free=1300 * MB) for r in range(4)], wires(4)), Workload(), "latency"
        ).ranks
        == 2
    )


def test_fixed_layers_that_cannot_be() -> None:
    def pinned_span(rank: int, start: int, stop: int, **more: Any) -> Node:
        return flat(1e-3, rank=rank, pinned_span=span(start, stop), **more)

    assert "rank 1 on h1 is fixed to layers 4-8, but the model's last is 7" in refused(
        tiny(8), [flat(1e-3), pinned_span(1, 4, 9)]
    )
    assert "do not come after layers 2-5 of rank 0" in refused(tiny(8), [pinned_span(0, 2, 6), pinned_span(1, 4, 8)])
    assert "can run 2-4 only" in refused(tiny(8), [flat(1e-3), pinned_span(1, 4, 6, allowed_span=span(2, 5))])
    assert "neither the first layer nor the last" in refused(
        tiny(8), [flat(1e-3), pinned_span(1, 4, 8, can_be_first_or_last=False)]
    )
    gap = refused(tiny(8), [pinned_span(0, 0, 2), pinned_span(1, 4, 8)])
    assert gap == "no rank can run layer 2: rank 0 is fixed to 0-1; rank 1 is fixed to 4-7"
    order = refused(tiny(8), [pinned_span(0, 4, 8), flat(1e-3, rank=1)])
    assert "in their order" in order and "rank 0 is fixed to 4-7" in order


def test_ranks_that_cannot_take_what_is_left() -> None:
    assert "rank 1 can run 0-3 only" in refused(
        tiny(8), [flat(1e-3, allowed_span=span(0, 3)), flat(1e-3, rank=1, allowed_span=span(0, 4))]
    )
    assert "rank 0 can have neither" in refused(tiny(8), [flat(1e-3, can_be_first_or_last=False)])


def test_exactly_so_many_ranks() -> None:
    nodes = [flat(1e-3, rank=r) for r in range(3)]
    assert refused(tiny(8), nodes, ranks=4).endswith("exactly 4 ranks have layers; there may be from 1 to 3")
    assert refused(tiny(1), nodes, ranks=2).endswith("there may be 1")


def test_rank_0_keeps_layers_where_measuring_is_no_more_exact() -> None:
    """Of two ranks that are as good but for noise, rank 0 has the layers; one that is far better takes them."""

    def spans(speed: float, tolerance: float) -> tuple[Span | None, ...]:
        nodes = [
            Node(rank=r, host=str(r), kind="cpu", memory=0, local_rank=0, threads=1, speed=Speed(
                layer_s=((1, 1.0 if r == 0 else speed), (96, 9.0)), head_s=((1, 0.0),),
            ))
            for r in range(2)
        ]  # fmt: skip
        links = {pair: Edge(latency_s=0.001, bytes_per_s=1e9) for pair in ((0, 1), (1, 0))}
        shape = Shape(layers=4, layer_bytes=8, head_bytes=8, kv_bytes=8, token_bytes=8)
        return place(profile_of(shape, nodes, links), Workload(), "latency", ranks=1, rank0_tolerance=tolerance).spans

    everything = Span(start=0, stop=4)
    assert spans(0.99, 1.0) == (None, everything) == spans(0.5, 0.97)
    assert spans(0.99, 0.97) == (everything, None)
