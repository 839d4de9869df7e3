"""Text to ids, messages to ids, and ids back to text as they come.

Knows: the model folder's tokenizer, its chat template, which ids end a text.
Must not know: models' weights, sequences, ranks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream

from mpgpt.errors import ModelError, RequestError

PRINTED = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
UNPRINTED = sorted(set(range(256)) - PRINTED)
BYTE_OF = {chr(byte): byte for byte in PRINTED} | {chr(256 + n): byte for n, byte in enumerate(UNPRINTED)}
"""The characters by which byte-level tokenizers write bytes: GPT-2's scheme, in which every byte is seen."""
BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
"""How SentencePiece names a byte."""
SPACE = "\u2581"
"""How SentencePiece writes a space."""


class Tokenizer:
    """A model's tokenizer, from its folder."""

    def __init__(self, folder: Path) -> None:
        """Raises ``ModelError`` when the folder holds none that transformers can read."""
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer.model")):
            raise ModelError(f"{folder} holds no tokenizer (tokenizer.json, vocab.json or tokenizer.model)")
        try:
            # Told no, transformers refuses a folder's own code; told nothing, it asks whoever is at stdin.
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            self._backend: Any = self._tokenizer.backend_tokenizer
        except Exception as error:  # whatever a damaged file makes an outside library raise
            raise ModelError(f"the tokenizer in {folder} cannot be read: {error}") from error
        end: int | None = self._tokenizer.eos_token_id
        self.stop_ids = frozenset(_stop_ids(folder)) or frozenset([] if end is None else [end])
        self.can_chat = bool(self._tokenizer.chat_template)
        self._byte_level = "ByteLevel" in json.dumps(json.loads(self._backend.to_str()).get("decoder"))

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, with the special tokens that the model wants at its beginning.

        Raises ``RequestError`` for what is no text.
        """
        return self._ids(text, specials=True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """The ids of a conversation up to where the model's answer begins.

        Raises ``RequestError`` when the model has no chat template or the template refuses the messages.
        """
        if not self.can_chat:
            raise RequestError("this model has no chat template: give a plain prompt, or --raw")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs of the model's makers
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return self._ids(text, specials=False)

    def _ids(self, text: str, *, specials: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half a surrogate pair; the tokenizer cannot read it
            raise RequestError(f"the prompt's character {error.start + 1} is half of a surrogate pair") from None
        ids: list[int] = self._tokenizer(text, add_special_tokens=specials, verbose=False)["input_ids"]
        return ids

    def bytes_of(self, token: int) -> bytes:
        """What a token stands for. It may be a part of a character, or, for a control token, its name.

        An id that the tokenizer does not know, which a model with a padded head may give, stands for nothing.
        """
        name: str | None = self._backend.id_to_token(token)
        if name is None:
            return b""
        if token in self._backend.get_added_tokens_decoder():
            return name.encode()
        if self._byte_level:
            return bytes(BYTE_OF[character] for character in name)
        if match := BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        return name.replace(SPACE, " ").encode()

    def stream(self, stops: Sequence[str] = ()) -> TextStream:
        """A fresh way from ids to text, which ends before any of ``stops``."""
        return TextStream(self._backend, stops)


class TextStream:
    """Ids in one by one, text out as soon as it is certain.

    A character whose bytes are not all there is held back, and so is what may be the beginning of a stop.
    """

    def __init__(self, backend: Any, stops: Sequence[str]) -> None:
        self._backend, self._stops = backend, [stop for stop in stops if stop]
        self._decoder = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._text = ""
        self._shown = 0
        self.stopped = False

    @property
    def text(self) -> str:
        """All the text that has come out."""
        return self._text[: self._shown]

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain; ``stopped`` turns true when it completes a stop."""
        if self.stopped:
            return ""
        self._ids.append(token)
        self._text += self._decoder.step(self._backend, token) or ""
        self._cut()
        return self._show(len(self._text) - (0 if self.stopped else self._held()))

    def finish(self) -> str:
        """The rest: what was held back turns out to be text after all."""
        whole = self._backend.decode(self._ids, skip_special_tokens=True)
        if not self.stopped and whole.startswith(self._text):
            self._text = whole
            self._cut()
        return self._show(len(self._text))

    def _cut(self) -> None:
        """End the text before the first stop that is complete."""
        found = [at for stop in self._stops if (at := self._text.find(stop)) >= 0]
        if found:
            self.stopped, self._text = True, self._text[: min(found)]

    def _held(self) -> int:
        """The length of the longest end of the text that may be a stop's beginning."""
        return max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._text.endswith(stop[:n])),
            default=0,
        )

    def _show(self, upto: int) -> str:
        new = self._text[self._shown : upto]
        self._shown = max(self._shown, upto)
        return new


def _stop_ids(folder: Path) -> list[int]:
    """What the model's makers declared as the end of a text; ``generation_config.json`` has the last word."""
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            if ids is not None:
                return [int(i) for i in (ids if isinstance(ids, list) else [ids])]
        except (OSError, ValueError, AttributeError, TypeError):
            continue
    return []
