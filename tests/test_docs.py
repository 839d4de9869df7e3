"""The pages for people who read the code: every file and name that they point to is there."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.support.launch import ROOT

ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "CONTRIBUTING.md", "README.md"])
def test_every_path_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8").partition("## Decisions")[0]
    paths = re.findall(r"`((?:\w+/)+(?:\w+\.\w+)?)`", text)
    assert paths and not [path for path in paths if not (ROOT / path).exists()]
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).is_file(), target


def test_names_of_the_journey_are_in_its_files() -> None:
    """``Engine.submit`` and the like: a method in a class of that name, of a file that the same step names."""
    journey = ARCHITECTURE.partition("## A token's journey")[2].partition("\n## ")[0]
    steps = re.split(r"^\d\. ", journey, flags=re.MULTILINE)[1:]
    assert len(steps) == 9
    for step in steps:
        files = [ROOT / path for path in re.findall(r"`(mpgpt/[\w/]+\.py)`", step)]
        for kind, method in re.findall(r"`([A-Z]\w+)\.(\w+)`", step):
            bodies = [re.search(rf"^class {kind}\b.*?(?=^class |\Z)", path.read_text(encoding="utf-8"), re.M | re.S)
                      for path in files]  # fmt: skip
            assert any(body and f"def {method}(" in body[0] for body in bodies), f"{kind}.{method}"


def test_the_map_shows_every_package() -> None:
    picture = (ROOT / "packages.svg").read_text(encoding="utf-8")
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = [module.strip() for layer in contracts[0]["layers"] for module in layer.split("|")]
    for module in layers[1:]:  # above them is only mpgpt.__main__
        assert module.removeprefix("mpgpt.") in picture, module
