"""`mpgpt convert coreml`: from its options to a package, and the lines to copy into the settings.

Knows: the options' meaning, where models lie, what is printed.
Must not know: how a package is made or checked.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import click
from rich.console import Console

from mpgpt.config import parse_layers
from mpgpt.display import notify
from mpgpt.errors import UsageError
from mpgpt.model.pull import find, pull
from mpgpt_ios.convert.package import PackageOptions, convert

SETTINGS = """ipad:
  rank: 1                        # the rank that stands before it; its layers are {first} to {last}
  address: 10.10.0.5:8000        # where it listens
  token_file: ipad.token         # the same token as on the iPad
  package: {out}"""


def run_convert(model: str, layers: str, out: Path, options: PackageOptions, *, home: Path) -> None:
    """Convert, and print the result. Raises ``UsageError`` and ``ModelError``."""
    spans = [span for span in parse_layers(layers) if span]
    if len(spans) != 1 or "," in layers:
        raise UsageError(f"--layers {layers}: one range, such as 4-7, makes one package")
    console = Console(file=sys.stderr)  # bound now: while it converts, sys.stderr is silenced
    folder = find(model, home) or pull(model, home=home, report=notify)
    with console.status("converting") as status:
        package = Path(os.path.realpath(out.expanduser()))
        bundle, difference = convert(folder, spans[0], package, replace(options, name=model), status.update)
    click.echo(f"{out}: layers {spans[0]} of {model}, {bundle.length / 1e6:.1f} MB, {bundle.hash.hex()[:12]}")
    click.echo(f"self-test within {difference:.4f} of float32; {bundle.manifest.tolerance} is allowed")
    click.echo(f"\n{SETTINGS.format(first=spans[0].start, last=spans[0].stop - 1, out=out)}")
