"""A command's options are the fields of its dataclasses: none is without an effect, none is missing."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click
import pytest

from mpgpt.cluster.session import SessionOptions
from mpgpt.commands import cli
from mpgpt.commands.generate import GenerateOptions
from mpgpt.commands.options import from_click, group
from mpgpt.commands.plan import PlanOptions
from mpgpt.commands.plan_report import SimulationOptions, WorkloadOptions
from mpgpt_api.serve import ServeOptions


def values(command: click.Command, *arguments: str) -> dict[str, Any]:
    return command.make_context("mpgpt", list(arguments)).params


@pytest.mark.parametrize(
    ("command", "arguments", "kinds", "others"),
    [
        (cli.generate_command, (), (SessionOptions, GenerateOptions), {"config"}),
        (cli.serve_command, (), (SessionOptions, ServeOptions), {"config"}),
        (cli.plan_command, (), (PlanOptions, WorkloadOptions), {"config", "what_if"}),
        (cli.simulate_command, ("machines.yaml",), (SimulationOptions,), {"file"}),
    ],
    ids=["generate", "serve", "plan", "simulate"],
)
def test_every_option_is_a_field(
    command: click.Command, arguments: tuple[str, ...], kinds: tuple[type[Any], ...], others: set[str]
) -> None:
    given = values(command, *arguments)
    assert set(given) == others.union(*({field.name for field in fields(kind)} for kind in kinds))
    for kind in kinds:
        assert from_click(kind, given) == kind(), "what is not given is the dataclass's default"


def test_values_come_by_name() -> None:
    given = values(
        cli.generate_command, "--prompt", "a", "--prompt", "b", "--raw", "--no-drafts", "--top-p", "0.5", "--seed", "-1"
    )  # fmt: skip
    options = from_click(SessionOptions, given)
    assert (options.chat, options.drafts, options.seed) == (False, False, -1)
    assert options.sampling == {"top_p": 0.5}
    assert from_click(GenerateOptions, given) == GenerateOptions(prompts=("a", "b"))
    given = values(cli.serve_command, "--port", "0", "--api-key-file", "keys", "--origin", "null")
    assert from_click(ServeOptions, given) == ServeOptions(port=0, api_key_file=Path("keys"), origins=("null",))


def test_a_field_without_an_option_is_a_mistake() -> None:
    @dataclass(frozen=True)
    class Other:
        absent: int = 0

    with pytest.raises(KeyError, match="absent"):
        from_click(Other, {"present": 1})


def test_a_group_keeps_its_order() -> None:
    @click.command
    @group(click.option("--first"), click.option("--second"))
    def command() -> None:
        """Nothing."""

    assert [option.name for option in command.params] == ["first", "second"]
