"""`python3 -m mpgpt_ios.predicting PACKAGE`: the evaluator as a child of a node that is not Python.

Knows: the node's pipe, and which backend executes the package.
Must not know: slots, positions, masks, chunks: whoever asks sends every input; the wire, bundles.

A message is a uint32, little-endian, with the length of the safetensors file that follows. The node sends the inputs of
one call, and names it in the metadata: ``function`` is one of the package's, or ``reset``, which has no inputs. Back
comes ``y``, after a reset nothing, or metadata ``error``, a sentence; the child then goes on. It speaks first: metadata
``ready`` is "yes" once the package is loaded, ``error`` if it cannot be, and then it ends. It ends with its stdin, too.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save

from mpgpt_ios.executor import TROUBLES, Array, Backend, EvaluatorBackend

LENGTH = struct.Struct("<I")
WRONG = (*TROUBLES, KeyError, SafetensorError)
"""What a call may raise: the backend, or the file that it came in."""


def main() -> int:
    """Load the package that the command line names, and answer until stdin ends; the exit status."""
    parser = argparse.ArgumentParser(prog="mpgpt_ios.predicting", description="Execute a Core ML package for a node.")
    parser.add_argument("package", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to the node, too, which closes stdin
    logging.disable(logging.WARNING)  # importing coremltools tells which of Apple's libraries are not here
    answers = _stdout_alone()
    torch.set_num_threads(options.threads)
    try:
        backend = EvaluatorBackend(options.package)
    except (*WRONG, OSError) as error:
        _send(answers, {}, {"error": str(error)})
        return 1
    _send(answers, {}, {"ready": "yes"})
    serve(backend, sys.stdin.buffer, answers)
    return 0


def serve(backend: Backend, calls: BinaryIO, answers: BinaryIO) -> None:
    """Answer every call, one after another."""
    while len(start := calls.read(LENGTH.size)) == LENGTH.size:
        data = calls.read(*LENGTH.unpack(start))
        try:
            _send(answers, _call(backend, data), {})
        except WRONG as error:
            _send(answers, {}, {"error": str(error) or type(error).__name__})


def _call(backend: Backend, data: bytes) -> Mapping[str, Array]:
    function = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]["function"]
    if function == "reset":
        backend.reset()
        return {}
    return {"y": backend.run(function, load(data))}


def _send(answers: BinaryIO, tensors: Mapping[str, Array], metadata: dict[str, str]) -> None:
    data = save(dict(tensors), metadata=metadata or None)  # an empty one beside no tensors would be no JSON
    answers.write(LENGTH.pack(len(data)) + data)
    answers.flush()


def _stdout_alone() -> BinaryIO:
    """What was stdout, for answers alone; whatever else is printed goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


if __name__ == "__main__":
    sys.exit(main())
