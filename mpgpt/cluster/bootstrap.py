"""What the ranks agree on before they load anything: where the model lies, kernels, layers, sizes.

Knows: in which order ranks have to tell one another what, and how an error on one ends the start on all.
Must not know: options, prompts, how layers are loaded or run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from mpgpt.cluster.rank_probe import probe_ranks
from mpgpt.config import DtypeName
from mpgpt.core import Node, Shape, Span, Workload
from mpgpt.engine.stage import Device
from mpgpt.errors import ModelError, MpgptError, PullError, UsageError
from mpgpt.model.architecture import ModelConfig, read_config
from mpgpt.model.autotune import KernelTiming, timing_from, tune
from mpgpt.model.folder import read_json
from mpgpt.model.kernels import Kernels
from mpgpt.model.pull import find, place_of, pull
from mpgpt.model.slice import weights_of
from mpgpt.model.weights import lean_heap
from mpgpt.placement.costs import Links, held_bytes
from mpgpt.placement.plan import AT_HOME, Objective, place
from mpgpt.placement.what_if import DTYPES, shape_of
from mpgpt.transport.link import World

MAX_CONTEXT = 4096
"""The context that is taken when none is asked for and the model would allow more."""

DeviceFactory = Callable[[dict[str, Any], World], Device]
"""Reaches for the iPad of a ``config.IPad`` in JSON (``mpgpt_ios``)."""

Spans = list[tuple[int, int] | None]
"""Every rank's layers, for JSON; None for a rank without layers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RingConfig:
    """What every rank must know before it can load. Made on rank 0 and broadcast as JSON."""

    config: dict[str, Any]
    spans: Spans
    dtype: str
    slots: int
    context: int
    threads: int | None

    chosen: list[dict[str, str]]
    """For each rank the kernels that its host chose (``Kernels.chosen``)."""

    def kernels(self, rank: int) -> Kernels:
        return Kernels(dtype=self.dtype, chosen=self.chosen[rank])

    def span(self, rank: int) -> Span | None:
        pair = self.spans[rank]
        return pair and Span(start=pair[0], stop=pair[1])

    @property
    def members(self) -> list[int]:
        """The ranks of the ring, in its order: rank 0, and all others that have layers."""
        return [rank for rank, pair in enumerate(self.spans) if pair or not rank]

    @property
    def stages(self) -> int:
        return sum(1 for pair in self.spans if pair)


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningResults:
    """What the hosts found out about kernels."""

    chosen: list[dict[str, str]]
    """By rank."""
    trials: dict[str, list[KernelTiming]]
    """By host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterProfile:
    """What a plan stands on."""

    shape: Shape
    nodes: list[Node]
    links: Links = field(repr=False)
    others: Mapping[str, Shape]
    """The same model held in fewer bytes, by dtype."""


def on_all_ranks(world: World, work: Callable[[], Any]) -> list[Any]:
    """Do ``work`` on every rank; every rank's (JSON) answer on every rank.

    If it fails anywhere, raises the same error everywhere, naming rank, host and cause, so that all end alike.
    """
    try:
        report: dict[str, Any] = {"answer": work()}
    except MpgptError as error:
        report = {"error": str(error), "status": error.exit_status}
    except Exception as error:
        report = {"error": f"{type(error).__name__}: {error}", "status": 1}
    reports = [json.loads(data) for data in world.gather(json.dumps(report).encode())]
    failed = [(rank, report) for rank, report in enumerate(reports) if "error" in report]
    if not failed:
        return [report["answer"] for report in reports]
    kind = UsageError if failed[0][1]["status"] == UsageError.exit_status else MpgptError
    if world.size == 1 or kind is UsageError:
        raise kind(failed[0][1]["error"])
    raise kind("\n".join(f"rank {rank} on {world.hosts[rank]}: {report['error']}" for rank, report in failed))


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


def tune_kernels(
    world: World, config: ModelConfig, *, dtype: str, threads: int | None, kernel: str, memory: Path | None
) -> TuningResults:  # fmt: skip
    """Choose the kernels for this model on every host: its first rank tries, while the others wait, and all of the host
    take the same. ``memory`` is where each host keeps what it found. Raises on every rank what fails on any.
    """
    share_cores(world, threads)

    def mine() -> dict[str, Any] | None:
        if local_rank(world):
            return None
        with lean_heap():  # what is tried is less than a slice, and gone before the slice comes
            kernels, trials = tune(dtype, weights_of(config), pinned=kernel, memory=memory)
        return {"chosen": dict(kernels.chosen), "trials": [asdict(trial) for trial in trials]}

    answers = on_all_ranks(world, mine)
    of_host = {host: answers[world.hosts.index(host)] for host in world.hosts}
    return TuningResults(
        chosen=[of_host[host]["chosen"] for host in world.hosts],
        trials={host: [timing_from(raw) for raw in answer["trials"]] for host, answer in of_host.items()},
    )


def settle_ring(
    world: World, folder: Path, *, dtype: DtypeName, slots: int, context: int | None, threads: int | None,
    plan: Callable[[ModelConfig], tuple[Span | None, ...] | None], objective: Objective = "throughput",
    workload: Workload = Workload(), report: Callable[[str], None] = lambda line: None,  # noqa: B008
    kernel: str = "auto", memory: Path | None = None, explain: Callable[[TuningResults], None] = lambda tuning: None,
    everyone: bool = False, device: Device | None = None,
) -> RingConfig:  # fmt: skip
    """Rank 0 decides the plan and the sizes; every rank gets them. ``plan`` gives the spans, or None for auto: then
    every rank is measured, and the layers are placed so that ``objective`` is best met for ``workload``.

    ``report`` hears, on rank 0, of ranks that are better left without layers, and ``explain`` of the kernels that were
    tried (see ``tune_kernels``). With ``everyone`` no rank is left without layers. ``device`` is the machine behind
    this rank, if there is one: its layers are the rank's, and the ring takes no more sequences or positions than it
    holds. Raises ``UsageError`` on every rank when the spans do not fit the model, the device or the number of ranks,
    or the model does not fit the ranks' memory.
    """

    def decide() -> dict[str, Any]:
        raw = read_json(folder / "config.json")
        config = read_config(raw)
        spans = plan(config) or (None if world.size > 1 else (Span(start=0, stop=config.layers),))
        room = {"slots": slots, "context": context_of(config, context)}
        for rank, held in enumerate(limits):
            if held and spans and spans[rank] != (wanted := Span(start=held["span"][0], stop=held["span"][1])):
                raise UsageError(
                    f"the package of rank {rank}'s iPad holds layers {wanted}, but the rank is to have "
                    f"{spans[rank] or 'none'}; convert those, or give the rank its layers"
                )
            if held and any(held[key] < room[key] for key in room):
                room = {key: min(held[key], room[key]) for key in room}
                report(
                    f"rank {rank}'s iPad has room for {held['slots']} sequences of {held['context']} tokens: "
                    "the ring takes no more"
                )
        return {"config": raw, "spans": spans and _plain(spans), **room}

    def limit() -> dict[str, Any] | None:
        if device is None:
            return None
        return {"span": _plain([device.span])[0], "slots": device.slots, "context": device.context}

    def placed() -> Spans:
        work = replace(workload, sequences=min(workload.sequences, chosen["slots"]))
        spans = place(
            profile.shape, profile.nodes, profile.links, work, objective, others=profile.others, home=AT_HOME,
            ranks=world.size if everyone else None,
        ).spans  # fmt: skip
        for node, span in zip(profile.nodes, spans, strict=True):
            if span is None:
                room = not node.free or held_bytes(profile.shape, 1, first=False, last=False) <= node.free
                why = "the ring is faster without it" if room else "its free memory does not hold one"
                report(f"rank {node.rank} on {node.host} has no layers: {why}")
        return _plain(spans)

    limits = on_all_ranks(world, limit)
    chosen = on_all_ranks(world, lambda: None if world.rank else decide())[0]
    config = read_config(chosen["config"])
    tuning = tune_kernels(world, config, dtype=dtype, threads=threads, kernel=kernel, memory=memory)
    if world.rank == 0:
        explain(tuning)
    if not chosen["spans"]:
        kernels = Kernels(dtype=dtype, chosen=tuning.chosen[world.rank])
        room = {key: chosen[key] for key in ("slots", "context")}
        profile = probe_cluster(world, config, kernels, **room, threads=threads, device=device)
        chosen["spans"] = on_all_ranks(world, lambda: None if world.rank else placed())[0]
    return RingConfig(**chosen, dtype=dtype, threads=threads, chosen=tuning.chosen)


def context_of(config: ModelConfig, asked: int | None) -> int:
    """The positions of a slot; ``UsageError`` when the model has fewer than were asked for."""
    if asked is not None and asked > config.positions:
        raise UsageError(f"--context {asked} is more than the model's {config.positions} positions")
    return asked or min(config.positions, MAX_CONTEXT)


def _plain(spans: Sequence[Span | None]) -> Spans:
    return [(span.start, span.stop) if span else None for span in spans]


def probe_cluster(
    world: World, config: ModelConfig, kernels: Kernels, *, slots: int, context: int, threads: int | None,
    device: Device | None = None,
) -> ClusterProfile:  # fmt: skip
    """Measure every rank and the links for a model of this shape. All ranks must call it."""
    nodes, links = probe_ranks(
        world, partial(on_all_ranks, world), config, kernels=kernels, threads=share_cores(world, threads),
        context=context, device=device,
    )  # fmt: skip
    shapes = {name: shape_of(config, name, slots, context) for name in get_args(DtypeName)}
    shape = shapes[kernels.dtype]
    others = {str(name): shapes[name] for name in DTYPES if shapes[name].layer_bytes < shape.layer_bytes}
    return ClusterProfile(shape=shape, nodes=nodes, links=links, others=others)


def local_rank(world: World) -> int:
    """This rank's position among those of its host."""
    return world.hosts[: world.rank].count(world.hosts[world.rank])


def share_cores(world: World, threads: int | None) -> int:
    """Give torch its threads: as many as told, which keeps whatever binding there is, or this rank's share of the
    host's cores. For that the binding to one core, which is mpirun's default, is undone."""
    if threads is None:
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_setaffinity"):
            if world.launched:
                os.sched_setaffinity(0, range(cores))
            cores = len(os.sched_getaffinity(0))
        threads = max(1, cores // world.hosts.count(world.hosts[world.rank]))
    torch.set_num_threads(threads)
    return threads
