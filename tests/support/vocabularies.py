"""Small tokenizers of every kind that there is, by name: what ids and text are compared over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIALS = ["<s>", "</s>", "<unk>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "\u2581"


def llama(letters: str = "abcdefghijklmnopqrstuvwxyz") -> Tokenizer:
    """Llama 2's kind: SentencePiece's BPE, with bytes for what is unknown, and a space before all."""
    after_space = [SPACE + letter for letter in letters]
    vocabulary = [*SPECIALS, *BYTES, SPACE, *letters, *after_space, ".", "Paris", SPACE + "Paris", "ab", SPACE + "ab"]
    made: Any = Tokenizer(
        models.BPE(
            vocab={token: id for id, token in enumerate(vocabulary)},
            merges=[(SPACE, letter) for letter in letters] + [("a", "b"), (SPACE, "ab")],
            byte_fallback=True, unk_token="<unk>", fuse_unk=True,
        )
    )  # fmt: skip
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    steps: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    made.add_special_tokens(SPECIALS)
    return made  # type: ignore[no-any-return]


def gemma() -> Tokenizer:
    """The same without the space before all."""
    made: Any = llama()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    return made  # type: ignore[no-any-return]


def byte_level(*more: str) -> Tokenizer:
    """GPT-2's kind; tokens that are no bytes besides, as some vocabularies have them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = [*SPECIALS, *alphabet, "Ġa", "ðŁ", "ĻĤ", "two words", *more]
    made: Any = Tokenizer(
        models.BPE(vocab={token: id for id, token in enumerate(vocabulary)}, merges=[("Ġ", "a"), ("ð", "Ł")])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIALS)
    made.add_tokens(["added word", "ñ"])
    return made  # type: ignore[no-any-return]


def words(decoder: Any, *more: str) -> Tokenizer:
    """Words as they come, with a decoder."""
    vocabulary = [*SPECIALS, "a", "b", SPACE + "a", f"{SPACE}{SPACE}b", ".", "'", "s", "n't", " x", "", "日本", *more]
    made: Any = Tokenizer(models.WordLevel({token: id for id, token in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if decoder:
        made.decoder = decoder
    made.add_special_tokens(SPECIALS)
    made.add_tokens([AddedToken("added word")])
    return made  # type: ignore[no-any-return]


def word_piece(cleanup: bool) -> Tokenizer:
    names = [*SPECIALS, "a", "##b", "##s", ".", ",", "'", "s", "do", "not", "n't", "##", "'s", "m"]
    made: Any = Tokenizer(models.WordPiece({token: id for id, token in enumerate(names)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=cleanup)
    made.add_special_tokens(SPECIALS)
    return made  # type: ignore[no-any-return]


SEQUENCE = [decoders.Replace(Regex(f"{SPACE}+"), "_"), decoders.ByteFallback(), decoders.Strip("a", 1, 0)]
KINDS: dict[str, Tokenizer] = {
    "llama": llama(),
    "gemma": gemma(),
    "byte-level": byte_level(),
    "metaspace": words(decoders.Metaspace()),
    "metaspace-never": words(decoders.Metaspace(prepend_scheme="never")),
    "word-piece": word_piece(cleanup=True),
    "word-piece-untidy": word_piece(cleanup=False),
    "ctc": words(decoders.CTC(), "<pad>", "|", "a|", " ."),
    "bpe-suffix": words(decoders.BPEDecoder(), "a</w>", "b</w>c</w>", "</w>"),
    "none": words(None),
    "fused-word-piece": words(decoders.Sequence([decoders.Fuse(), decoders.WordPiece()]), " .", " do", " not"),
    "fused-bytes": words(decoders.Sequence([decoders.Fuse(), decoders.ByteFallback()]), "<0x41>", "<0x", "41>"),
    "expression": words(decoders.Sequence(SEQUENCE), "<0xE2>", "<0x82>", "<0xAC>", "<0x0A>"),
    "fused-expression": words(decoders.Sequence([decoders.Fuse(), decoders.Replace(Regex("a+b"), "c")]), "aa"),
}


def save(backend: Tokenizer, folder: Path, **settings: Any) -> Path:
    """A folder as transformers saves it."""
    kind: Any = PreTrainedTokenizerFast
    kind(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **settings).save_pretrained(
        folder
    )
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder
