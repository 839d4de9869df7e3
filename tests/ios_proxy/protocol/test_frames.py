"""The codec of the iPad link: what it makes comes back, and whatever else arrives is a WireError, or waits for more.

The golden vectors in golden/ipad.json pin the bytes, for the Swift side too; PROTOCOL.md shows some of them.
"""

from __future__ import annotations

import contextlib
import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mpgpt.errors import WireError
from mpgpt_ios.protocol import frames as f
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.frames import CRC_AT, HEADER, MAX_PAYLOAD, Frames, VersionError, encode
from mpgpt_ios.protocol.messages import Message
from tests.ios_proxy.vectors import GOLDEN, MESSAGES, told

ROOT = Path(__file__).parent.parent.parent.parent
VECTORS = json.loads(GOLDEN.read_text())["frames"]


def seal(frame: bytes) -> bytes:
    """The same frame with the checksum that fits it: what a liar would send."""
    crc = zlib.crc32(frame[HEADER.size :], zlib.crc32(frame[:CRC_AT] + bytes(4)))
    return frame[:CRC_AT] + struct.pack("<I", crc) + frame[HEADER.size :]


def read(data: bytes) -> list[Message]:
    frames = Frames()
    frames.feed(data)
    messages = []
    while (message := frames.next()) is not None:
        messages.append(message)
    return messages


def same(a: Message, b: Message) -> bool:
    return type(a) is type(b) and told(a) == told(b)


uint32, uint64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
digest = st.binary(min_size=32, max_size=32)
positions = st.lists(st.tuples(uint32, uint32), min_size=1, max_size=4).map(tuple)
facts = st.dictionaries(
    st.text(max_size=5), st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=9), max_size=3
)


@st.composite
def values(draw: st.DrawFn, tokens: int) -> m.Values:
    dtype = draw(st.sampled_from([np.float16, np.float32]))
    return draw(arrays(dtype, (tokens, draw(st.integers(1, 5))), elements=st.floats(-9, 9, width=16)))


@st.composite
def prefills(draw: st.DrawFn) -> Message:
    x = draw(values(draw(st.integers(1, 9))))
    return m.Prefill(epoch=draw(uint32), request=draw(uint32), positions=draw(positions)[:1], x=x)


@st.composite
def decodes(draw: st.DrawFn) -> Message:
    where = draw(positions)
    return m.Decode(epoch=draw(uint32), request=draw(uint32), positions=where, x=draw(values(len(where))))


@st.composite
def results(draw: st.DrawFn) -> Message:
    where = draw(positions)
    y = draw(values(draw(st.integers(len(where), 9))))
    return m.Result(epoch=draw(uint32), request=draw(uint32), positions=where, compute_ns=draw(uint64), y=y)


printable = st.text(st.characters(categories=["L", "N", "P"]), max_size=60)
offered = st.lists(st.builds(m.File, name=printable.filter(bool), length=uint64, sha256=digest), min_size=1, max_size=4)
messages: st.SearchStrategy[Message] = st.one_of(
    st.builds(m.Hello, nonce=digest), st.builds(m.Challenge, nonce=digest, proof=digest),
    st.builds(m.Proof, proof=digest), st.builds(m.Info, facts=facts),
    st.builds(m.Offer, bundle=digest, files=offered.map(tuple)), st.builds(m.Want, offset=uint64),
    st.builds(m.Data, offset=uint64, piece=st.binary(min_size=1, max_size=99)), st.builds(m.Stored, bundle=digest),
    st.builds(m.Load, bundle=digest), st.builds(m.Loading, text=printable), st.builds(m.Ready, facts=facts),
    st.builds(m.Reset, epoch=uint32), prefills(), decodes(), results(),
    st.builds(m.Error, code=st.sampled_from(m.CODES), text=printable, epoch=uint32, request=uint32),
    st.builds(m.Ping, number=uint64), st.builds(m.Pong, number=uint64, facts=facts), st.just(m.Bye()),
)  # fmt: skip


def test_the_golden_file_has_one_of_every_kind() -> None:
    assert [vector["name"] for vector in VECTORS] == list(MESSAGES)
    assert {bytes.fromhex(vector["frame"])[5] for vector in VECTORS} == set(range(1, 20))


@pytest.mark.parametrize("vector", VECTORS, ids=lambda vector: str(vector["name"]))
def test_golden_vectors_hold_in_both_directions(vector: dict[str, Any]) -> None:
    frame, message = bytes.fromhex(vector["frame"]), MESSAGES[vector["name"]]
    assert encode(message) == frame and told(message) == vector["fields"]
    (got,) = read(frame)
    assert same(got, message)


def test_the_documents_examples_are_the_golden_ones() -> None:
    text = (ROOT / "ios_proxy" / "PROTOCOL.md").read_text()
    shown = re.findall(r"^([A-Z]+)(?:: [^\n]*)?\n\n```\n([0-9a-f\n]+)```", text, re.MULTILINE)
    golden = {vector["name"]: vector["frame"] for vector in VECTORS}
    assert len(shown) == 9
    for name, frame in shown:
        assert frame.replace("\n", "") == golden[name]


def test_the_header_is_laid_out_as_the_document_says() -> None:
    frame = encode(MESSAGES["DECODE"])
    assert frame[:8] == b"mpIP" + bytes([1, 14, 0, 0])
    assert struct.unpack("<II", frame[8:16]) == (3, 8)
    assert frame[16:18] == bytes([1, 0]) and struct.unpack("<HHHI", frame[18:28]) == (2, 2, 0, len(frame) - 32)
    assert struct.unpack("<I", frame[28:32])[0] == zlib.crc32(frame[:28] + bytes(4) + frame[32:])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(messages, min_size=1, max_size=4), st.data())
def test_whatever_is_sent_comes_back_however_it_is_cut(sent: list[Message], data: st.DataObject) -> None:
    stream, frames, got = b"".join(map(encode, sent)), Frames(), list[Message]()
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        frames.feed(stream[:cut])
        stream = stream[cut:]
        while (message := frames.next()) is not None:
            got.append(message)
    assert len(got) == len(sent) and all(map(same, got, sent)) and not frames.held


@settings(max_examples=300, deadline=None, derandomize=True)
@given(messages, st.data())
def test_a_flipped_bit_is_noticed(message: Message, data: st.DataObject) -> None:
    """Or, where it made the length grow within its bounds, the rest is waited for; and then noticed."""
    frame = bytearray(encode(message))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    frames = Frames()
    with pytest.raises(WireError):
        frames.feed(bytes(frame))
        assert frames.next() is None
        assert 8 * 24 <= bit < 8 * 28, "only a length may make it wait"
        frames.feed(bytes(MAX_PAYLOAD))
        frames.next()


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.lists(st.binary(max_size=80), max_size=8), st.integers(0, 20))
def test_any_bytes_are_an_error_or_wait(pieces: list[bytes], kind: int) -> None:
    """As they are, and behind the beginning of a header that might be one."""
    for start in (b"", HEADER.pack(f.MAGIC, 1, kind, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0)[:26]):
        frames = Frames()
        try:
            for piece in (start, *pieces):
                frames.feed(piece)
                while frames.next() is not None:
                    pass
                assert frames.held <= HEADER.size + MAX_PAYLOAD
        except WireError:
            pass


@settings(max_examples=300, deadline=None, derandomize=True)
@given(messages, st.binary(max_size=60), st.data())
def test_a_liars_payload_is_an_error_or_a_message(message: Message, junk: bytes, data: st.DataObject) -> None:
    """A checksum that fits what it covers proves nothing of it."""
    frame = bytearray(encode(message))
    at = data.draw(st.integers(0, len(frame)))
    frame[at : at + len(junk)] = junk
    frame = frame[: max(HEADER.size, len(frame))]
    struct.pack_into("<I", frame, 24, len(frame) - HEADER.size)
    with contextlib.suppress(WireError):
        read(seal(bytes(frame)))


@pytest.mark.parametrize("length", [2**32 - 1, MAX_PAYLOAD + 1])
def test_a_length_is_refused_from_its_header(length: int) -> None:
    for kind in range(1, 20):
        frames = Frames()
        frames.feed(HEADER.pack(f.MAGIC, 1, kind, 0, 0, 0, 0, 0, 0, 0, 0, length, 0))
        with pytest.raises(WireError, match=f"{length} bytes"):
            frames.next()


def test_another_version_is_known_from_five_bytes() -> None:
    frames = Frames()
    frames.feed(b"mpIP\x02")
    with pytest.raises(VersionError, match="version 2 of the protocol"):
        frames.next()


def test_what_is_told_to_a_person_prints() -> None:
    (message,) = read(seal(encode(m.Loading(text="x" * 9))[:32] + b"a\x1b[2Jb\xff\nc"))
    assert isinstance(message, m.Loading) and message.text.isprintable() and message.text.startswith("a")


def test_a_text_is_cut_between_two_characters() -> None:
    for message in (m.Loading(text="é" * 400), m.Error(code="BUSY", text="x" + "é" * 400)):
        (got,) = read(encode(message))
        assert got.text and got.text == message.text[: len(got.text)] and 498 < len(got.text.encode()) <= 500  # type: ignore[union-attr]


def test_a_code_of_a_later_version_is_kept() -> None:
    (got,) = read(seal(encode(m.Error(code="BUSY", text="why"))[:32] + b"\x0c\x00why"))
    assert got == m.Error(code="#12", text="why") and read(encode(got)) == [got]


@pytest.mark.parametrize(
    "payload",
    [
        b"[1]",
        b'{"a"',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b'{"\xff": 1}',
        b'{"a": 1, "a": 1}',
        b'{"a": ' + b"[" * 16 + b"]" * 16 + b"}",
        b'{"a": ' + b"[" * 9999,
    ],
    ids=["an array", "cut", "no number", "infinite", "a mark", "UTF-16", "no text", "twice", "deep", "deeper"],
)
def test_what_is_no_object_in_utf8(payload: bytes) -> None:
    head = HEADER.pack(f.MAGIC, 1, 4, 0, 0, 0, 0, 0, 0, 0, 0, len(payload), 0)
    with pytest.raises(WireError, match="JSON"):
        read(seal(head + payload))


def test_an_offer_of_no_files_is_no_offer() -> None:
    with pytest.raises(WireError, match="0 rows"):
        read(encode(m.Offer(bundle=bytes(32), files=())))
