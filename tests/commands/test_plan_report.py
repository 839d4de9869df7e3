"""`mpgpt plan --what-if` and `mpgpt simulate`: what a person gets, for good input and for bad."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from mpgpt.commands.plan_report import (
    SimulationOptions,
    WorkloadOptions,
    save,
    sentences,
    show,
    simulation,
    what_if,
)
from mpgpt.errors import UsageError
from mpgpt.placement.plan import Plan, alternatives, choose
from mpgpt.placement.what_if import load_cluster
from tests.placement.test_what_if import GOOD
from tests.support.launch import ROOT, mpgpt

STANDARD = ROOT / "hostfiles" / "what-if" / "standard.yaml"


def said(*arguments: str | Path, status: int = 2) -> str:
    run = mpgpt(0, *arguments)
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr and run.stdout == ""
    return run.stderr


@pytest.fixture(scope="module")
def plans() -> list[Plan]:
    cluster = load_cluster(STANDARD)
    scene = cluster.scene(None, cluster.work, 16)
    return alternatives(scene.profile, scene.workload, "throughput")


def test_a_plan_is_shown_and_written(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    run = mpgpt(0, "plan", "--what-if", STANDARD, "--json", out)
    assert run.returncode == 0, run.stderr
    for words in ("Plan for throughput", "mini1", "pi5", "none", "taken", "1 rank is faster than 3 for one sequence"):
        assert words in run.stdout, words
    tree = json.loads(out.read_text())
    assert tree["ranks_with_layers"] == 2 and tree["ranks"][2]["layers"] is None
    assert [rank["layers"] for rank in tree["ranks"]] == tree["layers"]
    assert [other["ranks_with_layers"] for other in tree["alternatives"]] == [1, 2, 3]
    assert f"{tree['one_tokens_per_s']:.1f} tokens/s" in run.stdout
    assert list(tmp_path.iterdir()) == [out]


def test_options_over_the_file(tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = (
        "--objective",
        "latency",
        "--dtype",
        "int4",
        "--sequences",
        "3",
        "--prompt-tokens",
        "64",
        "--new-tokens",
        "9",
    )
    assert mpgpt(0, "plan", "--what-if", STANDARD, *options, "--json", out).returncode == 0
    tree = json.loads(out.read_text())
    assert (tree["objective"], tree["ranks_with_layers"]) == ("latency", 1)
    assert tree["workload"] == {"sequences": 3, "prompt_tokens": 64, "new_tokens": 9}
    assert tree["needs_bytes"] < 1.6e9, "float32 needs 1.9"


def test_a_simulation_is_shown_and_written(tmp_path: Path) -> None:
    outs = [tmp_path / "a.json", tmp_path / "b.json"]
    for out in outs:
        run = mpgpt(0, "simulate", STANDARD, "--sequences", "30", "--arrival", "9", "--seed", "3", "--json", out)
        assert run.returncode == 0, run.stderr
        assert run.stderr == "", "no bar where nobody watches"
    assert "30 requests, 3840 new tokens" in run.stdout and "mini2" in run.stdout
    assert outs[0].read_text() == outs[1].read_text()
    tree = json.loads(outs[0].read_text())
    assert tree["requests"] == tree["workload"]["sequences"] == 30 and tree["plan"]["workload"]["sequences"] == 16
    run = mpgpt(0, "simulate", STANDARD, "--spans", "-,0-5,6-11", "--json", outs[0])
    assert run.returncode == 0, run.stderr
    tree = json.loads(outs[0].read_text())
    assert [(stage["rank"], stage["layers"]) for stage in tree["stages"]] == [(0, 0), (1, 6), (2, 6)]
    assert tree["decode_tokens_per_s"] == pytest.approx(tree["plan"]["many_tokens_per_s"], rel=0.1)


def refused(command: Callable[..., None], path: Path, **given: Any) -> str:
    nowhere = Console(file=io.StringIO())
    with pytest.raises(UsageError) as caught:
        if command is what_if:
            command(path, WorkloadOptions(**given), nowhere)
        else:
            command(path, SimulationOptions(**given), nowhere, nowhere)
    return str(caught.value)


def test_what_cannot_be(tmp_path: Path) -> None:
    message = refused(what_if, STANDARD, prompt_tokens=1000, new_tokens=100)
    assert "1100, more than the context of 1024" in message
    for command in (what_if, simulation):
        assert "is a directory" in refused(command, STANDARD, json=tmp_path)
        assert "does not exist" in refused(command, STANDARD, json=tmp_path / "no" / "o.json")
    assert refused(simulation, STANDARD, spans="0-11").startswith(f"--spans names 1 rank but {STANDARD} has 3; give")
    for spans, words in (("0-3,x,4", "--spans: 'x'"), ("0-3,5-7,8-11", "rank 1 layers 5-7"), ("-,-,-", "no rank any")):
        assert words in refused(simulation, STANDARD, spans=spans)


def test_the_command_line_says_it_with_the_right_status(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("machine: []\n")
    assert "machine is not a known key; did you mean machines?" in said("plan", "--what-if", path)
    assert "absent.yaml" in said("simulate", tmp_path / "absent.yaml")
    assert "--what-if" in said("plan")
    assert "--arrival" in said("simulate", STANDARD, "--arrival", "0")


def test_a_dtype_that_would_fit_is_named(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    machine = GOOD["machines"][0] | {"memory_gb": 16, "free_gb": 13}
    llama = GOOD | {"model": "llama-3.1-8b", "context": 1024, "slots": 4, "machines": [machine]}
    path.write_text(yaml.safe_dump(llama))
    # 4 x (32 x 218103808 + 525336576) of weights, 2 x 4 x 1024 x 1024 x 32 x 4 of cache, a tenth and 64 MB more.
    expected = "the model needs 34.3 GB, the only rank has 13.0 GB; int8 would need 9.5 GB"
    assert refused(what_if, path) == refused(simulation, path) == expected
    path.write_text(yaml.safe_dump(llama | {"machines": [machine | {"free_gb": 1}]}))
    assert refused(what_if, path).endswith("no other dtype would fit either")


def test_where_fewer_are_not_faster_nothing_is_said_of_it(plans: list[Plan]) -> None:
    workload = load_cluster(STANDARD).work
    better = [
        replace(plans[0], single_rate=40.0, overall_rate=100.0),
        replace(plans[1], single_rate=40.1, overall_rate=150.0),
    ]
    (only,) = sentences(better[1], better, workload)
    assert only.startswith("With 2 ranks one sequence gains 0% against 1") and "1.50 times" in only
    assert sentences(plans[0], plans[:1], workload) == []
    three = sentences(choose(plans), plans, workload)
    assert three[1].startswith("2 ranks are faster than 3 for 8 sequences with their prompts: ")
    assert "one sequence loses" in three[2]


def test_names_are_no_markup(plans: list[Plan]) -> None:
    cluster = load_cluster(STANDARD)
    scene = cluster.scene(None, cluster.work, 16)
    nodes = [replace(node, host=f"[bold]h{node.rank}") for node in scene.profile.nodes]
    text = io.StringIO()
    profile = replace(scene.profile, nodes=nodes)
    show(plans[1], plans, profile, cluster.work, Console(file=text, width=100))
    assert "[bold]h2" in text.getvalue()


def test_a_file_that_cannot_be_replaced_is_left_whole(tmp_path: Path) -> None:
    out = tmp_path / "o.json"
    out.write_text("before")
    with pytest.raises(TypeError):
        save(out, {"x": object()})
    assert out.read_text() == "before" and list(tmp_path.iterdir()) == [out]
    save(out, {"x": 1})
    assert json.loads(out.read_text()) == {"x": 1}
