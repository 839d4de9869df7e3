"""`mpgpt plan --what-if` and `mpgpt simulate`: tables and JSON, made from a file and options.

Knows: what the options mean together, how a plan and a simulation are shown and written down.
Must not know: MPI, how anything is measured, planned or simulated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from mpgpt.config import DtypeName, parse_layers
from mpgpt.core import Span, check_spans
from mpgpt.display import counted, gigabytes
from mpgpt.files import check_writable, write_atomically
from mpgpt.machines import ClusterProfile, Node, Workload
from mpgpt.placement.costs import needs
from mpgpt.placement.plan import Objective, Plan, alternatives, choose, predict
from mpgpt.placement.simulator import Report, Traffic, run
from mpgpt.placement.what_if import SLOTS, Scene, WhatIf, load_cluster

OTHER_COLUMNS = 66
"""The width of all columns but that of the layers, where plans are compared."""
LISTED = 40
"""Of more ranks than this the tables leave out the middle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadOptions:
    """The options of a workload, and where its figures go. None leaves a value to the file, or to the settings."""

    objective: Objective | None = None
    dtype: DtypeName | None = None
    sequences: int | None = None
    prompt_tokens: int | None = None
    new_tokens: int | None = None
    json: Path | None = None

    def over(self, workload: Workload) -> Workload:
        """``workload`` with the options that are given."""
        options = {name: getattr(self, name) for name in ("sequences", "prompt_tokens", "new_tokens")}
        return replace(workload, **{name: value for name, value in options.items() if value is not None})


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationOptions(WorkloadOptions):
    """The options of `mpgpt simulate`."""

    spans: str | None = None
    """Every machine's layers, such as "0-3,-,4-11"; None for the best plan."""
    arrival: float | None = None
    """Requests a second; None for all at once."""
    seed: int = 0


def what_if(path: Path, options: WorkloadOptions, console: Console) -> None:
    """Plan for the machines of a file and show it. Raises ``UsageError`` when there is no plan."""
    cluster, target = load_cluster(path), check_target(options.json)
    workload = options.over(cluster.work)
    scene = cluster.scene(options.dtype, workload, cluster.slots or max(SLOTS, workload.sequences))
    scene = replace(scene, workload=replace(workload, sequences=min(workload.sequences, scene.slots)))
    plans = _plans(cluster, scene, options)
    plan = choose(plans)
    show(plan, plans, scene.profile, scene.workload, console)
    if target:
        save(target, plan_tree(plan, plans, scene.profile, scene.workload))


def simulation(path: Path, options: SimulationOptions, console: Console, progress: Console) -> None:
    """Simulate the ring of a file's machines and show the figures; with a bar on ``progress`` if it is a terminal."""
    cluster, target = load_cluster(path), check_target(options.json)
    workload = options.over(cluster.work)
    scene = cluster.scene(options.dtype, workload, cluster.slots or max(SLOTS, cluster.workload.sequences))
    # The plan is made for as many as run at once; the simulation serves them all.
    scene = replace(scene, workload=replace(workload, sequences=min(workload.sequences, scene.slots)))
    profile = scene.profile
    if options.spans:
        spans = _given_spans(path, options.spans, profile)
        plan = predict(spans, profile, scene.workload, options.objective or cluster.objective)
    else:
        plan = choose(_plans(cluster, scene, options))
    traffic = Traffic(workload=workload, arrival=options.arrival, seed=options.seed)
    with Progress(
        TextColumn("simulating"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} tokens"),
        TimeRemainingColumn(),
        console=progress,
        disable=not progress.is_terminal,
        transient=True,
    ) as bar:
        update = _sometimes(bar, bar.add_task("", total=workload.sequences * workload.new_tokens))
        report = run(plan.spans, profile, traffic, slots=scene.slots, context=scene.context, progress=update)
    show_report(report, plan, profile.nodes, console)
    if target:
        tree = {"workload": asdict(workload), "slots": scene.slots, "context": scene.context, **asdict(report)}
        save(target, tree | {"plan": plan_tree(plan, [plan], profile, scene.workload)})


def _given_spans(path: Path, text: str, profile: ClusterProfile) -> tuple[Span | None, ...]:
    """The spans of ``--spans``, checked against the machines of the file ``path``."""
    ranks = len(profile.nodes)
    spans = parse_layers(text, "--spans")
    return check_spans(spans, ranks, profile.shape.layers, "--spans", f"{path} has {ranks}")


def _sometimes(bar: Progress, task: TaskID) -> Callable[[int], None]:
    """A function that advances the bar every few hundred tokens, so that it does not slow the simulation down."""
    shown_at = 0

    def update(tokens: int) -> None:
        nonlocal shown_at
        if tokens - shown_at >= 500:
            shown_at = tokens
            bar.update(task, completed=tokens)

    return update


def _plans(cluster: WhatIf, scene: Scene, options: WorkloadOptions) -> list[Plan]:
    objective = options.objective or cluster.objective
    return alternatives(scene.profile, scene.workload, objective)


# -- showing


def show(plan: Plan, plans: Sequence[Plan], profile: ClusterProfile, workload: Workload, console: Console) -> None:
    """A plan, its prediction, and what other numbers of ranks would give (``plans``, fewest first)."""
    sequences = counted(workload.sequences, "sequence")
    console.print(_ranks_table(plan, profile.nodes))
    _print(console, f"The model needs {gigabytes(needs(profile.shape))} with its cache and headroom. Predicted:")
    _print(console, f"  one sequence     {plan.single_rate:8.1f} tokens/s")
    decode = f"{plan.decode_rate:8.1f} tokens/s while all decode"
    _print(console, f"  {sequences:16} {decode}, {plan.overall_rate:.1f} with their prompts counted in")
    after = f"after a prompt of {workload.prompt_tokens} tokens"
    _print(console, f"  first token      {plan.first_token_s:8.3f} s {after}\n")
    if len(plans) > 1:
        console.print(_plans_table(plan, plans, workload, console.width))
    for sentence in sentences(plan, plans, workload):
        _print(console, sentence)


def _rate(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _print(console: Console, line: str) -> None:
    """Print a line as it is: not wrapped, without markup."""
    console.print(line, soft_wrap=True, markup=False, highlight=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="left" if column in ("host", "kind", "layers") else "right", no_wrap=True)
    return table


def _ranks_table(plan: Plan, nodes: Sequence[Node]) -> Table:
    table = _table(
        f"Plan for {plan.objective}", "rank", "host", "kind", "layers", "memory", "of", "busy, ms a token", ""
    )
    most = max(share.busy_s for share in plan.shares)
    for rank in _listed(len(nodes)):
        if rank is None:
            table.add_row("...")
            continue
        node, share = nodes[rank], plan.shares[rank]
        table.add_row(
            str(node.rank), escape(node.host), node.kind, str(share.span) if share.span else "none",
            gigabytes(share.memory) if share.span else "", gigabytes(node.free) if node.free else "",
            f"{share.busy_s * 1e3:.3f}" if share.busy_s else "", f"{share.busy_s / most:.0%}" if share.busy_s else "",
        )  # fmt: skip
    return table


def _listed(count: int) -> list[int | None]:
    """All, or the first and the last with a gap."""
    if count <= LISTED:
        return list(range(count))
    half = LISTED // 2
    return [*range(half), None, *range(count - half, count)]


def _plans_table(plan: Plan, plans: Sequence[Plan], workload: Workload, width: int) -> Table:
    room = max(12, width - OTHER_COLUMNS)
    table = _table(
        "By the number of ranks that have layers, tokens/s", "ranks", "layers", "one", str(workload.sequences),
        "with prompts", "first token, s", "",
    )  # fmt: skip
    for other in plans:
        layers = ",".join(str(span) if span else "-" for span in other.spans)
        table.add_row(
            str(other.ranks), layers if len(layers) <= room else f"{layers[: room - 3]}...",
            _rate(other.single_rate), _rate(other.decode_rate), _rate(other.overall_rate), f"{other.first_token_s:.3f}",
            "taken" if other == plan else "",
        )  # fmt: skip
    return table


def sentences(plan: Plan, plans: Sequence[Plan], workload: Workload) -> list[str]:
    """Sentences on fewer ranks that are faster than all, and on what one sequence gains or loses by the plan."""
    if len(plans) < 2:
        return []
    found = []
    single = [(plan.single_rate, plan.ranks) for plan in plans]
    overall = [(plan.overall_rate, plan.ranks) for plan in plans]
    for what, values in (("one sequence", single), (f"{workload.sequences} sequences with their prompts", overall)):
        (best, ranks), (last, all_ranks) = max(values), values[-1]
        if best > 1.01 * last:
            verb = "rank is" if ranks == 1 else "ranks are"
            found.append(
                f"{ranks} {verb} faster than {all_ranks} for {what}: {_rate(best)} against {_rate(last)} tokens/s."
            )
    first = plans[0]
    if plan.ranks > first.ranks:
        gain = plan.single_rate / first.single_rate - 1
        word = "gains" if plan.single_rate > first.single_rate else "loses"
        found.append(
            f"With {plan.ranks} ranks one sequence {word} {abs(gain):.0%} against {first.ranks} "
            f"({_rate(plan.single_rate)} and {_rate(first.single_rate)} tokens/s); {workload.sequences} make "
            f"{plan.overall_rate / first.overall_rate:.2f} times as many, prompts counted in."
        )
    return found


def show_report(report: Report, plan: Plan, nodes: Sequence[Node], console: Console) -> None:
    """A simulation's figures, and how busy every stage was."""
    table = _table("Stages", "rank", "host", "layers", "busy", "steps waiting")
    for at in _listed(len(report.stages)):
        if at is None:
            table.add_row("...")
            continue
        stage = report.stages[at]
        table.add_row(
            str(stage.rank), escape(nodes[stage.rank].host), str(plan.spans[stage.rank] or "none"),
            f"{stage.utilisation:.0%}", f"{stage.queue:.2f}" if at else "",
        )  # fmt: skip
    decoding = f"{report.decode_tokens_per_s:8.1f} tokens/s" if report.decode_tokens_per_s else "   never"
    done = f"{report.requests} requests, {report.new_tokens} new tokens in {report.steps} steps"
    _print(console, f"{done} and {report.seconds:.3f} s of the ring's time")
    _print(console, f"  while all decode {decoding}, {plan.decode_rate:.1f} predicted")
    _print(
        console, f"  over all time    {report.new_tokens_per_s:8.1f} tokens/s, {report.tokens_per_s:.1f} with prompts"
    )
    waits = (("before the ring", report.waited_s), ("to first token", report.ttft_s), ("between tokens", report.tpot_s))
    for name, pair in waits:
        if pair:
            _print(console, f"  {name:16} {pair[0] * 1e3:8.1f} ms p50, {pair[1] * 1e3:.1f} ms p95")
    console.print(table)


# -- writing down


def plan_tree(plan: Plan, plans: Sequence[Plan], profile: ClusterProfile, workload: Workload) -> dict[str, Any]:
    """For JSON: seconds, bytes, tokens a second; layers as [start, stop)."""
    ranks = [
        {
            "rank": node.rank,
            "host": node.host,
            "kind": node.kind,
            "layers": [share.span.start, share.span.stop] if share.span else None,
            "memory_bytes": share.memory,
            "free_bytes": node.free or None,
            "busy_s": share.busy_s,
            "one_s": share.single_s,
        }
        for node, share in zip(profile.nodes, plan.shares, strict=True)
    ]
    return {
        "objective": plan.objective,
        "workload": asdict(workload),
        "needs_bytes": needs(profile.shape),
        **_rates(plan),
        "ranks": ranks,
        "alternatives": [_rates(other) for other in plans],
        "sentences": sentences(plan, plans, workload),
    }


def _rates(plan: Plan) -> dict[str, Any]:
    return {
        "ranks_with_layers": plan.ranks,
        "layers": [[span.start, span.stop] if span else None for span in plan.spans],
        "one_tokens_per_s": plan.single_rate,
        "many_tokens_per_s": plan.decode_rate,
        "whole_tokens_per_s": plan.overall_rate,
        "first_token_s": plan.first_token_s,
    }


def check_target(path: Path | None) -> Path | None:
    """The path for JSON; raises ``UsageError`` before any work if it cannot be written."""
    if path is not None:
        check_writable(path, "--json")
    return path


def save(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree as JSON."""
    write_atomically(path, (json.dumps(tree, indent=2) + "\n").encode(), f"--json {path}")
