"""Many clients at once on a server: is every answer whole and right, and does the server stay well meanwhile?

    python bench/soak.py [--seconds 60] [--clients 32] [--ranks 3] [--layers 0-9,10-19,20-29] [--model smollm2-135m]

Starts `mpirun -n RANKS mpgpt serve`, has every prompt answered alone first, and then lets the clients ask: streamed or
whole, by OpenAI's endpoints or the reference's, a third of them leaving in the middle. Greedy, so that each answer must
be the one that the prompt had alone. Printed are answers and tokens a second, how long /health took, the memory of all
ranks over time, and whether every slot is free in the end.

Knows: HTTP, and processes. Must not know: how anything is served.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

ENV = os.environ | {
    "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_hwloc_default_binding_policy": "none", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}  # fmt: skip
PROMPTS = [
    "What is the capital of France?", "Explain in two sentences why the sky is blue.", "How do I boil an egg?",
    "Write a short poem about a lighthouse.", "List five animals that live in the sea.", "Who was Ada Lovelace?",
    "What is the difference between a violin and a cello?", "Tell me a story about a fox.",
]  # fmt: skip
NEW = 24
LEAVING = 1 / 3
HEALTH_EVERY_S = 0.1
START_S = 120.0


@dataclass(slots=True)
class Soak:
    """What came of it."""

    answers: int = 0
    left: int = 0
    """Clients that went away in the middle."""
    tokens: int = 0
    """Of whole answers."""
    wrong: list[str] = field(default_factory=list)
    """The answer that came instead of the right one."""
    health_s: list[float] = field(default_factory=list)
    memory: list[list[int]] = field(default_factory=list)
    """Bytes of each rank, once a second."""
    seconds: float = 0.0
    running: int = 0
    """Sequences that still have a slot when all clients are gone; 0 if none was lost."""


@contextmanager
def served(ranks: int, *arguments: str, port: int = 0) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A server under mpirun, on a port of its own if none is given, ended in the end; its address, and mpirun."""
    if not port:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    launcher = shutil.which("mpirun", path=str(Path(sys.executable).parent)) or "mpirun"
    command = [launcher, "-n", str(ranks), sys.executable, "-m", "mpgpt", "serve", "--port", str(port), *arguments]
    process = subprocess.Popen(command, env=ENV, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while True:
            try:
                httpx.get(f"{url}/health", timeout=START_S)
                break
            except httpx.TransportError:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the server did not start") from None
                time.sleep(0.1)
        yield url, process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


async def ask(client: httpx.AsyncClient, prompt: str, how: str) -> AsyncIterator[str]:
    """An answer's pieces, by one of the endpoints."""
    messages = [{"role": "user", "content": prompt}]
    if how == "query":
        answer = await client.post("/query", json={"messages": messages, "max_tokens": NEW})
        yield answer.raise_for_status().json()["generated_text"]
        return
    path = "/chat" if how == "chat" else "/v1/chat/completions"
    body: dict[str, Any] = {"messages": messages, "max_tokens": NEW} | ({"stream": True} if how == "openai" else {})
    async with client.stream("POST", path, json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(str(event["error"]))
            yield event.get("token", "") if how == "chat" else event["choices"][0]["delta"].get("content", "")


async def soak(url: str, *, clients: int, seconds: float, processes: list[psutil.Process], seed: int = 0) -> Soak:
    """Let ``clients`` ask at once for so many seconds; ``processes`` are the ranks."""
    found = Soak()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        alone = {prompt: "".join([piece async for piece in ask(client, prompt, "query")]) for prompt in PROMPTS}
        begun = time.monotonic()
        end = begun + seconds

        async def one(chance: random.Random) -> None:
            while time.monotonic() < end:
                prompt, how = chance.choice(PROMPTS), chance.choice(("chat", "query", "openai"))
                leaving = chance.random() < LEAVING
                if leaving and how == "query":
                    try:
                        body = {"text": prompt, "max_tokens": NEW}
                        await client.post("/query", json=body, timeout=chance.uniform(0.05, 1.0))
                    except httpx.TimeoutException:
                        found.left += 1
                    continue
                pieces, most = [], chance.randrange(1, NEW) if leaving else 10**9
                telling = ask(client, prompt, how)
                async for piece in telling:
                    pieces.append(piece)
                    if len(pieces) >= most:
                        break
                await telling.aclose()  # type: ignore[attr-defined]
                text = "".join(pieces)
                found.left += leaving
                found.answers += not leaving
                found.tokens += 0 if leaving else NEW
                if not (alone[prompt].startswith(text) if leaving else text == alone[prompt]):
                    found.wrong.append(text)

        async def watch() -> None:
            while time.monotonic() < end:
                asked = time.monotonic()
                (await client.get("/health")).raise_for_status()
                found.health_s.append(time.monotonic() - asked)
                if len(found.memory) < asked - begun:
                    found.memory.append([process.memory_info().rss for process in processes])
                await asyncio.sleep(HEALTH_EVERY_S)

        await asyncio.gather(watch(), *(one(random.Random(seed * 1000 + n)) for n in range(clients)))
        found.seconds = time.monotonic() - begun
        for _ in range(50):
            state = (await client.get("/cluster")).json()
            found.running = state["running"] + state["waiting"]
            if not found.running:
                break
            await asyncio.sleep(0.1)
    return found


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The rank processes below mpirun."""
    return [
        p for p in psutil.Process(process.pid).children(recursive=True) if "OMPI_COMM_WORLD_RANK" in p.environ()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--layers", default="0-9,10-19,20-29")
    parser.add_argument("--model", default="smollm2-135m")
    options = parser.parse_args()
    arguments = ["--model", options.model, "--layers", options.layers, "--threads", "1"]
    with served(options.ranks, *arguments) as (url, process):
        found = asyncio.run(
            soak(url, clients=options.clients, seconds=options.seconds, processes=ranks_of(process))
        )  # fmt: skip
    health = sorted(1000 * each for each in found.health_s)
    third = len(found.memory) // 3
    print(f"{found.answers} whole answers, {found.left} clients left in the middle, {len(found.wrong)} wrong")
    print(f"{found.tokens / found.seconds:.0f} tokens/s of whole answers")
    print(
        f"/health: {len(health)} times, median {health[len(health) // 2]:.1f} ms, "
        f"99 of 100 within {health[int(0.99 * len(health))]:.1f} ms, most {health[-1]:.1f} ms"
    )
    for rank, each in enumerate(zip(*found.memory[third :: max(1, third // 5)], strict=True)):
        print(f"memory of rank {rank}, MB, from a third on: {[round(size / 1e6) for size in each]}")
    print(f"sequences left: {found.running}")


if __name__ == "__main__":
    main()
