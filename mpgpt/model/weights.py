"""A model folder: its configuration, and those of its tensors that are read.

Knows: the files of a model folder (config.json, safetensors, an index of shards, our checksums).
Must not know: the use of a tensor, which rank it is, or how the folder came to be.

Tensors are mapped, not read: only the pages of what is asked for are touched, and a mapping is dropped as soon
as its block has been taken over. Where ``mpgpt pull`` left checksums, every tensor that is read is checked.
"""

from __future__ import annotations

import contextlib
import ctypes
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mpgpt.errors import ModelError
from mpgpt.model.architecture import ModelConfig
from mpgpt.model.folder import read_json, read_marker, weight_files
from mpgpt.model.known_families import read_config

BLOCK_BYTES = 8 << 20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PREFIXES = ("", "transformer.", "model.")


def model_config(folder: Path) -> ModelConfig:
    """The configuration of the model in ``folder``; ``ModelError`` when it is absent or not supported."""
    return read_config(read_json(folder / "config.json"))


class Checkpoint:
    """The tensors of a model folder, by name, with or without the prefix of the family's outer module."""

    def __init__(self, folder: Path) -> None:
        """Raises ``ModelError`` when a file is absent, cut or damaged in its header."""
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._sums: dict[str, int] = {}
        known = (read_marker(folder) or {}).get("tensors", {})
        for path in weight_files(folder):
            sums = known.get(path.relative_to(folder).as_posix(), {})
            with _open(path) as file:
                names = list(file.keys())
            self._files |= dict.fromkeys(names, path)
            # Of each file its own: a tensor may be in several, and a file may have come after the pull.
            self._sums = {name: crc for name, crc in self._sums.items() if self._files[name] != path}
            self._sums |= {name: sums[name] for name in names if name in sums}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all tensors, by their full names. Nothing but headers is read."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path in dict.fromkeys(self._files.values()):
            with _open(path) as file:
                mine = [name for name, where in self._files.items() if where == path]
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in mine}
        return shapes

    def holds(self, name: str) -> bool:
        """Whether there is a tensor of this name, with a prefix or without."""
        return any(prefix + name in self._files for prefix in PREFIXES)

    def _find(self, name: str) -> str:
        for prefix in PREFIXES:
            if prefix + name in self._files:
                return prefix + name
        raise ModelError(f"{self._folder} lacks the tensor {name}: the checkpoint is incomplete or of another model")

    def _pieces(self, full: str) -> Iterator[Tensor]:
        """The tensor in pieces of about ``BLOCK_BYTES`` along its first dimension, each mapped by itself; its
        checksum is compared after the last."""
        path = self._files[full]
        with _open(path) as file:
            shape = file.get_slice(full).get_shape()
        rows = shape[0] if shape else 1
        width = max(1, torch.Size(shape).numel() // max(1, rows))
        crc, step = 0, max(1, BLOCK_BYTES // (4 * width))
        for first in range(0, rows, step):
            with _open(path) as file:
                piece: Tensor = file.get_slice(full)[first : first + step] if shape else file.get_tensor(full)
            if piece.dtype not in DTYPES:
                raise ModelError(f"{path} holds {full} as {piece.dtype}: quantised checkpoints are not supported")
            if full in self._sums:
                crc = zlib.crc32(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data, crc)
            yield piece
        if full in self._sums and crc != self._sums[full]:
            raise ModelError(f"{path} is damaged: the checksum of {full} does not fit; pull the model again")

    def blocks(self, name: str, *, transpose: bool = False) -> Iterator[Tensor]:
        """The weight ``name`` as [O, I] blocks in its file's dtype (see ``loader.Source``)."""
        full = self._find(name)
        if transpose:
            yield self._transposed(full)
        else:
            yield from self._pieces(full)

    def _transposed(self, full: str) -> Tensor:
        whole_OI, filled = torch.empty(0), 0
        for piece_IO in self._pieces(full):
            if not filled:
                with _open(self._files[full]) as file:
                    inputs, outputs = file.get_slice(full).get_shape()
                whole_OI = torch.empty((outputs, inputs), dtype=piece_IO.dtype)
            whole_OI[:, filled : filled + len(piece_IO)] = piece_IO.t()
            filled += len(piece_IO)
        return whole_OI

    def vector(self, name: str) -> Tensor:
        """A small tensor, copied out of its file."""
        return torch.cat(list(self._pieces(self._find(name))))

    def mapped(self, name: str) -> Tensor:
        """The whole tensor as a view into its file: rows are read when they are looked up."""
        full = self._find(name)
        for _ in self._pieces(full):  # for the checksum; each piece is dropped at once
            pass
        with _open(self._files[full]) as file:
            tensor: Tensor = file.get_tensor(full)
        return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise ModelError(f"{path} is absent, although the index names it; pull the model again") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(f"{path} is cut or damaged ({error}); pull the model again") from error


@contextlib.contextmanager
def lean_heap() -> Iterator[None]:
    """Give the memory of every block back at once while a slice is loaded.

    glibc keeps large blocks that were freed for the next ones, and blocks of many sizes leave holes: half as much
    again as the weights. Afterwards it may keep them: a step's tensors have the same sizes every time, and taking
    them from the system anew would cost a page fault for every 4 KiB. Does nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 256 << 20)
