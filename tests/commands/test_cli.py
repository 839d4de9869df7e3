"""The command line, alone as one process: what a person gets for good input and for bad."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mpgpt.model.pull import pull
from tests.support.launch import mpgpt, records
from tests.support.models import save_random, save_tokenizer

TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}a:"
SHORT = ("--raw", "--ignore-eos", "--max-new-tokens", "5", "--threads", "1")


def said(*arguments: str | Path, status: int, env: dict[str, str] | None = None) -> str:
    """What goes to standard error for input that must fail with ``status``: no traceback, nothing on standard out."""
    run = mpgpt(0, *arguments, env=env, cold=env is not None)
    assert run.returncode == status, run.stderr
    assert "Traceback" not in run.stderr and run.stdout == ""
    return run.stderr


@pytest.fixture
def broken(models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of a model that a test may break."""
    return Path(shutil.copytree(models["llama"], tmp_path / "broken"))


def test_help_and_version() -> None:
    assert "--layers" in mpgpt(0, "generate", "--help").stdout
    shown = mpgpt(0, "--version").stdout
    assert shown.startswith("mpgpt, version ") and "\nkernels: " in shown


def test_no_model() -> None:
    assert "--model" in said("generate", "--prompt", "x", status=2)


def test_no_such_model_and_no_hub(tmp_path: Path) -> None:
    """A name that is no folder is looked for on the hub, which cannot be reached: a sentence within seconds."""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "MPGPT_HOME": str(tmp_path)}
    assert "hub" in said("generate", "--model", "no-body/no-model", "--prompt", "x", status=1, env=env)
    assert not list(tmp_path.rglob("*.part"))
    assert "hub" in said("pull", "no-body/no-model", status=1, env=env)


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    assert "config.json" in said("generate", "--model", tmp_path, "--prompt", "x", status=1)


def test_another_architecture(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    errors = said("generate", "--model", broken, "--prompt", "x", status=1)
    assert "bert" in errors and "gpt2, llama, mistral, qwen2, qwen3" in errors


def test_a_cut_safetensors_file(broken: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "model.safetensors" in said("generate", "--model", broken, "--prompt", "x", status=1)


def test_a_flipped_bit_in_the_header(broken: Path) -> None:
    path = broken / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8] ^= 0x10
    path.write_bytes(data)
    assert "model.safetensors" in said("generate", "--model", broken, "--prompt", "x", status=1)


@pytest.mark.parametrize("where", [0.05, 0.5, 0.95])
def test_a_flipped_bit_in_the_weights(models: dict[str, Path], tmp_path: Path, where: float) -> None:
    """The checksums that pull left find it, wherever it is."""
    folder = pull(str(models["llama"]), folder=tmp_path / "pulled", report=lambda line: None)
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = int.from_bytes(data[:8], "little") + 8
    data[header + int(where * (len(data) - header))] ^= 0x01
    path.write_bytes(data)
    errors = said("generate", "--model", folder, "--prompt", "x", status=1)
    assert "checksum" in errors and "model.safetensors" in errors


def test_a_missing_shard(tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "m", max_shard_size="100KB")
    gone = sorted(folder.glob("*.safetensors"))[1]
    gone.unlink()
    assert gone.name in said("generate", "--model", folder, "--prompt", "x", status=1)


def test_no_tokenizer(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    assert "tokenizer" in said("generate", "--model", broken, "--prompt", "x", status=1)


def test_prompts_that_cannot_be(models: dict[str, Path]) -> None:
    model = models["llama"]
    assert "empty" in said("generate", "--model", model, "--prompt", "  ", status=1)
    errors = said("generate", "--model", model, "--prompt", "x" * 600, status=1)
    assert "600" in errors and "512" in errors
    errors = said("generate", "--model", model, "--prompt", "x" * 60, "--context", "50", status=1)
    assert "60" in errors and "50" in errors


def test_prompts_files_that_cannot_be(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["llama"]
    latin = tmp_path / "latin.txt"
    latin.write_bytes("fine\ncaf\xe9\n".encode("latin-1"))
    assert "not UTF-8" in said("generate", "--model", model, "--prompts", latin, status=2)
    assert "directory" in said("generate", "--model", model, "--prompts", tmp_path, status=2)
    assert "absent.txt" in said("generate", "--model", model, "--prompts", tmp_path / "absent.txt", status=2)
    good = tmp_path / "good.txt"
    good.write_text("one\n")
    errors = said("generate", "--model", model, "--prompts", good, "--out", tmp_path / "no" / "out.jsonl", status=2)
    assert "does not exist" in errors
    assert "not both" in said("generate", "--model", model, "--prompts", good, "--prompt", "x", status=2)


def test_options_that_cannot_be(models: dict[str, Path], tmp_path: Path) -> None:
    model = models["llama"]
    for option, value, name in (
        ("--temperature", "nan", "temperature"), ("--top-p", "-0.5", "top_p"), ("--min-p", "2", "min_p"),
        ("--top-k", "-1", "top_k"), ("--repetition-penalty", "0", "repetition_penalty"),
        ("--seed", str(2**63), "--seed"), ("--seed", str(-(2**63) - 1), "--seed"),
        ("--max-new-tokens", "0", "--max-new-tokens"), ("--layers", "0-x", "--layers"), ("--dtype", "int3", "--dtype"),
        ("--strategy", "beam", "--strategy"),
    ):  # fmt: skip
        assert name in said("generate", "--model", model, "--prompt", "x", option, value, status=2), option
    config = tmp_path / "c.yaml"
    config.write_text("max_new_token: 3\n")
    assert "max_new_token" in said("generate", "--model", model, "--prompt", "x", "--config", config, status=2)
    assert "chat template" in said("generate", "--model", model, "--prompt", "x", "--chat", status=2)


def test_a_bad_line_is_a_record_and_the_rest_goes_on(models: dict[str, Path], tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        '{"id": "a", "prompt": "hello", "max_new_tokens": 3}',
        '{"id": "b", "prompt": "broken',
        '{"id": "c", "prompt": "x", "temperature": -2}',
        '{"id": "d", "prompt": ""}',
        '{"id": "e", "messages": [{"role": "user", "content": "x"}]}',
        json.dumps({"id": "f", "prompt": "x" * 700}),
        '{"id": "g", "prompt": "again", "seed": 3, "temperature": 1.0, "stop": ["zzz"]}',
    ]
    source.write_text("\n".join(lines) + "\n")
    arguments = ("generate", "--model", models["llama"], "--prompts", source, "--out", out, *SHORT)
    run = mpgpt(0, *arguments)
    assert run.returncode == 1
    assert "5 of 7" in run.stderr
    got = records(out)
    assert set(got) == {"a", 2, "c", "d", "e", "f", "g"}
    assert got["a"]["completion_tokens"] == 3 and got["a"]["finish_reason"] == "length"
    for line, key in enumerate(("a", 2, "c", "d", "e", "f", "g"), 1):
        assert got[key]["error"] is None or got[key]["error"].startswith(f"line {line}: ")
    for key, word in (("c", "temperature"), ("d", "empty"), ("e", "chat template"), ("f", "700")):
        assert word in got[key]["error"] and got[key]["token_ids"] == []
    assert got["g"]["error"] is None

    before = got["g"], got["a"]
    source.write_text("\n".join([*lines[:1], '{"id": "b", "prompt": "mended"}', lines[-1]]) + "\n")
    run = mpgpt(0, *arguments)
    assert run.returncode == 0, run.stderr
    got = records(out)
    assert set(got) == {"a", "b", "g"} and (got["g"], got["a"]) == before


def test_a_seed_below_0_and_a_top_p_of_0_are_the_same_everywhere(models: dict[str, Path], tmp_path: Path) -> None:
    """As options, in the settings, and in a line of a batch."""
    config, source, out = tmp_path / "c.yaml", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    config.write_text("seed: -1\nactive_decoding_strategy: top_p\ndecoding_strategies: {top_p: {p: 0.95}}\n")
    lines = [{"id": "seed", "seed": -1}, {"id": "greedy", "top_p": 0}, {"id": "other", "seed": 1}]
    source.write_text("".join(json.dumps({"prompt": "hello", "temperature": 1.0, **line}) + "\n" for line in lines))
    arguments = ("generate", "--model", models["llama"], "--ignore-eos", "--threads", "1", "--max-new-tokens", "12")
    assert mpgpt(0, *arguments, "--top-p", "0.95", "--prompts", source, "--out", out).returncode == 0
    told = {key: record["text"] + "\n" for key, record in records(out).items()}
    assert len(set(told.values())) == 3

    def one(*options: str | Path) -> str:
        run = mpgpt(0, *arguments, "--prompt", "hello", *options)
        assert run.returncode == 0, run.stderr
        return run.stdout

    assert one("--config", config) == told["seed"]
    assert one("--temperature", "1", "--top-p", "0.95", "--seed", "-1") == told["seed"]
    assert one() == told["greedy"]
    assert one("--config", config, "--top-p", "0", "--seed", "5") == told["greedy"]


def test_standard_input_and_several_prompts(models: dict[str, Path]) -> None:
    model = models["llama"]
    piped = mpgpt(0, "generate", "--model", model, *SHORT, stdin="hello\n")
    given = mpgpt(0, "generate", "--model", model, *SHORT, "--prompt", "hello")
    assert piped.returncode == given.returncode == 0
    assert piped.stdout == given.stdout and "5 prompt + 5 new tokens" in piped.stderr
    several = mpgpt(0, "generate", "--model", model, *SHORT, "--prompt", "hello", "--prompt", "you")
    lines = [json.loads(line) for line in several.stdout.splitlines()]
    assert {line["prompt"] for line in lines} == {"hello", "you"}
    text = next(line["text"] for line in lines if line["prompt"] == "hello")
    assert text + "\n" == given.stdout
    assert "empty" in said("generate", "--model", model, status=1)


def test_stop_and_chat_and_system(tmp_path: Path) -> None:
    folder = save_random("llama", tmp_path / "chatty")
    save_tokenizer(folder, TEMPLATE)
    out = tmp_path / "out.jsonl"
    arguments = ("generate", "--model", folder, "--ignore-eos", "--threads", "1", "--max-new-tokens", "20")
    raw = "s:be kind;u:hello;a:"
    mpgpt(0, *arguments, "--raw", "--prompt", raw, "--out", out)
    whole = records(out)[1]
    chat = mpgpt(0, *arguments, "--prompt", "hello", "--system", "be kind")
    assert chat.stdout == whole["text"] + "\n"
    stop = whole["text"][4:6]
    assert stop
    stopped = mpgpt(0, *arguments, "--prompt", "hello", "--system", "be kind", "--stop", stop)
    assert stopped.stdout == whole["text"][: whole["text"].index(stop)] + "\n"
    assert "--raw" not in said("generate", "--model", folder, "--prompt", "x", "--raw", "--system", "y", status=2)


def test_pull_prints_the_folder(models: dict[str, Path], tmp_path: Path) -> None:
    run = mpgpt(0, "pull", models["gpt2"], "--dir", tmp_path / "here")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == str(tmp_path / "here")
    assert mpgpt(0, "generate", "--model", tmp_path / "here", "--prompt", "x", *SHORT).returncode == 0
