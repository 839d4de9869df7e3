"""The reason why there is no plan, as a sentence.

Knows: the possible reasons, in the order in which a person would look: contradictions among pinned layers, memory, and
the layers that ranks can run.
Must not know: torch, MPI, speeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from mpgpt.display import gigabytes
from mpgpt.errors import UsageError
from mpgpt.machines import ClusterProfile, Node, Shape
from mpgpt.placement.costs import BUFFERS, held_bytes, needs
from mpgpt.placement.search import Mask, allowed_pieces, piece_counts

SHOWN = 8
"""Of more ranks than this a sentence does not speak one by one."""


def explain_infeasible(profile: ClusterProfile, counts: tuple[int, int] | None, *, ranks: int | None) -> UsageError:
    """The error to raise where there is no plan.

    ``counts`` are the fewest and the most ranks that can have layers, None if there is no way at all; ``ranks`` is how
    many must have some, if that is given.
    """
    shape, nodes = profile.shape, profile.nodes
    if counts is not None:
        possible = f"{counts[0]}" if counts[0] == counts[1] else f"from {counts[0]} to {counts[1]}"
        return UsageError(f"there is no plan in which exactly {ranks} ranks have layers; there may be {possible}")
    if wrong := _contradiction(shape, nodes):
        return UsageError(wrong)
    unlimited = [replace(node, free=0) for node in nodes]
    if rank_counts(shape, unlimited):
        return UsageError(too_large(profile))
    lonely = np.flatnonzero(~_covered(shape, unlimited))
    if lonely.size:
        return UsageError(f"no rank can run layer {lonely[0]}: {_limits(nodes)}")
    return UsageError(f"the {shape.layers} layers cannot be given to these ranks in their order: {_limits(nodes)}")


def too_large(profile: ClusterProfile) -> str:
    """The sentence for a model that does not fit; it names the first of the profile's other dtypes that would."""
    shape, nodes = profile.shape, profile.nodes
    room, need = sum(node.free for node in nodes), needs(shape)
    limited = all(node.free for node in nodes)
    if limited and need > room:
        sentence = f"the model needs {gigabytes(need)}, the {_ranks(nodes)} {gigabytes(room)}"
    else:
        sentence = (
            f"the model needs {gigabytes(need)} and cannot be cut so that every piece fits: {_room(shape, nodes)}"
        )
    for name, other in profile.others.items():
        if rank_counts(other, nodes):
            return f"{sentence}; {name} would need {gigabytes(needs(other))}"
    return sentence + ("; no other dtype would fit either" if profile.others else "")


def rank_counts(shape: Shape, nodes: Sequence[Node]) -> tuple[int, int] | None:
    """The fewest and the most ranks that can have layers; None if there is no way at all."""
    pinned = np.array([node.pinned_span is not None for node in nodes])
    return piece_counts(allowed_pieces(shape, nodes), pinned)


def _ranks(nodes: Sequence[Node]) -> str:
    return "ranks have" if len(nodes) > 1 else "only rank has"


def _covered(shape: Shape, nodes: Sequence[Node]) -> Mask:
    """[L]: whether some rank can run the layer."""
    some: Mask = allowed_pieces(shape, nodes).max(axis=0)
    return np.array([some[: layer + 1, layer + 1 :].any() for layer in range(shape.layers)])


def _contradiction(shape: Shape, nodes: Sequence[Node]) -> str:
    """The contradiction among pinned spans, as a sentence; empty if there is none."""
    before: Node | None = None
    for node in nodes:
        span = node.pinned_span
        if span is None:
            continue
        fixed = f"rank {node.rank} on {node.host} is fixed to layers {span}"
        if span.stop > shape.layers:
            return f"{fixed}, but the model's last is {shape.layers - 1}"
        if node.allowed_span and not (node.allowed_span.start <= span.start and span.stop <= node.allowed_span.stop):
            return f"{fixed}, but it can run {node.allowed_span} only"
        if not node.can_be_first_or_last and (span.start == 0 or span.stop == shape.layers):
            return f"{fixed}, but it can have neither the first layer nor the last: it does not embed or sample"
        if before and before.pinned_span and span.start < before.pinned_span.stop:
            return f"{fixed}, which do not come after layers {before.pinned_span} of rank {before.rank}"
        before = node
    return ""


def _limits(nodes: Sequence[Node]) -> str:
    """The layers that the ranks can run, in words."""
    limits = []
    for node in nodes:
        if node.pinned_span:
            limits.append(f"rank {node.rank} is fixed to {node.pinned_span}")
        elif node.allowed_span:
            limits.append(f"rank {node.rank} can run {node.allowed_span} only")
        if not node.can_be_first_or_last and not node.pinned_span:
            limits.append(f"rank {node.rank} can have neither the first layer nor the last")
    more = [f"and so on for {len(nodes)} ranks"] if len(limits) > SHOWN else []
    return "; ".join(limits[:SHOWN] + more) or f"there are {len(nodes)} ranks"


def _room(shape: Shape, nodes: Sequence[Node]) -> str:
    """The number of layers for which each rank has room, without the head."""
    rooms = []
    for node in nodes[:SHOWN]:
        need = [held_bytes(shape, n, last=False) for n in range(shape.layers + 1)]
        fit = [n for n in range(shape.layers + 1) if need[n] <= node.free]
        rooms.append(
            f"rank {node.rank} has room for {max(fit) if node.free else 'any number'} of {shape.layers} layers"
        )
    rooms += [f"and so on for {len(nodes)} ranks"] if len(nodes) > SHOWN else []
    rooms.append(f"the head needs {gigabytes(shape.head_bytes)}")
    rooms.append(f"every rank with layers {gigabytes(BUFFERS)} for buffers")
    return "; ".join(rooms)
