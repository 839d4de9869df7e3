"""A bench's picture: speed over ranks, and where each stage's time went.

Knows: the document that ``report.py`` makes, and matplotlib.
Must not know: how anything was measured.
"""

from __future__ import annotations

import importlib.util
import io
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpgpt.bench.report import by_line
from mpgpt.display import counted
from mpgpt.errors import UsageError
from mpgpt.files import check_writable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ENDINGS = (".png", ".svg", ".pdf")
LACKING = 'matplotlib is not installed, so the table comes without a picture: pip install "mpgpt[plots]"'
LINES = ("#1f6fb4", "#d1601f", "#2f8f4e", "#8550a8", "#a33a4c", "#5b6770")
PARTS = (("compute", "#1f6fb4"), ("wait", "#d5d9de"), ("send", "#e0912f"), ("other", "#8550a8"))
INK = "#30363d"


def check(path: Path) -> None:
    """Raise ``UsageError`` if no picture can be made at ``path``, before anything is measured."""
    if path.suffix.lower() not in ENDINGS:
        raise UsageError(f"--plot {path}: a picture's name ends with {', '.join(ENDINGS)}")
    check_writable(path, "--plot")


def installed() -> bool:
    """Whether there is matplotlib, which is an extra."""
    return importlib.util.find_spec("matplotlib") is not None


def plot(document: dict[str, Any], ending: str) -> bytes:
    """The picture as a file's bytes, in the format that ``ending`` (.png, .svg, .pdf) names; a row for each dtype."""
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(run["dtype"] for run in document["runs"]))
    bars = [sum(run["ranks"] for run in document["runs"] if run["dtype"] == dtype) for dtype in dtypes]
    heights = [max(4.2, 1.4 + 0.24 * count) for count in bars]
    figure = Figure(figsize=(13.0, sum(heights) + 0.9), layout="constrained", dpi=120)
    figure.suptitle(_title(document), fontsize=12, color=INK)
    grid = figure.subplots(len(dtypes), 2, squeeze=False, height_ratios=heights, width_ratios=(1.0, 1.15))
    for row, dtype in enumerate(dtypes):
        _speeds(grid[row][0], document, dtype)
        _shares(grid[row][1], document, dtype)
        for axes in grid[row]:
            axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format=ending.lstrip(".").lower())
    return picture.getvalue()


def _title(document: dict[str, Any]) -> str:
    settings, machine = document["settings"], document["machine"]
    threads = counted(settings["threads"], "thread") if settings["threads"] else "all cores"
    where = "each rank bound to its cores" if settings["pin"] else "not bound"
    return (
        f"{document['model']['name']}: {settings['prompt_tokens']} prompt + {settings['new_tokens']} new tokens\n"
        f"{machine['host']}: {machine['processor']}, {machine['cores']} cores, {threads} a rank, {where}; "
        f"{document['date'][:10]}"
    )


def _speeds(axes: Axes, document: dict[str, Any], dtype: str) -> None:
    """Speed over ranks, a line for each concurrency; what it would be without loss; what memory allows one sequence."""
    lines = {concurrency: runs for (kind, concurrency), runs in by_line(document).items() if kind == dtype}
    for colour, (concurrency, runs) in zip(LINES * len(lines), lines.items(), strict=False):
        ranks = [run["ranks"] for run in runs]
        speeds = [run["decode_tokens_per_s"] for run in runs]
        ends = [run["spread"]["decode_tokens_per_s"] for run in runs]
        below = [speed - least for speed, (least, _) in zip(speeds, ends, strict=True)]
        above = [greatest - speed for speed, (_, greatest) in zip(speeds, ends, strict=True)]
        axes.errorbar(
            ranks, speeds, yerr=[below, above], color=colour, marker="o", ms=5, lw=1.8, capsize=4, zorder=3,
            label=counted(concurrency, "sequence"),
        )  # fmt: skip
        for x, speed in zip(ranks, speeds, strict=True):
            axes.annotate(
                f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}", (x, speed), textcoords="offset points",
                xytext=(7, 5), fontsize=8, color=colour, zorder=4, path_effects=[_halo()],
            )  # fmt: skip
        # A sequence is in one stage at a time, so ranks beyond the number of sequences cannot help.
        alone = speeds[0] / min(ranks[0], concurrency)
        axes.plot(ranks, [alone * min(r, concurrency) for r in ranks], color=colour, ls="--", lw=1, zorder=2)
    axes.plot([], [], color=INK, ls="--", lw=1, label="ideal: nothing lost between ranks")
    runs = [run for run in document["runs"] if run["dtype"] == dtype]
    floors = [run["floor_tokens_per_s"] for run in runs if run["floor_tokens_per_s"]]
    if floors:
        axes.axhline(
            statistics.median(floors), color=INK, ls=":", lw=1.3, zorder=2, label="1 sequence at memory's speed"
        )
    every = {run["ranks"]: f"{run['ranks']}{'*' * run['oversubscribed']}" for run in runs}
    axes.set_xticks(sorted(every), [every[ranks] for ranks in sorted(every)])
    axes.set_xlim(min(every) - 0.3, max(every) + 0.4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("ranks (*: more threads than cores)" if any(r["oversubscribed"] for r in runs) else "ranks")
    axes.set_ylabel("new tokens a second")
    axes.set_title(f"{dtype}: decoding speed, median and range of the rounds", fontsize=10, loc="left", color=INK)
    axes.grid(axis="y", color="#e6e8eb", zorder=0)
    axes.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0.0, -0.13), ncols=3)


def _shares(axes: Axes, document: dict[str, Any], dtype: str) -> None:
    """A bar for each stage of each run: the shares of its time."""
    runs = [run for run in document["runs"] if run["dtype"] == dtype]
    runs.sort(key=lambda run: (run["concurrency"], run["ranks"]))
    at, reports, names = 0.0, [], []
    for run in runs:
        for stage in run["stages"]:
            begun = 0.0
            for part, colour in PARTS:
                share = 100 * stage[f"{part}_s"] / max(stage["wall_s"], 1e-9)
                axes.barh(at, share, left=begun, height=0.82, color=colour)
                if share >= 6:
                    axes.text(
                        begun + share / 2, at, f"{share:.0f}", ha="center", va="center", fontsize=7,
                        color=INK if part == "wait" else "white",
                    )  # fmt: skip
                begun += share
            first, stop = stage["layers"]
            of = f"{counted(run['concurrency'], 'sequence')}, {counted(run['ranks'], 'rank')}:  " * (stage["rank"] == 0)
            reports.append(at)
            names.append(f"{of}rank {stage['rank']}, layers {first}-{stop - 1}")
            at += 1.0
        at += 0.5
    axes.set_yticks(reports, names, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(at - 0.9, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the stage's time, prompts and decoding, %")
    axes.set_title(f"{dtype}: where each stage's time went", fontsize=10, loc="left", color=INK)
    axes.legend(
        handles=[_patch(part, colour) for part, colour in PARTS], ncols=4, fontsize=8, frameon=False,
        loc="upper left", bbox_to_anchor=(0.0, -0.13),
    )  # fmt: skip


def _patch(label: str, colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=colour, label=label)


def _halo() -> Any:
    from matplotlib.patheffects import withStroke

    return withStroke(linewidth=2.5, foreground="white")
