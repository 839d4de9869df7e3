"""The shared rules of both ends: the token and its proofs, times, and how an agreement is broken.

Knows: the constants of ``ios_proxy/PROTOCOL.md``, the token's file and bounds.
Must not know: either end's states (``proxy_session.py``, ``node_session.py``), sockets.

Either end is driven alike: bytes that come in go to ``receive``, which gives events; what is to be sent lies in
``out``, from which the driver takes what its socket takes. ``WireError`` and ``SessionError`` end the connection; what
is in ``out`` then (the reason, for the other end) should still be sent. Clocks are handed in as ``now``, seconds.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from mpgpt.errors import MpgptError, UsageError
from mpgpt_ios.protocol.messages import Code

PING_S = 2.0
"""The proxy asks for a sign of life after so long without one."""
HANDSHAKE_S = 10.0
"""How long it may take until both ends have proved themselves."""
LOAD_SILENCE_S = 60.0
"""How long nothing may be heard while a bundle is sent or loaded; a first load may take minutes, but it is told of."""
QUEUE = 8
"""Requests that a node takes before it has answered the first; READY may say more."""
LEAST_TOKEN, MOST_TOKEN = 16, 1024
"""Bytes."""
NODE_LABEL, PROXY_LABEL = b"mpgpt iPad link 1, node", b"mpgpt iPad link 1, proxy"


class SessionError(MpgptError):
    """The other end broke an agreement, refused, or fell silent."""

    def __init__(self, text: str, code: Code = "BAD_STATE") -> None:
        super().__init__(text)
        self.code = code


def prove(token: bytes, label: bytes, theirs: bytes, ours: bytes) -> bytes:
    """What only who holds the token can say: HMAC-SHA-256 over a role and both nonces, so that no proof can be sent
    back as one's own."""
    return hmac.new(token, label + theirs + ours, hashlib.sha256).digest()


def read_token(path: Path) -> bytes:
    """The token in a file, without white space around it. Raises ``UsageError`` that says how to make one."""
    how = f'make one with: python3 -c "import secrets; print(secrets.token_urlsafe())" > {path}'
    try:
        with path.expanduser().open("rb") as file:
            token = file.read(MOST_TOKEN + 1).strip()
    except FileNotFoundError:
        raise UsageError(f"there is no token file {path}; {how}; the iPad needs the same") from None
    except OSError as error:
        raise UsageError(f"the token file {path} cannot be read: {error.strerror}") from None
    if not LEAST_TOKEN <= len(token) <= MOST_TOKEN:
        raise UsageError(f"the token in {path} has {len(token)} bytes; {LEAST_TOKEN} to {MOST_TOKEN} are taken; {how}")
    return token
