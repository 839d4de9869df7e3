"""The messages between the proxy rank and the iPad, as values; each class has its name in ``ios_proxy/PROTOCOL.md``.

Knows: every type of message, and the codes of errors. The page says what they mean.
Must not know: how any of them becomes bytes, or which may follow which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from numpy.typing import NDArray

Values = NDArray[Any]
"""float16 or float32."""
Positions = tuple[tuple[int, int], ...]
"""Pairs of a slot and a position in it."""
Code = Literal[
    "BAD_FRAME", "BAD_VERSION", "BAD_TOKEN", "BAD_STATE", "BAD_BUNDLE", "BAD_POS", "BAD_REQUEST", "LOAD_FAILED",
    "COMPUTE_FAILED", "NO_SPACE", "BUSY",
]  # fmt: skip
CODES: tuple[Code, ...] = get_args(Code)
"""On the wire a code is its index here, counted from 1. A number that is not here comes from a later version."""


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
    """The iPad's description of itself."""

    facts: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """One file of an offered bundle."""

    name: str
    length: int
    sha256: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    bundle: bytes
    files: tuple[File, ...]

    @property
    def length(self) -> int:
        """Of the bundle, bytes."""
        return sum(file.length for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True)
class Want:
    """WANT: the node lacks the bundle's bytes from ``offset`` on; the bundle's length if it lacks none."""

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
class Prefill:
    """Consecutive tokens of one slot."""

    epoch: int
    request: int
    positions: Positions
    """One: the first token's."""
    x: Values = field(repr=False)
    """[tokens, embed]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decode:
    """One token for each of several slots."""

    epoch: int
    request: int
    positions: Positions
    """One a token."""
    x: Values = field(repr=False)
    """[tokens, embed]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    epoch: int
    request: int
    positions: Positions
    """The request's."""
    compute_ns: int
    y: Values = field(repr=False)
    """[tokens, embed]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Error:
    """A failure; ``request`` is 0 where it concerns no request."""

    code: str
    """One of ``CODES``; ``#12`` is the number of one that is not known here."""
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


Request = Prefill | Decode
Message = (
    Hello | Challenge | Proof | Info | Offer | Want | Data | Stored | Load | Loading | Ready | Reset | Prefill | Decode
    | Result | Error | Ping | Pong | Bye
)  # fmt: skip
