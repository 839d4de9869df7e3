"""Layers shared evenly, as they would be where nobody measured: what a measured plan is compared with.

Knows: how to have the plan's own search cut equal layers for equal ranks.
Must not know: models, speeds.
"""

from __future__ import annotations

from mpgpt.core import Span
from mpgpt.errors import UsageError
from mpgpt.machines import ClusterProfile, Node, Shape
from mpgpt.placement.plan import even_spans


def divide(layers: int, ranks: int, head: float = 0.0) -> tuple[Span, ...]:
    """``layers`` equal layers and then a head that costs as much as ``head`` of them, over ``ranks`` equal ranks.

    The busiest rank has as little to do as can be; among the ways to that, the most even one.
    Raises ``UsageError`` when there are more ranks than layers.
    """
    if ranks > layers:
        raise UsageError(f"{ranks} ranks are more than the model's {layers} layers: start at most -n {layers}")
    shape = Shape(layers=layers, layer_bytes=0, head_bytes=0, kv_bytes=0, token_bytes=0)
    nodes = [Node(rank=r, host=str(r), kind="cpu", memory=0, local_rank=0, threads=1) for r in range(ranks)]
    spans = even_spans(ClusterProfile(shape=shape, nodes=nodes, links={}), ranks, head)
    return tuple(span for span in spans or () if span)
