"""Why there is no plan, as a sentence.

Knows: what can stand in the way, in the order in which a person would look: layers that were fixed and cannot be,
memory, and what ranks can run.
Must not know: torch, MPI, speeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from mpgpt.errors import UsageError
from mpgpt.machines import Node, Shape
from mpgpt.placement.costs import BUFFERS, held_bytes, needs
from mpgpt.placement.cuts import Mask, piece_counts
from mpgpt.placement.field import allowed_pieces

SHOWN = 8
"""Of more ranks than this a sentence does not speak one by one."""


def refuse(
    shape: Shape, nodes: Sequence[Node], counts: tuple[int, int] | None, *, ranks: int | None, headroom: float,
    others: Mapping[str, Shape],
) -> UsageError:  # fmt: skip
    """What to raise where there is no plan. ``counts`` are the fewest and the most ranks that can have layers, None
    if there is no way at all; ``ranks`` how many were wanted."""
    if counts is not None:
        possible = f"{counts[0]}" if counts[0] == counts[1] else f"from {counts[0]} to {counts[1]}"
        return UsageError(f"there is no plan in which exactly {ranks} ranks have layers; there may be {possible}")
    if wrong := _contradiction(shape, nodes):
        return UsageError(wrong)
    free = [replace(node, free=0) for node in nodes]
    if _counts(shape, free, headroom):
        return UsageError(too_large(shape, nodes, headroom=headroom, others=others))
    lonely = np.flatnonzero(~_covered(shape, free, headroom))
    if lonely.size:
        return UsageError(f"no rank can run layer {lonely[0]}: {_limits(nodes)}")
    return UsageError(f"the {shape.layers} layers cannot be given to these ranks in their order: {_limits(nodes)}")


def too_large(shape: Shape, nodes: Sequence[Node], *, headroom: float, others: Mapping[str, Shape]) -> str:
    """The sentence for a model that does not fit; it names the first of ``others`` (by dtype) that would."""
    room, need = sum(node.free for node in nodes), needs(shape, headroom)
    limited = all(node.free for node in nodes)
    if limited and need > room:
        said = f"the model needs {gigabytes(need)}, the {_ranks(nodes)} {gigabytes(room)}"
    else:
        room_said = _room(shape, nodes, headroom)
        said = f"the model needs {gigabytes(need)} and cannot be cut so that every piece fits: {room_said}"
    for name, other in others.items():
        if _counts(other, nodes, headroom):
            return f"{said}; {name} would need {gigabytes(needs(other, headroom))}"
    return said + ("; no other dtype would fit either" if others else "")


def gigabytes(count: float) -> str:
    """In powers of ten, as memory is sold."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _ranks(nodes: Sequence[Node]) -> str:
    return "ranks have" if len(nodes) > 1 else "only rank has"


def _counts(shape: Shape, nodes: Sequence[Node], headroom: float) -> tuple[int, int] | None:
    pinned_span = np.array([node.pinned_span is not None for node in nodes])
    return piece_counts(allowed_pieces(shape, nodes, headroom), pinned_span)


def _covered(shape: Shape, nodes: Sequence[Node], headroom: float) -> Mask:
    """[L]: whether somebody can run the layer."""
    some: Mask = allowed_pieces(shape, nodes, headroom).max(axis=0)
    return np.array([some[: layer + 1, layer + 1 :].any() for layer in range(shape.layers)])


def _contradiction(shape: Shape, nodes: Sequence[Node]) -> str:
    """What is wrong with spans that are fixed; empty if nothing is."""
    before: Node | None = None
    for node in nodes:
        span = node.pinned_span
        if span is None:
            continue
        said = f"rank {node.rank} on {node.host} is fixed to layers {span}"
        if span.stop > shape.layers:
            return f"{said}, but the model's last is {shape.layers - 1}"
        if node.allowed_span and not (node.allowed_span.start <= span.start and span.stop <= node.allowed_span.stop):
            return f"{said}, but it can run {node.allowed_span} only"
        if not node.can_be_first_or_last and (span.start == 0 or span.stop == shape.layers):
            return f"{said}, but it can have neither the first layer nor the last: it does not embed or sample"
        if before and before.pinned_span and span.start < before.pinned_span.stop:
            return f"{said}, which do not come after layers {before.pinned_span} of rank {before.rank}"
        before = node
    return ""


def _limits(nodes: Sequence[Node]) -> str:
    """What the ranks can run, in words."""
    said = []
    for node in nodes:
        if node.pinned_span:
            said.append(f"rank {node.rank} is fixed to {node.pinned_span}")
        elif node.allowed_span:
            said.append(f"rank {node.rank} can run {node.allowed_span} only")
        if not node.can_be_first_or_last and not node.pinned_span:
            said.append(f"rank {node.rank} can have neither the first layer nor the last")
    more = [f"and so on for {len(nodes)} ranks"] if len(said) > SHOWN else []
    return "; ".join(said[:SHOWN] + more) or f"there are {len(nodes)} ranks"


def _room(shape: Shape, nodes: Sequence[Node], headroom: float) -> str:
    """For how many layers there is room, rank by rank; without head and embedding."""
    said = []
    for node in nodes[:SHOWN]:
        need = [held_bytes(shape, n, first=False, last=False, headroom=headroom) for n in range(shape.layers + 1)]
        fit = [n for n in range(shape.layers + 1) if need[n] <= node.free]
        said.append(f"rank {node.rank} has room for {max(fit) if node.free else 'any number'} of {shape.layers} layers")
    said += [f"and so on for {len(nodes)} ranks"] if len(nodes) > SHOWN else []
    said.append(f"the head needs {gigabytes(shape.head_bytes)}")
    said.append(f"every rank with layers {gigabytes(BUFFERS)} for buffers")
    return "; ".join(said)
