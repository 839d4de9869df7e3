"""The start of a ring, in steps that every rank takes together: the model's folder, the iPad, sizes, kernels, layers.

Knows: in which order ranks exchange what, and how an error on one ends the start on all.
Must not know: options, prompts, how layers are loaded or run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mpgpt.cluster.rank_probe import probe_ranks
from mpgpt.cluster.ring_config import RingConfig, RingOptions, Spans, plain
from mpgpt.core import Span
from mpgpt.display import silent
from mpgpt.engine.stage import Device
from mpgpt.errors import ModelError, PullError, UsageError
from mpgpt.machines import ClusterProfile
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.autotune import computing, missing, tune
from mpgpt.model.folder import read_json
from mpgpt.model.footprint import MAX_CONTEXT, shape_of, smaller_shapes
from mpgpt.model.kernel_timings import KernelTiming, timing_from
from mpgpt.model.known_families import read_config
from mpgpt.model.linear import Kernels
from mpgpt.model.native.library import cores
from mpgpt.model.pull import find, place_of, pull
from mpgpt.model.slice import weights_of
from mpgpt.model.weights import lean_heap
from mpgpt.placement.costs import held_bytes
from mpgpt.placement.plan import RANK0_TOLERANCE, place
from mpgpt.transport.collective import on_all_ranks, on_rank0
from mpgpt.transport.link import World

DeviceFactory = Callable[[dict[str, Any], World], Device]
"""Reaches for the iPad of a ``config.IPad`` in JSON (``mpgpt_ios``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningResults:
    """What the hosts found out about kernels."""

    chosen: list[dict[str, str]]
    """By rank."""
    timings: dict[str, list[KernelTiming]]
    """By host."""
    computing: dict[str, str]
    """By host, what computes, in words."""
    missing: dict[str, str]
    """Of the hosts that lack the compiled kernels and were not told to do without: why."""


def connect_device(world: World, ipad: dict[str, Any] | None, device_factory: DeviceFactory) -> Device | None:
    """On the rank that stands before an iPad: the iPad; elsewhere, and without any, None. All ranks must call it.

    ``ipad`` is ``config.IPad`` as JSON. Raises on every rank when it cannot be, such as for want of its package.
    """
    if not ipad:
        return None
    if ipad["rank"] >= world.size:
        raise UsageError(f"ipad.rank is {ipad['rank']}, but mpirun started {world.size} (-n {world.size})")
    found: list[Device] = []
    on_all_ranks(world, lambda: found.append(device_factory(ipad, world)) if world.rank == ipad["rank"] else None)
    return found[0] if found else None


def ensure_model(world: World, name: str, home: Path, report: Callable[[str], None]) -> Path:
    """The model's folder on this host. Where a host lacks it, its first rank pulls it; but a model that is given as a
    path must lie at that path on every host. Raises on every rank, by host, and says who has the model if anyone does.
    """
    found = on_all_ranks(world, lambda: _look(name, home))
    given = any(look["path"] for look in found)
    owner = next((rank for rank, look in enumerate(found) if look["path"] or (look["folder"] and not given)), None)
    lacking = [host for host, look in zip(world.hosts, found, strict=True) if not any(look.values())]
    if lacking and owner is not None and not given:
        report(f"{', '.join(dict.fromkeys(lacking))}: there is no model {name} yet; fetching it")

    def fetch() -> None:
        mine = found[world.rank]
        if given and not any(mine.values()):
            path = os.path.abspath(os.path.expanduser(name))
            raise ModelError(f"There is no {path}. {_advice(world, owner, found, path)}")
        if mine["folder"] or local_rank(world):
            return
        try:
            pull(name, home=home, report=report, progress=world.rank == 0)
        except PullError as error:
            if owner is None or given:
                raise
            raise PullError(error.reason, _advice(world, owner, found, str(place_of(name, home)))) from error

    on_all_ranks(world, fetch)
    folder = find(name, home)
    on_all_ranks(world, lambda: _present(folder, name))
    assert folder is not None
    return folder


def _look(name: str, home: Path) -> dict[str, str]:
    """What this host has of a model: ``path`` if its name is one here, and the finished ``folder``; else empty."""
    path, folder = os.path.abspath(os.path.expanduser(name)), find(name, home)
    if folder is None and os.path.isdir(path):
        raise ModelError(f"{name} is no model folder: it holds no config.json")
    given = os.path.isfile(path) or os.path.isfile(os.path.join(path, "config.json"))
    return {"path": path if given else "", "folder": str(folder or "")}


def _advice(world: World, owner: int | None, found: list[dict[str, str]], target: str) -> str:
    """How this rank's host gets what the owner's has."""
    assert owner is not None
    source = found[owner]["path"] or found[owner]["folder"]
    return f"{world.hosts[owner]} has it: copy {source} from there to {target} on {world.hosts[world.rank]}."


def _present(folder: Path | None, name: str) -> None:
    if folder is None:
        raise ModelError(f"the model {name} is not on this host")


def tune_kernels(world: World, config: ModelConfig, options: RingOptions) -> TuningResults:
    """The fastest kernels for this model on every host: its first rank tries, while the others wait, and all of the
    host take the same. All ranks must call it. Raises on every rank what fails on any.
    """
    share_cores(world, options.threads)

    def mine() -> dict[str, Any] | None:
        if local_rank(world):
            return None
        with lean_heap():  # what is tried is less than a slice, and gone before the slice comes
            kernels, timings = tune(
                options.dtype, weights_of(config), pinned=options.kernel, native=options.native, fast=options.fast,
                memory=options.memory,
            )  # fmt: skip
        return {
            "chosen": dict(kernels.chosen),
            "trials": [asdict(timing) for timing in timings],
            "computing": computing(kernels, options.kernel, options.native),
            "missing": missing() if options.kernel == "auto" and options.native else "",
        }

    answers = on_all_ranks(world, mine)
    of_host = {host: answers[world.hosts.index(host)] for host in world.hosts}
    return TuningResults(
        chosen=[of_host[host]["chosen"] for host in world.hosts],
        timings={host: [timing_from(raw) for raw in answer["trials"]] for host, answer in of_host.items()},
        computing={host: answer["computing"] for host, answer in of_host.items()},
        missing={host: answer["missing"] for host, answer in of_host.items() if answer["missing"]},
    )


def negotiate(
    world: World, folder: Path, options: RingOptions, device: Device | None = None, *,
    report: Callable[[str], None] = silent, explain: Callable[[TuningResults], None] = lambda tuning: None,
) -> RingConfig:  # fmt: skip
    """Sizes, kernels and layers, the same on every rank. All ranks must call it, with the same ``options`` but for what
    is rank 0's alone.

    On rank 0, ``report`` gets the ranks that are better left without layers, and ``explain`` the kernels that were
    tried (see ``tune_kernels``). ``device`` is the machine behind this rank, if there is one: its layers are the
    rank's, and the ring takes no more sequences or positions than it holds. Raises ``UsageError`` on every rank when
    the spans do not fit the model, the device or the number of ranks, or the model does not fit the ranks' memory.
    """
    limits = on_all_ranks(world, lambda: _limit(device))
    sizes = on_rank0(world, lambda: choose_sizes(folder, options, limits, world.size, report))
    config, spans, room = read_config(sizes["config"]), sizes["spans"], sizes["room"]
    tuning = tune_kernels(world, config, options)
    if world.rank == 0:
        explain(tuning)
        for host, why in tuning.missing.items():
            kept = ", and its cache is kept as --dtype says" if options.kv_dtype != "auto" else ""
            report(f"torch computes on {host}, whose texts may differ from other machines'{kept}: {why}")
    if not spans:
        kernels = Kernels(dtype=options.dtype, chosen=tuning.chosen[world.rank], kv_dtype=options.kv_dtype)
        profile = probe_cluster(world, config, kernels, **room, threads=options.threads, device=device)
        spans = on_rank0(world, lambda: place_layers(profile, options, room["slots"], world.size, report))
    return RingConfig(
        config=sizes["config"],
        spans=spans,
        **room,
        dtype=options.dtype,
        kv_dtype=options.kv_dtype,
        threads=options.threads,
        chosen=tuning.chosen,
    )


def _limit(device: Device | None) -> dict[str, Any] | None:
    """What the machine behind this rank holds, if there is one."""
    if device is None:
        return None
    return {"span": plain([device.span])[0], "room": {"slots": device.slots, "context": device.context}}


def choose_sizes(
    folder: Path, options: RingOptions, limits: Sequence[dict[str, Any] | None], ranks: int,
    report: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """The model's ``config``, the ``spans`` if they are given, and the ``room``: slots, and positions of each.

    ``limits`` are what the devices behind ranks hold (``_limit``), by rank. Called on rank 0.
    """
    raw = read_json(folder / "config.json")
    config = read_config(raw)
    spans = options.spans(config) or (None if ranks > 1 else (Span(start=0, stop=config.layers),))
    room = {"slots": options.slots, "context": context_of(config, options.context)}
    for rank, held in enumerate(limits):
        if not held:
            continue
        packaged, most = Span(start=held["span"][0], stop=held["span"][1]), held["room"]
        if spans and spans[rank] != packaged:
            raise UsageError(
                f"the package of rank {rank}'s iPad holds layers {packaged}, but the rank is to have "
                f"{spans[rank] or 'none'}; convert those, or give the rank its layers"
            )
        if any(most[key] < room[key] for key in room):
            room = {key: min(most[key], room[key]) for key in room}
            report(
                f"rank {rank}'s iPad has room for {most['slots']} sequences of {most['context']} tokens: "
                "the ring takes no more"
            )
    return {"config": raw, "spans": spans and plain(spans), "room": room}


def place_layers(
    profile: ClusterProfile, options: RingOptions, slots: int, ranks: int, report: Callable[[str], None]
) -> Spans:
    """Every rank's layers, as they suit the objective and the workload best. Called on rank 0."""
    workload = replace(options.workload, sequences=min(options.workload.sequences, slots))
    wanted = ranks if options.everyone else None
    plan = place(profile, workload, options.objective, ranks=wanted, rank0_tolerance=RANK0_TOLERANCE)
    for node, span in zip(profile.nodes, plan.spans, strict=True):
        if span is None:
            fits = not node.free or held_bytes(profile.shape, 1, last=False) <= node.free
            why = "the ring is faster without it" if fits else "its free memory does not hold one"
            report(f"rank {node.rank} on {node.host} has no layers: {why}")
    return plain(plan.spans)


def context_of(config: ModelConfig, asked: int | None) -> int:
    """The positions of a slot; ``UsageError`` when the model has fewer than were asked for."""
    if asked is not None and asked > config.positions:
        raise UsageError(f"--context {asked} is more than the model's {config.positions} positions")
    return asked or min(config.positions, MAX_CONTEXT)


def probe_cluster(
    world: World, config: ModelConfig, kernels: Kernels, *, slots: int, context: int, threads: int | None,
    device: Device | None = None,
) -> ClusterProfile:  # fmt: skip
    """Measure every rank and the links for a model of this shape. All ranks must call it."""
    nodes, links = probe_ranks(
        world, config, kernels=kernels, threads=share_cores(world, threads), context=context, device=device
    )  # fmt: skip
    shape = shape_of(config, kernels.dtype, slots, context, kernels.kv_dtype)
    others = smaller_shapes(config, kernels.dtype, slots, context, kernels.kv_dtype)
    return ClusterProfile(shape=shape, nodes=nodes, links=links, others=others)


def local_rank(world: World) -> int:
    """This rank's position among those of its host."""
    return world.hosts[: world.rank].count(world.hosts[world.rank])


def share_cores(world: World, threads: int | None) -> int:
    """Give torch its threads: as many as given, which keeps whatever binding there is, or this rank's share of the
    host's cores. For that the binding to one core, which is mpirun's default, is undone."""
    if threads is None:
        if world.launched and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, range(os.cpu_count() or 1))
        threads = max(1, cores() // world.hosts.count(world.hosts[world.rank]))
    torch.set_num_threads(threads)
    return threads
