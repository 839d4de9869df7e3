"""The results of a bench: several rounds as medians, in a JSON file, a table and a line.

Knows: how rounds become one figure, how a file is written whole, what a person sees.
Must not know: how anything was measured or started, MPI.

The JSON, whose numbers are medians over the rounds (times in the unit that the key ends with; MB are 10^6 bytes):

    {"format": 1, "date": "2026-11-23T10:00:00+00:00",
     "complete": true,                           false in the file of a bench that was interrupted
     "machine": {"host", "system", "processor", "cores", "memory_gb"},      of rank 0
     "versions": {"mpgpt", "python", "torch", "openmpi", "mpi4py", "numpy"},
     "model": {"name", "random", "layers"},
     "settings": {"prompt_tokens", "new_tokens", "threads", "pin", "rounds", "repeats", ...},
     "runs": [{
        "ranks": 2, "concurrency": 8, "dtype": "float32",
        "decode_tokens_per_s",                   from when all decode until the first is done; null where never
        "prompt_tokens_per_s",                   until the last first token
        "ttft_ms": {"p50", "p95"},               from handing all requests in to each sequence's first token
        "tpot_ms": {"p50", "p95"},               between two tokens of a sequence
        "stages": [{"rank", "host", "layers": [first, one past the last], "steps", "tokens",
                    "compute_s", "wait_s", "send_s", "other_s", "wall_s",     the four add up to the fifth
                    "peak_rss_mb", "slice_mb", "kv_mb",
                    "device": null, or of the iPad behind the rank {"requests", "compute_s" (there), "network_s",
                    "sent", "received" (bytes), "falls", "away_s", "thermal"}}],
        "read_bandwidth_gb_s",                   of rank 0, in the same process; null if interrupted before
        "read_by",                               the way of reading that was fastest
        "floor_tokens_per_s",                    one sequence alone, if reading all weights were all there is to do
        "oversubscribed": false,                 more threads than cores to run them
        "rounds": 3,
        "spread": {"decode_tokens_per_s": [least, greatest], ...},            for each of the medians
        "each_round": {"decode_tokens_per_s": [...], "prompt_tokens_per_s": [...]}        in the order of the rounds
     }],
     "peers": [{                                 empty without --against
        "peer": "transformers", "version": "5.23.0",
        "dtype": "float32",                      that it ran in: transformers has float32 where we have int8 or int4
        "ranks": 1,                              processes that each had a rank's cores
        "concurrency": 8, "decode_tokens_per_s", "prompt_tokens_per_s", "rounds": 3, "spread", "each_round",
        "ratios": [{                             for every run of ours that it is compared with
            "dtype": "int8", "ranks": 2,         of ours
            "ratio": 1.67,                       our decode_tokens_per_s / theirs, taken within each round: the median
            "spread": [least, greatest]}]        ratio and spread are null where a speed is
     }]}

``stages`` are those of one round, the one whose speed is the median, so that their parts still add up.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import socket
import statistics
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from mpgpt import __version__
from mpgpt.display import counted
from mpgpt.files import destination, write_atomically
from mpgpt.model.kernel_timings import processor_name

SPEEDS = ("decode_tokens_per_s", "prompt_tokens_per_s")
FIGURES = (*SPEEDS, "ttft_ms", "tpot_ms")
PACKAGES = ("torch", "openmpi", "mpi4py", "numpy")
BLOCKS = "▁▂▃▄▅▆▇█"
WIDTH, PEERS_WIDTH = 124, 32
Key = tuple[str, int, int]


class Results:
    """The runs so far; ``document`` is all of them at any time."""

    def __init__(self, header: dict[str, Any], file: Path | None) -> None:
        """``header`` has the keys ``model`` and ``settings``; ``file`` is written anew after every run.

        A pipe or the like, in which nothing can be written anew, gets the last document only.
        """
        self._header = {"format": 1, "date": now()} | machine() | header
        self._file, self._anew = file, file is not None and destination(file).regular
        self._rounds: dict[Key, list[dict[str, Any]]] = {}
        self._reads: dict[tuple[str, int], list[tuple[float, str]]] = {}
        self._peers: dict[tuple[str, Key], list[dict[str, Any]]] = {}
        self._compared: dict[tuple[str, Key], Sequence[tuple[str, int]]] = {}
        self.complete = False

    def add(self, run: dict[str, Any]) -> None:
        """A finished run of one round: ``ranks``, ``concurrency``, ``dtype``, ``stages``, and the figures."""
        self._rounds.setdefault((run["dtype"], run["ranks"], run["concurrency"]), []).append(run)
        self._write()

    def add_bandwidth(self, dtype: str, ranks: int, gb_s: float, way: str) -> None:
        """How fast rank 0 of a ring reads memory; it belongs to all runs of that dtype and so many ranks."""
        self._reads.setdefault((dtype, ranks), []).append((gb_s, way))
        self._write()

    def add_peer(self, run: dict[str, Any], compared: Sequence[tuple[str, int]]) -> None:
        """A peer's finished run of one round: ``peer``, ``version``, ``dtype``, ``ranks``, ``concurrency`` and the
        two speeds; ``compared`` are dtype and ranks of our own runs that it is to be compared with."""
        key = (run["peer"], (run["dtype"], run["ranks"], run["concurrency"]))
        self._peers.setdefault(key, []).append(run)
        self._compared[key] = compared
        self._write()

    def finish(self) -> None:
        self.complete = True
        self._write()

    def document(self) -> dict[str, Any]:
        """The JSON as it stands; see this module's docstring."""
        runs = [self._run(key, rounds) for key, rounds in self._rounds.items()]
        peers = [self._peer(key, rounds) for key, rounds in self._peers.items()]
        return self._header | {"complete": self.complete, "runs": runs, "peers": peers}

    def _peer(self, key: tuple[str, Key], rounds: list[dict[str, Any]]) -> dict[str, Any]:
        peer, (dtype, ranks, concurrency) = key
        every = {name: [run[name] for run in rounds] for name in SPEEDS}
        ratios = []
        for our_dtype, our_ranks in self._compared[key]:
            ours = self._rounds.get((our_dtype, our_ranks, concurrency), [])
            pairs = zip(ours, rounds, strict=False)  # in a round that is not over, one may be without the other
            each = [_ratio(a["decode_tokens_per_s"], b["decode_tokens_per_s"]) for a, b in pairs]
            if each:
                folded = {"ratio": _fold(each, statistics.median), "spread": _fold(each, _bounds)}
                ratios.append({"dtype": our_dtype, "ranks": our_ranks, **folded})
        return {
            "peer": peer, "version": rounds[0]["version"], "dtype": dtype, "ranks": ranks, "concurrency": concurrency,
            **{name: _fold(values, statistics.median) for name, values in every.items()}, "rounds": len(rounds),
            "spread": {name: _fold(values, _bounds) for name, values in every.items()}, "each_round": every,
            "ratios": ratios,
        }  # fmt: skip

    def _run(self, key: Key, rounds: list[dict[str, Any]]) -> dict[str, Any]:
        dtype, ranks, concurrency = key
        reads = self._reads.get((dtype, ranks), [])
        every = {name: [run[name] for run in rounds] for name in FIGURES}
        every["read_bandwidth_gb_s"] = [gb_s for gb_s, _ in reads] or [None]
        medians = {name: _fold(values, statistics.median) for name, values in every.items()}
        by_speed = sorted(rounds, key=lambda run: run["decode_tokens_per_s"] or 0.0)
        stages = by_speed[(len(rounds) - 1) // 2]["stages"]
        bandwidth = medians["read_bandwidth_gb_s"]
        floor = 1000 * bandwidth / sum(stage["slice_mb"] for stage in stages) if bandwidth else None
        return {
            "ranks": ranks, "concurrency": concurrency, "dtype": dtype, **medians, "stages": stages,
            "read_by": max(reads)[1] if reads else None, "floor_tokens_per_s": floor,
            "oversubscribed": rounds[0]["oversubscribed"], "rounds": len(rounds),
            "spread": {name: _fold(values, _bounds) for name, values in every.items()},
            "each_round": {name: every[name] for name in SPEEDS},
        }  # fmt: skip

    def _write(self) -> None:
        if self._file and (self._anew or self.complete):
            write_atomically(self._file, json.dumps(self.document(), indent=1).encode() + b"\n", f"--json {self._file}")


def _fold(values: list[Any], how: Callable[[list[float]], Any]) -> Any:
    """``how`` over the numbers at the same place of each value; None where there are none."""
    if isinstance(values[0], dict):
        return {key: _fold([value[key] for value in values], how) for key in values[0]}
    numbers = [value for value in values if value is not None]
    return how(numbers) if numbers else None


def _bounds(values: list[float]) -> list[float]:
    return [min(values), max(values)]


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return ours / theirs if ours and theirs else None


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def machine() -> dict[str, Any]:
    """This host and what runs on it."""
    versions = {"mpgpt": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    host = {
        "host": socket.gethostname(), "system": platform.platform(), "processor": processor_name(),
        "cores": os.cpu_count() or 1, "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
    }  # fmt: skip
    return {"machine": host, "versions": versions}


# -- on the terminal


def show(document: dict[str, Any]) -> None:
    """The table and the lines, on standard output."""
    console = Console(width=None if _has_width() else WIDTH + PEERS_WIDTH * bool(document["peers"]))
    console.print(_table(document))
    for line in peers(document):
        console.print(line, highlight=False)
    for line in sparklines(document):
        console.print(line, highlight=False)
    if any(run["oversubscribed"] for run in document["runs"]):
        console.print("* more threads than cores: these shared them")


def _has_width() -> bool:
    """Whether standard output is a terminal that knows how wide it is; the one that mpirun gives a rank does not."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def _table(document: dict[str, Any]) -> Table:
    settings = document["settings"]
    title = (
        f"{document['model']['name']}: {settings['prompt_tokens']} prompt + {settings['new_tokens']} new tokens, "
        f"median (least to greatest of the rounds)"
    )
    table = Table(title=title, title_justify="left")
    for heading in ("dtype", "ranks", "seq."):
        table.add_column(heading, no_wrap=True)
    for heading in (
        "tokens/s", "of memory's\nspeed", "prompt\ntokens/s", "first token\nms, p50, p95", "next token\nms, p50, p95",
        "computing,\neach stage",
    ):  # fmt: skip
        table.add_column(heading, justify="right", no_wrap=heading == "tokens/s")
    against = document["peers"] and [_against(document, run) for run in document["runs"]]
    if against:
        table.add_column("against")
    for n, run in enumerate(document["runs"]):
        table.add_row(*_cells(run), *against[n : n + 1])
    return table


def _against(document: dict[str, Any], run: dict[str, Any]) -> str:
    """The run's speed over that of each peer, a line each."""
    lines = []
    for peer in document["peers"]:
        for ratio in peer["ratios"] if peer["concurrency"] == run["concurrency"] else ():
            if (ratio["dtype"], ratio["ranks"]) == (run["dtype"], run["ranks"]) and ratio["ratio"]:
                other = f" {peer['dtype']}" if peer["dtype"] != run["dtype"] else ""
                lines.append(f"{ratio['ratio']:.2f} x {peer['peer']}{other}")
    return "\n".join(lines)


def peers(document: dict[str, Any]) -> list[str]:
    """A line for each run of a peer."""
    lines = []
    for peer in document["peers"]:
        least, greatest = peer["spread"]["decode_tokens_per_s"]
        processes, sequences = counted(peer["ranks"], "rank"), counted(peer["concurrency"], "sequence")
        lines.append(
            f"{peer['peer']} {peer['version']}, {peer['dtype']}, {processes}, {sequences}: "
            f"{peer['decode_tokens_per_s']:.1f} ({least:.1f} to {greatest:.1f}) tokens/s, "
            f"{peer['prompt_tokens_per_s']:.0f} prompt tokens/s"
        )
    return lines


def _cells(run: dict[str, Any]) -> list[str]:
    speed, floor = run["decode_tokens_per_s"], run["floor_tokens_per_s"]
    least, greatest = run["spread"]["decode_tokens_per_s"] or (0.0, 0.0)
    busy = [stage["compute_s"] / max(stage["wall_s"], 1e-9) for stage in run["stages"]]
    return [
        run["dtype"],
        f"{run['ranks']}{'*' * run['oversubscribed']}",
        str(run["concurrency"]),
        f"{speed:.1f} ({least:.1f} to {greatest:.1f})" if speed else "-",
        f"{speed / floor:.0%}" if speed and floor and run["concurrency"] == 1 else "",
        f"{run['prompt_tokens_per_s']:.0f}",
        *(f"{run[name]['p50']:.1f}, {run[name]['p95']:.1f}" for name in ("ttft_ms", "tpot_ms")),
        " ".join(f"{share:.0%}" for share in busy),
    ]


def sparklines(document: dict[str, Any]) -> list[str]:
    """For each dtype and concurrency a line: its speed over the numbers of ranks. None for a single number."""
    lines = []
    for (dtype, concurrency), runs in by_line(document).items():
        speeds = [run["decode_tokens_per_s"] for run in runs]
        if len(speeds) > 1:
            ranks = ", ".join(str(run["ranks"]) for run in runs)
            figures = ", ".join(f"{speed:.1f}" for speed in speeds)
            sequences = counted(concurrency, "sequence")
            lines.append(f"{dtype}, {sequences}: {_spark(speeds)}  {figures} tokens/s on {ranks} ranks")
    return lines


def by_line(document: dict[str, Any]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    """The runs that have a speed, by dtype and concurrency, ranks ascending."""
    lines: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for run in sorted(document["runs"], key=lambda run: run["ranks"]):
        if run["decode_tokens_per_s"]:
            lines.setdefault((run["dtype"], run["concurrency"]), []).append(run)
    return lines


def _spark(values: list[float]) -> str:
    most = max(values)
    return "".join(BLOCKS[min(len(BLOCKS) - 1, int(len(BLOCKS) * value / most))] for value in values)
