"""Tokens to text, one by one: the decoder of a tokenizer.json as a chain of transducers.

Knows: what each kind of decoder makes of a sequence of tokens, and which part of it no later token can change.
Must not know: ids, vocabularies, stops, requests.

The ``tokenizers`` library decodes a whole sequence; its stream decodes a window of it, and fails where a window's text
is not the beginning of the next one's. Here every decoder keeps as much of its input as may still change what it gives,
so that a token costs the same however long the text is, and the text is the one of the whole sequence.

A decoder sees separate tokens until one before it has joined them (``Fuse``, ``ByteLevel``); from there on there is one
token that grows.
"""

from __future__ import annotations

import codecs
import copy
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from mpgpt.errors import ModelError, RequestError

PRINTED = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
UNPRINTED = sorted(set(range(256)) - PRINTED)
BYTE_OF = {chr(byte): byte for byte in PRINTED} | {chr(256 + n): byte for n, byte in enumerate(UNPRINTED)}
"""The characters by which byte-level tokenizers write bytes: GPT-2's scheme, in which every byte is seen."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")
"""How SentencePiece names a byte; the sign is read by the library too."""
BROKEN = "\ufffd"
"""In place of bytes that are no character."""
CONTRACTIONS = ((" n't", "n't"), (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))
PUNCTUATION = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"))
TIDY = (*PUNCTUATION, *CONTRACTIONS)
"""Replacements of the decoders WordPiece and CTC where they clean up, in this order."""
CLEAN_UP = (*PUNCTUATION, *(pair for pair in CONTRACTIONS if pair[0] != " do not"))
"""Replacements of transformers in the whole text, where a tokenizer has them on."""

Spec = Mapping[str, Any]
"""A decoder as it stands in a tokenizer.json."""


class Transducer(Protocol):
    """A decoder that takes pieces in and gives pieces out. Its state is made of immutable values: a copy is shallow."""

    def push(self, piece: str) -> Iterable[str]: ...
    def rest(self) -> Iterable[str]:
        """The text that would follow if no more tokens came; changes nothing."""
        ...


class Each:
    """A decoder that makes a token of each; ``function`` takes whether it is the first, too."""

    def __init__(self, function: Callable[[bool, str], str]) -> None:
        self._function, self._first = function, True

    def push(self, piece: str) -> Iterable[str]:
        first, self._first = self._first, False
        return (self._function(first, piece),)

    def rest(self) -> Iterable[str]:
        return ()


class ByteRuns:
    """ByteFallback: a run of byte tokens is the text of its bytes, or, if they are none, a U+FFFD for each of them.

    So a byte that is a character by itself is not certain before the run is over.
    """

    def __init__(self) -> None:
        self._run = b""

    def push(self, piece: str) -> Iterable[str]:
        if match := BYTE_TOKEN.fullmatch(piece):
            self._run += bytes([int(match[1], 16)])
            return ()
        before = self.rest()
        self._run = b""
        return (*before, piece)

    def rest(self) -> Iterable[str]:
        try:
            return (self._run.decode(),) if self._run else ()
        except UnicodeDecodeError:
            return (BROKEN,) * len(self._run)


class ByteLevel:
    """Characters that each write a byte, back to UTF-8; a token with any other character is its own text."""

    def __init__(self) -> None:
        self._pending = b""

    def push(self, piece: str) -> Iterable[str]:
        data = self._pending + byte_level(piece)
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._pending = data[used:]
        return (text,)

    def rest(self) -> Iterable[str]:
        return (self._pending.decode(errors="replace"),)


class LastSuffix:
    """BPEDecoder: a suffix ends a word, and stands for a space unless its token is the last."""

    def __init__(self, suffix: str) -> None:
        self._suffix = suffix
        self._last: str | None = None

    def push(self, piece: str) -> Iterable[str]:
        before, self._last = self._last, piece
        return () if before is None else (before.replace(self._suffix, " "),)

    def rest(self) -> Iterable[str]:
        return () if self._last is None else (self._last.replace(self._suffix, ""),)


class Ctc:
    """CTC: a token that is repeated at once counts once; the padding between two of a kind is nothing."""

    def __init__(self, replace: Callable[[str], str]) -> None:
        self._replace = replace
        self._before: str | None = None

    def push(self, piece: str) -> Iterable[str]:
        again, self._before = piece == self._before, piece
        text = "" if again else self._replace(piece)
        return (text,) if text else ()

    def rest(self) -> Iterable[str]:
        return ()


class Replaced:
    """All of ``old`` in a growing token becomes ``new``; what may be its beginning is kept."""

    def __init__(self, old: str, new: str) -> None:
        self._old, self._new, self._kept = old, new, ""

    def push(self, piece: str) -> Iterable[str]:
        *parts, last = (self._kept + piece).split(self._old)
        whole = len(last) - beginning(last, self._old)
        self._kept = last[whole:]
        return (self._new.join([*parts, last[:whole]]),)

    def rest(self) -> Iterable[str]:
        return (self._kept,)


class Stripped:
    """A growing token without up to ``start`` of a character at its beginning, and ``stop`` at its end."""

    def __init__(self, content: str, start: int, stop: int) -> None:
        self._content, self._start, self._stop, self._kept = content, start, stop, ""

    def push(self, piece: str) -> Iterable[str]:
        text = self._kept + piece
        if self._start and text:
            stripped = strip(text, self._content, self._start, 0)
            self._start = 0 if stripped else self._start - len(text)
            text = stripped
        kept = strip(text, self._content, 0, self._stop)
        self._kept = text[len(kept) :]
        return (kept,)

    def rest(self) -> Iterable[str]:
        return ()


class AtEnd:
    """Decoders that are known to the library alone, or of which nothing is certain before the end: all at once then."""

    def __init__(self, specs: Sequence[Spec]) -> None:
        self._decode = library(specs)
        self._tokens: tuple[str, ...] = ()

    def push(self, piece: str) -> Iterable[str]:
        self._tokens = (*self._tokens, piece)
        return ()

    def rest(self) -> Iterable[str]:
        return (self._decode(self._tokens),)


class Grown:
    """AtEnd behind a decoder that joins: the one token is what all pieces make together."""

    def __init__(self, specs: Sequence[Spec]) -> None:
        self._decode, self._token = library(specs), ""

    def push(self, piece: str) -> Iterable[str]:
        self._token += piece
        return ()

    def rest(self) -> Iterable[str]:
        return (self._decode((self._token,)),)


class Detokenizer:
    """A sequence of tokens on its way to text."""

    def __init__(self, transducers: Iterable[Transducer]) -> None:
        """``transducers`` are fresh ones, in order: a token's text goes through all of them."""
        self._chain = list(transducers)

    @classmethod
    def of(cls, decoder: Spec | None, clean_up: bool = False) -> Detokenizer:
        """``decoder`` as in a tokenizer.json; with ``clean_up``, the text is cleaned as transformers does it."""
        return cls([*chain(decoder), *(Replaced(*pair) for pair in CLEAN_UP if clean_up)])

    def push(self, token: str) -> str:
        """The text that ``token`` makes certain."""
        return "".join(through(self._chain, (token,)))

    @property
    def rest(self) -> str:
        """The text that would come besides if no token came any more."""
        pieces: Iterable[str] = ()
        for transducer in map(copy.copy, self._chain):
            pieces = (*through([transducer], pieces), *transducer.rest())
        return "".join(pieces)

    def copy(self) -> Detokenizer:
        return Detokenizer(map(copy.copy, self._chain))


def through(transducers: Iterable[Transducer], pieces: Iterable[str]) -> Iterable[str]:
    for transducer in transducers:
        pieces = [out for piece in pieces for out in transducer.push(piece)]
    return pieces


def chain(decoder: Spec | None) -> list[Transducer]:
    """The transducers that are a decoder together; without a decoder there is a space between tokens."""
    if decoder is None:
        return [Each(lambda first, token: token if first else " " + token)]
    specs, made, grows = flat(decoder), list[Transducer](), False
    for at, spec in enumerate(specs):
        more = growing(spec) if grows else separate(spec)
        if more is None:
            left = specs[at:]
            return [*made, Grown(left) if grows else AtEnd(left)]
        made += more
        grows = grows or spec.get("type") in ("Fuse", "ByteLevel")
    return made


def flat(decoder: Spec) -> list[Spec]:
    if decoder.get("type") != "Sequence":
        return [decoder]
    return [spec for inner in decoder["decoders"] for spec in flat(inner)]


def separate(spec: Spec) -> list[Transducer] | None:
    """A decoder of separate tokens; None for one that is not known here."""
    match spec:
        case {"type": "Fuse"}:
            return []
        case {"type": "ByteLevel"}:
            return [ByteLevel()]
        case {"type": "ByteFallback"}:
            return [ByteRuns()]
        case {"type": "Replace", "pattern": {"String": old}, "content": new}:
            return [Each(lambda first, token: token.replace(old, new))]
        case {"type": "Replace", "pattern": {"Regex": _}}:
            decode = library([spec])
            return [Each(lambda first, token: decode((token,)))]
        case {"type": "Strip", "content": content, "start": start, "stop": stop}:
            return [Each(lambda first, token: strip(token, content, start, stop))]
        case {"type": "Metaspace", "replacement": mark}:
            dropped = spec.get("prepend_scheme") != "never"
            return [Each(lambda first, token: token.replace(mark, "" if first and dropped else " "))]
        case {"type": "WordPiece", "prefix": prefix, "cleanup": cleanup}:
            return [Each(lambda first, token: word_piece(first, token, prefix, cleanup))]
        case {"type": "CTC"}:
            pairs = ctc_pairs(spec)
            return [Ctc(lambda token: replace_all(token, pairs))]
        case {"type": "BPEDecoder", "suffix": suffix}:
            return [LastSuffix(suffix)]
    return None


def growing(spec: Spec) -> list[Transducer] | None:
    """A decoder of one token that grows; None for one that must see all of it."""
    match spec:
        case {"type": "Fuse"}:
            return []
        case {"type": "Replace", "pattern": {"String": old}, "content": new} if old:
            return [Replaced(old, new)]
        case {"type": "Strip", "content": content, "start": start, "stop": stop}:
            return [Stripped(content, start, stop)]
        case {"type": "Metaspace", "replacement": mark}:
            return [Replaced(mark, " " if spec.get("prepend_scheme") == "never" else "")]
        case {"type": "WordPiece", "cleanup": cleanup}:
            return [Replaced(*pair) for pair in TIDY if cleanup]
        case {"type": "CTC", "pad_token": pad} if pad:
            return [Replaced(*pair) for pair in ctc_pairs(spec)]
        case {"type": "BPEDecoder", "suffix": suffix} if suffix:
            return [Replaced(suffix, "")]
    return None


def byte_level(token: str) -> bytes:
    """The bytes of a byte-level token."""
    try:
        return bytes(BYTE_OF[character] for character in token)
    except KeyError:
        return token.encode()


def word_piece(first: bool, token: str, prefix: str, cleanup: bool) -> str:
    if not first:
        token = token[len(prefix) :] if token.startswith(prefix) else " " + token
    return replace_all(token, TIDY) if cleanup else token


def ctc_pairs(spec: Spec) -> list[tuple[str, str]]:
    clean = (*TIDY, (spec["word_delimiter_token"], " ")) if spec["cleanup"] else ()
    return [(spec["pad_token"], ""), *clean]


def replace_all(text: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        text = text.replace(old, new)
    return text


def strip(text: str, content: str, start: int, stop: int) -> str:
    """``text`` without up to ``start`` times ``content``, a character, before it and up to ``stop`` times behind it."""
    before = next((n for n, character in enumerate(text[:start]) if character != content), min(start, len(text)))
    text = text[before:]
    behind = next((n for n in range(min(stop, len(text))) if text[-1 - n] != content), min(stop, len(text)))
    return text[: len(text) - behind]


def beginning(text: str, wanted: str) -> int:
    """The length of the longest end of ``text`` that ``wanted`` begins with and is longer than."""
    return next((n for n in range(min(len(text), len(wanted) - 1), 0, -1) if text.endswith(wanted[:n])), 0)


def library(specs: Sequence[Spec]) -> Callable[[tuple[str, ...]], str]:
    """The text that the ``tokenizers`` library itself makes of tokens by these decoders."""
    from tokenizers import Tokenizer

    whole: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": None, "post_processor": None, "decoder": {"type": "Sequence", "decoders": list(specs)},
        "model": {"type": "BPE", "vocab": {}, "merges": []},
    }  # fmt: skip
    try:
        decoder: Any = Tokenizer.from_str(json.dumps(whole)).decoder
    except Exception as error:  # the library's own, of its own form
        raise ModelError(f"the tokenizer's decoder cannot be read: {error}") from error

    def decode(tokens: tuple[str, ...]) -> str:
        text: str = unpanicked(lambda: decoder.decode(list(tokens)))
        return text

    return decode


def unpanicked(call: Callable[[], Any]) -> Any:
    """The value of ``call()``. A panic of the library, which is no Exception, becomes a RequestError."""
    try:
        return call()
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RequestError(f"the tokenizer cannot take this text: {error}") from None
