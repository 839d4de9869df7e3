"""A stand-in for a program that ``preloaded.py`` runs: passes on what it was started with, signals, and the status.

Begins in milliseconds, and so imports little: ``python -I -S preloaded_client.py SOCKET ARGUMENTS``.
"""

import json
import os
import signal
import socket
import sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    asked = {"arguments": sys.argv[2:], "environment": dict(os.environ), "folder": os.getcwd()}
    message = json.dumps(asked).encode()
    message = len(message).to_bytes(4, "little") + message
    sent = socket.send_fds(server, [message], [0, 1, 2])
    server.sendall(message[sent:])
    pid = int.from_bytes(server.recv(4), "little")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    status = int.from_bytes(server.recv(4), "little", signed=True)
if status < 0:
    signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
    os.kill(os.getpid(), -status)
os._exit(status)
