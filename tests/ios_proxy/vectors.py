"""One message of every kind, and the golden file that pins their bytes: `python -m tests.ios_proxy.vectors` writes it.

The file is for the Swift side too: a frame in hex, and what it says.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from mpgpt_ios.protocol import frames as f
from mpgpt_ios.protocol import messages as m

GOLDEN = Path(__file__).parent.parent / "golden" / "ipad.json"
HALVES = np.array([[1.0, -2.5], [0.5, 65504.0]], np.float16)
FLOATS = np.array([[0.1, -3.0]], np.float32)
HASH, OTHER = bytes(range(32)), bytes(range(32, 64))
FACTS = {"battery": 0.5, "thermal": "nominal"}

MESSAGES: dict[str, m.Message] = {
    "HELLO": m.Hello(nonce=HASH),
    "CHALLENGE": m.Challenge(nonce=OTHER, proof=HASH),
    "PROOF": m.Proof(proof=OTHER),
    "INFO": m.Info(facts={"name": "iPad", "protocol": 1}),
    "OFFER": m.Offer(
        bundle=HASH,
        files=(
            m.File(name="manifest.json", length=5, sha256=OTHER),
            m.File(name="model.mlpackage/é", length=2**33, sha256=HASH),
        ),
    ),
    "WANT": m.Want(offset=2**33 + 5),
    "DATA": m.Data(offset=262144, piece=b"bytes"),
    "STORED": m.Stored(bundle=HASH),
    "LOAD": m.Load(bundle=HASH),
    "LOADING": m.Loading(text="compiling"),
    "READY": m.Ready(facts={"dtype": "float16", "queue": 8, "unit": "CPU_AND_NE"}),
    "RESET": m.Reset(epoch=3),
    "PREFILL": m.Request(epoch=3, request=7, positions=((2, 40),), prefill=True, x=HALVES),
    "DECODE": m.Request(epoch=3, request=8, positions=((2, 42), (0, 9)), prefill=False, x=HALVES),
    "DECODE, float32": m.Request(epoch=3, request=9, positions=((1, 0),), prefill=False, x=FLOATS),
    "RESULT": m.Result(epoch=3, request=8, positions=((2, 42), (0, 9)), compute_ns=1_500_000, y=HALVES),
    "ERROR": m.Error(code="BAD_POS", text="slot 2 holds 40 positions", epoch=3, request=8),
    "PING": m.Ping(number=123456789),
    "PONG": m.Pong(number=123456789, facts=FACTS),
    "BYE": m.Bye(),
}


def told(message: m.Message) -> dict[str, Any]:
    """A message for people and for JSON: bytes in hex, numbers as they are."""

    def plain(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.hex()
        if isinstance(value, np.ndarray):
            return {"dtype": value.dtype.name, "values": value.tolist()}
        if isinstance(value, m.File):
            return {"name": value.name, "length": value.length, "sha256": value.sha256.hex()}
        return [plain(each) for each in value] if isinstance(value, tuple) else value

    return {field.name: plain(getattr(message, field.name)) for field in fields(message)}


def main() -> None:
    vectors = [
        {"name": name, "fields": told(message), "frame": f.encode(message).hex()} for name, message in MESSAGES.items()
    ]
    GOLDEN.write_text(json.dumps({"version": f.VERSION, "frames": vectors}, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
