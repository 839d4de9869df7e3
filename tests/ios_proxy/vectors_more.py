"""What Python says of proofs, bundles, refused frames, the inputs of a package, a self-test and whole sessions.

`python -m tests.ios_proxy.vectors_more` writes the golden file, which the Swift side is held against; the tests hold
Python against it.
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from mpgpt.errors import MpgptError
from mpgpt_ios.bundle import MANIFEST, SELFTEST, bundle_hash
from mpgpt_ios.executor import BadPosition, Executor, run_selftest
from mpgpt_ios.node.bundle_store import check_offer
from mpgpt_ios.pairing import pairing_link
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import NODE_LABEL, PROXY_LABEL, fingerprint, prove
from mpgpt_ios.protocol.frames import HEADER, LENGTHS, MAGIC, encode
from mpgpt_ios.protocol.payloads import Kind
from tests.ios_proxy.packages import Recording, SmallSizes, Turning
from tests.ios_proxy.vectors import GOLDEN, HASH, MESSAGES, OTHER
from tests.ios_proxy.walks import play, sealed, walk

MORE = GOLDEN.with_name("ipad_more.json")
SESSIONS = 60
Plain = dict[str, Any]


def proofs() -> Iterator[Plain]:
    for token in (b"the shared token", bytes(range(256)), b"x" * 16, b"y" * 1024):
        for theirs, ours in ((bytes(32), HASH), (HASH, OTHER), (OTHER, OTHER)):
            yield {
                "token": token.hex(), "proxy_nonce": theirs.hex(), "node_nonce": ours.hex(),
                "node": prove(token, NODE_LABEL, theirs, ours).hex(),
                "proxy": prove(token, PROXY_LABEL, ours, theirs).hex(),
            }  # fmt: skip


def pairings() -> Iterator[Plain]:
    """Tokens with what a person compares and what the app opens."""
    for token in (
        b"a token of words",
        b"abcdefghijklmnopqrstuvwxyz-_0123456789ABCDE",
        bytes(range(1, 256)),
        b"%+&=?/#: ;%41\xc3\xa9x",
    ):
        yield {"token": token.hex(), "fingerprint": fingerprint(token), "link": pairing_link(token)}


def offers() -> Iterator[Plain]:
    """Offers, and whether a node takes them."""
    names = [MANIFEST, "model.mlpackage/Data/weight.bin", "model.mlpackage/Manifest.json", SELFTEST]
    more = {
        "what it should be": names, "no package": [MANIFEST, SELFTEST],
        "no manifest": names[1:], "no self-test": names[:3],
        "a file twice": [*names[:2], *names[1:]], "out of order": [names[1], names[0], *names[2:]],
        "two that differ by case": [MANIFEST, "model.mlpackage/A", "model.mlpackage/a", SELFTEST],
        "a file that is a folder": [MANIFEST, "model.mlpackage/a", "model.mlpackage/a/b", SELFTEST],
    }  # fmt: skip
    for name in (
        "../a", "/etc/passwd", "model.mlpackage", "model.mlpackage/../a", "model.mlpackage//a", "model.mlpackage/./a",
        "model.mlpackage/a/", "model.mlpackage/é", "model.mlpackage/a b", "model.mlpackage/a\\b", "model.mlpackage/a:b",
        "model.mlpackage/a\n", "other", "Manifest.json", "model.mlpackage/-_.Az09",
    ):  # fmt: skip
        more[f"with {name!r}"] = sorted([*names, name], key=str.encode)
    for what, listed in more.items():
        yield offered(what, [(name, at + 1, HASH) for at, name in enumerate(listed)])
    yield offered("64 GiB", [(name, 1 << 34, HASH) for name in names])
    yield offered("more than 64 GiB", [(name, (1 << 34) + (name == MANIFEST), HASH) for name in names])
    yield offered("a sum beyond 64 bits", [(name, (1 << 64) - 1, HASH) for name in names])
    yield offered("another hash", [(name, 1, HASH) for name in names], bundle=OTHER)


def offered(what: str, files: list[tuple[str, int, bytes]], bundle: bytes | None = None) -> Plain:
    digest = bundle or bundle_hash(files)
    offer = m.Offer(bundle=digest, files=tuple(m.File(name=n, length=size, sha256=d) for n, size, d in files))
    try:
        check_offer(offer)
        taken = True
    except MpgptError:
        taken = False
    return {"what": what, "frame": encode(offer).hex(), "taken": taken}


def bad_frames() -> Iterator[Plain]:
    """Frames that no state of either end takes: BAD_FRAME, or BAD_VERSION."""
    for kind, (least, most) in LENGTHS.items():
        for length in {least - 1, most + 1, 2**32 - 1} - {-1}:
            yield {
                "what": f"{Kind(kind).name} of {length} bytes",
                "code": "BAD_FRAME",
                "frame": head(kind, length).hex(),
            }
    for kind in (0, 20, 255):
        yield {"what": f"a type {kind}", "code": "BAD_FRAME", "frame": head(kind, 0).hex()}
    for version in (0, 2, 255):
        yield {"what": f"version {version}", "code": "BAD_VERSION", "frame": (MAGIC + bytes([version])).hex()}
    yield {"what": "something else", "code": "BAD_FRAME", "frame": b"GET / HTTP/1.1\r\n\r\n".hex()}
    for name, message in MESSAGES.items():
        frame = encode(message)
        for at, what in (
            (6, "flags"),
            (17, "byte 17"),
            (22, "bytes 22 and 23"),
            (16, "a dtype 3"),
            (18, "65 rows and more"),
        ):
            yield changed(name, frame, at, 3 if at == 16 else 255, what)
        if not isinstance(message, m.Prefill | m.Decode | m.Result | m.Error):
            yield changed(name, frame, 12, 1, "a request")
            if not isinstance(message, m.Reset):
                yield changed(name, frame, 8, 1, "an epoch")
        flipped = bytearray(frame)
        flipped[28] ^= 1
        yield {"what": f"{name} with another checksum", "code": "BAD_FRAME", "frame": flipped.hex()}
    for what, frame in payloads():
        yield {"what": what, "code": "BAD_FRAME", "frame": frame.hex()}


def head(kind: int, length: int) -> bytes:
    valued = (1, 1, 1) if kind in (13, 14, 15) else (0, 1 if kind == Kind.OFFER else 0, 0)
    return HEADER.pack(MAGIC, 1, kind, 0, 0, 0, valued[0], 0, valued[1], valued[2], 0, length, 0)


def changed(name: str, frame: bytes, at: int, value: int, what: str) -> Plain:
    other = bytearray(frame)
    other[at] = value
    if at == 18:
        other[19] = 255
    return {"what": f"{name} with {what}", "code": "BAD_FRAME", "frame": sealed(other).hex()}


def payloads() -> Iterator[tuple[str, bytes]]:
    prefill, decode, offer = (encode(MESSAGES[name]) for name in ("PREFILL", "DECODE", "OFFER"))
    yield "a PREFILL of two positions", sealed(prefill[:5] + b"\x0d" + decode[6:])
    yield "a DECODE of more tokens than rows", sealed(decode[:5] + b"\x0e" + prefill[6:])
    yield "a RESULT whose values are cut", sealed(resized(encode(MESSAGES["RESULT"])[:-1]))
    yield "a PREFILL whose values are cut", sealed(resized(prefill[:-1]))
    wide = m.Prefill(epoch=3, request=7, positions=((2, 40),), x=np.zeros((1, 16385), np.float16))
    yield "a PREFILL that is too wide", encode(wide)
    yield "an OFFER that is cut", sealed(resized(offer[:-1]))
    yield "an OFFER with more than its files", sealed(resized(offer + b"x"))
    yield "an OFFER of a name without a letter", sealed(offer[:64] + bytes(2) + offer[66:])
    yield "an OFFER of a name that is no text", sealed(offer[:66] + b"\xff" + offer[67:])
    info = encode(MESSAGES["INFO"])[:32]
    for what, text in (
        ("an array", b"[1]"), ("cut", b'{"a"'), ("NaN", b'{"a": NaN}'), ("infinite", b'{"a": -Infinity}'),
        ("a number that no double holds", b'{"a": 1e400}'),
        ("an integer beyond 64 bits", b'{"a": 9223372036854775808}'),
        ("half a surrogate pair", b'{"a": "\\ud800"}'),
        ("marked", b"\xef\xbb\xbf{}"), ("in UTF-16", '{"a": 1}'.encode("utf-16")), ("no text", b'{"\xff": 1}'),
        ("with a key twice", b'{"a": 1, "a": 2}'), ("17 deep", b'{"a": ' + b"[" * 16 + b"]" * 16 + b"}"),
        ("with a comma too many", b'{"a": 1,}'), ("with another quote", b"{'a': 1}"),
        ("with a zero in front", b'{"a": 01}'),
        ("two", b"{}{}"), ("with a line in a text", b'{"a": "\n"}'), ("with half an escape", b'{"a": "\\u12"}'),
        ("only space", b"  "),
    ):  # fmt: skip
        yield f"JSON: {what}", sealed(resized(info + text))


def resized(frame: bytes) -> bytes:
    return frame[:24] + struct.pack("<I", len(frame) - HEADER.size) + frame[28:]


SMALL = SmallSizes(embed=4, kv_heads=2, head_dim=4, slots=3, context=12, chunk=4)
CALLS: tuple[tuple[list[int], list[int], int], ...] = (
    ([0], [0], 6), ([1], [0], 1), ([0, 1], [6, 1], 2), ([2, 0], [0, 7], 2), ([0], [8], 4), ([1], [1], 3), ([1], [9], 1),
    ([1], [4], 7), ([0], [3], 2), ([0], [6], 1), ([2, 1, 0], [1, 11, 5], 3), ([0], [11], 2), ([2], [2], 10),
)  # fmt: skip
"""Slots, positions, tokens: what follows, begins anew, does not fit, is padded, ends the context."""


def inputs() -> Iterator[Plain]:
    """What a package is given for requests; its answer is x."""
    for rotary in (None, Turning(inv_freq=(1.0, 0.05), gain=1.25)):
        backend = Recording()
        executor, calls = Executor(backend, replace(SMALL, rotary=rotary)), list[Plain]()
        for number, (slots, positions, count) in enumerate(CALLS):
            x = (np.arange(count * SMALL.embed).reshape(count, -1) + 100 * number).astype(np.float16)
            backend.calls.clear()
            try:
                if len(slots) == 1:
                    executor.prefill(slots[0], positions[0], x)
                else:
                    executor.decode(slots, positions, x)
                code = None
            except BadPosition:
                code = "BAD_POS"
            calls.append({
                "slots": slots, "positions": positions, "x": x.tobytes().hex(), "code": code,
                "given": [{"function": name, "inputs": given(arrays)} for name, arrays in backend.calls],
                "filled": list(executor.filled),
            })  # fmt: skip
        sizes = {name: getattr(SMALL, name) for name in ("embed", "kv_heads", "head_dim", "slots", "context", "chunk")}
        turning = rotary and {"inv_freq": list(rotary.inv_freq), "gain": rotary.gain}
        yield {"sizes": sizes, "rotary": turning, "calls": calls}


def given(arrays: dict[str, Any]) -> Plain:
    """As the package has them: tables too are rounded to float16."""
    halves = {name: a if a.dtype == np.int32 else a.astype(np.float16) for name, a in arrays.items()}
    return {name: {"shape": list(a.shape), "bytes": a.tobytes().hex()} for name, a in halves.items()}


def selftest() -> Plain:
    """A file, and by how much a package whose y is x is off."""
    tensors: dict[str, Any] = {}
    for i, (slots, positions) in enumerate((([0] * 6, range(6)), ([1, 0], [0, 6]), ([0] * 2, [2, 3]))):
        x = (np.arange(len(slots) * SMALL.embed).reshape(-1, SMALL.embed) / 8).astype(np.float16)
        y = x.astype(np.float32) * np.float32(1 + i / 64) + np.float32(i / 128)
        tensors |= {f"{i}.slot": np.array(slots, np.int32), f"{i}.pos": np.array(positions, np.int32)}
        tensors |= {f"{i}.x": x, f"{i}.y": y}
    file = save(tensors, metadata={"kind.0": "prefill", "kind.1": "decode", "kind.2": "prefill"})
    return {"file": file.hex(), "largest": off_by(file)}


def off_by(file: bytes) -> float:
    """How far off a self-test finds a package whose y is x."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / SELFTEST
        path.write_bytes(file)
        return run_selftest(Executor(Recording(), SMALL), path, 1.0)


def sessions() -> Iterator[Plain]:
    for seed in range(SESSIONS):
        script = walk(seed)
        yield {"script": script, "outcome": play(script)}


def everything() -> Plain:
    """All but the self-test, whose file is another each time: safetensors has no order of its metadata."""
    return {
        "proofs": list(proofs()), "pairings": list(pairings()), "offers": list(offers()),
        "bad_frames": list(bad_frames()), "inputs": list(inputs()), "sessions": list(sessions()),
    }  # fmt: skip


def main() -> None:
    sections = (
        f"{json.dumps(name)}: {listed(section)}" for name, section in (everything() | {"selftest": selftest()}).items()
    )
    MORE.write_text("{\n" + ",\n".join(sections) + "\n}\n")


def listed(section: Any) -> str:
    """As JSON, an entry a line."""
    entries = section if isinstance(section, list) else [section]
    lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    return f"[\n{lines}\n]" if isinstance(section, list) else lines


if __name__ == "__main__":
    main()
