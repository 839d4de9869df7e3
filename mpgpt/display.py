"""What several commands show in the same way: lines of progress, numbers with their nouns and units, a progress bar.

Knows: plurals, units, standard error, how a bar is laid out, and that none is drawn where that is no terminal.
Must not know: what is counted, or what progresses.
"""

from __future__ import annotations

from typing import Self

import click


def notify(line: str) -> None:
    """Show a line of progress, on standard error."""
    click.echo(line, err=True)


def silent(line: str) -> None:
    """The report of a rank that shows nothing."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as 1 rank and 2 ranks."""
    return f"{number} {noun}{'s' * (number != 1)}"


def gigabytes(count: float) -> str:
    """Bytes in powers of ten, as memory is sold."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


class ProgressBar:
    """The number of things that are done, and the time that is left for the others."""

    def __init__(
        self,
        noun: str,
        *,
        total: int,
        done: int = 0,
        text: str = "",
        window_s: float = 30.0,
        refresh_per_second: float = 10.0,
    ) -> None:
        """``noun`` is the plural of the things, ``text`` follows it; the last ``window_s`` give the time left."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeRemainingColumn,
        )

        console = Console(stderr=True)
        self.watched = console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(noun),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            disable=not self.watched,
            speed_estimate_period=window_s,
            refresh_per_second=refresh_per_second,
        )
        self._task = self._progress.add_task(text, total=total, completed=done)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def show(self, text: str) -> None:
        """Replace the text behind the noun."""
        self._progress.update(self._task, description=text)
