"""`mpgpt plan --what-if` and `mpgpt simulate`: from a file and options to tables and JSON.

Knows: what the options mean together, how a plan and a simulation are shown and written down.
Must not know: MPI, how anything is measured, planned or simulated.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mpgpt.config import check_spans, parse_layers
from mpgpt.files import writable, write_whole
from mpgpt.machines import Node, Shape, Workload
from mpgpt.placement.infeasible import gigabytes
from mpgpt.placement.plan import Plan, alternatives, choose, needs, predict
from mpgpt.placement.simulator import Report, run
from mpgpt.placement.what_if import SLOTS, Scene, WhatIf, load_cluster

OTHER_COLUMNS = 66
"""The width of all columns but that of the layers, where plans are compared."""
LISTED = 40
"""Of more ranks than this the tables leave out the middle."""


def what_if(path: Path, options: Mapping[str, Any], console: Console) -> None:
    """Plan for the machines of a file and show it. Raises ``UsageError`` when there is no plan."""
    cluster, target = load_cluster(path), check_target(options["json"])
    workload = _workload(cluster, options)
    scene = cluster.scene(options["dtype"], workload, cluster.slots or max(SLOTS, workload.sequences))
    scene = replace(scene, workload=replace(workload, sequences=min(workload.sequences, scene.slots)))
    plans = _plans(cluster, scene, options)
    plan = choose(plans)
    show(plan, plans, scene.nodes, scene.shape, console, workload=scene.workload)
    if target:
        save(target, plan_tree(plan, plans, scene.nodes, scene.shape, scene.workload))


def simulation(path: Path, options: Mapping[str, Any], console: Console, progress: Console) -> None:
    """Simulate the ring of a file's machines and show what comes of it; a bar on ``progress`` if it is a terminal."""
    cluster, target = load_cluster(path), check_target(options["json"])
    asked = _workload(cluster, options)
    scene = cluster.scene(options["dtype"], asked, cluster.slots or max(SLOTS, cluster.workload.sequences))
    # The plan is made for as many as run at once; the simulation serves them all.
    scene = replace(scene, workload=replace(asked, sequences=min(asked.sequences, scene.slots)))
    if options["spans"]:
        there = len(scene.nodes)
        spans = check_spans(
            parse_layers(options["spans"], "--spans"), there, scene.shape.layers, "--spans", f"{path} has {there}"
        )
        objective = options["objective"] or cluster.objective
        plan = predict(spans, scene.shape, scene.nodes, scene.links, scene.workload, objective)
    else:
        plan = choose(_plans(cluster, scene, options))
    with Progress(
        TextColumn("simulating"), BarColumn(), TextColumn("{task.completed:.0f} of {task.total:.0f} tokens"),
        TimeRemainingColumn(), console=progress, disable=not progress.is_terminal, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("", total=asked.sequences * asked.new_tokens)
        report = run(
            plan.spans, scene.shape, scene.nodes, scene.links, asked, slots=scene.slots, context=scene.context,
            arrival=options["arrival"], seed=options["seed"], progress=_sometimes(bar, task),
        )  # fmt: skip
    show_report(report, plan, scene.nodes, console)
    if target:
        tree = {"workload": asdict(asked), "slots": scene.slots, "context": scene.context, **asdict(report)}
        save(target, tree | {"plan": plan_tree(plan, [plan], scene.nodes, scene.shape, scene.workload)})


def _sometimes(bar: Progress, task: Any) -> Callable[[int], None]:
    """A listener that does not let the bar slow the simulation down."""
    shown_at = 0

    def hear(tokens: int) -> None:
        nonlocal shown_at
        if tokens - shown_at >= 500:
            shown_at = tokens
            bar.update(task, completed=tokens)

    return hear


def _workload(cluster: WhatIf, options: Mapping[str, Any]) -> Workload:
    """The file's, and over it what is given on the command line."""
    given = {key: options[key] for key in ("sequences", "prompt_tokens", "new_tokens") if options[key] is not None}
    return replace(cluster.work, **given)


def _plans(cluster: WhatIf, scene: Scene, options: Mapping[str, Any]) -> list[Plan]:
    objective = options["objective"] or cluster.objective
    return alternatives(scene.shape, scene.nodes, scene.links, scene.workload, objective, others=scene.others)


# -- showing


def show(
    plan: Plan, plans: Sequence[Plan], nodes: Sequence[Node], shape: Shape, console: Console, *, workload: Workload
) -> None:
    """A plan, what is predicted of it, and what other numbers of ranks would give (``plans``, fewest first)."""
    many = f"{workload.sequences} sequence{'s' * (workload.sequences > 1)}"
    console.print(_ranks_table(plan, nodes))
    _say(console, f"The model needs {gigabytes(needs(shape))} with its cache and headroom. Predicted:")
    _say(console, f"  one sequence     {plan.one:8.1f} tokens/s")
    _say(
        console,
        f"  {many:16} {plan.many:8.1f} tokens/s while all decode, {plan.whole:.1f} with their prompts counted in",
    )
    _say(console, f"  first token      {plan.first_token_s:8.3f} s after a prompt of {workload.prompt_tokens} tokens\n")
    if len(plans) > 1:
        console.print(_plans_table(plan, plans, workload, console.width))
    for sentence in sentences(plan, plans, workload):
        _say(console, sentence)


def _rate(value: float) -> str:
    """Three digits that count, or all before the point."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _say(console: Console, line: str) -> None:
    """A line that is left as it is: not wrapped, no word of it taken for colour."""
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
            _rate(other.one), _rate(other.many), _rate(other.whole), f"{other.first_token_s:.3f}",
            "taken" if other == plan else "",
        )  # fmt: skip
    return table


def sentences(plan: Plan, plans: Sequence[Plan], workload: Workload) -> list[str]:
    """Where fewer ranks are faster than all, and what one sequence gains or loses by the plan, in plain words."""
    if len(plans) < 2:
        return []
    said = []
    one = [(plan.one, plan.ranks) for plan in plans]
    whole = [(plan.whole, plan.ranks) for plan in plans]
    for what, values in (("one sequence", one), (f"{workload.sequences} sequences with their prompts", whole)):
        (best, ranks), (last, all_ranks) = max(values), values[-1]
        if best > 1.01 * last:
            verb = "rank is" if ranks == 1 else "ranks are"
            said.append(
                f"{ranks} {verb} faster than {all_ranks} for {what}: {_rate(best)} against {_rate(last)} tokens/s."
            )
    first = plans[0]
    if plan.ranks > first.ranks:
        word = "gains" if plan.one > first.one else "loses"
        said.append(
            f"With {plan.ranks} ranks one sequence {word} {abs(plan.one / first.one - 1):.0%} against {first.ranks} "
            f"({_rate(plan.one)} and {_rate(first.one)} tokens/s); {workload.sequences} make "
            f"{plan.whole / first.whole:.2f} times as many, prompts counted in."
        )
    return said


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
    _say(console, f"{done} and {report.seconds:.3f} s of the ring's time")
    _say(console, f"  while all decode {decoding}, {plan.many:.1f} predicted")
    _say(console, f"  over all time    {report.new_tokens_per_s:8.1f} tokens/s, {report.tokens_per_s:.1f} with prompts")
    waits = (("before the ring", report.waited_s), ("to first token", report.ttft_s), ("between tokens", report.tpot_s))
    for name, pair in waits:
        if pair:
            _say(console, f"  {name:16} {pair[0] * 1e3:8.1f} ms p50, {pair[1] * 1e3:.1f} ms p95")
    console.print(table)


# -- writing down


def plan_tree(
    plan: Plan, plans: Sequence[Plan], nodes: Sequence[Node], shape: Shape, workload: Workload
) -> dict[str, Any]:
    """For JSON: seconds, bytes, tokens a second; layers as [start, stop)."""

    def rates(one: Plan) -> dict[str, Any]:
        return {
            "ranks_with_layers": one.ranks,
            "layers": [[span.start, span.stop] if span else None for span in one.spans],
            "one_tokens_per_s": one.one, "many_tokens_per_s": one.many, "whole_tokens_per_s": one.whole,
            "first_token_s": one.first_token_s,
        }  # fmt: skip

    ranks = [
        {
            "rank": node.rank, "host": node.host, "kind": node.kind,
            "layers": [share.span.start, share.span.stop] if share.span else None,
            "memory_bytes": share.memory, "free_bytes": node.free or None, "busy_s": share.busy_s, "one_s": share.one_s,
        }
        for node, share in zip(nodes, plan.shares, strict=True)
    ]  # fmt: skip
    return {
        "objective": plan.objective, "workload": asdict(workload), "needs_bytes": needs(shape), **rates(plan),
        "ranks": ranks, "alternatives": [rates(one) for one in plans],
        "sentences": sentences(plan, plans, workload),
    }  # fmt: skip


def check_target(path: Path | None) -> Path | None:
    """Where JSON will go, found impossible before the work and not after it."""
    if path is not None:
        writable(path, "--json")
    return path


def save(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree as JSON."""
    write_whole(path, (json.dumps(tree, indent=2) + "\n").encode(), f"--json {path}")
