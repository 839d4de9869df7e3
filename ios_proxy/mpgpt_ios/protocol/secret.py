"""The token that the proxy rank and the iPad share.

Knows: its file and its bounds.
Must not know: what is proved with it.
"""

from __future__ import annotations

from pathlib import Path

from mpgpt.errors import UsageError

LEAST, MOST = 16, 1024


def read_token(path: Path) -> bytes:
    """The token in a file, without white space around it. Raises ``UsageError`` that says how to make one."""
    how = f'make one with: python3 -c "import secrets; print(secrets.token_urlsafe())" > {path}'
    try:
        with path.expanduser().open("rb") as file:
            token = file.read(MOST + 1).strip()
    except FileNotFoundError:
        raise UsageError(f"there is no token file {path}; {how}; the iPad needs the same") from None
    except OSError as error:
        raise UsageError(f"the token file {path} cannot be read: {error.strerror}") from None
    if not LEAST <= len(token) <= MOST:
        raise UsageError(f"the token in {path} has {len(token)} bytes; {LEAST} to {MOST} are taken; {how}")
    return token
