"""The shared token's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpgpt.errors import UsageError
from mpgpt_ios.protocol.auth import read_token


def test_a_token_and_what_is_none(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("  a token that is long enough\n")
    assert read_token(path) == b"a token that is long enough"
    for text, words in (("short", "has 5 bytes; 16 to 1024"), ("", "has 0 bytes"), ("x" * 2000, "has 1025 bytes")):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_token(path)
    with pytest.raises(UsageError, match=r"there is no token file .*; make one with: mpgpt ipad-token"):
        read_token(tmp_path / "absent")
    with pytest.raises(UsageError, match="cannot be read"):
        read_token(tmp_path)
