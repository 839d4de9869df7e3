"""`mpgpt ipad-token`: the file that it makes, and the code that it draws, read by another program's eyes."""

from __future__ import annotations

import re
import stat
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import zxingcpp
from click.testing import CliRunner

from mpgpt.commands.cli import cli
from mpgpt.errors import OutputError, UsageError
from mpgpt_ios.pairing import SCHEME, drawn, make_token, pairing_link
from mpgpt_ios.protocol.auth import fingerprint, read_token

TOKENS = [b"x" * 16, b"AbcdefghijKLMNOPQRSTUVwxyz-_0123456789abcde", bytes(range(33, 127)) * 3]
LIGHT, DARK = 255, 0
PIXELS = 4
"""To a module's side."""


def photograph(text: str, *, ink: int, paper: int) -> str | None:
    """What a scanner reads in a terminal of that ink and paper; the picture is grey."""
    colours = {"16": DARK, "231": LIGHT}
    rows: list[list[int]] = []
    for line in text.split("\n"):
        front, back, pair = ink, paper, list[tuple[int, int]]()
        for style, cell in re.findall(r"(?:\x1b\[([\d;]*)m)|(.)", line):
            if cell:
                pair.append({" ": (back, back), "▀": (front, back), "▄": (back, front), "█": (front, front)}[cell])
            elif style == "0":
                front, back = ink, paper
            else:
                named = re.fullmatch(r"38;5;(\d+);48;5;(\d+)", style)
                assert named, style
                front, back = colours[named[1]], colours[named[2]]
        rows += [[upper for upper, _ in pair], [lower for _, lower in pair]]
    picture = np.array(rows, np.uint8).repeat(PIXELS, 0).repeat(PIXELS, 1)
    around = np.pad(picture, 8 * PIXELS, constant_values=paper)
    found = zxingcpp.read_barcodes(around, try_invert=False)
    return found[0].text if len(found) == 1 else None


@pytest.mark.parametrize("token", TOKENS)
def test_the_code_is_read_in_a_light_and_in_a_dark_terminal(token: bytes) -> None:
    code = drawn(pairing_link(token), colour=True)
    for ink, paper in ((DARK, LIGHT), (LIGHT, DARK), (130, 130)):
        assert photograph(code, ink=ink, paper=paper) == pairing_link(token)


def test_without_colours_it_is_ink_on_paper() -> None:
    code = drawn(pairing_link(TOKENS[1]), colour=False)
    assert "\x1b" not in code and photograph(code, ink=DARK, paper=LIGHT) == pairing_link(TOKENS[1])
    assert photograph(code.replace("▄", "▀", 1), ink=LIGHT, paper=DARK) is None, "the test sees a difference"


@pytest.mark.parametrize("token", TOKENS)
def test_the_link_holds_the_token(token: bytes) -> None:
    parts = urlsplit(pairing_link(token))
    assert (parts.scheme, parts.netloc, parts.path) == (SCHEME, "pair", "")
    assert parse_qs(parts.query, strict_parsing=True) == {"token": [token.decode()]}


def test_fingerprints_differ() -> None:
    prints = {fingerprint(token) for token in TOKENS}
    assert len(prints) == len(TOKENS) and all(re.fullmatch(r"[0-9a-f]{4} [0-9a-f]{4}", each) for each in prints)


def test_a_token_is_made_for_its_owner_alone_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "token"
    made = CliRunner().invoke(cli, ["ipad-token", str(path)])
    token = read_token(path)
    assert made.exit_code == 0 and stat.S_IMODE(path.stat().st_mode) == 0o600 and len(token) == 43
    assert made.stdout == f"fingerprint {fingerprint(token)}\n", "and nothing that is secret"
    again = CliRunner().invoke(cli, ["ipad-token", str(path)])
    assert again.stdout == made.stdout and "--force" in again.stderr and "chmod" not in again.stderr
    path.chmod(0o644)
    assert f"chmod 600 {path}" in CliRunner().invoke(cli, ["ipad-token", str(path)]).stderr
    forced = CliRunner().invoke(cli, ["ipad-token", str(path), "--force"])
    assert forced.exit_code == 0 and read_token(path) != token and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]


def test_the_code_is_printed_when_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "token"
    run = CliRunner().invoke(cli, ["ipad-token", str(path), "--qr"])
    code, _, link = (
        run.stdout.removeprefix(f"fingerprint {fingerprint(read_token(path))}\n\n").strip("\n").rpartition("\n")
    )
    assert link == pairing_link(read_token(path)) == photograph(code, ink=DARK, paper=LIGHT)


def test_what_is_there_is_not_written_over(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("a token of somebody's")
    with pytest.raises(UsageError, match="is there already; --force"):
        make_token(path, replace=False)
    with pytest.raises(OutputError, match=r"cannot be written to .*absent"):
        make_token(tmp_path / "absent" / "token", replace=False)
    with pytest.raises(OutputError, match="cannot be written to"):
        make_token(path / "token", replace=False)
    assert path.read_text() == "a token of somebody's" and list(tmp_path.iterdir()) == [path]
    path.write_text("short")
    run = CliRunner().invoke(cli, ["ipad-token", str(path)])
    assert isinstance(run.exception, UsageError) and "has 5 bytes" in str(run.exception)


def test_a_token_that_no_code_holds(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_bytes("é".encode() * 400)
    run = CliRunner().invoke(cli, ["ipad-token", str(path), "--qr"])
    assert isinstance(run.exception, UsageError) and "too long for a QR code" in str(run.exception)
