"""Text to ids, messages to ids, and ids back to text as they come.

Knows: the model folder's tokenizer, its chat template, which ids end a text.
Must not know: models' weights, sequences, ranks.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from mpgpt.errors import ModelError, RequestError
from mpgpt.model.detokenizer import BROKEN, BYTE_OF, BYTE_TOKEN, Detokenizer, beginning, byte_level, unpanicked
from mpgpt.model.folder import TOKENIZERS

__all__ = ["BYTE_OF", "Message", "TextStream", "Tokenizer"]

Message = dict[str, str]
"""One of a conversation's, as chat templates take it: ``role`` and ``content``."""

SPACE = "\u2581"
"""How SentencePiece writes a space."""
SENTENCEPIECE_KINDS = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
"""A SentencePiece model's ``model_type``."""
CONTEXT_IDS = 64
"""So many of a prompt's first and last tokens decide how the text behind it begins."""


class Tokenizer:
    """A model's tokenizer, from its folder.

    Where there is a tokenizer.json it alone says which ids a text has, as the ``tokenizers`` library reads it; what
    class tokenizer_config.json names does not matter. transformers would have some classes build a tokenizer of their
    own from the vocabulary. From transformers come the chat template and the names of the special tokens.
    """

    def __init__(self, folder: Path) -> None:
        """Raises ``ModelError`` when the folder holds none that can be read."""
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        if not any((folder / name).is_file() for names in TOKENIZERS for name in names[:1]):
            raise ModelError(f"{folder} holds no tokenizer (tokenizer.json, vocab.json or tokenizer.model)")
        try:
            self._names, self._backend = unpanicked(lambda: _read(folder))
            decoder = self._backend.decoder
            spec = None if decoder is None else json.loads(decoder.__getstate__())
            self._detokenizer = Detokenizer.of(spec, _cleans_up(self._names, self._backend))
        except ModelError:
            raise
        except Exception as error:  # whatever a damaged file makes an outside library raise
            raise ModelError(f"the tokenizer in {folder} cannot be read: {error}") from error
        end = None if self._names.eos_token is None else self._backend.token_to_id(str(self._names.eos_token))
        self.stop_ids = frozenset(_stop_ids(folder)) or frozenset([] if end is None else [end])
        self.can_chat = bool(self._names.chat_template)
        self._byte_level = "ByteLevel" in json.dumps(spec)
        self._added = frozenset(self._backend.get_added_tokens_decoder())
        self._skipped = _special(self._backend) | _special(self._names)

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
            text = self._names.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs of the model's makers
            raise RequestError(f"the model's chat template refuses these messages: {error}") from error
        return self._ids(text, specials=False)

    def _ids(self, text: str, *, specials: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can write half a surrogate pair; the tokenizer cannot read it
            raise RequestError(f"the prompt's character {error.start + 1} is half of a surrogate pair") from None
        # A batch of one: unlike `encode` it lets other threads run, such as heartbeats while a book is read.
        (encoding,) = unpanicked(lambda: self._backend.encode_batch([text], add_special_tokens=specials))
        ids: list[int] = encoding.ids
        return ids

    def bytes_of(self, token: int) -> bytes:
        """The text of a token. It may be a part of a character, or, for a control token, its name.

        An id that the tokenizer does not know, which a model with a padded head may give, stands for nothing.
        """
        name = _name(self._backend, token)
        if name is None:
            return b""
        if token in self._added:
            return name.encode()
        if self._byte_level:
            return byte_level(name)
        if match := BYTE_TOKEN.fullmatch(name):
            return bytes([int(match[1], 16)])
        return name.replace(SPACE, " ").encode()

    def labels_of(self, tokens: Sequence[int]) -> list[str]:
        """A name of each token to print, distinct where the tokens are; the first has the best claim on its own.

        A part of a character is named by its bytes as OpenAI does it, ``bytes:\\xf0\\x9f``.
        """
        labels: dict[int, str] = {}
        taken: set[str] = set()
        for token in dict.fromkeys(tokens):
            raw = self.bytes_of(token)
            by_bytes = "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
            text = _text(raw)
            names = [by_bytes if text is None else text, *([by_bytes] if raw else [])]
            numbered = (f"token_id:{token}" + "'" * n for n in count())
            labels[token] = next(name for name in chain(names, numbered) if name not in taken)
            taken.add(labels[token])
        return [labels[token] for token in tokens]

    def stream(self, stops: Sequence[str] = (), *, after: Sequence[int] = ()) -> TextStream:
        """A fresh way from ids to text, which ends before any of ``stops``.

        The text is what the ids add to that of ``after``, a prompt that they continue: its first word may begin with a
        space, where decoders leave out a text's first.
        """
        return TextStream(
            self._backend, stops, after=after, detokenizer=self._detokenizer.copy(), skipped=self._skipped
        )  # fmt: skip


class TextStream:
    """Ids in one by one, text out as soon as it is certain.

    What later tokens may change is held back, a character whose bytes are not all there for example, and so is what may
    be the beginning of a stop.
    """

    def __init__(
        self, backend: Any, stops: Sequence[str], *, after: Sequence[int] = (), detokenizer: Detokenizer | None = None,
        skipped: frozenset[str] | None = None,
    ) -> None:  # fmt: skip
        """``skipped`` are tokens that are no text. ``detokenizer`` is at its beginning."""
        self._backend, self._stops = backend, [stop for stop in stops if stop]
        self._added = frozenset(self._backend.get_added_tokens_decoder())
        self._skipped = _special(backend) if skipped is None else skipped
        decoder = backend.decoder
        self._detokenizer = detokenizer or Detokenizer.of(decoder and json.loads(decoder.__getstate__()))
        for token in after if len(after) <= 2 * CONTEXT_IDS else (*after[:CONTEXT_IDS], *after[-CONTEXT_IDS:]):
            self._certain(token)
        self._given = self._detokenizer.rest
        """The end of the prompt's text, as far as it has not come out of the detokenizer yet: not to be repeated."""
        self._shown: list[str] = []
        self._length = 0
        self._held = ""
        self.starts: list[int] = []
        """Where in the text each pushed token's part begins, in characters; behind a stop it is beyond the text."""
        self.stopped = False

    @property
    def text(self) -> str:
        """All the text that has come out."""
        return "".join(self._shown)

    def push(self, token: int) -> str:
        """The text that ``token`` makes certain; ``stopped`` turns true when it completes a stop."""
        if self.stopped:
            return ""
        before = _without(self._detokenizer.rest, self._given)[0]
        new, self._given = _without(self._certain(token), self._given)
        # Bytes that wait to be a character are this token's too, unless it is they that turn out to be none.
        waiting = before if new.startswith(before) else before.rstrip(BROKEN)
        self.starts.append(max([self._length + len(self._held) + len(waiting), *self.starts[-1:]]))
        self._held += new
        # A stop in what is likely is complete if the text ends here, and it does end there.
        at = self._first_stop(self._held + self._likely()) if self._stops else None
        if at is not None:
            self.stopped = True
            self._held += self._likely()
            return self._show(at)
        return self._show(len(self._held) - max((beginning(self._held, stop) for stop in self._stops), default=0))

    def finish(self) -> str:
        """The rest: what was held back turns out to be text after all."""
        if self.stopped:
            return ""
        self._held += _without(self._detokenizer.rest, self._given)[0]
        at = self._first_stop(self._held)
        self.stopped = at is not None
        return self._show(len(self._held) if at is None else at)

    def _certain(self, token: int) -> str:
        name = _name(self._backend, token)
        return "" if name is None or name in self._skipped else self._detokenizer.push(name)

    def _likely(self) -> str:
        """The text that would follow if it ended here, without incomplete characters."""
        return _without(self._detokenizer.rest, self._given)[0].rstrip(BROKEN)

    def _first_stop(self, text: str) -> int | None:
        """Where the first stop that is complete begins."""
        return min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)

    def _show(self, upto: int) -> str:
        new, self._held = self._held[:upto], "" if self.stopped else self._held[upto:]
        self._shown.append(new)
        self._length += len(new)
        return new


def _read(folder: Path) -> tuple[Any, Any]:
    """A tokenizer of transformers, for its names and its template; and one of ``tokenizers``, for ids."""
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    # Told no, transformers refuses a folder's own code; told nothing, it asks whoever is at stdin.
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if (folder / "tokenizer.json").is_file():
        backend: Any = Backend.from_file(str(folder / "tokenizer.json"))
        names: Any = PreTrainedTokenizerFast.from_pretrained(folder, tokenizer_object=Backend(BPE()), **options)
        _refuse_own_code(folder, names.init_kwargs)
        _mark_special(names, backend)
    elif (folder / "vocab.json").is_file():
        from transformers import AutoTokenizer  # takes a while, and is seldom needed

        names = AutoTokenizer.from_pretrained(folder, **options)
        backend = names.backend_tokenizer
    else:
        _check_sentencepiece(folder / "tokenizer.model")
        names = PreTrainedTokenizerFast.from_pretrained(folder, **options)
        backend = names.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return names, backend


def _refuse_own_code(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ``ModelError`` where neither the model nor the tokenizer's class is known, only code in the folder."""
    own = settings.get("auto_map")
    if not own or "AutoTokenizer" not in own:
        return
    import transformers

    config = json.loads((folder / "config.json").read_bytes()) if (folder / "config.json").is_file() else {}
    if config.get("model_type") not in transformers.CONFIG_MAPPING:
        raise ModelError(f"the tokenizer in {folder} cannot be read: it contains custom code, which is not run here")


def _mark_special(names: Any, backend: Any) -> None:
    """A special token that only tokenizer_config.json names, of the vocabulary, is one token wherever it stands."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_special_tokens(
        [token for token in names.all_special_tokens if token not in known and backend.token_to_id(token) is not None]
    )


def _check_sentencepiece(path: Path) -> None:
    """Raises ``ModelError`` for what is no SentencePiece model, or of a kind that splits at words."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    needed = "a tokenizer.json is needed (transformers writes one: AutoTokenizer.from_pretrained(...).save_pretrained)"
    model = vars(messages)["ModelProto"]()  # made as the module is loaded: its stub does not know of it
    try:
        model.ParseFromString(path.read_bytes())
    except Exception:  # protobuf's own
        raise ModelError(f"{path} is no SentencePiece model (Llama 3's is tiktoken's): {needed}") from None
    kind = SENTENCEPIECE_KINDS.get(model.trainer_spec.model_type, "unknown")
    if not model.pieces:
        raise ModelError(f"{path} is no SentencePiece model: it holds no pieces; {needed}")
    if kind not in ("unigram", "bpe", "char"):
        raise ModelError(f"{path} is a SentencePiece model of kind {kind}, which is not supported: {needed}")


def _cleans_up(names: Any, backend: Any) -> bool:
    """Whether transformers would clean the text up: where it is wanted, and never a BPE's unless it says so twice."""
    forced = getattr(names, "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    return bool(names.clean_up_tokenization_spaces and (forced or type(backend.model).__name__ != "BPE"))


def _special(tokenizer: Any) -> frozenset[str]:
    """The special tokens that a tokenizer of either library knows."""
    fast = getattr(tokenizer, "backend_tokenizer", tokenizer)
    return frozenset(token.content for token in fast.get_added_tokens_decoder().values() if token.special)


def _name(backend: Any, token: int) -> str | None:
    """A token's name in the vocabulary; None for an id that it does not have."""
    name: str | None = backend.id_to_token(token) if 0 <= token < 2**32 else None
    return name


def _text(raw: bytes) -> str | None:
    """Bytes as text; None if they are none."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _without(text: str, given: str) -> tuple[str, str]:
    """``text`` without what it begins with of ``given``, and what is left of that. Where they differ it is over."""
    same = next((n for n, (a, b) in enumerate(zip(text, given, strict=False)) if a != b), min(len(text), len(given)))
    return text[same:], given[same:] if same == len(text) else ""


def _stop_ids(folder: Path) -> list[int]:
    """The tokens that end a text, as the model's makers declared them; ``generation_config.json`` has the last word."""
    for name in ("generation_config.json", "config.json"):
        try:
            ids = json.loads((folder / name).read_text(encoding="utf-8")).get("eos_token_id")
            if ids is not None:
                return [int(i) for i in (ids if isinstance(ids, list) else [ids])]
        except (OSError, ValueError, AttributeError, TypeError):
            continue
    return []
