"""`mpgpt bench` from outside: real rings of small models, bad input, an interrupt."""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mpgpt.bench import runner
from mpgpt.bench.options import BenchArguments, check_outputs, fit, parse
from mpgpt.bench.random_model import random_model
from mpgpt.bench.runner import Bench
from mpgpt.commands.cli import bench_command
from mpgpt.commands.options import from_click
from mpgpt.errors import MpgptError, UsageError
from mpgpt.model.weights import Checkpoint, model_config
from tests.support.launch import ENV, ROOT, mpgpt

SMALL = ("--prompt-tokens", "20", "--new-tokens", "6", "--threads", "1")
NUMBER = (int, float)
RUN: dict[str, Any] = {
    "ranks": int, "concurrency": int, "dtype": str, "decode_tokens_per_s": NUMBER, "prompt_tokens_per_s": NUMBER,
    "ttft_ms": dict, "tpot_ms": dict, "stages": list, "read_bandwidth_gb_s": NUMBER, "floor_tokens_per_s": NUMBER,
    "read_by": str, "oversubscribed": bool, "rounds": int, "spread": dict,
    "each_round": dict,
}  # fmt: skip
STAGE: dict[str, Any] = {
    "rank": int, "host": str, "layers": list, "steps": int, "tokens": int, "compute_s": float, "wait_s": float,
    "send_s": float, "other_s": float, "wall_s": float, "peak_rss_mb": float, "slice_mb": float, "kv_mb": float,
    "device": type(None),
}  # fmt: skip


def check_document(document: dict[str, Any], work: int) -> None:
    """Every key with its type; every stage's parts make its wall; ``work`` tokens in each repeat of a sequence."""
    for run in document["runs"]:
        assert run.keys() == RUN.keys()
        assert all(isinstance(run[key], kind) for key, kind in RUN.items()), run
        assert [stage["rank"] for stage in run["stages"]] == list(range(run["ranks"]))
        stop = 0
        for stage in run["stages"]:
            assert stage.keys() == STAGE.keys()
            assert all(isinstance(stage[key], kind) for key, kind in STAGE.items()), stage
            parts = sum(stage[f"{part}_s"] for part in ("compute", "wait", "send", "other"))
            assert parts == pytest.approx(stage["wall_s"], rel=0.02)
            assert 0 < stage["compute_s"] < stage["wall_s"]
            assert stage["wall_s"] == pytest.approx(run["stages"][0]["wall_s"], rel=0.1, abs=0.02), "one window for all"
            assert stage["tokens"] == 3 * run["concurrency"] * work
            assert stage["layers"][0] == stop
            stop = stage["layers"][1]
        assert stop == document["model"]["layers"]
        least, greatest = run["spread"]["decode_tokens_per_s"]
        assert 0 < least <= run["decode_tokens_per_s"] <= greatest
        each = run["each_round"]["decode_tokens_per_s"]
        assert len(each) == run["rounds"] and statistics.median(each) == run["decode_tokens_per_s"]
        assert 0 < run["tpot_ms"]["p50"] <= run["tpot_ms"]["p95"]
        weights = sum(stage["slice_mb"] for stage in run["stages"])
        assert run["floor_tokens_per_s"] == pytest.approx(1000 * run["read_bandwidth_gb_s"] / weights)


def parsed(*arguments: str) -> BenchArguments:
    """What click makes of a command line."""
    return from_click(BenchArguments, bench_command.make_context("bench", list(arguments)).params)


# -- whole runs


def test_one_process_several_rounds_and_dtypes(models: dict[str, Path], tmp_path: Path) -> None:
    """Everything but MPI: the file, the picture, the table, the line of each run."""
    run = mpgpt(
        0, "bench", "--model", models["gpt2"], "--concurrency", "1,3", "--dtype", "float32,bfloat16", "--rounds", "2",
        "--json", tmp_path / "out.json", "--plot", tmp_path / "out.png", *SMALL,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["complete"] and document["settings"]["rounds"] == 2 and not document["model"]["random"]
    assert [(r["dtype"], r["concurrency"], r["rounds"]) for r in document["runs"]] == [
        ("float32", 1, 2), ("float32", 3, 2), ("bfloat16", 1, 2), ("bfloat16", 3, 2),
    ]  # fmt: skip
    check_document(document, work=20 + 5)
    wide, _, half, _ = (run["stages"][0] for run in document["runs"])
    assert half["slice_mb"] == pytest.approx(wide["slice_mb"] / 2, rel=0.1), "two bytes a weight, not four"
    picture = (tmp_path / "out.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and min(struct.unpack(">2I", picture[16:24])) > 500
    assert "tokens/s" in run.stdout and "bfloat16" in run.stdout
    assert run.stderr.count("1 rank, float32, 3 sequences: ") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.json", "out.png"]


def check_interrupt(model: Path, path: Path, ranks: int, signum: signal.Signals, status: int) -> None:
    """Once the first run is in the file: what is finished stays and is shown, and no process does."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mpgpt", "bench", "--model", str(model), "--concurrency", "1", "--rounds", "1000",
         "--ranks", str(ranks), "--json", str(path), *SMALL],
        cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip
    deadline, children = time.monotonic() + 90, list[psutil.Process]()
    while (not path.exists() or len(children) < ranks) and time.monotonic() < deadline:
        time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signum)
    out, errors = process.communicate(timeout=60)
    assert process.returncode == status and "Traceback" not in errors
    assert ("interrupted" in errors) == (signum == signal.SIGINT)
    document = json.loads(path.read_text())
    assert document["complete"] is False and len(document["runs"]) == 1, "one run, of however many rounds"
    assert "float32" in out, "the table of what there is"
    assert len(children) >= ranks and not psutil.wait_procs(children, timeout=10)[1], "all of the ring has ended too"


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_keeps_what_is_finished(
    models: dict[str, Path], tmp_path: Path, signum: signal.Signals, status: int
) -> None:
    check_interrupt(models["gpt2"], tmp_path / "out.json", 1, signum, status)


def test_a_ring_that_fails_is_named_and_says_why(models: dict[str, Path], tmp_path: Path) -> None:
    """The configuration is whole, so all looks well from outside; the ring says what is wrong."""
    broken = Path(shutil.copytree(models["llama"], tmp_path / "broken"))
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    run = mpgpt(0, "bench", "--model", broken, "--json", tmp_path / "out.json", *SMALL)
    assert run.returncode == 1 and run.stdout == ""
    assert run.stderr.startswith("mpgpt: 1 rank, float32: ") and "model.safetensors" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_second_ring_that_fails_leaves_the_first(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    bench = Bench(
        parsed("--model", str(models["gpt2"]), "--ranks", "1,2", "--rounds", "1", "--json", str(path), *SMALL),
        home=tmp_path, env=ENV,
    )  # fmt: skip
    mpirun_fails = [sys.executable, "-c", "raise SystemExit('mpgpt: no')"]
    monkeypatch.setattr(runner, "mpirun", lambda ranks, **options: mpirun_fails)
    with pytest.raises(MpgptError, match="2 ranks, float32: no"):
        bench.run()
    document = json.loads(path.read_text())
    assert [run["ranks"] for run in document["runs"]] == [1, 1] and not document["complete"]
    assert "tokens/s" in capsys.readouterr().out


def test_without_matplotlib_there_is_a_sentence_at_once_and_the_table(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    files = "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")
    arguments = parsed("--model", str(models["gpt2"]), "--rounds", "1", "--concurrency", "1", *files, *SMALL)
    assert Bench(arguments, home=tmp_path, env=ENV).run() == 0
    printed = capsys.readouterr()
    sentence, *progress = printed.err.splitlines()
    assert sentence == (
        f"mpgpt: --plot {tmp_path}/out.png: matplotlib is not installed, so the table comes without a picture: "
        'pip install "mpgpt[plots]"'
    )
    assert len(progress) == 1 and "tokens/s" in printed.out
    assert json.loads((tmp_path / "out.json").read_text())["complete"] and not (tmp_path / "out.png").exists()


# -- bad input, before anything is started


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "--model"),
        (("--model", "a", "--random", "gpt2"), "not both"),
        (("--random", "gpt2", "--ranks", "0"), "--ranks 0: '0'"),
        (("--random", "gpt2", "--ranks", "1,,2"), "--ranks 1,,2: ''"),
        (("--random", "gpt2", "--ranks", "two"), "'two'"),
        (("--random", "gpt2", "--ranks", "1,-2"), "'-2'"),
        (("--random", "gpt2", "--ranks", "99999999999999999999"), "no number"),
        (("--random", "gpt2", "--concurrency", "1,1.5"), "--concurrency 1,1.5: '1.5'"),
        (("--random", "gpt2", "--concurrency", ""), "--concurrency"),
        (("--random", "gpt2", "--concurrency", "8", "--max-sequences", "4"), "--max-sequences"),
        (("--random", "gpt2", "--context", "100"), "--context 100"),
        (("--random", "gpt2", "--dtype", "float32,float8"), "'float8'"),
        (("--random", "gpt2", "--pin", "--threads", "4000"), "4000 cores"),
        (("--random", "gpt2", "--layers", "5-2"), "--layers"),
        (("--random", "gpt2", "--against", "llama-rpc"), "--llama-bin"),
        (("--random", "gpt2", "--llama-bin", "/"), "--against llama-rpc, which is not asked for"),
        (("--random", "gpt2", "--against", "transformers", "--llama-bin", "/"), "--against llama-rpc, which"),
        (("--random", "gpt2", "--against", "transformers", "--hostfile", __file__), "--hostfile"),
    ],
)
def test_options_that_make_no_sense(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(parsed(*arguments), None)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", "2"), "mpirun started 3"),
        (("--ranks", "1,3"), "mpirun started 3"),
        (("--pin",), "--bind-to core"),
        (("--dtype", "float32,bfloat16"), "one dtype"),
        (("--against", "transformers"), "leave mpirun out"),
    ],
)
def test_options_that_a_ring_contradicts(arguments: tuple[str, ...], said: str) -> None:
    assert parse(parsed("--random", "gpt2", "--ranks", "3"), 3).ranks == (3,)
    with pytest.raises(UsageError) as caught:
        parse(parsed("--random", "gpt2", *arguments), 3)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--ranks", "1,40"), "--ranks 40: the model has 5 layers"),
        (("--new-tokens", "500"), "512 positions"),
        (("--context", "513"), "512 positions"),
        (("--ranks", "1,2", "--layers", "0-2,3-4"), "--layers names 2 ranks"),
        (("--ranks", "2", "--layers", "0-2,3-5"), "--layers ends with layer 5"),
    ],
)
def test_more_than_the_model_has(models: dict[str, Path], arguments: tuple[str, ...], said: str) -> None:
    config = model_config(models["gpt2"])
    fit(parse(parsed("--random", "gpt2", "--ranks", "5"), None), config)
    with pytest.raises(UsageError) as caught:
        fit(parse(parsed("--random", "gpt2", *arguments), None), config)
    assert said in str(caught.value)


def test_files_that_cannot_be_written() -> None:
    for option, path in (("--json", "/no/such/folder/out.json"), ("--plot", "/no/such/folder/out.png")):
        with pytest.raises(UsageError, match=f"{option} {path} cannot be written"):
            check_outputs(parsed("--random", "gpt2", option, path))


def test_bad_input_ends_the_command_with_a_sentence(models: dict[str, Path], tmp_path: Path) -> None:
    for status, said, *arguments in (
        (2, "--ranks 40: the model has 5 layers", "--model", models["gpt2"], "--ranks", "40"),
        (1, "config.json", "--model", tmp_path),
        (2, "no such file", "--random", "no-such-shape"),
        (2, "'vllm' is not one of", "--model", models["gpt2"], "--against", "vllm"),
        (
            2,
            f"llama-rpc: {tmp_path} has no llama-bench; build llama.cpp with GGML_RPC=ON",
            "--model",
            models["gpt2"],
            "--against",
            "llama-rpc",
            "--llama-bin",
            tmp_path,
        ),
    ):
        run = mpgpt(0, "bench", *map(str, arguments))
        assert run.returncode == status and str(said) in run.stderr, run.stderr
        assert "Traceback" not in run.stderr and run.stdout == ""


# -- random weights


def test_random_weights_are_the_same_every_time(models: dict[str, Path], tmp_path: Path) -> None:
    said: list[str] = []
    one, other = (random_model(str(models["qwen3"]), tmp_path / name, said.append) for name in ("a", "b"))
    assert one.name == other.name and one.name.startswith("random-qwen3-") and len(said) == 2
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert model_config(one) == model_config(models["qwen3"])
    Checkpoint(one)
    assert random_model(str(models["qwen3"] / "config.json"), tmp_path / "a", said.append) == one and len(said) == 2
    assert [path.name for path in (tmp_path / "a").iterdir()] == [one.name]


def test_another_configuration_is_another_folder(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    raw = json.loads((models["llama"] / "config.json").read_text())
    names = set()
    for layers in (2, 3):
        path.write_text(json.dumps(raw | {"num_hidden_layers": layers}))
        folder = random_model(str(path), tmp_path / "home")
        names.add(folder.name)
        assert model_config(folder).layers == layers
    assert len(names) == 2


def test_a_shape_that_is_not_supported(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(MpgptError, match="bert"):
        random_model(str(path), tmp_path / "home")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(MpgptError, match="cannot be written"):
        random_model("gpt2", blocked)
    assert not (tmp_path / "home").exists()
