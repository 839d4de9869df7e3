"""A random model that hosts take for one they pulled: its name leads to it, and no weights need be fetched."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from mpgpt.model.folder import seal
from mpgpt.model.pull import model_home
from tests.hosts.host import Host
from tests.support.models import GPT2, save_tokenizer


def save_gpt2(folder: Path) -> Path:
    """A GPT-2 of as many layers and positions as gpt2, but narrow, finished as a pull of gpt2 leaves it."""
    torch.manual_seed(12)
    options: dict[str, Any] = GPT2 | {"n_layer": 12, "n_positions": 1024}
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
    for name, value in model.named_parameters():
        if name.endswith("mlp.c_proj.weight"):
            value.data *= 3  # as in tests/support/models.py: layers must matter more than the embedding
    model.save_pretrained(folder)
    save_tokenizer(folder)
    seal(folder, "gpt2")
    return folder


def give(hosts: Iterable[Host], model: Path, home: Path | None = None) -> None:
    """Put the model into the hosts' model cache, or into that of the user whose home is given."""
    models = home / ".cache/mpgpt/models" if home else model_home()
    for host in hosts:
        host.copy(model, models / "gpt2")
