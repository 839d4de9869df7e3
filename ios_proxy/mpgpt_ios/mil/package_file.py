"""A saved .mlpackage as it lies on disk: its program, and its constants as tensors.

Knows: where a package keeps its program and its weights, the header of a blob, the bits of a type, what a constant is.
Must not know: what an op does, or in what order ops run.

The program is protocol buffers (MIL.proto); large constants lie in blobs beside it. A blob begins with 64 bytes:

    offset size
         0    4  0xDEADBEEF
         4    4  kind of element
         8    8  bytes of data
        16    8  where the data begin, from the beginning of the file
        24   40  padding, in bits, of elements that are smaller than a byte; zeros
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpgpt.errors import ModelError

HEADER = struct.Struct("<IIQQ")
SENTINEL = 0xDEADBEEF
STRING = 2

# MIL's number of a type: the type, and its number in a blob's header
TYPES: dict[int, tuple[str, int | None]] = {
    1: ("bool", None), 10: ("float16", 1), 11: ("float32", 2), 21: ("int8", 4), 22: ("int16", 6), 23: ("int32", 14),
    31: ("uint8", 3), 32: ("uint16", 7),
}  # fmt: skip
# two elements in a byte, the first in its low half; held as whole bytes here
NIBBLES: dict[int, tuple[str, int]] = {25: ("int8", 8), 35: ("uint8", 11)}

Constant = Tensor | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Type:
    """A tensor's type: as the package declares it, and the dtype in which it is held here."""

    shape: tuple[int, ...]
    """-1 for a size that is known at run time only."""
    declared: np.dtype[Any]
    dtype: torch.dtype

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of ``shape`` may be of this type."""
        if shape == self.shape:
            return True
        return len(shape) == len(self.shape) and all(
            mine in (-1, its) for mine, its in zip(self.shape, shape, strict=True)
        )


class Package:
    """The program and the constants of the .mlpackage at ``path``. In its methods, ``what`` begins an error's sentence.

    ``half`` is the dtype in which float16 is held: itself, or float32. What lies in the weight file is mapped, not
    read; a blob that two functions share is one tensor. Raises ``ModelError`` for what is not such a package, and,
    from every method, for what is damaged or of a kind that is not understood.
    """

    def __init__(self, path: Path, half: torch.dtype) -> None:
        try:
            from coremltools.proto import Model_pb2
            from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
        except ImportError:
            raise ModelError('a .mlpackage is read with coremltools: pip install "mpgpt[coreml]"') from None
        self.path, self._half = path, half
        self._root = path / "Data" / "com.apple.CoreML"
        spec = Model_pb2.Model()
        try:
            spec.ParseFromString((self._root / "model.mlmodel").read_bytes())
        except OSError as error:
            raise ModelError(f"{path} is not a Core ML package: {error}") from None
        except DecodeError:
            raise ModelError(f"{path}: its model.mlmodel is damaged") from None
        if spec.WhichOneof("Type") != "mlProgram":
            raise ModelError(f"{path} holds a {spec.WhichOneof('Type') or 'damaged model'}, not an ML program")
        self.spec: Any = spec
        self._files: dict[str, np.ndarray[Any, Any]] = {}
        self._blobs: dict[tuple[str, int], Tensor] = {}
        self._made: dict[tuple[str, tuple[int, ...]], tuple[Sequence[Tensor], Sequence[Tensor]]] = {}

    def type(self, declared: Any, what: str, *, fixed: bool = True) -> Type:
        """The type of ``what``, from a ValueType. Only tensors have one; ``fixed``: only those of fixed shape."""
        kind = declared.WhichOneof("type")
        if kind != "tensorType":
            raise ModelError(f"{what} is a {kind or 'value of no type'}; only tensors are understood")
        tensor = declared.tensorType
        name, _ = TYPES.get(tensor.dataType) or NIBBLES.get(tensor.dataType) or ("", 0)
        if not name:
            raise ModelError(f"{what} is of type {tensor.dataType}, which is not understood")
        unknown = [dim.unknown for dim in tensor.dimensions if dim.WhichOneof("dimension") != "constant"]
        if any(fixed or dim.variadic for dim in unknown):
            raise ModelError(f"{what} has a shape that is not fixed")
        shape = tuple(dim.constant.size if dim.HasField("constant") else -1 for dim in tensor.dimensions)
        dtype: torch.dtype = self._half if name == "float16" else getattr(torch, name)
        return Type(shape=shape, declared=np.dtype(name), dtype=dtype)

    def constant(self, value: Any, what: str) -> Constant:
        """The constant in a Value: a tensor, or a text."""
        if value.type.WhichOneof("type") == "tensorType" and value.type.tensorType.dataType == STRING:
            texts = value.immediateValue.tensor.strings.values
            if len(texts) != 1:
                raise ModelError(f"{what} is {len(texts)} texts; one is understood")
            return str(texts[0])
        type = self.type(value.type, what)
        if value.WhichOneof("value") == "blobFileValue":
            at = value.blobFileValue
            key = (at.fileName, at.offset)
            if key not in self._blobs:
                self._blobs[key] = self._blob(at.fileName, at.offset, value.type.tensorType.dataType, type, what)
            found = self._blobs[key]
        else:
            found = self._immediate(value, type, what)
        if tuple(found.shape) != type.shape:
            raise ModelError(f"{what} is stored as {tuple(found.shape)} and declared as {type.shape}")
        return found

    def single(self, tensor: Tensor) -> Tensor:
        """The same constant in float32, made once."""
        return self.once("float32", (tensor,), lambda: (tensor.float(),))[0]

    def once(self, kind: str, constants: Sequence[Tensor], make: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """The result of ``make`` for these very tensors, made at the first call and shared by all functions."""
        key = (kind, tuple(map(id, constants)))
        if key not in self._made:
            self._made[key] = tuple(constants), make()  # the constants too, so that an id stays its own
        return self._made[key][1]

    def _immediate(self, value: Any, type: Type, what: str) -> Tensor:
        tensor = value.immediateValue.tensor
        field = tensor.WhichOneof("value")
        if field is None:
            raise ModelError(f"{what} has no value")
        stored: Any = getattr(tensor, field).values
        number = value.type.tensorType.dataType
        if field == "bytes":
            raw: np.ndarray[Any, Any] = np.frombuffer(stored, np.uint8).copy()
            return self._tensor(raw, number, type, what)
        array = np.array(list(stored)).astype(type.declared)
        if array.size != math.prod(type.shape):
            raise ModelError(f"{what} has {array.size} elements and is declared as {type.shape}")
        return torch.from_numpy(array.reshape(type.shape)).to(type.dtype)

    def _blob(self, file: str, offset: int, number: int, type: Type, what: str) -> Tensor:
        mapped = self._mapped(file, what)
        if offset + HEADER.size > mapped.size:
            raise ModelError(f"{what} lies behind the end of {file}")
        sentinel, kind, length, start = HEADER.unpack(mapped[offset : offset + HEADER.size].tobytes())
        _, expected = TYPES.get(number) or NIBBLES[number]
        if sentinel != SENTINEL or kind != expected or start + length > mapped.size:
            raise ModelError(f"{what} has a damaged header in {file}, or one of another type")
        return self._tensor(mapped[start : start + length], number, type, what)

    def _tensor(self, raw: np.ndarray[Any, Any], number: int, type: Type, what: str) -> Tensor:
        """The elements in ``raw`` bytes, as the type ``number`` lays them out."""
        count, packed = math.prod(type.shape), number in NIBBLES
        bytes = (count + 1) // 2 if packed else count * type.declared.itemsize
        if raw.size != bytes:
            raise ModelError(f"{what} has {raw.size} bytes where {type.shape} takes {bytes}")
        if packed:
            raw = np.stack((raw & 15, raw >> 4), axis=-1).reshape(-1)[:count]
            if type.declared == np.int8:
                raw = (raw ^ 8) - 8  # wraps: 8 to 15 become -8 to -1
        return torch.from_numpy(raw.view(type.declared).reshape(type.shape)).to(type.dtype)

    def _mapped(self, file: str, what: str) -> np.ndarray[Any, Any]:
        if file not in self._files:
            at = (self._root / file.removeprefix("@model_path/")).resolve()
            if not at.is_relative_to(self._root.resolve()):
                raise ModelError(f"{what} lies outside the package, in {file}")
            try:
                # private pages: torch wants memory that it could write to
                self._files[file] = np.asarray(np.memmap(at, dtype=np.uint8, mode="c"))
            except (OSError, ValueError) as error:
                raise ModelError(f"{self.path}: its weights cannot be read: {error}") from None
        return self._files[file]
