"""Options that several commands have, and the values that a command makes of its options.

Knows: names, types and help of options.
Must not know: commands, or what options do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar, get_args

import click

from mpgpt.config import CacheDtype, DtypeName
from mpgpt.core import SEEDS

Option = Callable[[Any], Any]
Options = TypeVar("Options")


def from_click(kind: type[Options], values: Mapping[str, Any]) -> Options:
    """A dataclass whose fields are click's ``values`` of the same names; a command has an option for each of them."""
    return kind(**{field.name: values[field.name] for field in fields(kind)})  # type: ignore[arg-type]


def group(*options: Option) -> Option:
    """Several options as one decorator; ``--help`` shows them in this order."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


source = group(
    click.option("--model", help="A folder, or a name that `mpgpt pull` knows; pulled where it is absent."),
    click.option(
        "--config", type=click.Path(path_type=Path), help="Settings.  [default: the .yaml beside the hostfile]"
    ),
)
"""Which model, and which settings."""

decoding = group(
    click.option("--max-new-tokens", type=click.IntRange(1, 1_000_000)),
    click.option("--strategy", type=click.Choice(["greedy", "sampling", "top_k", "top_p"])),
    click.option("--temperature", type=float),
    click.option("--top-k", type=int, help="Only the K most probable tokens."),
    click.option("--top-p", type=float, help="Only the most probable tokens that together reach P; 0 is greedy."),
    click.option("--min-p", type=float, help="Only tokens at least P times as probable as the most probable."),
    click.option("--repetition-penalty", type=float, help="Above 1: fewer tokens that are already in the text."),
    click.option(
        "--seed", type=click.IntRange(-(SEEDS // 2), SEEDS // 2 - 1),
        help="The same seed, the same text, on any cluster (but see --fast).",
    ),
)  # fmt: skip
"""How tokens are chosen."""

prompting = group(
    click.option("--ignore-eos", is_flag=True, help="Go on after the end-of-text token."),
    click.option(
        "--chat/--raw", "chat", default=None, help="Through the chat template or not.  [default: if there is one]"
    ),
    click.option("--system", help="The system message of a chat."),
    click.option(
        "--drafts/--no-drafts", "drafts", default=None,
        help="Predict tokens from the text so far; faster or not, the same text (but see --fast).  [default: drafts]",
    ),
)  # fmt: skip
"""How a prompt becomes a sequence."""

fast = click.option(
    "--fast/--exact", "fast", default=None,
    help="Take kernels that are faster but may round otherwise beside other texts or on other hosts, so that texts may "
    "differ.  [default: exact]",
)  # fmt: skip
"""Whether speed goes before bits."""

DTYPES: tuple[str, ...] = get_args(DtypeName)
CACHE_DTYPES: tuple[str, ...] = get_args(CacheDtype)

kv_dtype = click.option("--kv-dtype", type=click.Choice(CACHE_DTYPES), help="Of the cache.  [default: as --dtype]")

computing = group(
    click.option("--kernel", help="What multiplies: auto, native, torch, or a name from --explain.  [default: auto]"),
    fast,
    click.option("--explain", is_flag=True, help="Show what computes on each host, and which kernels were tried."),
    click.option("--threads", type=click.IntRange(1), help="Threads a rank.  [default: the host's cores, shared]"),
    click.option("--max-sequences", type=click.IntRange(1, 65535), help="Sequences at once.  [default: 16]"),
)
"""What computes on a host, and how much of it."""

ring = group(
    click.option("--dtype", type=click.Choice(get_args(DtypeName))),
    kv_dtype,
    click.option("--layers", help='Every rank\'s layers, such as "0-3,4-7,8-11"; "-" for none.  [default: measured]'),
    click.option(
        "--objective", type=click.Choice(["throughput", "latency"]), help="What the measured layers are best for."
    ),
    computing,
    click.option(
        "--context", type=click.IntRange(2), help="Tokens of a sequence at most.  [default: the model's, up to 4096]"
    ),
)
"""How the ring is formed."""

workload_options = group(
    click.option("--objective", type=click.Choice(["throughput", "latency"]), help="What to be best at."),
    click.option("--dtype", type=click.Choice(get_args(DtypeName))),
    click.option("--sequences", type=click.IntRange(1, 1_000_000), help="How many.  [default: the file's]"),
    click.option("--prompt-tokens", type=click.IntRange(1, 1_000_000), help="Of each.  [default: the file's]"),
    click.option("--new-tokens", type=click.IntRange(1, 1_000_000), help="Of each.  [default: the file's]"),
    click.option("--json", type=click.Path(path_type=Path), help="Write all figures here, too."),
)
"""The workload of a plan or a simulation."""
