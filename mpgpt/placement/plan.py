"""Which rank runs which layers, and what comes of it.

Knows: what a plan may look like, what is predicted of one, how the best is found and which of several to take.
Must not know: torch, MPI, or any machine: it is arithmetic on what it is told.

A step goes from rank 0 through the ranks that have layers, in order, and its result from the last of them to rank 0.
Ranks without layers are skipped; rank 0 always takes part, because requests come in there: without layers it sends
ids to the first rank that has some.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from types import MappingProxyType
from typing import Literal

import numpy as np

from mpgpt.core import Span
from mpgpt.errors import UsageError
from mpgpt.machines import Node, Shape, Speed, Workload
from mpgpt.placement.costs import (
    HEADROOM,
    Links,
    alone_work,
    chunk_of,
    decode_work,
    held_bytes,
    life_work,
    prompt_work,
)
from mpgpt.placement.costs import needs as needs
from mpgpt.placement.costs import stage_seconds as stage_seconds
from mpgpt.placement.cuts import Mask, piece_counts
from mpgpt.placement.field import CostTables, allowed_pieces
from mpgpt.placement.infeasible import refuse
from mpgpt.placement.way import Route

Objective = Literal["throughput", "latency"]

HEAD_SHARE = 0.15
AS_GOOD = 0.99
"""Plans whose figure is within one part in a hundred are taken for equal: measuring is not that exact."""
AT_HOME = 0.97
"""Rank 0 has layers where that costs no more than this, if measured ranks are placed: it takes part anyway."""
ALL_COUNTS = 32
"""Up to so many possible numbers of ranks all are tried; of more, steps of two fifths."""
OTHERS: Mapping[str, Shape] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What a plan asks of one rank."""

    rank: int
    span: Span | None
    memory: int
    """Bytes that it needs, headroom included."""
    busy_s: float
    """For one generated token of the workload: all that it computes for a sequence, over the sequence's new tokens."""
    one_s: float
    """For one token of a sequence that decodes alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The spans of all ranks, and what is predicted of them; all rates are 0 where nobody measured."""

    spans: tuple[Span | None, ...]
    """By rank; None has no layers."""
    objective: Objective
    shares: tuple[Share, ...]
    one: float
    """Tokens a second of one sequence that decodes alone."""
    many: float
    """Tokens a second of the workload's sequences together while all of them decode."""
    whole: float
    """The same with their prompts counted in: all come at once, from the first prompt to the last token."""
    first_token_s: float
    """Seconds to the first token of the workload's prompt, alone."""

    @property
    def ranks(self) -> int:
        """How many ranks have layers."""
        return sum(span is not None for span in self.spans)

    @property
    def value(self) -> float:
        """What the objective wants most of."""
        return self.one if self.objective == "latency" else self.whole


def place(
    shape: Shape, nodes: Sequence[Node], links: Links, workload: Workload, objective: Objective, *,
    ranks: int | None = None, headroom: float = HEADROOM, others: Mapping[str, Shape] = OTHERS, home: float = 1.0,
) -> Plan:  # fmt: skip
    """The best plan, with exactly ``ranks`` ranks that have layers if that is given.

    See ``alternatives`` for what is exact about it, ``choose`` for how many ranks it takes. Where no node has a speed,
    the layers are shared evenly among as many ranks as can have some.
    Raises ``UsageError`` when there is no plan; ``others`` (by dtype) are the shapes that it may suggest instead.
    """
    if any(node.speed is None for node in nodes):
        return _unmeasured(shape, nodes, ranks, headroom, others)
    plans = alternatives(
        shape, nodes, links, workload, objective, ranks=ranks, headroom=headroom, others=others, home=home
    )
    return choose(plans)


def choose(plans: Sequence[Plan]) -> Plan:
    """The best of some for the same objective. Of those as good, the most ranks for throughput (there are those who
    brought them), the fewest for latency (each more is one more that can fail)."""
    good = [plan for plan in plans if plan.value >= AS_GOOD * max(plan.value for plan in plans)]
    return max(good, key=lambda plan: plan.ranks if plan.objective == "throughput" else -plan.ranks)


def alternatives(
    shape: Shape, nodes: Sequence[Node], links: Links, workload: Workload, objective: Objective, *,
    ranks: int | None = None, headroom: float = HEADROOM, others: Mapping[str, Shape] = OTHERS, home: float = 1.0,
) -> list[Plan]:  # fmt: skip
    """The best plan with exactly 1, 2, ... ranks that have layers, fewest first, as far as they are possible.

    For ``latency`` the least sum of what stages and hops cost one token. For ``throughput`` the least busy time of the
    busiest stage or link for one of the workload's requests; among the ways to that, the least sum; among those, the
    most even. Both are exact, by dynamic programming, if every rank has cores of its own. Where a host has fewer cores
    than its ranks have threads, they are taken to be slower by that factor, and the plan is made again for those that
    have layers in it, as long as that makes it better. With more than ``ALL_COUNTS`` possible numbers of ranks only
    some are tried, the fewest and the most among them. Below 1, ``home`` is the share of a plan's value for which one
    that gives rank 0 layers is taken in its stead: what was measured is not exact, and rank 0 is there anyway.
    Raises ``UsageError`` when there is none.
    """
    counts = _possible(shape, nodes, ranks, headroom, others)
    tried = _some(*counts) if ranks is None else [ranks]
    allowed = allowed_pieces(shape, nodes, headroom)

    def found(allowed: Mask) -> list[Plan]:
        field = CostTables(nodes, links, shape, allowed)
        if objective == "latency":
            return [expect(spans) for spans in field.min_latency(alone_work(workload, max(tried)), tried)]
        plans = [expect(spans) for spans in field.min_bottleneck(workload, tried)]
        return [again(field, plan) for plan in plans] if field.crowded else plans

    def expect(spans: Sequence[Span | None]) -> Plan:
        return predict(spans, shape, nodes, links, workload, objective, headroom=headroom)

    def again(field: CostTables, plan: Plan) -> Plan:
        next_ = expect(field.min_bottleneck(workload, [plan.ranks], plan.spans)[0])
        return again(field, next_) if next_.whole > plan.whole * (1 + 1e-6) else plan

    plans = found(allowed)
    if not plans:
        raise refuse(shape, nodes, counts, ranks=ranks, headroom=headroom, others=others)
    if home < 1 and any(plan.spans[0] is None for plan in plans):
        allowed[1:, 0] = False
        at_home = {plan.ranks: plan for plan in found(allowed)}
        pairs = [(plan, at_home.get(plan.ranks, plan)) for plan in plans]
        plans = [near if near.value >= home * plan.value else plan for plan, near in pairs]
    return plans


def _possible(
    shape: Shape, nodes: Sequence[Node], ranks: int | None, headroom: float, others: Mapping[str, Shape]
) -> tuple[int, int]:
    """How few and how many ranks can have layers. Raises ``UsageError`` if none can, or not ``ranks``."""
    pinned_span = np.array([node.pinned_span is not None for node in nodes])
    counts = piece_counts(allowed_pieces(shape, nodes, headroom), pinned_span)
    if counts is None or (ranks is not None and not counts[0] <= ranks <= counts[1]):
        raise refuse(shape, nodes, counts, ranks=ranks, headroom=headroom, others=others)
    return counts


def _some(least: int, most: int) -> list[int]:
    """The numbers of ranks to try."""
    if most - least < ALL_COUNTS:
        return list(range(least, most + 1))
    found = [least]
    while found[-1] < most:
        found.append(min(most, max(found[-1] + 1, round(found[-1] * 1.4))))
    return found


def divide(layers: int, ranks: int, head: float = 0.0) -> tuple[Span, ...]:
    """``layers`` equal layers and then a head that costs as much as ``head`` of them, over ``ranks`` equal ranks.

    The busiest rank has as little to do as can be; among the ways to that, the most even one.
    Raises ``UsageError`` when there are more ranks than layers.
    """
    if ranks > layers:
        raise UsageError(f"{ranks} ranks are more than the model's {layers} layers: start at most -n {layers}")
    shape = Shape(layers=layers, layer_bytes=0, head_bytes=0, embedding_bytes=0, kv_bytes=0, token_bytes=0)
    nodes = [Node(rank=r, host=str(r), kind="cpu", memory=0, local_rank=0, threads=1) for r in range(ranks)]
    spans = _evenly(shape, nodes, ranks, head, HEADROOM)
    return tuple(span for span in spans or () if span)


def head_in_layers(head_weights: int, layer_weights: int) -> float:
    """What the head counts in layers when ranks are given their share and nobody measured.

    A decoding step reads all of it, a prompt's chunk nothing, so no one weight is right. Measured on GPT-2 and two
    ranks (``bench/LOG.md``): counted in full, many sequences decode 8% faster; hardly counted, first tokens come 14%
    and whole requests 8% sooner. The latter is what more people wait for.
    """
    return HEAD_SHARE * head_weights / layer_weights


# -- what comes of a plan


def predict(
    spans: Sequence[Span | None], shape: Shape, nodes: Sequence[Node], links: Links, workload: Workload,
    objective: Objective, *, headroom: float = HEADROOM,
) -> Plan:  # fmt: skip
    """What is to be expected of given spans. They are contiguous, disjoint and complete, or it is our mistake.

    Many sequences: while all decode, every stage works on one of the steps that are in flight, or the steps wait for
    the way around; so a token for each of them takes as long as the busiest stage, link or host has to do for all
    steps, or as one step's way, whichever is longer. A host whose ranks have more threads together than it has cores
    does not finish sooner than threads x seconds / cores; its ranks' busy times are stretched by one factor, so that
    the busiest of them is as busy as that.

    With prompts: the first one's way, the others behind it as fast as the busiest lets them, and then all decode.
    """
    _prove(spans, shape.layers)
    way = Route(spans, shape, nodes, links)
    alone, k = alone_work(workload, len(way.stages)), sum(span is not None for span in spans)
    prompt = prompt_work(workload, chunk_of(nodes))
    cycle, life = decode_work(workload, k), life_work(workload, k, chunk_of(nodes))
    one_s, around_s = way.seconds(alone), way.seconds([replace(cycle[0], count=1)])
    first_token_s = way.first_token(prompt, depth=1 if k == 1 else k + 1)
    cycle_s = max(way.busiest(cycle), around_s)
    prompts_s = first_token_s + (workload.sequences - 1) * way.busiest(prompt)
    busy = way.stretched(life)
    memory, single = _memory(spans, shape, headroom), way.busy(alone)
    shares = [
        Share(
            rank=rank, span=span, memory=memory[rank], busy_s=busy.get(rank, 0.0) / workload.new_tokens,
            one_s=single.get(rank, 0.0),
        )
        for rank, span in enumerate(spans)
    ]  # fmt: skip
    return Plan(
        spans=tuple(spans), objective=objective, shares=tuple(shares), one=1 / one_s,
        many=workload.sequences / cycle_s,
        whole=workload.sequences * workload.new_tokens / (prompts_s + (workload.new_tokens - 1) * cycle_s),
        first_token_s=first_token_s,
    )  # fmt: skip


def _prove(spans: Sequence[Span | None], layers: int) -> None:
    present = [span for span in spans if span]
    assert present and present[0].start == 0 and present[-1].stop == layers, "not all layers are there"
    assert all(a.stop == b.start for a, b in pairwise(present)), "layers twice, missing or out of order"


def _memory(spans: Sequence[Span | None], shape: Shape, headroom: float) -> list[int]:
    """Bytes by rank."""
    return [
        held_bytes(shape, len(s), first=s.start == 0, last=s.stop == shape.layers, headroom=headroom) if s else 0
        for s in spans
    ]


# -- where nobody measured


def _unmeasured(
    shape: Shape, nodes: Sequence[Node], ranks: int | None, headroom: float, others: Mapping[str, Shape]
) -> Plan:
    """The layers shared evenly, among as many ranks as can have some, or exactly so many."""
    assert all(node.speed is None for node in nodes), "either all ranks are measured or none"
    counts = _possible(shape, nodes, ranks, headroom, others)
    head = head_in_layers(shape.head_bytes, shape.layer_bytes) if shape.layer_bytes else 0.0
    found = (_evenly(shape, nodes, k, head, headroom) for k in ([ranks] if ranks else range(counts[1], 0, -1)))
    spans = next((spans for spans in found if spans), None)
    if spans is None:
        raise refuse(shape, nodes, counts, ranks=ranks, headroom=headroom, others=others)
    memory = _memory(spans, shape, headroom)
    shares = [
        Share(rank=rank, span=span, memory=memory[rank], busy_s=0.0, one_s=0.0) for rank, span in enumerate(spans)
    ]
    return Plan(
        spans=spans, objective="throughput", shares=tuple(shares), one=0.0, many=0.0, whole=0.0, first_token_s=0.0
    )


def _evenly(
    shape: Shape, nodes: Sequence[Node], ranks: int, head: float, headroom: float
) -> tuple[Span | None, ...] | None:
    """Exactly so many ranks with layers, all taken to be equal, a layer to cost 1 and the head ``head``."""
    speed = Speed(layer_s=((1, 1.0),), head_s=((1, head),))
    alone = [replace(node, speed=speed, host=str(node.rank)) for node in nodes]
    field = CostTables(alone, {}, shape, allowed_pieces(shape, nodes, headroom))
    found = field.min_bottleneck(Workload(sequences=1, prompt_tokens=1, new_tokens=1), [ranks])
    return found[0] if found else None
