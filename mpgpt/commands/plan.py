"""`mpgpt plan` with ranks: measure them, place the layers, and predict the speed.

Knows: what the options mean together; that nothing of the model is needed but its config.json.
Must not know: how ranks are measured, how layers are placed, how a table is drawn.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mpgpt import config as configs
from mpgpt import stdio
from mpgpt.cluster.bootstrap import DeviceFactory, connect_device, context_of, probe_cluster, tune_kernels
from mpgpt.cluster.ring_config import RingOptions, over_settings
from mpgpt.commands.plan_report import WorkloadOptions, check_target, plan_tree, save, show
from mpgpt.commands.terminal import explain
from mpgpt.errors import OutputError, UsageError
from mpgpt.machines import ClusterProfile
from mpgpt.model.folder import read_json
from mpgpt.model.known_families import read_config
from mpgpt.model.linear import Kernels
from mpgpt.model.pull import find
from mpgpt.placement.plan import RANK0_TOLERANCE, alternatives, choose
from mpgpt.transport.collective import on_rank0
from mpgpt.transport.link import World
from mpgpt.transport.mpirun import SettingsFile


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOptions(WorkloadOptions):
    """The options of `mpgpt plan` with ranks. None leaves a value to the settings, or to the model."""

    model: str | None = None
    kv_dtype: configs.CacheDtype | None = None
    kernel: str | None = None
    fast: bool | None = None
    explain: bool = False
    """Whether the kernels that each host tried are shown."""
    threads: int | None = None
    max_sequences: int | None = None
    context: int | None = None


class Planning:
    """One run. ``start`` is called on every rank, then ``run_rank0`` on rank 0 and ``serve`` on the others."""

    def __init__(
        self,
        options: PlanOptions,
        *,
        home: Path,
        config: SettingsFile | None,
        console: Console,
        device_factory: DeviceFactory,
    ) -> None:
        """``config`` is the settings file, if there is one; the tables go to ``console``; ``device_factory`` connects
        the iPad behind a rank."""
        self._options, self._home, self._file, self._console = options, home, config, console
        self._device_factory = device_factory
        self._config = configs.RunConfig()

    def start(self, world: World) -> Planning:
        """Measure. Whatever is wrong anywhere is raised on every rank."""
        chosen = on_rank0(world, self._prepare)
        config, dtype, threads = read_config(chosen["raw"]), chosen["dtype"], chosen["threads"]
        device = connect_device(world, chosen["ipad"], self._device_factory)
        options = RingOptions(
            dtype=dtype, kv_dtype=chosen["kv_dtype"], slots=chosen["slots"], context=chosen["context"],
            threads=threads, kernel=chosen["kernel"], fast=chosen["fast"],
            memory=self._home.parent / "kernels.json",
        )  # fmt: skip
        tuning = tune_kernels(world, config, options)
        if world.rank == 0 and self._options.explain:
            explain(tuning.timings, tuning.computing)
        kernels = Kernels(dtype=dtype, chosen=tuning.chosen[world.rank], kv_dtype=chosen["kv_dtype"])
        self._profile: ClusterProfile = probe_cluster(
            world, config, kernels, slots=chosen["slots"], context=chosen["context"], threads=threads, device=device
        )
        return self

    def _prepare(self) -> dict[str, Any]:
        """The sizes by which every rank is measured, checked as far as that can be before."""
        options = self._options
        self._config = config = configs.load(self._file.path, self._file.text) if self._file else configs.RunConfig()
        chosen = over_settings(options, config)
        if not chosen["model"]:
            raise UsageError("no model: give --model, or a config with hf_model_name, or --what-if FILE")
        check_target(options.json)
        raw = read_json(self._locate(chosen["model"]))
        self._slots = chosen["slots"]
        return chosen | {"raw": raw, "context": context_of(read_config(raw), chosen["context"])}

    def _locate(self, model: str) -> Path:
        """The model's config.json, which may itself have been named."""
        if Path(model).is_file():
            return Path(model)
        folder = find(model, self._home)
        if folder is None:
            raise UsageError(f"the model {model} is not here: mpgpt pull {model}, or name a config.json")
        return folder / "config.json"

    def run_rank0(self, ring: Planning) -> int:
        """Rank 0's part: place the layers, print the plan. Raises ``UsageError`` when the model does not fit."""
        profile, options, config = self._profile, self._options, self._config
        workload = options.over(config.workload)
        workload = replace(workload, sequences=min(workload.sequences, self._slots))
        objective = options.objective or config.plan.objective
        plans = alternatives(profile, workload, objective, rank0_tolerance=RANK0_TOLERANCE)
        plan = choose(plans)
        try:
            show(plan, plans, profile, workload, self._console)
            if options.json:
                tree = plan_tree(plan, plans, profile, workload)
                save(options.json, tree | {"measured": _measured(profile)})
        except OutputError as error:
            return stdio.parting(error)
        return 0

    def serve(self) -> None:
        """Every other rank's part: it has been measured, and is done."""


def _measured(profile: ClusterProfile) -> dict[str, Any]:
    """For JSON: every rank as it reported itself, and the links."""
    links = [{"from": a, "to": b, **asdict(edge)} for (a, b), edge in sorted(profile.links.items())]
    return {"nodes": [asdict(node) for node in profile.nodes], "links": links}
