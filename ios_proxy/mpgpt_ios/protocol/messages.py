"""What the proxy rank and the iPad say to each other, as values.

Knows: every kind of message, and the codes of errors. ``ios_proxy/PROTOCOL.md`` says what they mean.
Must not know: how any of them becomes bytes, or which may follow which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from numpy.typing import NDArray

Values = NDArray[Any]
"""float16 or float32."""
Code = Literal[
    "BAD_FRAME", "BAD_VERSION", "BAD_TOKEN", "BAD_STATE", "BAD_BUNDLE", "BAD_POS", "BAD_REQUEST", "LOAD_FAILED",
    "COMPUTE_FAILED", "NO_SPACE", "BUSY",
]  # fmt: skip
CODES: tuple[Code, ...] = get_args(Code)
"""On the wire their place in this list, counted from 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    nonce: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Challenge:
    nonce: bytes
    proof: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    proof: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Info:
    """What the iPad is."""

    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of a bundle that is offered."""

    name: str
    length: int
    sha256: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    bundle: bytes
    files: tuple[File, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """The bundle's bytes from ``offset`` on; its length when nothing is missing."""

    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    offset: int
    piece: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    bundle: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    bundle: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset:
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """PREFILL, tokens of one slot from its position on, or DECODE, a token for each of several slots."""

    epoch: int
    request: int
    positions: tuple[tuple[int, int], ...]
    """(slot, position): one for PREFILL, one a token for DECODE."""
    prefill: bool
    x: Values = field(repr=False)
    """[tokens, embed]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    epoch: int
    request: int
    positions: tuple[tuple[int, int], ...]
    compute_ns: int
    y: Values = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """ERROR: what went wrong; ``request`` is 0 where it is about no request."""

    code: Code
    text: str
    epoch: int = 0
    request: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    number: int
    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bye:
    pass


Message = (
    Hello | Challenge | Proof | Info | Offer | Want | Data | Stored | Load | Loading | Ready | Reset | Request | Result
    | Error | Ping | Pong | Bye
)  # fmt: skip
