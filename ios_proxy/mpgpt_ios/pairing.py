"""`mpgpt ipad-token`: the shared token is made, and shown to an iPad as a QR code.

Knows: the token's file and its mode, the link that the app opens, how a code is drawn in a terminal.
Must not know: what a token proves (``protocol/auth.py``), connections.

The link holds the token itself: whoever sees the code can pair. It is drawn only when that is asked for.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
from pathlib import Path
from urllib.parse import quote

import click
import segno

from mpgpt.errors import OutputError, UsageError
from mpgpt_ios.protocol.auth import fingerprint, read_token

SCHEME = "mpgpt-ipad"
"""Of the links that the app opens; its Info.plist has it, too."""
QUIET = 4
"""Light modules around a QR code, which scanners want."""
BLACK, WHITE = 16, 231
"""Of the 256 colours that every terminal has, those that no theme changes."""
TOKEN_BYTES = 32


def run_token(path: Path, *, force: bool, qr: bool) -> None:
    """Make the token, unless it is there, and print its fingerprint. Raises ``UsageError`` and ``OutputError``."""
    path = path.expanduser()
    if force or not os.path.exists(path):  # pathlib raises where a folder cannot be looked into
        make_token(path, replace=force)
        click.echo(f"{path}: a new token", err=True)
    else:
        click.echo(f"{path}: the token that was there; --force makes another", err=True)
        if path.stat().st_mode & 0o077:
            click.echo(f"others on this machine can read it: chmod 600 {path}", err=True)
    token = read_token(path)
    click.echo(f"fingerprint {fingerprint(token)}")
    if qr:
        link = pairing_link(token)
        click.echo(f"\n{drawn(link, colour=sys.stdout.isatty())}\n{link}")


def make_token(path: Path, *, replace: bool) -> None:
    """Write a token that only this user may read. Raises ``OutputError``, and where a file is there ``UsageError``."""
    part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    fresh, made = part if replace else path, False
    try:
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        made = True
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(f"{secrets.token_urlsafe(TOKEN_BYTES)}\n")
        if replace:
            part.replace(path)
    except FileExistsError:
        raise UsageError(f"{path} is there already; --force makes another token") from None
    except OSError as error:
        if made:  # half a token is worse than none
            with contextlib.suppress(OSError):
                fresh.unlink()
        raise OutputError(f"the token cannot be written to {path}: {error.strerror}") from None


def pairing_link(token: bytes) -> str:
    """What the app opens to be given the token."""
    return f"{SCHEME}://pair?token={quote(token, safe='')}"


def drawn(text: str, *, colour: bool) -> str:
    """A QR code in lines of half blocks, two modules high.

    With ``colour`` black and white are said outright, so that it scans in a light and in a dark terminal. Without, what
    is dark is left to ink on paper. Raises ``UsageError`` for a text that no code holds.
    """
    try:
        code = segno.make_qr(text, error="m")
    except segno.DataOverflowError:
        raise UsageError("the token is too long for a QR code; --force makes another") from None
    modules = [list(row) for row in code.matrix_iter(border=QUIET)]
    if len(modules) % 2:
        modules.append([0] * len(modules[0]))
    return "\n".join(
        _line(upper, lower, colour=colour) for upper, lower in zip(modules[::2], modules[1::2], strict=True)
    )


def _line(upper: list[int], lower: list[int], *, colour: bool) -> str:
    if not colour:
        return "".join(" ▀▄█"[bool(high) + 2 * bool(low)] for high, low in zip(upper, lower, strict=True))
    cells, before = [], ""
    for high, low in zip(upper, lower, strict=True):
        style = f"\x1b[38;5;{BLACK if high else WHITE};48;5;{BLACK if low else WHITE}m"
        cells.append("▀" if style == before else f"{style}▀")
        before = style
    return "".join(cells) + "\x1b[0m"
