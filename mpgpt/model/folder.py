"""A model folder on this machine: what makes it whole, and the marker that says so.

Knows: which files a model needs and which of them hold its weights, the layout of a safetensors file, the marker
``mpgpt.json`` that is written last and holds a checksum of every tensor.
Must not know: where models come from, layers, ranks, or how tensors are loaded and run.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mpgpt.errors import ModelError

MARKER = "mpgpt.json"
INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
HEADER_LIMIT = 100_000_000
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a finished folder; None if there is none that can be understood."""
    try:
        marker = json.loads((folder / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    ours = isinstance(marker, dict) and marker.get("format") == 1 and isinstance(marker.get("source"), str)
    return marker if ours and _has_sums(marker.get("tensors", {})) else None


def _has_sums(tensors: Any) -> bool:
    return isinstance(tensors, dict) and all(isinstance(sums, dict) for sums in tensors.values())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; ``ModelError`` when it is absent, unreadable or no object."""
    try:
        table = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}.") from None
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}.") from error
    if not isinstance(table, dict):
        raise ModelError(f"{path} is damaged: it is not a table.")
    return table


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a model's weights: those that transformers reads, in its order, and no other.

    ``model.safetensors`` alone where it is there, else all that the index names; of a tensor that is in several of
    them the last counts. Raises ModelError: there is neither, or the index is damaged or names what is not there.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ModelError(f"{folder} has no safetensors{_instead(folder)}: {WEIGHTS} or {INDEX} is needed.")
    files = {name: folder / name for name in indexed(folder / INDEX)}
    missing = [name for name, path in files.items() if not path.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing[:3])}, named in its {INDEX}.")
    return list(files.values())


def indexed(index: Path) -> list[str]:
    """The files that an index names, sorted. Raises ModelError: it is damaged, or one is none that we load."""
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ModelError(f"{index} is damaged: it has no weight_map of tensors' names to files' names.")
    if not files:
        raise ModelError(f"{index} names no weights: its weight_map is empty.")
    for name in sorted(set(files.values())):
        path = PurePosixPath(name)
        if not name.isprintable() or path.is_absolute() or ".." in path.parts or "\\" in name:
            raise ModelError(f"{index} names {name!r}, which is not a file of this folder.")
        if path.suffix != ".safetensors":
            raise ModelError(f"{index} names {name!r}, which is no safetensors file; nothing else is loaded here.")
    return sorted(set(files.values()))


def _instead(folder: Path) -> str:
    """Other files in the folder that look like weights."""
    there = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    others = [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".safetensors"))]
    return f" (there is {others[0]}, which is not loaded here)" if others else ""


def check_whole(folder: Path) -> None:
    """ModelError naming what a model folder lacks."""
    weight_files(folder)
    there = {path.name for path in folder.iterdir() if path.is_file()}
    if not any(there.issuperset(names) for names in TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer: tokenizer.json, or vocab.json and merges.txt, is needed.")
    read_json(folder / "config.json")


def seal(folder: Path, source: str) -> None:
    """Check the folder, add the marker, make the files readable to others and push them to the disk."""
    check_whole(folder)
    tensors = {path.relative_to(folder).as_posix(): checksums(path) for path in weight_files(folder)}
    marker = {"format": 1, "source": source, "tensors": tensors}
    (folder / MARKER).write_text(json.dumps(marker, indent=1))
    mode = folder.stat().st_mode & 0o666  # of a plain mkdir: the umask, applied
    for path in (*folder.rglob("*"), folder):
        if path.is_file():
            path.chmod(mode)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def checksums(path: Path) -> dict[str, int]:
    """CRC-32 of each tensor's raw bytes in a safetensors file, read in bounded memory.

    Raises ModelError: the file is not there, cut short, or its header does not describe it.
    """
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            start, spans = _header(stream, size)
            stream.seek(start)
            # The spans are back to back in this order, so one sequential read visits them all.
            return {name: _crc(stream, stop - begin) for begin, stop, name in spans}
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}. Fetch or copy it again.") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}.") from error


def _header(stream: BinaryIO, size: int) -> tuple[int, list[tuple[int, int, str]]]:
    """Where the tensors begin, and (begin, stop, name) of each, in file order. ValueError if malformed."""
    length = int.from_bytes(stream.read(8), "little")
    if size < 8 or length > min(HEADER_LIMIT, size - 8):
        raise ValueError(f"its header claims {length} bytes of {size}")
    header = json.loads(stream.read(length).decode())
    if not isinstance(header, dict):
        raise ValueError("its header is not a table")
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        span = entry.get("data_offsets") if isinstance(entry, dict) else None
        if not (isinstance(span, list) and len(span) == 2 and all(type(edge) is int for edge in span)):
            raise ValueError(f"its header has no offsets for {name!r}")
        spans.append((span[0], span[1], name))
    spans.sort()
    at = 0
    for begin, stop, name in spans:
        if begin != at or stop < begin:
            raise ValueError(f"{name!r} lies at {begin} to {stop} where {at} is due")
        at = stop
    if 8 + length + at != size:
        raise ValueError(f"it has {size} bytes and its header describes {8 + length + at}")
    return 8 + length, spans


def _crc(stream: BinaryIO, length: int) -> int:
    crc = 0
    while length:
        chunk = stream.read(min(length, 1 << 20))
        if not chunk:
            raise ValueError("it became shorter while it was read")
        crc = zlib.crc32(chunk, crc)
        length -= len(chunk)
    return crc
