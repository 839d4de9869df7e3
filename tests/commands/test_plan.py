"""`mpgpt plan` with ranks: alone here, under mpirun in tests/mpi/test_placing.py."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from mpgpt.cluster import rank_probe
from mpgpt.commands.plan import Planning, PlanOptions
from mpgpt.engine.stage import Device
from mpgpt.errors import UsageError
from mpgpt.transport.link import SoloWorld, World
from mpgpt.transport.mpirun import SettingsFile
from tests.support.launch import mpgpt


def nobody(ipad: dict[str, Any], world: World) -> Device:
    raise AssertionError("there is no iPad")


def plan(home: Path, config: Path | None = None, **given: Any) -> str:
    """What is printed."""
    out, world = io.StringIO(), SoloWorld()
    try:
        console = Console(file=out, width=100)
        file = SettingsFile(path=config) if config else None
        options = PlanOptions(**given)
        planning = Planning(options, home=home, config=file, console=console, device_factory=nobody).start(world)
        assert planning.run_rank0(planning) == 0
    finally:
        world.close()
    return out.getvalue()


def test_a_config_json_is_enough(models: dict[str, Path], tmp_path: Path) -> None:
    """No weights are needed, and what is written is what was asked for."""
    shutil.copy(models["llama"] / "config.json", tmp_path)
    target = tmp_path / "plan.json"
    said = plan(tmp_path, model=str(tmp_path), threads=1, json=target, sequences=4, prompt_tokens=20, new_tokens=10)
    assert "0-4" in said and "tokens/s" in said
    tree = json.loads(target.read_text())
    assert tree["layers"] == [[0, 5]] and len(tree["measured"]["nodes"]) == 1 and tree["measured"]["links"] == []
    assert tree["workload"] == {"sequences": 4, "prompt_tokens": 20, "new_tokens": 10}
    assert tree["one_tokens_per_s"] > 0 and tree["measured"]["nodes"][0]["speed"]["layer_s"][0][1] > 0
    assert "0-4" in plan(tmp_path, model=str(tmp_path / "config.json"), threads=1)


def test_settings_are_heeded_and_options_go_first(models: dict[str, Path], tmp_path: Path) -> None:
    settings, target = tmp_path / "run.yaml", tmp_path / "plan.json"
    settings.write_text(
        f"hf_model_name: {models['gpt2']}\nthreads: 1\nmax_sequences: 2\n"
        "plan: {objective: latency, sequences: 3, prompt_tokens: 7, new_tokens: 5}\n"
    )
    plan(tmp_path, settings, json=target)
    tree = json.loads(target.read_text())
    assert tree["objective"] == "latency"
    assert tree["workload"] == {"sequences": 2, "prompt_tokens": 7, "new_tokens": 5}, "no more sequences than slots"
    plan(tmp_path, settings, json=target, objective="throughput", max_sequences=3, new_tokens=6)
    tree = json.loads(target.read_text())
    assert tree["objective"] == "throughput"
    assert tree["workload"] == {"sequences": 3, "prompt_tokens": 7, "new_tokens": 6}


def test_a_model_that_does_not_fit(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=40_000_000, total=80_000_000)
    monkeypatch.setattr(rank_probe, "psutil", SimpleNamespace(virtual_memory=lambda: memory))
    with pytest.raises(UsageError, match=r"needs .* MB, the only rank has 40 MB"):
        plan(tmp_path, model=str(models["gpt2"]), threads=1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "no model"),
        ({"model": "gpt2-of-nobody/nowhere"}, "mpgpt pull"),
        ({"model": "MODEL", "context": 100_000}, "512"),
        ({"model": "MODEL", "json": Path("/nonexistent/x.json")}, "--json"),
    ],
)
def test_what_cannot_be_is_said(models: dict[str, Path], tmp_path: Path, given: dict[str, Any], said: str) -> None:
    given = {key: str(models["gpt2"]) if value == "MODEL" else value for key, value in given.items()}
    with pytest.raises(UsageError, match=said):
        plan(tmp_path, **given)


def test_what_if_is_not_for_ranks() -> None:
    run = mpgpt(0, "plan", "--what-if", "hostfiles/what-if/standard.yaml", "--model", "gpt2")
    assert run.returncode == 2 and "--model" in run.stderr and "Traceback" not in run.stderr
