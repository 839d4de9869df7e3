"""ML programs written by hand, message by message, and packages that are edited: what no converter would write."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

NUMBERS = {"float16": 10, "int32": 23, "bool": 1}
FEATURES = {"float16": 65552, "int32": 131104}


def value_type(dtype: str, shape: Sequence[int]) -> Any:
    from coremltools.proto import MIL_pb2

    type = MIL_pb2.ValueType()
    type.tensorType.dataType = NUMBERS[dtype]
    type.tensorType.rank = len(shape)
    for size in shape:
        type.tensorType.dimensions.add().constant.size = size
    return type


def constant(array: np.ndarray[Any, Any]) -> Any:
    from coremltools.proto import MIL_pb2

    value = MIL_pb2.Value(type=value_type(array.dtype.name, array.shape))
    tensor = value.immediateValue.tensor
    if array.dtype == np.float16:
        tensor.bytes.values = array.tobytes()
    elif array.dtype == np.int32:
        tensor.ints.values.extend(array.ravel().tolist())
    else:
        tensor.bools.values.extend(array.ravel().tolist())
    return value


class Writer:
    """One function, ``main``, op by op. A name is the value of an op; arrays become constants."""

    def __init__(self, inputs: Mapping[str, Sequence[int]], states: Mapping[str, Sequence[int]]) -> None:
        """Shapes by name; all are float16."""
        from coremltools.proto import Model_pb2

        self.spec = Model_pb2.Model(specificationVersion=9)
        self.function = self.spec.mlProgram.functions["main"]
        self.function.opset = "CoreML8"
        self.block = self.function.block_specializations["CoreML8"]
        for name, shape in inputs.items():
            self.function.inputs.add(name=name, type=value_type("float16", shape))
            self._feature("input", name, shape)
        for name, shape in states.items():
            wrapped = self.function.inputs.add(name=name).type.stateType.wrappedType
            wrapped.CopyFrom(value_type("float16", shape))
            array = self.spec.description.state.add(name=name).type.stateType.arrayType
            array.shape.extend(shape)
            array.dataType = FEATURES["float16"]
        self._count = 0

    def op(self, kind: str, shape: Sequence[int] | None, /, **inputs: str | np.ndarray[Any, Any]) -> str:
        """The name of its result, which is float16 of ``shape``; none when ``shape`` is None."""
        op = self.block.operations.add(type=kind)
        for name, given in inputs.items():
            argument = op.inputs[name].arguments.add()
            if isinstance(given, str):
                argument.name = given
            else:
                argument.value.CopyFrom(constant(given))
        if shape is None:
            return ""
        self._count += 1
        op.outputs.add(name=f"v{self._count}", type=value_type("float16", shape))
        return f"v{self._count}"

    def constant(self, array: np.ndarray[Any, Any]) -> str:
        op = self.block.operations.add(type="const")
        self._count += 1
        op.outputs.add(name=f"v{self._count}", type=value_type(array.dtype.name, array.shape))
        op.attributes["val"].CopyFrom(constant(array))
        return f"v{self._count}"

    def save(self, path: Path, outputs: Mapping[str, Sequence[int]]) -> Path:
        for name, shape in outputs.items():
            self.block.outputs.append(name)
            self._feature("output", name, shape)
        return write(path, self.spec)

    def _feature(self, part: str, name: str, shape: Sequence[int]) -> None:
        array = getattr(self.spec.description, part).add(name=name).type.multiArrayType
        array.shape.extend(shape)
        array.dataType = FEATURES["float16"]


def write(path: Path, spec: Any) -> Path:
    folder = path / "Data" / "com.apple.CoreML"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.mlmodel").write_bytes(spec.SerializeToString())
    return path


def edited(package: Path, path: Path, edit: Callable[[Any], object]) -> Path:
    """A copy of ``package`` at ``path``, with its spec changed by ``edit``."""
    from coremltools.proto import Model_pb2

    shutil.copytree(package, path)
    spec = Model_pb2.Model()
    spec.ParseFromString((path / "Data" / "com.apple.CoreML" / "model.mlmodel").read_bytes())
    edit(spec)
    return write(path, spec)


def first_op(spec: Any, kind: str) -> Any:
    """The first op of that type in ``prefill``."""
    function = spec.mlProgram.functions["prefill"]
    return next(op for op in function.block_specializations["CoreML8"].operations if op.type == kind)
