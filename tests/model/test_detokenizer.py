"""Every decoder token by token, beside the ``tokenizers`` library, which sees all tokens at once."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders

from mpgpt.errors import ModelError, RequestError
from mpgpt.model.detokenizer import Detokenizer, strip

ATOMS = [
    "a", "aa", "b", "▁", "▁a", "##b", "##", "<0x0A>", "<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "<0x41>", "<0xff>",
    "<0x+4>", " ", ".", " .", "'", " '", "n't", " do", "not", "<pad>", "|", "</w>", "a</w>", "do</w>x</w>", "é", "Ã",
    "©", "ð", "ðŁ", "ĻĤ", "two words", "日本", "🙂", "s",
]  # fmt: skip
TOKENS = st.lists(st.sampled_from(ATOMS) | st.text(alphabet="ab ▁.'<0x>#é日Ãð|", max_size=4), max_size=14)
DECODERS: dict[str, Any] = {
    "ByteLevel": decoders.ByteLevel(),
    "ByteFallback": decoders.ByteFallback(),
    "Fuse": decoders.Fuse(),
    "Metaspace": decoders.Metaspace(),
    "Metaspace, never": decoders.Metaspace(prepend_scheme="never"),
    "WordPiece": decoders.WordPiece(),
    "WordPiece, untidy": decoders.WordPiece(cleanup=False),
    "CTC": decoders.CTC(),
    "CTC, untidy": decoders.CTC(cleanup=False),
    "BPEDecoder": decoders.BPEDecoder(),
    "Replace": decoders.Replace("▁", " "),
    "Replace two": decoders.Replace("aa", "b"),
    "Replace an expression": decoders.Replace(Regex("a+"), "x"),
    "Strip one": decoders.Strip(" ", 1, 0),
    "Strip two": decoders.Strip("a", 2, 0),
}
LLAMA: Any = decoders.Sequence([DECODERS[name] for name in ("Replace", "ByteFallback", "Fuse", "Strip one")])


def spec(decoder: Any) -> Any:
    return json.loads(decoder.__getstate__())


def compare(decoder: Any, tokens: list[str], cut: int) -> None:
    """What is certain is never taken back, and with the rest it is the text of all tokens so far."""
    detokenizer = Detokenizer.of(spec(decoder))
    certain = "".join(map(detokenizer.push, tokens[:cut]))
    assert certain + detokenizer.rest == decoder.decode(tokens[:cut])
    other = detokenizer.copy()
    more = "".join(map(detokenizer.push, tokens[cut:]))
    assert certain + more + detokenizer.rest == decoder.decode(list(tokens))
    assert "".join(map(other.push, tokens[cut:])) + other.rest == more + detokenizer.rest, "a copy goes its own way"


@pytest.mark.parametrize("name", DECODERS)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(tokens=TOKENS, cut=st.integers(0, 14))
def test_a_decoder_alone(name: str, tokens: list[str], cut: int) -> None:
    compare(DECODERS[name], tokens, cut)


@settings(max_examples=800, deadline=None, derandomize=True)
@given(names=st.lists(st.sampled_from(sorted(DECODERS)), min_size=2, max_size=4), tokens=TOKENS, cut=st.integers(0, 14))
def test_decoders_behind_one_another(names: list[str], tokens: list[str], cut: int) -> None:
    compare(decoders.Sequence([DECODERS[name] for name in names]), tokens, cut)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(tokens=TOKENS, cut=st.integers(0, 14))
def test_llamas_decoder(tokens: list[str], cut: int) -> None:
    compare(LLAMA, tokens, cut)


@pytest.mark.parametrize(
    ("tokens", "pieces", "rest"),
    [
        (["a", "b"], ["a", "b"], ""),
        (["<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "b"], ["", "", "", "", "🙂b"], ""),
        (["<0x0A>", "<0xF0>", "<0x9F>", "b"], ["", "", "", "\ufffd\ufffd\ufffdb"], ""),
        (["▁", "▁a", "<0x0A>"], ["", " a", ""], "\n"),
        (["<0xF0>"], [""], "\ufffd"),
    ],
)
def test_bytes_are_certain_when_their_run_is_over(tokens: list[str], pieces: list[str], rest: str) -> None:
    detokenizer = Detokenizer.of(spec(LLAMA))
    assert ([detokenizer.push(token) for token in tokens], detokenizer.rest) == (pieces, rest)


def test_a_byte_level_character_comes_with_its_last_byte() -> None:
    detokenizer = Detokenizer.of(spec(DECODERS["ByteLevel"]))
    assert [detokenizer.push(token) for token in ("a", "ðŁ", "Ļ", "Ĥ", "ð", "a")] == ["a", "", "", "🙂", "", "\ufffda"]


def test_without_a_decoder_there_are_spaces() -> None:
    detokenizer = Detokenizer.of(None)
    assert [detokenizer.push(token) for token in ("a", "", "b")] == ["a", " ", " b"]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([" ", ".", "'", "n't", "s", " 's", "a", " ?", ",", "m", "ve", "re"]), max_size=12))
def test_cleaning_up_is_transformers(tokens: list[str]) -> None:
    from transformers import PreTrainedTokenizerBase

    detokenizer = Detokenizer.of(spec(DECODERS["Fuse"]), clean_up=True)
    text = "".join(map(detokenizer.push, tokens)) + detokenizer.rest
    theirs: Any = PreTrainedTokenizerBase
    assert text == theirs.clean_up_tokenization(None, "".join(tokens))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet="ab", max_size=6), st.integers(0, 3), st.integers(0, 3))
def test_strip_takes_from_both_ends(text: str, start: int, stop: int) -> None:
    """The library panics where the two ends meet; else it is the same."""
    stripped = strip(text, "a", start, stop)
    front = text[: min(start, len(text) - len(text.lstrip("a")))]
    assert text.startswith(front) and stripped in text
    if "b" in text:
        assert stripped == decoders.Strip("a", start, stop).decode([text])
    else:
        assert len(stripped) == max(0, len(text) - start - stop)


def test_what_the_library_cannot_read_is_a_sentence() -> None:
    with pytest.raises(ModelError, match="decoder cannot be read"):
        Detokenizer.of({"type": "Tomorrow's"})


def test_a_panic_of_the_library_is_a_request_error() -> None:
    """Known to panic in tokenizers 0.22 and 0.23: both ends of one space."""
    steps = [decoders.Replace(Regex("x"), " "), decoders.Strip(" ", 1, 1)]
    specs = [spec(decoders.Fuse()), *map(spec, steps)]
    detokenizer = Detokenizer.of({"type": "Sequence", "decoders": specs})
    detokenizer.push("x")
    with pytest.raises(RequestError, match="tokenizer cannot take this text"):
        _ = detokenizer.rest
