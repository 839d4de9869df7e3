"""The evaluator behind a pipe: it answers with the very bytes that it gives without one, and outlives what is wrong."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load, save

pytest.importorskip("coremltools")

from mpgpt_ios.executor import EvaluatorBackend, Executor
from mpgpt_ios.predicting import serve
from tests.ios_proxy.packages import Array, Recording, Small, rows
from tests.support.launch import ENV, ROOT


class Pipe:
    """An ``executor.Backend`` whose package runs in a child."""

    def __init__(self, process: subprocess.Popen[bytes], folder: Path) -> None:
        self.process, self._scratch = process, folder / "answer"
        assert process.stdin and process.stdout
        self._in, self._out = process.stdin, process.stdout

    def run(self, function: str, inputs: dict[str, Array]) -> Array:
        tensors, metadata = self.ask(function, inputs)
        assert not metadata and list(tensors) == ["y"], metadata
        return tensors["y"]

    def reset(self) -> None:
        assert self.ask("reset", {}) == ({}, {})

    def ask(self, function: str, inputs: Mapping[str, Array]) -> tuple[dict[str, Array], Mapping[str, str]]:
        contiguous = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
        self.send(save(contiguous, metadata={"function": function}))
        return self.hear()

    def send(self, data: bytes) -> None:
        self._in.write(struct.pack("<I", len(data)) + data)
        self._in.flush()

    def hear(self) -> tuple[dict[str, Array], Mapping[str, str]]:
        data = self._out.read(*struct.unpack("<I", self._out.read(4)))
        self._scratch.write_bytes(data)
        with safe_open(self._scratch, framework="numpy") as file:
            return load(data), file.metadata() or {}


@contextlib.contextmanager
def child(package: Path, folder: Path) -> Iterator[Pipe]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "ios_proxy")])
    command = [sys.executable, "-m", "mpgpt_ios.predicting", str(package)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENV | {"PYTHONPATH": path}
    ) as process:
        yield Pipe(process, folder)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_same_bytes_as_without_a_pipe(small: dict[str, Small], tmp_path: Path, name: str) -> None:
    package, sizes = small[name].path, small[name].sizes
    with child(package, tmp_path) as pipe:
        assert pipe.hear() == ({}, {"ready": "yes"})
        here, there = Executor(EvaluatorBackend(package), sizes), Executor(pipe, sizes)
        for _ in "12":  # and again, from a state that was forgotten
            for executor in (here, there):
                executor.reset()
            for slot, count in ((0, 9), (2, 3)):  # a chunk and a step; a chunk
                x = rows(count, seed=slot)
                assert here.prefill(slot, 0, x).tobytes() == there.prefill(slot, 0, x).tobytes()
            for at in range(4):
                x = rows(2, seed=9 + at)
                y = [executor.decode([2, 0], [3 + at, 9 + at], x) for executor in (here, there)]
                assert y[0].tobytes() == y[1].tobytes()
    assert pipe.process.returncode == 0


def test_it_outlives_a_call_that_cannot_be(small: dict[str, Small], tmp_path: Path) -> None:
    with child(small["gpt2"].path, tmp_path) as pipe:
        pipe.hear()
        for function, inputs, words in (
            ("decode", {}, "decode takes"), ("encode", {}, "there is no function"),
            ("decode", {"x": np.zeros(3, np.float16)}, "decode takes"),
        ):  # fmt: skip
            tensors, metadata = pipe.ask(function, inputs)
            assert not tensors and words in metadata["error"]
        for data in (b"", b"no safetensors file at all", save({}), save({}, metadata={})):
            pipe.send(data)
            assert pipe.hear()[1]["error"]
        assert pipe.ask("reset", {}) == ({}, {})


def test_a_package_that_cannot_be_loaded(tmp_path: Path) -> None:
    with child(tmp_path / "absent.mlpackage", tmp_path) as pipe:
        assert "absent.mlpackage" in pipe.hear()[1]["error"]
    assert pipe.process.returncode == 1


def test_what_a_backend_prints_is_no_answer(small: dict[str, Small], tmp_path: Path) -> None:
    """Nothing but messages is on the pipe, from the first byte to the last."""
    with child(small["gpt2"].path, tmp_path) as pipe:
        pipe.hear()
        rest, _ = pipe.process.communicate(timeout=30)
    assert rest == b""


def test_a_call_that_is_cut_ends_it() -> None:
    calls, answers = io.BytesIO(struct.pack("<I", 100)[:3]), io.BytesIO()
    serve(Recording(), calls, answers)
    assert not answers.getvalue()


def test_it_goes_on_after_a_backend_that_fails() -> None:
    class Failing(Recording):
        def run(self, function: str, inputs: dict[str, Array]) -> Array:
            super().run(function, inputs)
            raise RuntimeError("no luck")

    def message(metadata: dict[str, str], tensors: dict[str, Any]) -> bytes:
        data = save(tensors, metadata=metadata)
        return struct.pack("<I", len(data)) + data

    call, x = {"function": "decode"}, {"x": np.ones((1, 2), np.float16)}
    backend, answers = Failing(), io.BytesIO()
    serve(backend, io.BytesIO(message(call, x) + message({"function": "reset"}, {})), answers)
    assert b"no luck" in answers.getvalue() and backend.names == ["decode", "reset"]
