"""Peers: transformers itself on small models; llama.cpp's programs as small scripts that behave like them."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mpgpt.bench import baselines
from mpgpt.bench.baselines import BaselineSettings, Transformers
from mpgpt.bench.llama_cpp import LlamaRpc, programs
from mpgpt.bench.options import BenchArguments
from mpgpt.bench.runner import Bench
from mpgpt.commands.cli import bench_command
from mpgpt.commands.options import from_click
from mpgpt.errors import MpgptError, UsageError
from tests.support.launch import ENV, mpgpt

SMALL = ("--prompt-tokens", "12", "--new-tokens", "5", "--threads", "1")


def a_task(folder: Path, **changes: Any) -> BaselineSettings:
    given: dict[str, Any] = {
        "folder": folder, "layers": 5, "concurrency": (1, 3), "prompt_tokens": 12, "new_tokens": 5, "repeats": 3,
        "threads": 1, "pin": True, "env": ENV,
    }  # fmt: skip
    return BaselineSettings(**given | changes)


def test_cores_of_ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 3, 5})
    assert [a_task(tmp_path).cores(rank) for rank in range(4)] == [(2,), (3,), (5,), (2,)]
    assert [a_task(tmp_path, threads=2).cores(rank) for rank in range(2)] == [(2, 3), (5, 2)]
    assert a_task(tmp_path, threads=4).cores(0) == (2, 3, 5)
    assert a_task(tmp_path, pin=False).cores(0) is None


# -- transformers


class Ticking:
    """A model whose prompt takes 2 s and whose every further token takes half a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.prompts = 0.0, list[Any]()
        self.config = type("Config", (), {"vocab_size": 50})
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def generate(self, ids: Any, attention_mask: Any, max_new_tokens: int) -> Any:
        assert attention_mask.shape == ids.shape and attention_mask.all()
        self.prompts.append(ids)
        self.now += 2.0 + 0.5 * (max_new_tokens - 1)
        return ids.new_zeros(ids.shape[0], ids.shape[1] + max_new_tokens)


def test_what_the_figures_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Ticking(monkeypatch)
    figures = baselines.measure(model, 3, 12, 5, repeats=2)
    assert figures == {"decode_tokens_per_s": 3 / 0.5, "prompt_tokens_per_s": 3 * 12 / 2.0}
    warm, one, other = model.prompts[0], model.prompts[1], model.prompts[3]
    assert warm.shape == (3, 12) and warm.min() >= 0 and warm.max() < 50
    assert (one == model.prompts[2]).all() and (one != other).any() and (one[0] != one[1]).any()


def test_transformers_is_measured_on_our_folder(models: dict[str, Path], tmp_path: Path) -> None:
    """Even where every token would end the text."""
    folder = Path(shutil.copytree(models["gpt2"], tmp_path / "model"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(300))}))
    heard: list[dict[str, Any]] = []
    peer = Transformers(a_task(folder))
    peer.run("bfloat16", 1, heard.append)
    assert [(said["peer"], said["dtype"], said["ranks"], said["concurrency"]) for said in heard] == [
        ("transformers", "bfloat16", 1, 1), ("transformers", "bfloat16", 1, 3),
    ]  # fmt: skip
    assert all(said["decode_tokens_per_s"] > 0 and said["prompt_tokens_per_s"] > 0 for said in heard)
    assert heard[0]["version"].startswith("5.")
    (folder / "model.safetensors").unlink()
    with pytest.raises(MpgptError, match=r"model\.safetensors"):
        peer.run("float32", 1, heard.append)


def test_transformers_in_turn_with_our_rings(models: dict[str, Path], tmp_path: Path) -> None:
    """One float32 peer a round for two dtypes; ratios that can be had again from what is in the file."""
    run = mpgpt(
        0, "bench", "--model", models["llama"], "--concurrency", "2", "--dtype", "float32,int8", "--rounds", "2",
        "--against", "transformers", "--pin", "--json", tmp_path / "out.json", *SMALL,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    heads = [line.rpartition(":")[0] for line in run.stderr.splitlines()]
    assert heads == 2 * [
        "1 rank, float32, 2 sequences", "transformers, 1 rank, float32, 2 sequences", "1 rank, int8, 2 sequences",
    ]  # fmt: skip
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["settings"]["against"] == ["transformers"]
    (peer,) = document["peers"]
    assert peer["rounds"] == 2 and [ratio["dtype"] for ratio in peer["ratios"]] == ["float32", "int8"]
    for run_, ratio in zip(document["runs"], peer["ratios"], strict=True):
        ours, theirs = (part["each_round"]["decode_tokens_per_s"] for part in (run_, peer))
        assert ratio["ratio"] == pytest.approx(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)))
    assert "x transformers" in run.stdout


# -- llama.cpp

SAY = f"""#!{sys.executable}
import json, os, signal, socket, sys, time
here = os.path.dirname(os.path.abspath(__file__))
args = dict(zip(sys.argv[1::2], sys.argv[2::2]))
with open(here + "/log", "a") as log:
    said = dict(program=os.path.basename(__file__), args=args, cores=sorted(os.sched_getaffinity(0)), pid=os.getpid())
    log.write(json.dumps(said) + "\\n")
"""
SERVER = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is killed, not asked
listening = socket.create_server((args["-H"], int(args["-p"])))
while True:
    listening.accept()
"""
CALL = """
for end in filter(None, args.get("--rpc", "").split(",")):
    socket.create_connection(end.split(":")).close()
"""
ONE = CALL + 'print("load: ok"); print(json.dumps({"samples_ts": [10.0, 90.0, 20.0 + int(args["-p"])]}))'
SEVERAL = """
if "--version" in sys.argv:
    print("version: 77 (abcdef)", file=sys.stderr)
    sys.exit()
""" + CALL + """
for n in args["-npl"].split(","):
    print(json.dumps({"speed_tg": 7.0 * int(n), "speed_pp": 100.0 * int(n)}))
"""  # fmt: skip
HANG = "time.sleep(600)"


def fake(folder: Path, bench: str = ONE, batched: str = SEVERAL, server: str = SERVER) -> Path:
    """A folder of programs that write down how they were called."""
    folder.mkdir()
    for name, body in (("llama-bench", bench), ("llama-batched-bench", batched), ("ggml-rpc-server", server)):
        (folder / name).write_text(SAY + body)
        (folder / name).chmod(0o755)
    return folder


def calls(folder: Path) -> list[dict[str, Any]]:
    """What the programs were called with, in their order; none of them runs any more."""
    said = [json.loads(line) for line in (folder / "log").read_text().splitlines()]
    assert not any(psutil.pid_exists(call["pid"]) for call in said)
    return [call for call in said if call["args"]]  # not that which asks for the version


def a_peer(models: dict[str, Path], folder: Path, **changes: Any) -> LlamaRpc:
    return LlamaRpc(a_task(models["llama"], **changes), programs(folder), ["float32"], folder.parent, lambda line: None)


def test_llama_has_a_process_for_every_rank(models: dict[str, Path], tmp_path: Path) -> None:
    peer, heard = a_peer(models, fake(tmp_path / "bin")), list[dict[str, Any]]()
    peer.run("float32", 3, heard.append)
    who = {"peer": "llama-rpc", "version": "77 (abcdef)", "dtype": "float32", "ranks": 3}
    assert heard == [
        who | {"concurrency": 1, "decode_tokens_per_s": 20.0, "prompt_tokens_per_s": 32.0},
        who | {"concurrency": 3, "decode_tokens_per_s": 21.0, "prompt_tokens_per_s": 300.0},
    ]
    said = calls(tmp_path / "bin")
    assert [call["program"] for call in said] == [
        "ggml-rpc-server", "ggml-rpc-server", "llama-bench", "llama-bench", "llama-batched-bench",
    ]  # fmt: skip
    cores = sorted(os.sched_getaffinity(0))
    assert [call["cores"] for call in said[:3]] == [[cores[n % len(cores)]] for n in (1, 2, 0)]
    ends = ",".join(f"127.0.0.1:{call['args']['-p']}" for call in said[:2])
    for call in said[2:]:
        assert call["args"]["--rpc"] == ends and call["args"]["-t"] == "1"
        assert call["args"]["-ngl"] == "4", "two of five layers and the head here, and two on each server"
        assert Path(call["args"]["-m"]).read_bytes()[:4] == b"GGUF"
    decode, prompt, several = (call["args"] for call in said[2:])
    assert (decode["-p"], decode["-n"], decode["-d"], prompt["-p"], prompt["-n"]) == ("0", "4", "12", "12", "0")
    assert [several[key] for key in ("-npp", "-ntg", "-npl", "-c")] == ["12", "4", "3,3,3", "51"]


def test_llama_alone_needs_no_server(models: dict[str, Path], tmp_path: Path) -> None:
    a_peer(models, fake(tmp_path / "bin"), concurrency=(1,)).run("float32", 1, lambda said: None)
    said = calls(tmp_path / "bin")
    assert [call["program"] for call in said] == ["llama-bench"] * 2
    assert all(call["args"]["-ngl"] == "0" and "--rpc" not in call["args"] for call in said)


FAILS = 'sys.exit("first\\nerror: unable to load model")'


@pytest.mark.parametrize(
    ("programs_", "said"),
    [
        ({"bench": FAILS}, "llama-bench: first\nerror: unable to load model"),
        ({"batched": SEVERAL + FAILS}, "llama-batched-bench: first"),
        ({"bench": ""}, "llama-bench printed no speeds"),
        ({"bench": 'print(json.dumps({"samples_ts": [0.0]}))'}, "llama-bench printed no speeds"),
        ({"bench": 'print("{broken")'}, "llama-bench: it printed what is no JSON: {broken"),
        ({"bench": HANG}, "llama-bench: it took longer than 2 s"),
        ({"server": 'sys.exit("cannot bind")'}, "ggml-rpc-server ended with status 1 at its start: cannot bind"),
        ({"server": HANG}, "ggml-rpc-server cannot be reached on port"),
        (
            {"server": SERVER.replace("accept()", "accept(); time.sleep(1); sys.exit('bad tensor')"),
             "bench": "time.sleep(2); " + FAILS},
            "unable to load model\nggml-rpc-server ended with status 1: bad tensor",
        ),
    ],
)  # fmt: skip
def test_llama_fails(models: dict[str, Path], tmp_path: Path, programs_: dict[str, str], said: str) -> None:
    """One message with the last words; and no server is left, which ``calls`` looks after."""
    peer = a_peer(
        models, fake(tmp_path / "bin", **programs_), limit_s=2.0 if programs_.get("bench") == HANG else 60.0,
        start_s=1.0 if programs_.get("server") == HANG else 20.0,
    )  # fmt: skip
    with pytest.raises(MpgptError) as caught:
        peer.run("float32", 2, lambda said: None)
    assert said in str(caught.value)
    assert any(call["program"] == "ggml-rpc-server" for call in calls(tmp_path / "bin"))


def test_an_interrupt_kills_the_servers(models: dict[str, Path], tmp_path: Path) -> None:
    def interrupt(said: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        a_peer(models, fake(tmp_path / "bin")).run("float32", 3, interrupt)
    assert len(calls(tmp_path / "bin")) == 4


@pytest.mark.parametrize("name", ["llama-bench", "llama-batched-bench", "ggml-rpc-server"])
def test_a_program_that_is_absent(tmp_path: Path, name: str) -> None:
    (fake(tmp_path / "bin") / name).unlink()
    with pytest.raises(UsageError, match=rf"{tmp_path}/bin has no .*{name}; build llama.cpp with GGML_RPC=ON"):
        programs(tmp_path / "bin")


def test_a_program_that_does_not_run_here(tmp_path: Path) -> None:
    program = fake(tmp_path / "bin") / "llama-batched-bench"
    program.write_bytes(b"\x7fELF of another machine")
    with pytest.raises(UsageError, match="llama-batched-bench does not run"):
        programs(tmp_path / "bin")


def test_a_peer_that_fails_leaves_our_runs(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, path = fake(tmp_path / "bin", bench=FAILS), tmp_path / "out.json"
    asked = [
        "--model", str(models["llama"]), "--concurrency", "1", "--against", "llama-rpc", "--llama-bin", str(folder),
        "--json", str(path), *SMALL,
    ]  # fmt: skip
    arguments = from_click(BenchArguments, bench_command.make_context("bench", asked).params)
    with pytest.raises(MpgptError, match="llama-rpc, 1 rank, float32: llama-bench: first\nerror: unable to load"):
        Bench(arguments, home=tmp_path, env=ENV).run()
    document = json.loads(path.read_text())
    assert len(document["runs"]) == 1 and document["peers"] == [] and not document["complete"]
    assert "tokens/s" in capsys.readouterr().out
