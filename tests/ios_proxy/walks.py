"""Walks through a node's session: what comes in, what the node does, what must go out; mostly as a proxy would have it.

A script is JSON: a token, a nonce, the facts of INFO and PONG, and steps. A step is bytes that come in (in hex), or
something that the node does:

    {"now": 1.5, "bytes": "6d70..."}
    {"do": "admit"}, {"do": "want", "offset": 7}, {"do": "stored"}, {"do": "loading", "text": "..."}
    {"do": "ready", "facts": {...}}, {"do": "error", "code": "NO_SPACE", "text": "..."}
    {"do": "result", "request": 0, "y": "...", "ns": 500000000}     of the first request that was taken, and so on
    {"do": "failed", "request": 0, "code": "BAD_POS", "text": "..."}

``play`` has the Python session walk it; the Swift one is held against the same.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from mpgpt.errors import WireError
from mpgpt_ios.protocol import messages as m
from mpgpt_ios.protocol.auth import PROXY_LABEL, PeerClosed, SessionError, prove
from mpgpt_ios.protocol.frames import HEADER, VersionError, encode
from mpgpt_ios.protocol.node_session import Command, NodeSession
from tests.ios_proxy.vectors import FACTS, HASH, MESSAGES, OTHER, told

Script = dict[str, Any]
Step = dict[str, Any]
TOKEN, READY = b"the shared token", {"dtype": "float16", "embed": 4, "slots": 3}
INFO = {"name": "iPad", "protocol": 1, "bundles": [HASH.hex()]}
HALF_S = 500_000_000


class Player:
    """A session that walks step by step, and what came of it."""

    def __init__(self, script: Script) -> None:
        self.session = NodeSession(
            bytes.fromhex(script["token"]), bytes.fromhex(script["nonce"]), 0.0, facts=script["facts"],
            health=lambda: script["health"],
        )  # fmt: skip
        self.commands: list[Command] = []
        self.closed: dict[str, str | None] | None = None

    @property
    def requests(self) -> list[m.Request]:
        return [command for command in self.commands if isinstance(command, m.Prefill | m.Decode)]

    def step(self, step: Step) -> None:
        """Take a step, if the session is not over."""
        if self.closed:
            return
        try:
            if "bytes" in step:
                self.commands += self.session.receive(bytes.fromhex(step["bytes"]), step["now"])
            else:
                self._do(step)
        except VersionError:
            self.closed = {"code": "BAD_VERSION"}
        except WireError:
            self.closed = {"code": "BAD_FRAME"}
        except PeerClosed:
            self.closed = {"code": None}
        except SessionError as error:
            self.closed = {"code": error.code}

    def _do(self, step: Step) -> None:
        session = self.session
        match step["do"]:
            case "admit":
                session.admit()
            case "want":
                session.want(step["offset"])
            case "stored":
                session.stored()
            case "loading":
                session.loading(step["text"])
            case "ready":
                session.ready(step["facts"])
            case "error":
                session.error(step["code"], step["text"])
            case "result":
                request = self.requests[step["request"]]
                y = np.frombuffer(bytes.fromhex(step["y"]), request.x.dtype).reshape(request.x.shape)
                session.result(request, y, step["ns"] / 1e9)
            case "failed":
                session.failed(self.requests[step["request"]], step["code"], step["text"])

    @property
    def outcome(self) -> dict[str, Any]:
        """What came of it: the commands, all bytes that went out but texts of errors, which are each end's own."""
        return {
            "commands": [said(command) for command in self.commands], "out": without_texts(bytes(self.session.out)),
            "closed": self.closed,
        }  # fmt: skip


def play(script: Script) -> dict[str, Any]:
    player = Player(script)
    for step in script["steps"]:
        player.step(step)
    return player.outcome


def said(command: m.Message) -> dict[str, Any]:
    """A command for JSON; values as they lay on the wire."""
    if isinstance(command, m.Prefill | m.Decode):
        return {
            "name": type(command).__name__.upper(), "epoch": command.epoch, "request": command.request,
            "positions": [list(pair) for pair in command.positions], "dtype": command.x.dtype.name,
            "width": command.x.shape[1], "values": command.x.tobytes().hex(),
        }  # fmt: skip
    return {"name": type(command).__name__.upper(), **told(command)}


def without_texts(out: bytes) -> list[str]:
    """The frames of ``out`` in hex, and of an ERROR the header's numbers and the code alone."""
    frames = []
    while out:
        end = HEADER.size + struct.unpack_from("<I", out, 24)[0]
        frame, out = out[:end], out[end:]
        frames.append(frame[:24].hex() + frame[32:34].hex() if frame[5] == 16 else frame.hex())
    return frames


# -- making them


def walk(seed: int, steps: int = 25) -> Script:
    """A script; the same for the same seed."""
    dice = random.Random(seed)
    script: Script = {
        "token": TOKEN.hex(), "nonce": OTHER.hex(), "facts": INFO, "health": FACTS, "steps": list[Step]()
    }  # fmt: skip
    player, proxy = Player(script), Proxy(dice)
    while len(script["steps"]) < steps and not player.closed:
        for step in proxy.next(player):
            script["steps"].append(step)
            player.step(step)
    return script


class Proxy:
    """What a proxy and the node do next: what they should, and now and then anything."""

    def __init__(self, dice: random.Random) -> None:
        self._dice, self._now = dice, 0.0
        self._errant = dice.choice([0.0, 0.05, 0.3])
        self._size, self._sent = 0, 0
        self._numbers = self._epoch = self._taken = self._answered = 0
        self._seen = 0
        self._stage, self._dtype = "new", "float16"

    def next(self, player: Player) -> list[Step]:
        for command in player.commands[self._seen :]:
            self._notice(command)
        self._seen = len(player.commands)
        if self._dice.random() < self._errant:
            return list(self._bytes(self._anything()))
        return list(self._proper(player))

    def _notice(self, command: Command) -> None:
        stages = {m.Proof: "proved", m.Offer: "offered", m.Load: "loading", m.Reset: "serving"}
        self._stage = stages.get(type(command), self._stage)
        if isinstance(command, m.Offer):
            self._size = sum(file.length for file in command.files)
        if isinstance(command, m.Data):
            self._sent += len(command.piece)
            self._stage = "whole" if self._sent == self._size else "receiving"
        if isinstance(command, m.Reset):
            self._epoch, self._answered = command.epoch, self._taken
        if isinstance(command, m.Prefill | m.Decode):
            self._numbers, self._taken = command.request, self._taken + 1

    def _proper(self, player: Player) -> Iterator[Step]:
        dice = self._dice
        match self._stage:
            case "new":
                self._stage = "challenged"
                yield from self._bytes(encode(m.Hello(nonce=HASH)))
            case "challenged":
                proof = prove(TOKEN, PROXY_LABEL, OTHER, HASH)
                yield from self._bytes(encode(m.Proof(proof=proof)))
            case "proved":
                self._stage = "known"
                yield {"do": "admit"}
            case "known":
                files = tuple(m.File(name=n, length=dice.randint(0, 9), sha256=HASH) for n in ("a", "b", "c"))
                yield from self._bytes(encode(m.Offer(bundle=OTHER, files=files)))
            case "offered":
                self._sent = dice.choice([0, self._size, dice.randint(0, self._size)])
                self._stage = "whole" if self._sent == self._size else "receiving"
                yield {"do": "want", "offset": self._sent}
            case "receiving":
                piece = bytes(dice.randint(1, min(50, self._size - self._sent)))
                yield from self._bytes(encode(m.Data(offset=self._sent, piece=piece)))
            case "whole":
                self._stage = "stored"
                yield {"do": "stored"}
            case "stored":
                yield from self._bytes(encode(m.Load(bundle=OTHER)))
            case "loading":
                if dice.random() < 0.3:
                    yield {"do": "loading", "text": dice.choice(["compiling", "é" * 300])}
                else:
                    self._stage = "loaded"
                    facts = dice.choice([READY, READY, READY | {"dtype": "float32"}, {}])
                    self._dtype = str(facts.get("dtype", "float16"))
                    yield {"do": "ready", "facts": facts}
            case "loaded":
                yield from self._bytes(encode(m.Reset(epoch=dice.choice([1, 7]))))
            case _:
                yield from self._serve(player)

    def _serve(self, player: Player) -> Iterator[Step]:
        dice, open_ = self._dice, self._taken - self._answered
        what = dice.random()
        if open_ and what < 0.4:
            late = dice.random() < 0.1 and self._answered > 0  # once more, or one that a RESET dropped
            at = dice.randrange(self._answered) if late else self._answered
            self._answered += at == self._answered
            request = player.requests[at]
            if dice.random() < 0.3:
                code = dice.choice(["BAD_POS", "COMPUTE_FAILED"])
                yield {"do": "failed", "request": at, "code": code, "text": "why"}
            else:
                yield {"do": "result", "request": at, "y": request.x.tobytes().hex(), "ns": HALF_S * dice.randint(0, 4)}
        elif what < 0.5:
            yield from self._bytes(encode(m.Ping(number=dice.getrandbits(64))))
        elif what < 0.6:
            yield from self._bytes(encode(m.Reset(epoch=self._epoch + dice.randint(0, 2))))
        else:
            yield from self._bytes(
                b"".join(encode(self._request()) for _ in range(dice.choice([1] * 9 + [2] * 9 + [9])))
            )

    def _request(self) -> m.Request:
        dice = self._dice
        self._numbers += dice.choice([1, 1, 1, 2])
        count, dtype = dice.randint(1, 3), dice.choice([self._dtype] * 30 + ["float32"])
        x = np.arange(count * 4, dtype=np.dtype(dtype)).reshape(count, 4)
        slots = dice.sample(range(3 + (dice.random() < 0.02)), count)
        if dice.random() < 0.5:
            return m.Prefill(epoch=self._epoch, request=self._numbers, positions=((slots[0], 0),), x=x)
        return m.Decode(
            epoch=self._epoch, request=self._numbers, positions=tuple((s, dice.getrandbits(8)) for s in slots), x=x
        )  # fmt: skip

    def _bytes(self, data: bytes) -> Iterator[Step]:
        """As they come: at once, or cut somewhere."""
        self._now += 0.25
        cut = self._dice.randint(0, len(data)) if self._dice.random() < 0.3 else 0
        for piece in (data[:cut], data[cut:]):
            if piece:
                yield {"now": self._now, "bytes": piece.hex()}

    def _anything(self) -> bytes:
        """Another message than comes next, a damaged one, or bytes of no kind."""
        dice = self._dice
        frame = bytearray(encode(MESSAGES[dice.choice(list(MESSAGES))]))
        kind = dice.random()
        if kind < 0.4:
            return bytes(frame)
        if kind < 0.6:  # a field of the header that is sealed all the same
            at = dice.choice([4, 5, 6, 8, 12, 16, 17, 18, 20, 22, 24, 25, 26])
            frame[at] = dice.choice([0, 1, 2, 3, 16, 20, 255])
            return sealed(frame)
        if kind < 0.8 and len(frame) > HEADER.size:  # or something in its payload
            frame[dice.randrange(HEADER.size, len(frame))] = dice.getrandbits(8)
            return sealed(frame)
        if kind < 0.9:
            frame[dice.randrange(len(frame))] ^= 1 << dice.randrange(8)
            return bytes(frame)
        return dice.randbytes(dice.randint(1, 99))


def sealed(frame: bytes | bytearray) -> bytes:
    """The same frame with the checksum that fits it."""
    crc = zlib.crc32(frame[HEADER.size :], zlib.crc32(bytes(frame[:28]) + bytes(4)))
    return bytes(frame[:28]) + struct.pack("<I", crc) + bytes(frame[HEADER.size :])
