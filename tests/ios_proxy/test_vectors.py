"""The golden file for both sides: what Python says is what it said, and the frames that are to be refused are."""

from __future__ import annotations

import json

import pytest

from mpgpt.errors import WireError
from mpgpt_ios.protocol.frames import Frames, VersionError
from tests.ios_proxy.vectors_more import MORE, everything, off_by
from tests.ios_proxy.walks import play, walk

GOLDEN = json.loads(MORE.read_text())


def test_what_python_says_is_in_the_file() -> None:
    now = json.loads(json.dumps(everything()))
    assert [*now, "selftest"] == list(GOLDEN)
    for section, entries in now.items():
        assert entries == GOLDEN[section], section
    assert off_by(bytes.fromhex(GOLDEN["selftest"]["file"])) == GOLDEN["selftest"]["largest"]


def test_bad_frames_are_refused() -> None:
    assert len(GOLDEN["bad_frames"]) > 200
    for entry in GOLDEN["bad_frames"]:
        frames = Frames()
        frames.feed(bytes.fromhex(entry["frame"]))
        with pytest.raises(WireError) as caught:
            frames.next()
            raise AssertionError(entry["what"])
        assert isinstance(caught.value, VersionError) is (entry["code"] == "BAD_VERSION"), entry["what"]


def test_offers_that_are_taken() -> None:
    taken = [entry["what"] for entry in GOLDEN["offers"] if entry["taken"]]
    assert taken == ["what it should be", "with 'model.mlpackage/-_.Az09'", "64 GiB"]


def test_sessions_go_everywhere() -> None:
    """No state and no end that the walks never come to; and how bytes are cut changes nothing."""
    outcomes = [session["outcome"] for session in GOLDEN["sessions"]]
    assert {command["name"] for outcome in outcomes for command in outcome["commands"]} == {
        "PROOF", "OFFER", "DATA", "LOAD", "RESET", "PREFILL", "DECODE",
    }  # fmt: skip
    codes = {str(outcome["closed"] and outcome["closed"]["code"]) for outcome in outcomes}
    assert codes >= {"None", "BAD_STATE", "BAD_FRAME", "BAD_REQUEST", "BUSY"}
    for seed in range(100):
        script = walk(seed)
        steps = [
            step | {"bytes": step["bytes"][at : at + 2]} if "bytes" in step else step
            for step in script["steps"]
            for at in range(0, len(step.get("bytes", "00")), 2)
        ]
        cut, whole = play(script | {"steps": steps}), play(script)
        assert (cut["out"], cut["closed"]) == (whole["out"], whole["closed"])
