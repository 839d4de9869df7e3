"""`mpgpt convert coreml`: its output, and where it writes."""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpgpt.core import Span
from tests.support.launch import mpgpt
from tests.support.models import save_random

pytest.importorskip("coremltools")

from mpgpt_ios.bundle import Bundle
from mpgpt_ios.convert import command
from mpgpt_ios.convert import package as conversion
from mpgpt_ios.convert.package import PackageOptions

OPTIONS = PackageOptions(slots=1, context=32, chunk=8)


def test_on_the_command_line(folders: dict[str, Path], tmp_path: Path) -> None:
    model, out = save_random("gpt2", tmp_path / "model"), tmp_path / "a.mlpackage"
    run = mpgpt(0, "convert", "coreml", "--model", model, "--layers", "1-2", "--context", "64", "--out", out)
    assert run.returncode == 2 and "mpgpt: the model's head dimension is 16" in run.stderr
    run = mpgpt(0, "convert", "coreml", "--model", folders["llama"], "--layers", "1,2", "--out", out)
    assert run.returncode == 2 and "one range, such as 4-7" in run.stderr
    run = mpgpt(
        0, "convert", "coreml", "--model", folders["llama"], "--layers", "1-2", "--context", "64", "--slots", "2",
        "--chunk", "8", "--out", out,
    )  # fmt: skip
    assert run.returncode == 0 and not run.stderr.strip(), run.stderr
    assert Bundle.at(out).hash.hex()[:12] in run.stdout and "self-test within 0.0" in run.stdout
    assert f"package: {out}" in run.stdout and "its layers are 1 to 2" in run.stdout


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_says_how_far_it_is_and_libraries_say_nothing(
    folders: dict[str, Path], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal()

    def slow(
        folder: Path, span: Span, out: Path, options: PackageOptions, report: Callable[[str], None]
    ) -> tuple[Bundle, float]:
        with conversion.quiet_libraries():
            for line in ("reading layers", "converting prefill"):
                report(line)
                print("a library's bar", file=sys.stderr)
                deadline = time.monotonic() + 10.0
                while line not in terminal.getvalue():
                    assert time.monotonic() < deadline, "it is not seen"
                    time.sleep(0.01)
        return bundle, 0.01

    monkeypatch.setattr(command, "convert", slow)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", terminal)
    command.run_convert(str(folders["gpt2"]), "1-2", tmp_path / "a.mlpackage", OPTIONS, home=tmp_path)
    assert sys.stderr is terminal and "a library's bar" not in terminal.getvalue()


def test_a_link_is_written_through(
    folders: dict[str, Path], bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package is made beside the folder that the link points to, and takes its place, not the link's."""
    made: list[Path] = []

    def convert(folder: Path, span: Any, out: Path, *more: Any) -> tuple[Bundle, float]:
        made.append(out)
        return bundle, 0.01

    monkeypatch.setattr(command, "convert", convert)
    (tmp_path / "far" / "b.mlpackage").mkdir(parents=True)
    (tmp_path / "a.mlpackage").symlink_to("far/b.mlpackage")
    for name in ("a.mlpackage", "far/b.mlpackage", "far/new.mlpackage"):
        command.run_convert(str(folders["gpt2"]), "1-2", tmp_path / name, OPTIONS, home=tmp_path)
    assert made == [tmp_path / "far" / name for name in ("b.mlpackage", "b.mlpackage", "new.mlpackage")]
