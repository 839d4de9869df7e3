"""Random weights for a known shape, so that speed can be measured where nothing can be fetched.

Knows: which known shapes are small, what transformers makes of a configuration, where such folders are kept.
Must not know: ranks, spans, or what is measured.

A folder is finished or it is not there: it is made beside its place and renamed. It has no tokenizer.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpgpt.display import silent
from mpgpt.errors import ModelError, UsageError
from mpgpt.model.folder import read_json
from mpgpt.model.known_families import read_config
from mpgpt.model.known_shapes import INVENTED, PUBLISHED

SEED = 0
SHAPES: Mapping[str, Mapping[str, Any]] = {
    name: {**PUBLISHED, **INVENTED}[name] for name in ("gpt2", "gpt2-medium", "smollm2-135m", "llama-small")
}
"""The known shapes that are small enough to be made on any machine."""


def random_model(name: str, home: Path, report: Callable[[str], None] = silent) -> Path:
    """The folder of a random model, made under ``home`` if it is not there yet.

    ``name`` is one of ``SHAPES``, a ``config.json``, or a folder with one; a file's folder is named after its
    contents, so that another configuration is another folder. ``report`` gets a line when there is work to do.
    Raises ``UsageError`` for a name that leads nowhere, ``ModelError`` for a shape that is not supported or a disk
    that does not play along.
    """
    raw, stem = _shape(name)
    folder = home / f"random-{stem}"
    if (folder / "config.json").is_file():
        return folder
    report(f"making random weights: {folder}")
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=home, prefix=".random-") as part:
            fresh = Path(part) / "model"
            _make(raw, fresh)
            _move(fresh, folder)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error.strerror or error}") from error
    return folder


def _move(fresh: Path, folder: Path) -> None:
    try:
        os.rename(fresh, folder)
    except OSError:
        if not (folder / "config.json").is_file():  # else somebody was faster, and made the same
            raise


def _shape(name: str) -> tuple[Mapping[str, Any], str]:
    """A configuration as transformers reads it, and the stem of its folder's name."""
    if name in SHAPES:
        return SHAPES[name], name
    path = Path(name)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise UsageError(f"--random {name}: there is no such file, and the shapes known are {', '.join(SHAPES)}")
    raw = read_json(path)
    read_config(raw)
    stem = path.resolve().parent.name if path.name == "config.json" else path.stem
    digest = zlib.crc32(json.dumps(raw, sort_keys=True).encode())
    return raw, f"{re.sub(r'[^A-Za-z0-9._-]', '-', stem)}-{digest:08x}"


def _make(raw: Mapping[str, Any], folder: Path) -> None:
    """Write a model as transformers initialises it, from a fixed seed, in float32."""
    import torch
    import transformers

    auto: Any = transformers.AutoModelForCausalLM
    logging: Any = transformers.utils.logging
    logging.disable_progress_bar()
    config = transformers.AutoConfig.for_model(**{key: raw[key] for key in raw if key not in ("dtype", "torch_dtype")})
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto.from_config(config, dtype=torch.float32).save_pretrained(folder)
    read_config(read_json(folder / "config.json"))
