"""What a server calls its model, and how it begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mpgpt_api.serve import _public


def test_a_model_is_called_by_its_folders_own_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never by nothing, and never by the way to it."""
    folder = tmp_path / "my-model"
    (folder / "inside").mkdir(parents=True)
    (tmp_path / "link").symlink_to("my-model")
    monkeypatch.setenv("HOME", str(tmp_path))
    for where, names in (
        (folder, (".", "./", "./.", "../my-model", "inside/..", "../link", "../link/", "../link/.")),
        (folder / "inside", ("..", "../", "../../my-model/", "../../link/inside/..")),
        (tmp_path, ("my-model", "./my-model", "my-model/", str(folder), f"{folder}/", "link", "~/my-model", "~/link/")),
    ):
        monkeypatch.chdir(where)
        for name in names:
            assert _public(name) == "my-model", (where, name)


def test_names_that_are_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _public("gpt2") == "gpt2" and _public("owner/name") == "owner/name"
    (tmp_path / "m.gguf").touch()
    assert _public("./m.gguf") == _public(str(tmp_path / "m.gguf")) == "m.gguf"
    assert _public("/") == "model"
    odd = tmp_path / os.fsdecode(b"caf\xe9")
    odd.mkdir()
    assert _public(str(odd)) == "caf\\udce9", "it must go into JSON"
