"""A client on the host of a server: `python -m tests.hosts.client stream|health PORT`, with the standard library alone.

    stream PORT    one completion after the other, streamed, until one ends by an error
    health PORT    /health five times a second, until nobody answers

Every event and every answer is printed as a line of JSON: its time ("at", seconds of the monotonic clock, which all
pretend hosts share), the HTTP status, and the "body".

Must not know: hosts.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from typing import Any

PATIENCE_S = 60.0
PERIOD_S = 0.2


def tell(status: int, body: Any) -> None:
    print(json.dumps({"at": time.monotonic(), "status": status, "body": body}), flush=True)


def stream(port: int) -> bool:
    """Whether there was nothing wrong."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    asked = {"model": "model", "prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "stream": True}
    connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    if answer.status != 200:
        tell(answer.status, json.loads(answer.read()))
        return False
    for line in answer:
        if line.startswith(b"data: {"):
            body = json.loads(line[6:])
            tell(answer.status, body)
            if "error" in body:
                return False
        elif line.startswith(b"data: [DONE]"):
            return True
    tell(0, "the stream broke off")
    return False


def health(port: int) -> bool:
    """Whether somebody answered."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        tell(answer.status, json.loads(answer.read()))
    except OSError:
        return False
    time.sleep(PERIOD_S)
    return True


if __name__ == "__main__":
    what = {"stream": stream, "health": health}[sys.argv[1]]
    while what(int(sys.argv[2])):
        pass
