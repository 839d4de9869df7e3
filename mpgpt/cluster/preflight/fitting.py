"""Whether a model is on every host, and fits there.

Knows: what hosts report of the model and of their memory; what layers need, as settings distribute them.
Must not know: how the reports came here, or where a measured plan would put layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np

from mpgpt.cluster.preflight.verdict import Reports, Trouble, differing
from mpgpt.config import RunConfig
from mpgpt.core import Span
from mpgpt.display import gigabytes
from mpgpt.errors import ModelError, UsageError
from mpgpt.machines import ClusterProfile, Node, Shape
from mpgpt.model.footprint import MAX_CONTEXT, shape_of, smaller_shapes
from mpgpt.model.known_families import read_config
from mpgpt.placement.costs import BUFFERS, held_bytes, slice_bytes
from mpgpt.placement.infeasible import too_large
from mpgpt.placement.search import allowed_pieces, piece_counts


def judge_model(name: str, reports: Reports, pull: str, targets: Mapping[str, str]) -> list[Trouble]:
    """Hosts that lack the model, have another one under its name, or have no room for it. ``pull`` is the command that
    fetches it, ``targets`` the other machines' names for ssh."""
    about = {host: report.model for host, report in reports.items() if report.model}
    there = {host: model for host, model in about.items() if model.get("config")}
    found = [
        _absent(name, host, model, there, f"ssh {targets[host]} {pull}" if host in targets else pull)
        for host, model in about.items() if host not in there and not model.get("source")
    ]  # fmt: skip
    digests = {host: model["digest"] for host, model in there.items() if model["digest"]}
    first = next(iter(digests), "")
    found += [
        Trouble(host=host, what=f"its model {name} has other weights than that of {first}", weight="model",
                cure=f"remove {there[host]['folder']} there and pull again, or copy it from {first}")
        for host in differing(digests)
    ]  # fmt: skip
    return found


def _absent(
    name: str, host: str, model: Mapping[str, Any], there: Mapping[str, Mapping[str, Any]], pull: str
) -> Trouble:
    """What to do about a host without the model; ``there`` are those that have it."""
    if model["wrong"]:
        what, cure = f"its model {name} is not whole: {model['wrong']}", f"remove {model['folder']} there, then {pull}"
        return Trouble(host=host, what=what, cure=cure, weight="model")
    what, cures = f"the model {name} is not there", [] if name.startswith(("/", ".", "~")) else [pull]
    if there:
        first, held = next(iter(there.items()))
        cures.append(f"copy {held['folder']} of {first} to {model['home']} there")
        if model["disk"] < held["bytes"]:
            what += (
                f", and of the {gigabytes(held['bytes'])} that it takes its disk has {gigabytes(model['disk'])} free"
            )
            cures = [f"make room there, then {cures[0]}", *cures[1:]]
    return Trouble(host=host, what=what, cure=", or ".join(cures) or "copy it there", weight="model")


def judge_memory(
    config: RunConfig, raw: Mapping[str, Any], placed: Sequence[str], reports: Reports, *, other_model: bool
) -> list[Trouble]:
    """Hosts that are too small for their layers. ``placed`` is every rank's host, ``raw`` the model's config.json;
    with ``other_model`` the settings' layers are not this model's."""
    try:
        model = read_config(raw, rotary=False)
        spans = None if other_model else config.spans(len(placed), model.layers)
    except ModelError as error:
        return [Trouble(host="the model", what=str(error), cure="take another one", weight="model")]
    except UsageError as error:
        return [Trouble(host="the settings", what=str(error), cure="correct them", weight="model")]
    context = min(config.ctx_length or MAX_CONTEXT, model.positions)
    shape = shape_of(model, config.dtype, config.max_sequences, context, config.kv_dtype)
    room = f"{config.max_sequences} sequences of {context} tokens"
    if spans:
        return _too_small(shape, spans, placed, reports, room)
    short = _too_small(shape, _even(model.layers, len(placed)), placed, reports, room)
    nodes = [
        Node(rank=rank, host=host, kind="cpu", memory=reports[host].memory, local_rank=placed[:rank].count(host),
             threads=1, free=max(1, reports[host].available // placed.count(host)))
        for rank, host in enumerate(placed) if host in reports and reports[host].memory
    ]  # fmt: skip
    if len(nodes) < len(placed):  # of a host nothing is known
        return short
    if piece_counts(allowed_pieces(shape, nodes), np.zeros(len(nodes), dtype=bool)) is None:
        others = smaller_shapes(model, config.dtype, config.max_sequences, context, config.kv_dtype)
        said = too_large(ClusterProfile(shape=shape, nodes=nodes, links={}, others=others))
        cure = "free memory, add a host, or take a smaller dtype or fewer max_sequences"
        return [Trouble(host=", ".join(dict.fromkeys(placed)), what=said, cure=cure, weight="model")]
    return [replace(one, cure="auto gives it fewer layers or none", weight="remark") for one in short]


def _even(layers: int, ranks: int) -> list[Span | None]:
    bounds = [layers * rank // ranks for rank in range(ranks + 1)]
    return [Span(start=a, stop=b) if a < b else None for a, b in pairwise(bounds)]


def _too_small(
    shape: Shape, spans: Sequence[Span | None], placed: Sequence[str], reports: Reports, room: str
) -> list[Trouble]:
    """Hosts whose free memory does not hold their layers, or not the cache too."""
    found = []
    bare = replace(shape, kv_bytes=0)
    for host in dict.fromkeys(placed):
        report = reports.get(host)
        mine = [span for span, other in zip(spans, placed, strict=True) if span and other == host]
        if report is None or not report.memory or not mine:
            continue
        layers = " and ".join(map(str, mine))
        weights = sum(slice_bytes(bare, len(s), last=s.stop == shape.layers) + BUFFERS for s in mine)
        all_of_it = sum(held_bytes(shape, len(s), last=s.stop == shape.layers) for s in mine)
        free = f"{gigabytes(report.available)} of its {gigabytes(report.memory)} are free"
        if weights > report.available:
            found.append(Trouble(
                host=host, what=f"layers {layers} need {gigabytes(weights)} of memory, and {free}", weight="model",
                cure="give it fewer layers, end other programs there, or take a smaller dtype",
            ))  # fmt: skip
        elif all_of_it > report.available:
            found.append(Trouble(
                host=host, what=f"layers {layers} with the cache of {room} need {gigabytes(all_of_it)} of memory, and "
                f"{free}", cure="fewer max_sequences or a shorter ctx_length would do with less", weight="remark",
            ))  # fmt: skip
    return found
