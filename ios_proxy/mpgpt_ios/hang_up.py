"""The end of a connection over which an ERROR or a BYE should still arrive.

Knows: sockets. Must not know: what is sent, which end this is.
"""

from __future__ import annotations

import contextlib
import socket
import time

LINGER_S = 1.0
"""The time for the other end to read what is left and close."""
RECEIVE = 256 << 10


def hang_up(connection: socket.socket, rest: bytes | bytearray) -> None:
    """Send the ``rest``, and read until the other end closes, or for ``LINGER_S``; the caller closes.

    A connection that is closed over unread bytes is reset, and what was sent last may be lost with it.
    """
    deadline = time.monotonic() + LINGER_S
    with contextlib.suppress(OSError):
        connection.settimeout(LINGER_S)
        connection.sendall(rest)
        connection.shutdown(socket.SHUT_WR)
        while (left := deadline - time.monotonic()) > 0:
            connection.settimeout(left)
            if not connection.recv(RECEIVE):
                break
