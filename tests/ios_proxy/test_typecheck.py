"""The Swift that Linux cannot build, checked against stubs of Apple's frameworks: it passes, and mistakes do not.

`swift build --package-path ios_proxy/GPT2Node/Typecheck` does the first half, too; here no code is generated, which
takes a quarter of the time. The package's own description says what there is and what needs what.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import ROOT

PACKAGE = ROOT / "ios_proxy" / "GPT2Node" / "Typecheck"
STUBS = "Stubs/"
FLAGS = ("-swift-version", "6", "-warnings-as-errors", "-parse-as-library")

pytestmark = pytest.mark.skipif(shutil.which("swift") is None, reason="there is no Swift toolchain")


@dataclass(frozen=True, slots=True)
class Target:
    """One target of the package."""

    name: str
    path: str
    needs: tuple[str, ...]
    sources: tuple[Path, ...]

    @property
    def module(self) -> str:
        return self.name.replace("-", "_")

    @property
    def flags(self) -> tuple[str, ...]:
        program = any(source.name == "main.swift" for source in self.sources)
        return FLAGS[:-1] if program else FLAGS


@dataclass(frozen=True, slots=True)
class Modules:
    """A folder with the modules of all targets, those that others need."""

    folder: Path
    targets: dict[str, Target]

    def emit(self, target: Target) -> None:
        """Write a target's module. Bodies are passed over where they are nobody's who imports it."""
        output = self.folder / f"{target.module}.swiftmodule"
        skip = "-experimental-skip-non-inlinable-function-bodies"
        ran = run(target, self.folder, target.sources, "-emit-module", "-emit-module-path", str(output), "-wmo", skip)
        assert ran.returncode == 0, ran.stderr

    def check(self, target: Target, sources: tuple[Path, ...]) -> subprocess.CompletedProcess[str]:
        """Everything that a build finds out: Swift looks for values that are sent away behind the types, in SIL."""
        return run(target, self.folder, sources, "-emit-sil", "-wmo", "-o", "/dev/null")


def run(target: Target, folder: Path, sources: tuple[Path, ...], *flags: str) -> subprocess.CompletedProcess[str]:
    command = ["swiftc", *target.flags, *flags, "-module-name", target.module, "-I", str(folder), *map(str, sources)]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Modules:
    """Stubs come first, then what is checked, each behind what it needs."""
    folder = tmp_path_factory.mktemp("modules")
    package = ["swift", "package", "--package-path", str(PACKAGE), "--scratch-path", str(folder / "build")]
    described = subprocess.run([*package, "describe", "--type", "json"], capture_output=True, text=True, check=True)
    targets = {entry["name"]: target(entry) for entry in json.loads(described.stdout)["targets"]}
    modules = Modules(folder, targets)
    needed = {name for each in targets.values() for name in each.needs}
    for each in ordered(targets):
        if each.name in needed:
            modules.emit(each)
    return modules


def target(entry: dict[str, Any]) -> Target:
    sources = tuple(PACKAGE / entry["path"] / source for source in entry["sources"])
    return Target(entry["name"], entry["path"], tuple(entry.get("target_dependencies", ())), sources)


def ordered(targets: dict[str, Target]) -> Iterator[Target]:
    done = set[str]()
    while len(done) < len(targets):
        ready = [each for each in targets.values() if each.name not in done and done.issuperset(each.needs)]
        assert ready, "targets need each other in a circle"
        yield from ready
        done |= {each.name for each in ready}


def test_every_folder_is_a_target(modules: Modules) -> None:
    folders = {f"{kind}/{path.name}" for kind in ("Stubs", "Checked") for path in (PACKAGE / kind).iterdir()}
    assert folders == {each.path for each in modules.targets.values()}


def test_what_only_apple_builds_passes(modules: Modules) -> None:
    """MPGPTWire and MPGPTNode are built on Linux anyway, and need no look from here."""
    elsewhere = {"MPGPTWire", "MPGPTNode"}
    for each in modules.targets.values():
        if not each.path.startswith(STUBS) and each.name not in elsewhere:
            ran = modules.check(each, each.sources)
            assert ran.returncode == 0, ran.stderr


MISTAKES = [
    pytest.param("Placement.swift", "try await MLComputePlan.load(", "try MLComputePlan.load(", "'await'", id="await"),
    pytest.param("CoreMLPredictor.swift", "using: state, options:", "with: state, options:", "label", id="label"),
    pytest.param(
        "CompiledModel.swift",
        "try blocking { try await MLModel.compileModel(at: URL(filePath: package)) }",
        "try blocking { try await MLModel.load(contentsOf: place) }.configuration.modelDisplayName",
        "Sendable",
        id="sendable",
    ),
    pytest.param("CoreMLPredictor.swift", "first.makeState()", "first.newState()", "newState", id="name"),
    pytest.param("NodeModel.swift", "follow { await self.close() }", "follow { self.close() }", "'await'",
                 id="app-await"),
    pytest.param("StatusView.swift", "ProgressView(value:", "ProgressView(of:", "argument", id="app-label"),
    pytest.param("NodeModel.swift", "Task { @MainActor in self.packages = packages }", "self.packages = packages",
                 "main actor", id="app-actor"),
    pytest.param("DeviceState.swift", "    @MainActor func sample()", "    func sample()", "main actor",
                 id="app-isolation"),
    pytest.param("DeviceState.swift", "let value = Mutex(Health())", "var value = Health()", "Sendable",
                 id="app-sendable"),
    pytest.param("StatusView.swift", "case .failure: .red", "case .failed: .red", "failed", id="app-name"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "right", "wrong", "words"), MISTAKES)
def test_a_mistake_is_found(modules: Modules, tmp_path: Path, file: str, right: str, wrong: str, words: str) -> None:
    """A missing await, a wrong label, a value that may not leave its task, a name that Swift does not have."""
    (checked,) = (
        each
        for each in (modules.targets[name] for name in ("MPGPTCoreML", "GPT2NodeApp"))
        if any(source.name == file for source in each.sources)
    )
    (text,) = (source.read_text() for source in checked.sources if source.name == file)
    assert right in text
    bent = tmp_path / file
    bent.write_text(text.replace(right, wrong))
    sources = tuple(bent if source.name == file else source for source in checked.sources)
    ran = modules.check(checked, sources)
    assert ran.returncode and words in ran.stderr, ran.stderr
