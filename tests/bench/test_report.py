"""Rounds into one figure, files that are whole, and the picture: against figures worked out by hand."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest

from mpgpt.bench import plot
from mpgpt.bench.report import Results, show, sparklines
from mpgpt.errors import MpgptError, UsageError
from mpgpt.files import check_writable, write_atomically

SETTINGS = {"prompt_tokens": 64, "new_tokens": 32, "threads": 1, "pin": True}
HEADER = {"model": {"name": "tiny", "random": True, "layers": 6}, "settings": SETTINGS}


def a_run(speed: float | None, ranks: int = 2, concurrency: int = 1, dtype: str = "float32") -> dict[str, Any]:
    """One round's run; its stages give the speed away in their steps."""
    stages = [
        {"rank": rank, "host": "here", "layers": [3 * rank, 3 * rank + 3], "steps": int(speed or 0), "tokens": 9,
         "compute_s": 2.0, "wait_s": 1.0, "send_s": 0.5, "other_s": 0.5, "wall_s": 4.0, "peak_rss_mb": 300.0,
         "slice_mb": 100.0, "kv_mb": 1.0}
        for rank in range(ranks)
    ]  # fmt: skip
    times = {"p50": 1000 / (speed or 1.0), "p95": 2000 / (speed or 1.0)}
    return {
        "ranks": ranks, "concurrency": concurrency, "dtype": dtype, "oversubscribed": False, "stages": stages,
        "decode_tokens_per_s": speed, "prompt_tokens_per_s": 10 * (speed or 1.0), "ttft_ms": times, "tpot_ms": times,
    }  # fmt: skip


def filled(file: Path | None = None) -> Results:
    """Three sizes, two concurrencies, two dtypes, three rounds."""
    found = Results(HEADER, file)
    for round in (-1, 0, 2):
        for dtype in ("float32", "bfloat16"):
            for ranks in (1, 2, 3):
                for concurrency, speed in ((1, 50), (8, 100 * ranks)):
                    found.add(a_run(speed + round, ranks, concurrency, dtype))
                found.add_bandwidth(dtype, ranks, 20.0 + round, "sum")
    return found


def test_medians_spread_and_the_stages_of_the_median_round() -> None:
    found = Results(HEADER, None)
    for speed in (10.0, 40.0, 20.0):
        found.add(a_run(speed))
    (run,) = found.document()["runs"]
    assert (run["ranks"], run["concurrency"], run["dtype"], run["rounds"]) == (2, 1, "float32", 3)
    assert run["decode_tokens_per_s"] == 20.0 and run["prompt_tokens_per_s"] == 200.0
    assert run["tpot_ms"] == {"p50": 50.0, "p95": 100.0}
    assert run["spread"]["decode_tokens_per_s"] == [10.0, 40.0]
    assert run["spread"]["ttft_ms"] == {"p50": [25.0, 100.0], "p95": [50.0, 200.0]}
    assert [stage["steps"] for stage in run["stages"]] == [20, 20]


def test_an_even_number_of_rounds_gives_the_stages_of_one_that_was() -> None:
    found = Results(HEADER, None)
    for speed in (30.0, 10.0):
        found.add(a_run(speed))
    (run,) = found.document()["runs"]
    assert run["decode_tokens_per_s"] == 20.0 and run["stages"][0]["steps"] == 10


def test_the_floor_is_bandwidth_over_all_weights() -> None:
    found = Results(HEADER, None)
    found.add(a_run(30.0))
    (run,) = found.document()["runs"]
    assert run["read_bandwidth_gb_s"] is run["floor_tokens_per_s"] is run["read_by"] is None
    found.add_bandwidth("float32", 2, 18.0, "slow way")
    found.add_bandwidth("float32", 2, 22.0, "fast way")
    found.add_bandwidth("float32", 1, 99.0, "of another ring")
    (run,) = found.document()["runs"]
    assert run["read_bandwidth_gb_s"] == 20.0 and run["read_by"] == "fast way"
    assert run["floor_tokens_per_s"] == pytest.approx(20.0e9 / 200e6)
    assert run["spread"]["read_bandwidth_gb_s"] == [18.0, 22.0]


def test_a_run_that_never_had_all_decoding_has_no_speed(capsys: pytest.CaptureFixture[str]) -> None:
    found = Results(HEADER, None)
    found.add(a_run(None))
    found.add(a_run(40.0, ranks=1))
    document = found.document()
    assert document["runs"][0]["decode_tokens_per_s"] is None
    assert document["runs"][0]["spread"]["decode_tokens_per_s"] is None
    show(document)
    assert " - " in capsys.readouterr().out
    assert plot.plot(document, ".svg").startswith(b"<?xml")


def test_the_file_is_there_after_every_run(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    found = Results(HEADER, path)
    for count in (1, 2, 3):
        found.add(a_run(10.0, ranks=count))
        document = json.loads(path.read_text())
        assert len(document["runs"]) == count and document["complete"] is False
    found.finish()
    assert json.loads(path.read_text()) == found.document() and found.document()["complete"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]


def test_machine_and_versions_are_said() -> None:
    document = Results(HEADER, None).document()
    assert document["format"] == 1 and document["model"]["layers"] == 6
    assert set(document["machine"]) == {"host", "system", "processor", "cores", "memory_gb"}
    assert document["versions"]["torch"].startswith("2.") and document["versions"]["mpi4py"]


# -- peers


def a_peer(speed: float | None, concurrency: int = 1, peer: str = "transformers", ranks: int = 1) -> dict[str, Any]:
    return {
        "peer": peer, "version": "5.0", "dtype": "float32", "ranks": ranks, "concurrency": concurrency,
        "decode_tokens_per_s": speed, "prompt_tokens_per_s": 100.0,
    }  # fmt: skip


def test_ratios_are_taken_within_each_round() -> None:
    """The median of the ratios, 2, is not the ratio of the medians, 40 / 10."""
    found = Results(HEADER, None)
    assert found.document()["peers"] == []
    compared = [("float32", 1), ("int8", 2), ("int8", 3)]
    for ours, theirs in ((40.0, 20.0), (20.0, 10.0), (60.0, 10.0)):
        found.add(a_run(ours, ranks=1))
        found.add(a_run(99.0, ranks=1, concurrency=8))
        found.add_peer(a_peer(theirs), compared)
        found.add(a_run(2 * ours, ranks=2, dtype="int8"))
    (peer,) = found.document()["peers"]
    assert peer["decode_tokens_per_s"] == 10.0 and peer["spread"]["decode_tokens_per_s"] == [10.0, 20.0]
    assert peer["each_round"] == {"decode_tokens_per_s": [20.0, 10.0, 10.0], "prompt_tokens_per_s": [100.0] * 3}
    assert (peer["peer"], peer["version"], peer["dtype"], peer["ranks"]) == ("transformers", "5.0", "float32", 1)
    assert peer["ratios"] == [
        {"dtype": "float32", "ranks": 1, "ratio": 2.0, "spread": [2.0, 6.0]},
        {"dtype": "int8", "ranks": 2, "ratio": 4.0, "spread": [4.0, 12.0]},
    ]
    assert found.document()["runs"][0]["each_round"]["decode_tokens_per_s"] == [40.0, 20.0, 60.0]


def test_a_round_that_is_not_over_and_a_speed_that_is_not_there() -> None:
    found = Results(HEADER, None)
    found.add(a_run(40.0))
    found.add_peer(a_peer(20.0), [("float32", 2)])
    found.add(a_run(90.0))
    (peer,) = found.document()["peers"]
    assert peer["ratios"] == [{"dtype": "float32", "ranks": 2, "ratio": 2.0, "spread": [2.0, 2.0]}]
    found = Results(HEADER, None)
    found.add(a_run(None))
    found.add_peer(a_peer(20.0), [("float32", 2)])
    (peer,) = found.document()["peers"]
    assert peer["ratios"] == [{"dtype": "float32", "ranks": 2, "ratio": None, "spread": None}]


def test_the_table_says_how_many_times_as_fast(capsys: pytest.CaptureFixture[str]) -> None:
    found = Results(HEADER, None)
    for dtype, speed in (("float32", 50.0), ("int8", 90.0)):
        found.add(a_run(speed, ranks=2, dtype=dtype))
    found.add_peer(a_peer(30.0), [("float32", 2), ("int8", 2)])
    found.add_peer(a_peer(40.0, peer="llama-rpc", ranks=2), [("float32", 2)])
    show(found.document())
    said = capsys.readouterr().out
    assert "1.67 x transformers" in said and "1.25 x llama-rpc" in said
    assert "3.00 x transformers float32" in said, "not in our dtype, and says so"
    assert "llama-rpc 5.0, float32, 2 ranks, 1 sequence: 40.0 (40.0 to 40.0) tokens/s, 100 prompt tokens/s" in said


# -- what a person sees


def test_the_table_and_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    document = filled().document()
    show(document)
    said = capsys.readouterr().out
    assert "50.0 (49.0 to 52.0)" in said and "300.0 (299.0 to 302.0)" in said
    assert "tiny: 64 prompt + 32 new tokens" in said
    assert sparklines(document) == [
        "float32, 1 sequence: ███  50.0, 50.0, 50.0 tokens/s on 1, 2, 3 ranks",
        "float32, 8 sequences: ▃▆█  100.0, 200.0, 300.0 tokens/s on 1, 2, 3 ranks",
        "bfloat16, 1 sequence: ███  50.0, 50.0, 50.0 tokens/s on 1, 2, 3 ranks",
        "bfloat16, 8 sequences: ▃▆█  100.0, 200.0, 300.0 tokens/s on 1, 2, 3 ranks",
    ]


def test_the_plot_is_a_png() -> None:
    picture = plot.plot(filled().document(), ".png")
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and picture[12:16] == b"IHDR"
    width, height = struct.unpack(">2I", picture[16:24])
    assert width > 1000 and height > 900, "a row for each dtype"
    assert len(picture) > 30_000
    assert plot.plot(filled().document(), ".PDF").startswith(b"%PDF")


@pytest.mark.parametrize("name", ["out", "out.txt", "out.jpeg.gz"])
def test_a_picture_of_no_known_kind(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"\.png"):
        plot.check(tmp_path / name)


# -- files


def test_a_file_that_can_be_written_is_not_touched_yet(tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_text("old")
    check_writable(old, "--json")
    check_writable(tmp_path / "new.json", "--json")
    assert [path.name for path in tmp_path.iterdir()] == ["old.json"] and old.read_text() == "old"


@pytest.mark.parametrize("path", ["/", "/no/such/folder/out.json", "/proc/out.json"])
def test_a_file_that_cannot_be_written(path: str) -> None:
    with pytest.raises(UsageError, match=f"--json {path}"):
        check_writable(Path(path), "--json")


def test_a_file_is_old_or_new_and_never_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.json"
    write_atomically(path, b"old")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(MpgptError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
