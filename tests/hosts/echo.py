"""What the cluster's tests say over its network: `python -m tests.hosts.echo`, with Python's standard library alone.

    serve PORT                           send everything back, over TCP and UDP; says "ready" first
    ping tcp|udp ADDRESS PORT COUNT SIZE JSON: the round trips of SIZE bytes (at most 64 KiB) in milliseconds, null for
                                         one that takes 2 s or more
    send ADDRESS PORT COUNT              so many datagrams, a millisecond apart
    count PORT                           how many datagrams come before there is none for 1 s; says "ready" first

Must not know: hosts.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from contextlib import suppress

PATIENCE_S, SILENCE_S = 2.0, 1.0


def serve(port: int) -> None:
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind(("", port))
    threading.Thread(target=return_datagrams, args=(datagrams,), daemon=True).start()
    with socket.create_server(("", port)) as listener:
        print("ready", flush=True)
        while True:
            threading.Thread(target=return_stream, args=(listener.accept()[0],), daemon=True).start()


def return_datagrams(datagrams: socket.socket) -> None:
    while True:
        datagrams.sendto(*datagrams.recvfrom(65536))


def return_stream(connection: socket.socket) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with connection, suppress(OSError):
        while text := connection.recv(1 << 20):
            connection.sendall(text)


def ping(kind: str, address: str, port: int, count: int, size: int) -> list[float | None]:
    sort = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
    with socket.socket(socket.AF_INET, sort) as connection:
        connection.settimeout(PATIENCE_S)
        try:
            connection.connect((address, port))
        except OSError:
            return [None] * count
        if kind == "tcp":
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return [round_trip(connection, n.to_bytes(4, "big") * (size // 4)) for n in range(count)]


def round_trip(connection: socket.socket, text: bytes) -> float | None:
    begun = time.perf_counter()
    try:
        connection.sendall(text)
        returned = b""
        while len(returned) < len(text):
            returned += connection.recv(1 << 20)
            if not text.startswith(returned):  # the answer to one that had been given up
                returned = b""
    except OSError:
        return None
    return 1e3 * (time.perf_counter() - begun)


def send(address: str, port: int, count: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        for n in range(count):
            datagrams.sendto(n.to_bytes(4, "big"), (address, port))
            time.sleep(1e-3)


def count(port: int) -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("", port))
        print("ready", flush=True)
        total = 0
        datagrams.settimeout(10)
        with suppress(TimeoutError):
            while datagrams.recv(65536):
                total += 1
                datagrams.settimeout(SILENCE_S)
    return total


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["serve", port]:
            serve(int(port))
        case ["ping", kind, address, port, number, size]:
            print(json.dumps(ping(kind, address, int(port), int(number), int(size))))
        case ["send", address, port, number]:
            send(address, int(port), int(number))
        case ["count", port]:
            print(count(int(port)))
        case _:
            sys.exit(__doc__)
