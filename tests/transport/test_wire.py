"""The frame codec: what it makes comes back, and whatever else arrives is a WireError and nothing worse.

The golden vectors in golden/wire.json pin the bytes: ranks of one version talk to each other, and a change of the
layout must be a decision.
"""

from __future__ import annotations

import json
import math
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpgpt.core import MAX_LOGPROBS, NO_TOKEN, DeviceAccount, Result, Row, Sampling, StageStats, StatsRound, Step, Stop
from mpgpt.errors import WireError
from mpgpt.transport.wire import (
    ACCOUNT,
    ALIGN,
    CRC_AT,
    HEADER,
    MAGIC,
    RESULT,
    ROW,
    STEP,
    STOP,
    TALLY,
    THERMAL,
    Codec,
    Message,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "wire.json").read_text())
CODEC = Codec(rows=4, tokens=24, token_bytes=6, slots=8, context=1000, ranks=5)

uint32 = st.integers(0, 2**32 - 1)
token = st.integers(0, 2**31 - 1)
number = st.floats(allow_nan=False)
samplings = st.builds(
    Sampling,
    temperature=number, top_k=uint32, top_p=number, min_p=number, repetition_penalty=number,
    frequency_penalty=number, presence_penalty=number,
    seed=st.integers(0, 2**64 - 1),
)  # fmt: skip


@st.composite
def steps(draw: st.DrawFn, codec: Codec = CODEC) -> Step:
    rows = []
    for _ in range(count := draw(st.integers(1, codec.rows))):
        ids = draw(st.lists(token, min_size=1, max_size=codec.tokens // count))
        rows.append(
            Row(
                slot=draw(st.integers(0, codec.slots - 1)),
                start=draw(st.integers(0, codec.context - len(ids))),
                ids=tuple(ids),
                outputs=draw(st.integers(0, len(ids))),
                prompt=draw(uint32),
                logprobs=draw(st.integers(0, MAX_LOGPROBS)),
                sampling=draw(samplings),
            )
        )
    size = codec.token_bytes * sum(len(row.ids) for row in rows)
    hidden = draw(st.just(b"") | st.binary(min_size=size, max_size=size))
    return Step(epoch=draw(uint32), number=draw(uint32), rows=tuple(rows), hidden=hidden)


@st.composite
def results(draw: st.DrawFn) -> Result:
    ids = draw(st.lists(token | st.just(NO_TOKEN), max_size=CODEC.tokens))
    logprob = st.tuples(token, st.floats(width=32, allow_nan=False, allow_infinity=False))
    logprobs = draw(st.lists(logprob, max_size=(len(ids) - ids.count(NO_TOKEN)) * MAX_LOGPROBS))
    return Result(epoch=draw(uint32), number=draw(uint32), ids=tuple(ids), logprobs=tuple(logprobs))


uint64 = st.integers(0, 2**64 - 1)
seconds = st.floats(min_value=0, allow_nan=False, allow_infinity=False)
accounts = st.builds(
    StageStats,
    rank=st.integers(0, CODEC.ranks - 1), steps=uint64, tokens=uint64, peak_rss=uint64, wall_s=seconds,
    compute_s=seconds, wait_s=seconds, send_s=seconds, other_s=seconds,
    device=st.none()
    | st.builds(
        DeviceAccount, requests=uint64, compute_s=seconds, network_s=seconds, sent=uint64, received=uint64,
        falls=uint64, away_s=seconds, thermal=st.sampled_from(THERMAL), away=st.booleans(),
    ),
)  # fmt: skip
each_once = st.lists(accounts, max_size=CODEC.ranks, unique_by=lambda account: account.rank).map(tuple)
tallies = st.builds(StatsRound, epoch=uint32, accounts=each_once, redial=st.booleans())
messages: st.SearchStrategy[Message] = st.one_of(steps(), results(), st.builds(Stop, epoch=uint32), tallies)


def seal(frame: bytearray) -> bytearray:
    """The same frame with the checksum that fits it: what a liar would send."""
    struct.pack_into("<I", frame, CRC_AT, 0)
    struct.pack_into("<I", frame, CRC_AT, zlib.crc32(frame))
    return frame


def small_step(**changes: Any) -> Step:
    """Two rows, three tokens, hidden states; the second row may be changed."""
    first = Row(slot=1, start=7, ids=(5, 6), outputs=0)
    sampling = Sampling(temperature=0.5, frequency_penalty=0.25, presence_penalty=-1.5, seed=3)
    second = replace(Row(slot=2, start=30, ids=(9,), outputs=1, prompt=12, logprobs=6, sampling=sampling), **changes)
    return Step(epoch=1, number=2, rows=(first, second), hidden=bytes(range(18)))


def small_tally(*ranks: int) -> StatsRound:
    """An account of each rank, all parts different; rank 3 stands before a device."""
    device = DeviceAccount(
        requests=11, compute_s=0.5, network_s=0.125, sent=1000, received=2000, falls=2, away_s=3.5, thermal="serious"
    )
    accounts = tuple(
        StageStats(
            rank=rank, steps=2**32 + rank, tokens=7, wall_s=10.0, compute_s=1.5, wait_s=2.5, send_s=0.25, other_s=5.75,
            peak_rss=2**33, device=device if rank == 3 else None,
        )
        for rank in ranks
    )  # fmt: skip
    return StatsRound(epoch=6, accounts=accounts)


# -- there and back


@settings(max_examples=200, deadline=None, derandomize=True)
@given(messages)
def test_whatever_is_encoded_comes_back_equal(message: Message) -> None:
    frame = CODEC.encode(message)
    assert len(frame) <= CODEC.max_frame
    assert CODEC.decode(frame) == message
    assert CODEC.decode(bytes(frame)) == CODEC.decode(memoryview(frame)) == message
    assert CODEC.encode(CODEC.decode(frame)) == frame


def test_the_longest_frame_is_as_long_as_promised() -> None:
    codec = replace(CODEC, ranks=1, token_bytes=200)
    rows = tuple(Row(slot=slot, start=0, ids=(1,) * 6) for slot in range(4))
    frame = codec.encode(Step(epoch=0, number=0, rows=rows, hidden=bytes(24 * 200)))
    assert len(frame) == codec.max_frame


def test_hidden_states_are_aligned_and_not_copied() -> None:
    frame = CODEC.encode(small_step())
    step = CODEC.decode(frame)
    assert isinstance(step, Step)
    assert isinstance(step.hidden, memoryview)
    assert (len(frame) - len(step.hidden)) % ALIGN == 0
    frame[-1] ^= 0xFF
    assert step.hidden[-1] == 17 ^ 0xFF


def test_floats_keep_every_bit() -> None:
    for value in (0.1, math.nextafter(1, 2), 5e-324, -0.0, math.inf):
        step = CODEC.decode(CODEC.encode(small_step(sampling=Sampling(temperature=value, top_p=value))))
        assert isinstance(step, Step)
        assert struct.pack("<d", step.rows[1].sampling.temperature) == struct.pack("<d", value)


def test_encode_refuses_what_the_ring_was_not_built_for() -> None:
    row = Row(slot=0, start=0, ids=(1,))
    for step in (
        Step(epoch=0, number=0, rows=()),
        Step(epoch=0, number=0, rows=(row,) * 5),
        Step(epoch=0, number=0, rows=(replace(row, ids=(1,) * 25),)),
        Step(epoch=0, number=0, rows=(row,), hidden=bytes(5)),
    ):
        with pytest.raises(AssertionError):
            CODEC.encode(step)


# -- golden vectors


def as_message(kind: str, fields: dict[str, Any]) -> Message:
    if kind == "stop":
        return Stop(**fields)
    if kind == "tally":
        accounts = (
            StageStats(**account | {"device": account["device"] and DeviceAccount(**account["device"])})
            for account in fields["accounts"]
        )
        return StatsRound(**fields | {"accounts": tuple(accounts)})
    if kind == "result":
        logprobs = tuple((id, log) for id, log in fields["logprobs"])
        return Result(**fields | {"ids": tuple(fields["ids"]), "logprobs": logprobs})
    rows = tuple(
        Row(**row | {"ids": tuple(row["ids"]), "sampling": Sampling(**row["sampling"])}) for row in fields["rows"]
    )
    return Step(**fields | {"rows": rows, "hidden": bytes.fromhex(fields["hidden"])})


def test_the_golden_file_has_every_kind() -> None:
    assert [(v["kind"], bool(v["fields"].get("hidden"))) for v in GOLDEN["frames"]] == [
        ("step", False), ("step", True), ("result", False), ("stop", False), ("tally", False), ("result", False),
        ("tally", False), ("result", False),
    ]  # fmt: skip


@pytest.mark.parametrize("vector", GOLDEN["frames"], ids=lambda v: str(v["name"]))
def test_golden_vectors_hold_in_both_directions(vector: dict[str, Any]) -> None:
    codec = Codec(**GOLDEN["codec"])
    message = as_message(vector["kind"], vector["fields"])
    assert codec.encode(message).hex() == vector["frame"]
    assert codec.decode(bytes.fromhex(vector["frame"])) == message


def test_a_frame_is_laid_out_as_the_docstring_says() -> None:
    """Read with plain slices: this test shares nothing with the codec but the magic."""
    frame = bytes(CODEC.encode(small_step()))

    def uint(at: int, size: int) -> int:
        return int.from_bytes(frame[at : at + size], "little")

    assert frame[:4] == MAGIC == b"mpg1"
    assert (uint(4, 1), uint(5, 1), uint(6, 2)) == (1, 0, 2)
    assert [uint(at, 4) for at in (8, 12, 16, 20, 24)] == [1, 2, 3, 1, len(frame) - 32]
    assert uint(28, 4) == zlib.crc32(frame[:28] + bytes(4) + frame[32:])
    row = 32 + 88
    assert [uint(row + 4 * i, 4) for i in range(8)] == [2, 30, 1, 1, 12, 6, 0, 0]
    assert struct.unpack("<6d", frame[row + 32 : row + 80]) == (0.5, 1.0, 0.0, 1.0, 0.25, -1.5)
    assert uint(row + 80, 8) == 3
    ids = 32 + 2 * 88
    assert [uint(ids + 4 * i, 4) for i in range(3)] == [5, 6, 9]
    assert frame[ids + 12 : ids + 16] == bytes(4)
    assert frame[ids + 16 :] == bytes(range(18))


def test_a_tally_is_laid_out_as_the_docstring_says() -> None:
    frame = bytes(CODEC.encode(small_tally(0, 3)))
    assert len(frame) == 32 + 2 * 136
    assert (frame[4], frame[5], int.from_bytes(frame[6:8], "little")) == (4, 0, 2)
    assert [int.from_bytes(frame[at : at + 4], "little") for at in (8, 12, 16, 20, 24)] == [6, 0, 0, 0, 272]
    first, second = frame[32:168], frame[168:]
    assert [int.from_bytes(first[at : at + 4], "little") for at in (0, 4)] == [0, 0] and not any(first[72:])
    assert [int.from_bytes(second[at : at + 4], "little") for at in (0, 4)] == [3, 1]
    assert [int.from_bytes(second[at : at + 8], "little") for at in (8, 16, 24)] == [2**32 + 3, 7, 2**33]
    assert struct.unpack("<5d", second[32:72]) == (10.0, 1.5, 2.5, 0.25, 5.75)
    assert struct.unpack("<4Q3dQ", second[72:]) == (11, 1000, 2000, 2, 0.5, 0.125, 3.5, 3)


# -- damage


@settings(max_examples=200, deadline=None, derandomize=True)
@given(messages, st.data())
def test_any_cut_is_noticed(message: Message, data: st.DataObject) -> None:
    frame = CODEC.encode(message)
    with pytest.raises(WireError):
        CODEC.decode(frame[: data.draw(st.integers(0, len(frame) - 1))])


@settings(max_examples=200, deadline=None, derandomize=True)
@given(messages, st.binary(min_size=1, max_size=200))
def test_any_extension_is_noticed(message: Message, more: bytes) -> None:
    with pytest.raises(WireError):
        CODEC.decode(CODEC.encode(message) + more)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(messages, st.data())
def test_any_flipped_bits_are_noticed(message: Message, data: st.DataObject) -> None:
    frame = CODEC.encode(message)
    for bit in data.draw(st.sets(st.integers(0, 8 * len(frame) - 1), min_size=1, max_size=6)):
        frame[bit // 8] ^= 1 << bit % 8
    with pytest.raises(WireError):
        CODEC.decode(frame)


@pytest.mark.parametrize(
    "message",
    [small_step(), Result(epoch=1, number=2, ids=(3, 4)), Stop(epoch=1), small_tally(0, 1)],
    ids=["step", "result", "stop", "tally"],
)
def test_every_single_bit_every_cut_every_added_byte(message: Message) -> None:
    frame = CODEC.encode(message)
    for bit in range(8 * len(frame)):
        frame[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            CODEC.decode(frame)
        frame[bit // 8] ^= 1 << bit % 8
    for cut in range(len(frame)):
        with pytest.raises(WireError):
            CODEC.decode(frame[:cut])
    for byte in range(256):
        with pytest.raises(WireError):
            CODEC.decode(frame + bytes([byte]))
    assert CODEC.decode(frame) == message


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.binary(max_size=CODEC.max_frame + 50))
def test_arbitrary_bytes_are_refused(noise: bytes) -> None:
    with pytest.raises(WireError):
        CODEC.decode(noise)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(0, 255), st.integers(0, 255), st.integers(0, 2**16 - 1), uint32, uint32, uint32, uint32),
    st.binary(max_size=CODEC.max_frame - HEADER.size),
)
def test_noise_under_a_right_header_is_a_message_or_refused(fields: tuple[int, ...], body: bytes) -> None:
    """Length and checksum fit: only the bounds are left to say no. What passes must be what encode makes."""
    frame = seal(bytearray(HEADER.pack(MAGIC, *fields, len(body), 0) + body))
    try:
        message = CODEC.decode(frame)
    except WireError:
        return
    assert CODEC.encode(message) == frame


# -- lies with a checksum that fits


def header(offset: int, form: str, value: float) -> Callable[[bytearray], None]:
    def forge(frame: bytearray) -> None:
        struct.pack_into("<" + form, frame, offset, value)

    return forge


def row(index: int, field: int, value: int) -> Callable[[bytearray], None]:
    """One of a row's eight leading integers: slot, start, count, outputs, prompt, logprobs, top_k, zero."""
    return header(HEADER.size + index * ROW.size + 4 * field, "I", value)


def both(*forgeries: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    def forge(frame: bytearray) -> None:
        for one in forgeries:
            one(frame)

    return forge


IDS_AT = HEADER.size + 2 * ROW.size
FORGERIES = {
    "magic": header(0, "I", 0x3067706D),
    "kind 0": header(4, "B", 0),
    "kind 5": header(4, "B", 5),
    "kind result": header(4, "B", RESULT),
    "kind stop": header(4, "B", STOP),
    "kind tally": header(4, "B", TALLY),
    "reserved byte": header(5, "B", 1),
    "no rows": header(6, "H", 0),
    "too many rows": header(6, "H", 5),
    "most rows": header(6, "H", 65535),
    "one row fewer": header(6, "H", 1),
    "no tokens": header(16, "I", 0),
    "fewer tokens than rows": header(16, "I", 1),
    "one token fewer": header(16, "I", 2),
    "one token more": header(16, "I", 4),
    "too many tokens": header(16, "I", 25),
    "most tokens": header(16, "I", 2**32 - 1),
    "an output too many": header(20, "I", 2),
    "an output too few": header(20, "I", 0),
    "most outputs": header(20, "I", 2**32 - 1),
    "body shorter": header(24, "I", 1),
    "body of 4 GiB": header(24, "I", 2**32 - 1),
    "slot beyond": row(1, 0, 8),
    "slot -1": row(1, 0, 2**32 - 1),
    "start beyond": row(1, 1, 1000),
    "start -1": row(1, 1, 2**32 - 1),
    "count 0": row(1, 2, 0),
    "first count 0": row(0, 2, 0),
    "count too large": row(1, 2, 2),
    "count -1": row(1, 2, 2**32 - 1),
    "counts that add up to less": row(0, 2, 1),
    "a count from the other row": both(row(0, 2, 3), row(1, 2, 0)),
    "more outputs than ids": both(row(1, 3, 2), header(20, "I", 2)),
    "outputs of 2**32": both(row(0, 3, 2**32 - 1), header(20, "I", 0)),
    "a logprob too many": row(1, 5, MAX_LOGPROBS + 1),
    "row's reserved word": row(1, 7, 1),
    "negative id": header(IDS_AT + 8, "i", -1),
    "least id": header(IDS_AT, "i", -(2**31)),
    "padding": header(IDS_AT + 12, "I", 1),
    "last byte of padding": header(IDS_AT + 15, "B", 0x80),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES.keys())
def test_a_step_with_an_impossible_field_is_refused(forge: Callable[[bytearray], None]) -> None:
    frame = CODEC.encode(small_step())
    assert CODEC.decode(seal(frame)) == small_step(), "sealing alone changes nothing"
    forge(frame)
    with pytest.raises(WireError):
        CODEC.decode(seal(frame))


@pytest.mark.parametrize("counts", [(1,) * 5, (25,), (21, 1, 1, 2), (2, 0), (0, 2)])
def test_a_ring_of_other_bounds_is_refused(counts: tuple[int, ...]) -> None:
    """Frames in which all adds up, but with more rows or tokens than this ring has, or with an empty row."""
    larger = Codec(rows=8, tokens=64, token_bytes=6, slots=8, context=1000, ranks=5)
    frame = larger.encode(Step(epoch=0, number=0, rows=tuple(Row(slot=0, start=0, ids=(1,) * n) for n in counts)))
    assert len(frame) <= CODEC.max_frame
    with pytest.raises(WireError):
        CODEC.decode(frame)


def test_a_step_of_nothing_is_refused() -> None:
    with pytest.raises(WireError, match="0 rows"):
        CODEC.decode(seal(bytearray(HEADER.pack(MAGIC, STEP, 0, 0, 0, 0, 0, 0, 0, 0))))


def test_bounds_hold_to_the_last_position() -> None:
    for start in (998, 999):
        forged = CODEC.encode(small_step())
        row(0, 1, start)(forged)
        if start == 998:
            assert isinstance(CODEC.decode(seal(forged)), Step)
        else:
            with pytest.raises(WireError, match="out of bounds"):
                CODEC.decode(seal(forged))


def test_hidden_states_for_some_tokens_only_are_refused() -> None:
    frame = CODEC.encode(small_step())
    for length in (1, 6, 17, 19, 24):
        forged = (frame + bytes(6))[: len(frame) - 18 + length]
        struct.pack_into("<I", forged, 24, len(forged) - HEADER.size)
        with pytest.raises(WireError, match="hidden"):
            CODEC.decode(seal(forged))


@pytest.mark.parametrize(
    "fields",
    [
        (RESULT, 0, 1, 0, 0, 0, 2),  # rows
        (RESULT, 0, 0, 0, 0, 1, 2),  # a logprob that is not there
        (RESULT, 0, 0, 0, 0, 1, 0),  # and one of which the ids are taken
        (RESULT, 0, 0, 0, 0, 0, 1),  # fewer ids than there are
        (RESULT, 0, 0, 0, 0, 0, 3),
        (RESULT, 0, 0, 0, 0, 0, 2**30 + 2),  # 4 * outputs is right modulo 2**32
        (RESULT, 1, 0, 0, 0, 0, 2),
        (STOP, 0, 0, 0, 0, 0, 2),  # a stop with a result's ids
        (STOP, 0, 0, 0, 0, 0, 0),
    ],
)
def test_a_result_with_an_impossible_field_is_refused(fields: tuple[int, ...]) -> None:
    body = struct.pack("<2i", 3, 4)
    right = seal(bytearray(HEADER.pack(MAGIC, RESULT, 0, 0, 0, 0, 0, 2, 8, 0) + body))
    assert CODEC.decode(right) == Result(epoch=0, number=0, ids=(3, 4))
    with pytest.raises(WireError):
        CODEC.decode(seal(bytearray(HEADER.pack(MAGIC, *fields, 8, 0) + body)))


def test_a_result_gives_no_negative_id_and_no_more_ids_than_a_step_has_tokens() -> None:
    for ids in ((1,) * 25, (3, -2), (3, -(2**31))):
        with pytest.raises(WireError):
            CODEC.decode(CODEC.encode(Result(epoch=0, number=0, ids=ids)))


@pytest.mark.parametrize(
    "logprobs", [((-1, -0.5),), ((1, math.nan),), ((1, -math.inf),), ((1, -1.0),) * (MAX_LOGPROBS + 1)]
)
def test_a_result_gives_logprobs_that_can_be(logprobs: tuple[tuple[int, float], ...]) -> None:
    for ids in ((1,), (NO_TOKEN, 1)):
        with pytest.raises(WireError):
            CODEC.decode(CODEC.encode(Result(epoch=0, number=0, ids=ids, logprobs=logprobs)))


def test_an_output_that_failed_is_minus_one_and_has_no_logprobs() -> None:
    frame = bytes(CODEC.encode(Result(epoch=8, number=9, ids=(5, NO_TOKEN), logprobs=((5, -0.5),))))
    assert [int.from_bytes(frame[at : at + 4], "little") for at in (4, 16, 20, 24)] == [2, 1, 2, 16]
    assert struct.unpack("<3if", frame[32:]) == (5, -1, 5, -0.5)
    with pytest.raises(WireError, match="0 tokens with 1 logprobs"):
        CODEC.decode(CODEC.encode(Result(epoch=8, number=9, ids=(NO_TOKEN,), logprobs=((5, -0.5),))))


def test_a_result_is_laid_out_as_the_docstring_says() -> None:
    frame = bytes(CODEC.encode(Result(epoch=8, number=9, ids=(5, 6), logprobs=((6, -0.5), (7, -2.0), (5, -0.25)))))
    assert [int.from_bytes(frame[at : at + 4], "little") for at in (4, 8, 12, 16, 20, 24)] == [2, 8, 9, 3, 2, 32]
    assert struct.unpack("<2i", frame[32:40]) == (5, 6)
    assert struct.unpack("<ififif", frame[40:]) == (6, -0.5, 7, -2.0, 5, -0.25)


def test_the_longest_result_fits_a_frame() -> None:
    tiny = replace(CODEC, token_bytes=1)
    longest = Result(epoch=0, number=0, ids=(1,) * 24, logprobs=((1, -1.0),) * (24 * MAX_LOGPROBS))
    assert tiny.decode(tiny.encode(longest)) == longest


@pytest.mark.parametrize("fields", [(1, 0, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)])
def test_a_stop_carries_its_epoch_only(fields: tuple[int, ...]) -> None:
    rows, epoch, number, tokens, outputs = fields
    with pytest.raises(WireError):
        CODEC.decode(seal(bytearray(HEADER.pack(MAGIC, STOP, 0, rows, epoch, number, tokens, outputs, 0, 0))))


TALLY_FORGERIES = {
    "an account fewer": header(6, "H", 1),
    "an account more": header(6, "H", 3),
    "most accounts": header(6, "H", 65535),
    "number": header(12, "I", 1),
    "tokens": header(16, "I", 2),
    "outputs": header(20, "I", 1),
    "body shorter": header(24, "I", ACCOUNT.size),
    "rank beyond": header(HEADER.size, "I", 5),
    "rank -1": header(HEADER.size, "i", -1),
    "a rank twice": header(HEADER.size, "I", 3),
    "device 3": header(HEADER.size + 4, "I", 3),
    "a device's numbers without one": header(HEADER.size + 72, "Q", 1),
    "thermal state beyond": header(HEADER.size + 2 * ACCOUNT.size - 8, "Q", len(THERMAL)),
    "a device's endless seconds": header(HEADER.size + 2 * ACCOUNT.size - 16, "d", math.inf),
    "negative seconds": header(HEADER.size + 32, "d", -1.0),
    "endless seconds": header(HEADER.size + 40, "d", math.inf),
    "no number of seconds": header(HEADER.size + ACCOUNT.size + 64, "d", math.nan),
}


@pytest.mark.parametrize("forge", TALLY_FORGERIES.values(), ids=TALLY_FORGERIES.keys())
def test_a_tally_with_an_impossible_field_is_refused(forge: Callable[[bytearray], None]) -> None:
    frame = CODEC.encode(small_tally(0, 3))
    assert CODEC.decode(seal(frame)) == small_tally(0, 3), "sealing alone changes nothing"
    forge(frame)
    with pytest.raises(WireError):
        CODEC.decode(seal(frame))


def test_a_tally_has_no_more_accounts_than_there_are_ranks() -> None:
    larger, roomy = replace(CODEC, ranks=6), replace(CODEC, tokens=999)
    frame = larger.encode(small_tally(0, 1, 2, 3, 4, 5))
    with pytest.raises(WireError, match="5 ranks"):
        roomy.decode(frame)
    with pytest.raises(AssertionError):
        CODEC.encode(small_tally(0, 1, 2, 3, 4, 5))
    tiny = Codec(rows=1, tokens=1, token_bytes=4, slots=1, context=8, ranks=5)
    assert len(tiny.encode(small_tally(0, 1, 2, 3, 4))) == tiny.max_frame, "a tally may be what is longest"


@pytest.mark.parametrize("kind", [STEP, RESULT, STOP, TALLY])
def test_a_header_that_announces_gigabytes_takes_no_memory(kind: int) -> None:
    huge = 2**32 - 1
    codec = Codec(rows=65535, tokens=2**31, token_bytes=16384, slots=2**16, context=2**20, ranks=2**16)
    frames = [
        seal(bytearray(HEADER.pack(MAGIC, kind, 0, 65535, 0, 0, huge, huge, length, 0) + bytes(96)))
        for length in (huge, 96)
    ]
    tracemalloc.start()
    try:
        for frame in frames:
            with pytest.raises(WireError):
                codec.decode(frame)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 256 * 1024


def test_a_frame_longer_than_any_is_refused_before_its_checksum_is_computed() -> None:
    with pytest.raises(WireError, match="possible"):
        CODEC.decode(bytes(CODEC.max_frame + 1))
