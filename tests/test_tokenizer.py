"""Text to ids and back, with a small byte-level BPE made here: no model, no network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mpgpt.errors import ModelError, RequestError
from mpgpt.tokenizer import BYTE_OF, TextStream, Tokenizer

SPECIALS = ["<|end|>", "<|start|>", "<|user|>"]
END, START, USER = 0, 1, 2
SENTENCES = [
    "The quick brown fox jumps over the lazy dog. ",
    "Grüße aus Köln, schöne Füße! ",
    "日本語のテキスト、日本語。",
    "🙂🙃🙂🚀 emoji 👩‍👩‍👧 🙂🚀 ",
]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|user|>{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


def backend() -> Backend:
    """Bytes, 30 merges and three special tokens; a prompt begins with <|start|>."""
    made = cast(Any, Backend)(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = cast(Any, trainers.BpeTrainer)(
        vocab_size=256 + len(SPECIALS) + 30, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(SENTENCES, trainer)
    made.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", START)])
    return cast(Backend, made)


BACKEND = backend()
VOCAB = BACKEND.get_vocab_size()


def save(folder: Path, *, template: str | None = None, eos: str | None = "<|end|>", **files: Any) -> Path:
    """A model folder as far as a tokenizer needs it."""
    BACKEND.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos, "chat_template": template}
    settings = {key: value for key, value in settings.items() if value is not None}
    files = {"tokenizer_config": settings, "config": {"model_type": "gpt2"}} | files
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(save(tmp_path_factory.mktemp("chatty"), template=TEMPLATE))


def ids_of(text: str) -> list[int]:
    ids: list[int] = BACKEND.encode(text, add_special_tokens=False).ids
    return ids


def byte_ids(data: bytes) -> list[int]:
    """One id a byte: no merge, so that every character of more than a byte is cut."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()  # printable bytes stand for themselves, the others from 256 on
    others = iter(range(256, 512))
    letters = [chr(b) if chr(b) in alphabet else chr(next(others)) for b in range(256)]
    assert set(letters) == set(alphabet)
    vocab: dict[str, int] = BACKEND.get_vocab()
    return [vocab[letters[b]] for b in data]


def streamed(stream: TextStream, ids: Sequence[int]) -> list[str]:
    """The pieces as a listener hears them, the last at the end; pushes end at a stop, as the engine's do."""
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


# -- to ids


@pytest.mark.parametrize("text", [*SENTENCES, "", " ", "a\x00b", "never seen: Ω≈ç√"])
def test_text_becomes_ids_and_comes_back(plain: Tokenizer, text: str) -> None:
    ids = plain.encode(text)
    assert ids == [START, *ids_of(text)]
    assert "".join(streamed(plain.stream(), ids)) == text


def test_a_conversation_becomes_ids_up_to_the_answer(chatty: Tokenizer) -> None:
    ids = chatty.encode_chat([{"role": "system", "content": "Grüße"}, {"role": "user", "content": "Hi"}])
    assert BACKEND.decode(ids, skip_special_tokens=False) == "<|user|>system: Grüße\n<|user|>user: Hi\nassistant:"
    assert ids.count(USER) == 2
    assert START not in ids, "the template alone says what a conversation begins with"


def test_without_a_template_there_is_no_conversation(plain: Tokenizer, chatty: Tokenizer) -> None:
    assert (plain.can_chat, chatty.can_chat) == (False, True)
    with pytest.raises(RequestError, match=r"no chat template.*--raw"):
        plain.encode_chat([{"role": "user", "content": "Hi"}])


def test_what_a_template_refuses_is_that_requests_error(chatty: Tokenizer) -> None:
    with pytest.raises(RequestError, match="refuses these messages: no tools here"):
        chatty.encode_chat([{"role": "tool", "content": "Hi"}])


def test_a_damaged_template_is_a_request_error(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="refuses these messages"):
        Tokenizer(save(tmp_path, template="{% for m in %}")).encode_chat([{"role": "user", "content": "Hi"}])


def test_half_a_surrogate_pair_is_no_text(plain: Tokenizer, chatty: Tokenizer) -> None:
    with pytest.raises(RequestError, match="character 3 is half of a surrogate pair"):
        plain.encode("ab\ud800c")
    with pytest.raises(RequestError, match="surrogate"):
        chatty.encode_chat([{"role": "user", "content": "\udfff"}])


# -- folders


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        Tokenizer(tmp_path)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        Tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"version": "1.0", "model": {"type": "none"}}'])
def test_a_damaged_tokenizer_is_refused(tmp_path: Path, content: str) -> None:
    save(tmp_path, tokenizer=content)
    with pytest.raises(ModelError, match=r"the tokenizer in .* cannot be read"):
        Tokenizer(tmp_path)


def test_a_tokenizer_cut_short_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path) / "tokenizer.json"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot be read"):
        Tokenizer(tmp_path)


def test_a_folders_own_code_is_not_run_nor_asked_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def yes(question: str = "") -> str:
        asked.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", yes)
    mapped = {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    save(tmp_path, config={"model_type": "own"} | mapped, tokenizer_config={"tokenizer_class": "Own"} | mapped)
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ModelError, match="contains custom code"):
        Tokenizer(tmp_path)
    assert (asked, (tmp_path / "ran").exists()) == ([], False)


# -- stop ids


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": 7}}, {7}),
        ({"generation_config": {"eos_token_id": 0}}, {0}),
        ({"generation_config": {"eos_token_id": [7, 8]}}, {7, 8}),
        ({"generation_config": {"eos_token_id": 7}, "config": {"model_type": "gpt2", "eos_token_id": 9}}, {7}),
        ({"config": {"model_type": "gpt2", "eos_token_id": 9}}, {9}),
        ({"config": {"model_type": "gpt2", "eos_token_id": [9, 0]}}, {9, 0}),
        ({"generation_config": {}, "config": {"model_type": "gpt2", "eos_token_id": 9}}, {9}),
        ({"generation_config": {"eos_token_id": None}}, {END}),
        ({"generation_config": "{", "config": {"model_type": "gpt2", "eos_token_id": 9}}, {9}),
        ({"generation_config": "[]"}, {END}),
        ({"generation_config": {"eos_token_id": "<|end|>"}}, {END}),
        ({"generation_config": {"eos_token_id": [[1]]}}, {END}),
        ({}, {END}),
        ({"eos": "<|user|>"}, {USER}),
        ({"eos": None}, set()),
    ],
)
def test_where_the_stop_ids_come_from(tmp_path: Path, files: dict[str, Any], expected: set[int]) -> None:
    assert Tokenizer(save(tmp_path, **files)).stop_ids == expected


# -- to text


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, VOCAB - 1), max_size=30))
def test_the_pieces_are_the_text_of_all_ids(ids: list[int]) -> None:
    """Any ids, also those whose bytes are no UTF-8: then, too, nothing is lost, repeated or raised."""
    stream = TextStream(BACKEND, [])
    pieces = streamed(stream, ids)
    assert "".join(pieces) == stream.text == BACKEND.decode(ids, skip_special_tokens=True)
    assert not stream.stopped


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text(alphabet="aß語🙂🚀👩\u200d é.\n", max_size=20))
def test_a_character_comes_out_whole_or_not_yet(text: str) -> None:
    stream = TextStream(BACKEND, [])
    shown = ""
    for token in byte_ids(text.encode()):
        shown += stream.push(token)
        assert "\ufffd" not in shown
        assert text.startswith(shown) and stream.text == shown
    assert shown + stream.finish() == text


def test_a_character_that_is_never_completed_comes_out_at_the_end() -> None:
    stream = TextStream(BACKEND, [])
    assert streamed(stream, byte_ids("a🙂".encode()[:-1])) == ["a", "", "", "", "\ufffd"]
    assert stream.text == "a\ufffd"


def test_special_tokens_are_not_shown() -> None:
    ids = [START, *ids_of("a fox"), USER, *ids_of(" jumps"), END]
    assert "".join(streamed(TextStream(BACKEND, []), ids)) == "a fox jumps"


def test_ids_that_only_the_model_knows_are_no_text() -> None:
    """Models pad their vocabulary to round numbers."""
    assert "".join(streamed(TextStream(BACKEND, []), [*ids_of("a"), VOCAB + 5, *ids_of("b")])) == "ab"


# -- stops


def letters(text: str, *stops: str) -> tuple[list[str], TextStream]:
    """The pieces of a text that comes byte by byte."""
    stream = TextStream(BACKEND, list(stops))
    return streamed(stream, byte_ids(text.encode())), stream


@pytest.mark.parametrize(
    ("text", "stops", "pieces", "stopped"),
    [
        ("abENDc", ["END"], ["a", "b", "", "", "", ""], True),
        ("abENc", ["END"], ["a", "b", "", "", "ENc", ""], False),
        ("abEN", ["END"], ["a", "b", "", "", "EN"], False),  # held back, and released at the end
        ("EEND", ["END"], ["", "E", "", "", ""], True),
        ("END", ["END"], ["", "", "", ""], True),
        ("ababac", ["abac"], ["", "", "", "ab", "", "", ""], True),
        ("xaby", ["a", "ab"], ["x", "", ""], True),  # the shorter one is complete first
        ("xaby", ["ab", "a"], ["x", "", ""], True),
        ("xabz", ["abc", "b"], ["x", "", "a", ""], True),
        ("xay", ["ab", "ac"], ["x", "", "ay", ""], False),
        ("x\n\ny", ["\n\n"], ["x", "", "", ""], True),
        ("a🙂b", ["🙂"], ["a", "", "", "", "", ""], True),
        ("ab", ["", "c"], ["a", "b", ""], False),  # an empty stop stops nothing
        ("ab", [], ["a", "b", ""], False),
    ],
)
def test_stops_that_come_byte_by_byte(text: str, stops: list[str], pieces: list[str], stopped: bool) -> None:
    got, stream = letters(text, *stops)
    assert (got, stream.stopped) == (pieces, stopped)
    assert stream.text == "".join(pieces)


def test_a_stop_in_the_middle_of_a_token_cuts_it() -> None:
    """One token holds the end of the text, the stop and more."""
    (token,) = [i for i in range(VOCAB) if BACKEND.decode([i]) == "日本語"]
    stream = TextStream(BACKEND, ["本"])
    assert streamed(stream, [*ids_of("a"), token]) == ["a", "日", ""]
    assert stream.stopped


def test_a_stop_inside_what_the_decoder_holds_back_is_found_at_the_end() -> None:
    """A token of a stop and the beginning of a character: its text comes out at the end only, and not the stop."""
    made = cast(Any, Backend)(models.BPE(vocab={"a": 0, "Eð": 1}, merges=[]))
    made.decoder = decoders.ByteLevel()
    stream = TextStream(made, ["E"])
    assert streamed(stream, [0, 1]) == ["a", "", ""]
    assert stream.text == "a"


def test_after_a_stop_nothing_comes() -> None:
    stream = TextStream(BACKEND, ["b"])
    assert [stream.push(i) for i in byte_ids(b"abcd")] == ["a", "", "", ""]
    assert (stream.finish(), stream.text) == ("", "a")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.text(alphabet="ab語🙂", max_size=14),
    st.lists(st.text(alphabet="ab語🙂", min_size=1, max_size=3), max_size=3),
)
def test_the_text_ends_before_the_first_stop_that_is_complete(text: str, stops: list[str]) -> None:
    pieces, stream = letters(text, *stops)
    whole = min((text[:n] for n in range(len(text) + 1) if any(s in text[:n] for s in stops)), key=len, default=None)
    if whole is None:
        assert ("".join(pieces), stream.stopped) == (text, False)
    else:
        assert ("".join(pieces), stream.stopped) == (whole[: min(whole.find(s) for s in stops if s in whole)], True)
    assert not any(stop in "".join(pieces) for stop in stops)


def test_a_token_is_the_bytes_that_it_stands_for(plain: Tokenizer) -> None:
    """Joined they are the text, where no token alone has to be any."""
    for sentence in SENTENCES:
        ids = plain.encode(sentence)
        assert b"".join(map(plain.bytes_of, ids)) == b"<|start|>" + sentence.encode()
    assert plain.bytes_of(END) == b"<|end|>"
    assert plain.bytes_of(10**6) == b""


def test_bytes_are_named_as_transformers_names_them() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert {byte: character for character, byte in BYTE_OF.items()} == bytes_to_unicode()  # type: ignore[no-untyped-call]


def test_a_sentencepiece_token_is_the_bytes_that_it_stands_for(tmp_path: Path) -> None:
    vocabulary = {"<unk>": 0, "<0xF0>": 1, "\u2581a": 2, "b": 3}
    made = cast(Any, Backend)(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>"))
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    tokenizer = Tokenizer(tmp_path)
    assert [tokenizer.bytes_of(id) for id in range(4)] == [b"<unk>", b"\xf0", b" a", b"b"]
