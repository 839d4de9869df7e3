"""The checks of a saved package: its declarations, its writes to the cache, and its results.

Knows: the converter's promises for every package.
Must not know: how a package is made.

A cache write that is lost in conversion leaves a package that loads, runs and lies; counting the writes of the saved
program and executing it are the two ways to notice, and neither alone is enough.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mpgpt.errors import ModelError
from mpgpt_ios.bundle import Bundle, Manifest
from mpgpt_ios.executor import EvaluatorBackend, Executor, run_selftest

UPDATES = ("write_state", "coreml_update_state")
"""The first is how a cache write is saved; the second is what coremltools calls it in memory."""


def check(bundle: Bundle) -> float:
    """Check a package; its self-test's largest difference from float32, in the evaluator.

    Raises ``ModelError`` for a package that fails a check.
    """
    manifest = bundle.manifest
    backend = EvaluatorBackend(bundle.package)
    program, layers = backend.program, len(manifest.span)
    for function, inputs in declared(manifest).items():
        found = program.functions[function]
        kv = {"kv": ((2 * layers, manifest.slots * manifest.kv_heads, manifest.context, manifest.head_dim), np.float16)}
        outputs = {"y": inputs["x"]}
        for what, wanted, there in (
            ("inputs", inputs, found.inputs), ("outputs", outputs, found.outputs), ("states", kv, found.states)
        ):  # fmt: skip
            if (plain := _plain(there)) != _plain(wanted):
                raise ModelError(f"{function} has the {what} {plain}, not {_plain(wanted)}")
        updates = sum(program.count(function, op) for op in UPDATES)
        if updates != 2 * layers:
            raise ModelError(
                f"{function} writes to its cache {updates} times, not {2 * layers}: a write was lost in conversion"
            )
    blobs = [entry.name for entry in bundle.entries if entry.name.endswith("weight.bin")]
    if len(blobs) != 1:
        raise ModelError(f"the package has {len(blobs)} files of weights: its functions do not share them")
    return run_selftest(Executor(backend, manifest), bundle.selftest, manifest.tolerance)


def declared(m: Manifest) -> dict[str, dict[str, tuple[tuple[int, ...], Any]]]:
    """Every function's inputs: name, shape, dtype."""
    half, integer = np.float16, np.int32
    turns = ("cos", "sin") if m.rotary else ()

    def one_slot(tokens: int) -> dict[str, tuple[tuple[int, ...], Any]]:
        return {
            "x": ((1, m.embed, 1, tokens), half), "mask": ((1, 1, tokens, m.context), half), "pos": ((1,), integer),
            "row": ((1,), integer),
        } | {name: ((1, 1, tokens, m.head_dim), half) for name in turns}  # fmt: skip

    any_slots: dict[str, tuple[tuple[int, ...], Any]] = {
        "x": ((m.slots, m.embed, 1, 1), half), "mask": ((m.slots, 1, 1, m.context), half),
        "wmask": ((m.slots, 1, m.context, 1), half),
    }  # fmt: skip
    any_slots |= {name: ((m.slots, 1, 1, m.head_dim), half) for name in turns}
    return {"prefill": one_slot(m.chunk), "step": one_slot(1), "decode": any_slots}


def _plain(ports: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(shape), np.dtype(dtype).name) for name, (shape, dtype) in sorted(ports.items())}
