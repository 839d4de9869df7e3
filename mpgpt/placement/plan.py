"""Plans: the spans of all ranks, the prediction for them, and the choice of the best.

Knows: what a plan may look like, what is predicted of one, how the best is found and which of several to take.
Must not know: torch, MPI, or any machine: it is arithmetic on a profile.

A step goes from rank 0 through the ranks that have layers, in order, and its result from the last of them to rank 0.
Ranks without layers are skipped; rank 0 always takes part, because requests come in there: without layers it sends
ids to the first rank that has some.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

from mpgpt.core import Span
from mpgpt.machines import ClusterProfile, Shape, Speed, Workload
from mpgpt.placement.costs import (
    Route,
    chunk_of,
    decode_work,
    held_bytes,
    prompt_work,
    request_work,
    single_step_work,
)
from mpgpt.placement.infeasible import explain_infeasible, rank_counts
from mpgpt.placement.search import CostTables, Mask, allowed_pieces

Objective = Literal["throughput", "latency"]

HEAD_SHARE = 0.15
AS_GOOD = 0.99
"""The share of the best value from which on a plan counts as equal: measuring is no more exact."""
RANK0_TOLERANCE = 0.97
"""The share of a plan's value for which measured ranks are placed with layers on rank 0: it takes part anyway."""
ALL_COUNTS = 32
"""The most possible numbers of ranks of which all are tried; of more, steps of two fifths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's part of a plan."""

    rank: int
    span: Span | None
    memory: int
    """Bytes that it needs, headroom included."""
    busy_s: float
    """Seconds for one generated token of the workload: all that it computes for a request, over its new tokens."""
    single_s: float
    """Seconds for one token of a sequence that decodes alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The spans of all ranks, and the prediction for them; all rates are 0 where nobody measured."""

    spans: tuple[Span | None, ...]
    """By rank; None has no layers."""
    objective: Objective
    shares: tuple[Share, ...]
    single_rate: float
    """Tokens a second of one sequence that decodes alone."""
    decode_rate: float
    """Tokens a second of the workload's sequences together while all of them decode."""
    overall_rate: float
    """The same with their prompts counted in: all come at once, from the first prompt to the last token."""
    first_token_s: float
    """Seconds to the first token of the workload's prompt, alone."""

    @property
    def ranks(self) -> int:
        """The number of ranks that have layers."""
        return sum(span is not None for span in self.spans)

    @property
    def value(self) -> float:
        """The rate that the objective maximises."""
        return self.single_rate if self.objective == "latency" else self.overall_rate


def place(
    profile: ClusterProfile,
    workload: Workload,
    objective: Objective,
    *,
    ranks: int | None = None,
    rank0_tolerance: float = 1.0,
) -> Plan:
    """The best plan, with exactly ``ranks`` ranks that have layers if that is given.

    See ``alternatives`` for what is exact about it, ``choose`` for how many ranks it takes. Where no node has a speed,
    the layers are shared evenly among as many ranks as can have some.
    Raises ``UsageError`` when there is no plan, which may suggest another of the profile's dtypes.
    """
    if any(node.speed is None for node in profile.nodes):
        return _unmeasured(profile, ranks)
    return choose(alternatives(profile, workload, objective, ranks=ranks, rank0_tolerance=rank0_tolerance))


def choose(plans: Sequence[Plan]) -> Plan:
    """The best of some plans for the same objective. Of equal ones, that with the most ranks for throughput (their
    owners brought them), with the fewest for latency (each more is one more that can fail)."""
    good = [plan for plan in plans if plan.value >= AS_GOOD * max(plan.value for plan in plans)]
    return max(good, key=lambda plan: plan.ranks if plan.objective == "throughput" else -plan.ranks)


def alternatives(
    profile: ClusterProfile,
    workload: Workload,
    objective: Objective,
    *,
    ranks: int | None = None,
    rank0_tolerance: float = 1.0,
) -> list[Plan]:
    """The best plan with exactly 1, 2, ... ranks that have layers, fewest first, as far as they are possible.

    For ``latency`` the least sum of what stages and hops cost one token. For ``throughput`` the least busy time of the
    busiest stage or link for one of the workload's requests; among the ways to that, the least sum; among those, the
    most even. Both are exact, by dynamic programming, if every rank has cores of its own. Where a host has fewer cores
    than its ranks have threads, they are taken to be slower by that factor, and the plan is made again for those that
    have layers in it, as long as that makes it better. With more than ``ALL_COUNTS`` possible numbers of ranks only
    some are tried, the fewest and the most among them. Below 1, ``rank0_tolerance`` is the share of a plan's value for
    which one that gives rank 0 layers is taken in its stead: measuring is not exact, and rank 0 is there anyway.
    Raises ``UsageError`` when there is none.
    """
    counts = _possible(profile, ranks)
    tried = _some(*counts) if ranks is None else [ranks]
    allowed = allowed_pieces(profile.shape, profile.nodes)

    def found(allowed: Mask) -> list[Plan]:
        tables = CostTables(profile, allowed)
        if objective == "latency":
            return [expect(spans) for spans in tables.min_latency(single_step_work(workload, max(tried)), tried)]
        plans = [expect(spans) for spans in tables.min_bottleneck(workload, tried)]
        return [again(tables, plan) for plan in plans] if tables.crowded else plans

    def expect(spans: Sequence[Span | None]) -> Plan:
        return predict(spans, profile, workload, objective)

    def again(tables: CostTables, plan: Plan) -> Plan:
        next_ = expect(tables.min_bottleneck(workload, [plan.ranks], plan.spans)[0])
        return again(tables, next_) if next_.overall_rate > plan.overall_rate * (1 + 1e-6) else plan

    plans = found(allowed)
    if not plans:
        raise explain_infeasible(profile, counts, ranks=ranks)
    if rank0_tolerance < 1 and any(plan.spans[0] is None for plan in plans):
        allowed[1:, 0] = False
        with_rank0 = {plan.ranks: plan for plan in found(allowed)}
        pairs = [(plan, with_rank0.get(plan.ranks, plan)) for plan in plans]
        plans = [near if near.value >= rank0_tolerance * plan.value else plan for plan, near in pairs]
    return plans


def _possible(profile: ClusterProfile, ranks: int | None) -> tuple[int, int]:
    """The fewest and the most ranks that can have layers. Raises ``UsageError`` if none can, or not ``ranks``."""
    counts = rank_counts(profile.shape, profile.nodes)
    if counts is None or (ranks is not None and not counts[0] <= ranks <= counts[1]):
        raise explain_infeasible(profile, counts, ranks=ranks)
    return counts


def _some(least: int, most: int) -> list[int]:
    """The numbers of ranks to try."""
    if most - least < ALL_COUNTS:
        return list(range(least, most + 1))
    found = [least]
    while found[-1] < most:
        found.append(min(most, max(found[-1] + 1, round(found[-1] * 1.4))))
    return found


def head_in_layers(head_weights: int, layer_weights: int) -> float:
    """The weight of the head, in layers, when layers are shared evenly because nobody measured.

    A decoding step reads all of it, a prompt's chunk nothing, so no one weight is right. Measured on GPT-2 and two
    ranks (``bench/LOG.md``): counted in full, many sequences decode 8% faster; hardly counted, first tokens come 14%
    and whole requests 8% sooner. The latter is what more people wait for.
    """
    return HEAD_SHARE * head_weights / layer_weights


# -- what is predicted of a plan


def predict(spans: Sequence[Span | None], profile: ClusterProfile, workload: Workload, objective: Objective) -> Plan:
    """The plan of given spans, which are contiguous, disjoint and complete.

    Many sequences: while all decode, every stage works on one of the steps that are in flight, or the steps wait for
    the way around; so a token for each of them takes as long as the busiest stage, link or host has to do for all
    steps, or as one step's way, whichever is longer. A host whose ranks have more threads together than it has cores
    does not finish sooner than threads x seconds / cores; its ranks' busy times are stretched by one factor, so that
    the busiest of them is as busy as that.

    With prompts: the first one's way, the others behind it as fast as the busiest lets them, and then all decode.
    """
    _check_spans(spans, profile.shape.layers)
    route, chunk = Route(spans, profile), chunk_of(profile.nodes)
    single_step, k = single_step_work(workload, len(route.stages)), sum(span is not None for span in spans)
    prompt = prompt_work(workload, chunk)
    cycle, request = decode_work(workload, k), request_work(workload, k, chunk)
    around_s = route.seconds([replace(cycle[0], count=1)])
    first_token_s = route.first_token(prompt, depth=1 if k == 1 else k + 1)
    cycle_s = max(route.busiest(cycle), around_s)
    prompts_s = first_token_s + (workload.sequences - 1) * route.busiest(prompt)
    busy, single = route.stretched(request), route.busy(single_step)
    shares = [
        Share(
            rank=rank,
            span=span,
            memory=_memory(span, profile.shape),
            busy_s=busy.get(rank, 0.0) / workload.new_tokens,
            single_s=single.get(rank, 0.0),
        )
        for rank, span in enumerate(spans)
    ]
    return Plan(
        spans=tuple(spans),
        objective=objective,
        shares=tuple(shares),
        single_rate=1 / route.seconds(single_step),
        decode_rate=workload.sequences / cycle_s,
        overall_rate=workload.sequences * workload.new_tokens / (prompts_s + (workload.new_tokens - 1) * cycle_s),
        first_token_s=first_token_s,
    )


def _check_spans(spans: Sequence[Span | None], layers: int) -> None:
    present = [span for span in spans if span]
    assert present and present[0].start == 0 and present[-1].stop == layers, "not all layers are there"
    assert all(a.stop == b.start for a, b in pairwise(present)), "layers twice, missing or out of order"


def _memory(span: Span | None, shape: Shape) -> int:
    """The bytes that a rank with this span needs."""
    return held_bytes(shape, len(span), last=span.stop == shape.layers) if span else 0


# -- where nobody measured


def _unmeasured(profile: ClusterProfile, ranks: int | None) -> Plan:
    """The layers shared evenly, among as many ranks as can have some, or exactly so many."""
    shape = profile.shape
    assert all(node.speed is None for node in profile.nodes), "either all ranks are measured or none"
    counts = _possible(profile, ranks)
    head = head_in_layers(shape.head_bytes, shape.layer_bytes) if shape.layer_bytes else 0.0
    found = (even_spans(profile, k, head) for k in ([ranks] if ranks else range(counts[1], 0, -1)))
    spans = next((spans for spans in found if spans), None)
    if spans is None:
        raise explain_infeasible(profile, counts, ranks=ranks)
    shares = [
        Share(rank=rank, span=span, memory=_memory(span, shape), busy_s=0.0, single_s=0.0)
        for rank, span in enumerate(spans)
    ]
    return Plan(
        spans=spans,
        objective="throughput",
        shares=tuple(shares),
        single_rate=0.0,
        decode_rate=0.0,
        overall_rate=0.0,
        first_token_s=0.0,
    )


def even_spans(profile: ClusterProfile, ranks: int, head: float) -> tuple[Span | None, ...] | None:
    """The most even spans with exactly ``ranks`` ranks that have layers; None if there are none.

    All ranks count as equal, a layer as 1, and the head as ``head`` layers.
    """
    speed = Speed(layer_s=((1, 1.0),), head_s=((1, head),))
    alone = [replace(node, speed=speed, host=str(node.rank)) for node in profile.nodes]
    equal = replace(profile, nodes=alone, links={})
    tables = CostTables(equal, allowed_pieces(profile.shape, profile.nodes))
    found = tables.min_bottleneck(Workload(sequences=1, prompt_tokens=1, new_tokens=1), [ranks])
    return found[0] if found else None
