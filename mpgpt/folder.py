"""A model folder on this machine: what makes it whole, and the marker that says so.

Knows: which files a model needs, the layout of a safetensors file, the marker ``mpgpt.json`` that is written last
and holds a checksum of every tensor.
Must not know: where models come from, layers, ranks, or how tensors are loaded and run.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
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
    return marker if ours else None


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


def check_whole(folder: Path) -> None:
    """ModelError naming what a model folder lacks."""
    there = {path.name for path in folder.iterdir() if path.is_file()}
    if not there & {INDEX, WEIGHTS}:
        others = sorted(name for name in there if name.endswith((".bin", ".pt", ".pth", ".safetensors")))
        instead = f" (there is {others[0]}, which is not loaded here)" if others else ""
        raise ModelError(f"{folder} has no safetensors{instead}: {WEIGHTS} or {INDEX} is needed.")
    if not any(there.issuperset(names) for names in TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer: tokenizer.json, or vocab.json and merges.txt, is needed.")
    read_json(folder / "config.json")
    if WEIGHTS not in there:
        files = read_json(folder / INDEX).get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
            raise ModelError(f"{folder / INDEX} is damaged: it has no weight_map.")
        missing = sorted(set(files.values()) - there)
        if missing or not files:
            raise ModelError(f"{folder} lacks {', '.join(missing[:3]) or 'the weights'}, named in its {INDEX}.")


def seal(folder: Path, source: str) -> None:
    """Check the folder, add the marker, make the files readable to others and push them to the disk."""
    check_whole(folder)
    tensors = {path.name: checksums(path) for path in sorted(folder.glob("*.safetensors"))}
    marker = {"format": 1, "source": source, "tensors": tensors}
    (folder / MARKER).write_text(json.dumps(marker, indent=1))
    mode = folder.stat().st_mode & 0o666  # of a plain mkdir: the umask, applied
    for path in (*folder.iterdir(), folder):
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
