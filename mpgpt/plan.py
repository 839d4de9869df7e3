"""Which rank runs which layers.

Knows: what a layer and the head cost, and how to divide them.
Must not know: torch, MPI, or any machine: it is arithmetic on what it is told.
"""

from __future__ import annotations

from functools import cache

from mpgpt.core import Span
from mpgpt.errors import UsageError

HEAD_SHARE = 0.15


def divide(layers: int, ranks: int, head: float = 0.0) -> tuple[Span, ...]:
    """``layers`` equal layers and then a head that costs as much as ``head`` of them, over ``ranks`` equal ranks.

    The busiest rank has as little to do as can be; among the ways to that, the most even one (least sum of
    squares), found exactly by dynamic programming over (ranks, layers) in O(ranks x layers^2).
    Raises ``UsageError`` when there are more ranks than layers.
    """
    if ranks > layers:
        raise UsageError(f"{ranks} ranks are more than the model's {layers} layers: start at most -n {layers}")

    @cache
    def best(rank: int, stop: int) -> tuple[float, float, int]:
        """(busiest, sum of squares, start of this rank's span) for layers below ``stop`` on ranks 0 to ``rank``."""
        extra = head if rank == ranks - 1 else 0.0
        if rank == 0:
            return stop + extra, (stop + extra) ** 2, 0
        ways = []
        for start in range(rank, stop):
            cost = stop - start + extra
            busiest, squares, _ = best(rank - 1, start)
            ways.append((max(busiest, cost), squares + cost * cost, start))
        return min(ways)

    spans, stop = [], layers
    for rank in reversed(range(ranks)):
        start = best(rank, stop)[2]
        spans.append(Span(start=start, stop=stop))
        stop = start
    return tuple(reversed(spans))


def head_in_layers(head_weights: int, layer_weights: int) -> float:
    """What the head counts in layers when ranks are given their share.

    A decoding step reads all of it, a prompt's chunk nothing, so no one weight is right. Measured on GPT-2 and two
    ranks (``bench/LOG.md``): counted in full, many sequences decode 8% faster; hardly counted, first tokens come 14%
    and whole requests 8% sooner. The latter is what more people wait for.
    """
    return HEAD_SHARE * head_weights / layer_weights
