"""What is written for people: the table of kernels."""

from __future__ import annotations

import pytest

from mpgpt.commands.terminal import explain
from mpgpt.model.kernel_timings import KernelTiming


def timing(kernel: str, *, exact: bool, chosen: bool) -> KernelTiming:
    times = (12.0, 34.0, 56.0) if exact else ()
    return KernelTiming(
        shape="int8 64x96", kernel=kernel, microseconds=times, batch_invariant=exact, exact=exact, chosen=chosen
    )


def test_kernels_that_are_inexact_are_explained(capsys: pytest.CaptureFixture[str]) -> None:
    tried = [timing("fbgemm-split", exact=True, chosen=True), timing("onednn", exact=False, chosen=False)]
    computing = dict.fromkeys(("pi", "mac"), "torch's kernels, because") | {"old": "compiled kernels for avx2 (gcc 12)"}
    explain({"pi": tried, "mac": [timing("integers", exact=True, chosen=True)], "old": []}, computing)
    said = capsys.readouterr().err
    assert "Not taken on pi, because their products of integers are inexact on its processor" in said
    assert "overflow): onednn. " in said and said.count("Not taken") == 1
    assert "On old: compiled kernels for avx2 (gcc 12)\n" in said and "On pi: torch's kernels" in said
    assert "Kernels on old" not in said, "none were tried"
    rows = [line for line in said.splitlines() if "64x96" in line]
    assert [[name in row for name in ("fbgemm-split", "integers", "onednn")] for row in rows] == [
        [True, False, False], [False, True, False],
    ], "no more of those that are not taken"  # fmt: skip
    assert all("12" in row and "yes" in row for row in rows)
