"""The shared token, its proof and fingerprint, and the rules that both ends of the iPad link keep to.

Knows: the token's file and bounds, the proofs and the times of ``ios_proxy/PROTOCOL.md``, how a session fails.
Must not know: either end's states (``proxy_session.py``, ``node_session.py``), sockets.

Both ends are driven alike: bytes that come in go to ``receive``, which returns events; bytes to be sent lie in
``out``, from which the driver takes as many as its socket takes. ``WireError`` and ``SessionError`` end the connection;
``out`` then holds the reason for the other end, and should still be sent. Clocks are handed in as ``now``, seconds.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from mpgpt.errors import MpgptError, UsageError
from mpgpt_ios.protocol import messages as m

MIN_TOKEN, MAX_TOKEN = 16, 1024
"""Bytes of a token."""
PING_S = 2.0
"""The proxy sends a PING after this long without a message from the node."""
HANDSHAKE_S = 10.0
"""The handshake must be over by then."""
PROXY_SILENCE_S = 30.0
"""The longest silence of a proxy, which sends a PING every ``PING_S`` if nothing else."""
LOAD_SILENCE_S = 60.0
"""The longest silence of a node to which a bundle is sent, or that loads one; LOADING breaks a long load's silence."""
QUEUE = 8
"""Requests that may be open at once, until READY says otherwise."""
STRANGERS = {
    "BAD_TOKEN": "the tokens of the two ends differ",
    "BAD_VERSION": "it speaks another version of the protocol: update the older",
    "BUSY": "another proxy is served",
}
"""What codes of an end that has not proved itself mean."""
NODE_LABEL, PROXY_LABEL = b"mpgpt iPad link 1, node", b"mpgpt iPad link 1, proxy"
FINGERPRINT_LABEL = b"mpgpt iPad link 1, fingerprint"


class SessionError(MpgptError):
    """The other end broke the protocol, refused, or fell silent."""

    def __init__(self, text: str, code: str = "BAD_STATE", request: m.Request | None = None) -> None:
        """``request`` is the one that broke the protocol, if it is about one."""
        super().__init__(text)
        self.code, self.request = code, request


class PeerClosed(SessionError):
    """The other end said ERROR or BYE, which are answered with nothing."""


def refused(error: m.Error, *, proved: bool) -> PeerClosed:
    """What an ERROR of the other end comes to; of one that has not ``proved`` itself no word is repeated."""
    words = STRANGERS.get(error.code, error.code)
    return PeerClosed(f"it refused: {(proved and error.text) or words}", error.code)


def prove(token: bytes, label: bytes, theirs: bytes, ours: bytes) -> bytes:
    """The proof of the token: HMAC-SHA-256 over a role and both nonces. The role keeps a proof from being sent back."""
    return hmac.new(token, label + theirs + ours, hashlib.sha256).digest()


def fingerprint(token: bytes) -> str:
    """What a person compares at both ends: 8 hexadecimal digits in two groups."""
    digits = hashlib.sha256(FINGERPRINT_LABEL + token).hexdigest()
    return f"{digits[:4]} {digits[4:8]}"


def read_token(path: Path) -> bytes:
    """The token in a file, without white space around it. Raises ``UsageError`` that says how to make one."""
    how = f"make one with: mpgpt ipad-token {path}"
    try:
        with path.expanduser().open("rb") as file:
            token = file.read(MAX_TOKEN + 1).strip()
    except FileNotFoundError:
        raise UsageError(f"there is no token file {path}; {how}; the iPad needs the same") from None
    except OSError as error:
        raise UsageError(f"the token file {path} cannot be read: {error.strerror}") from None
    if not MIN_TOKEN <= len(token) <= MAX_TOKEN:
        raise UsageError(f"the token in {path} has {len(token)} bytes; {MIN_TOKEN} to {MAX_TOKEN} are taken; {how}")
    return token
