"""A stand-in for a program that ``preloaded.py`` runs: passes on what it was started with, signals, and the status.

Begins in milliseconds, and so imports little: ``python -I -S preloaded_client.py SOCKET ARGUMENTS``.
"""

import json
import os
import signal
import socket
import sys


def number() -> int:
    """The next that the minder tells; without one this ends, and badly."""
    data = server.recv(4, socket.MSG_WAITALL)
    if len(data) < 4:
        sys.stderr.write("preloaded_client: the server has gone\n")
        sys.stderr.flush()
        os._exit(70)
    return int.from_bytes(data, "little", signed=True)


with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    asked = {"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}
    message = json.dumps(asked).encode()
    message = len(message).to_bytes(4, "little") + message
    sent = socket.send_fds(server, [message], [0, 1, 2])
    server.sendall(message[sent:])
    pid = number()
    for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(which, lambda which, _: os.kill(pid, which))
    status = number()
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
