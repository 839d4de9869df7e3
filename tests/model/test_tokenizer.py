"""Text to ids and back, with a small byte-level BPE made here: no model, no network."""

from __future__ import annotations

import functools
import io
import json
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from mpgpt.core import Request, Result, StageStats, StatsRound, Step
from mpgpt.engine.engine import Engine, Stream
from mpgpt.engine.scheduler import Scheduler
from mpgpt.errors import ModelError, RequestError
from mpgpt.model.tokenizer import BYTE_OF, TextStream, Tokenizer
from tests.support import vocabularies

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


def test_a_book_holds_up_no_other_thread(plain: Tokenizer) -> None:
    """Others must hear that this rank lives meanwhile."""
    beats, reading = 0, True

    def beat() -> None:
        nonlocal beats
        while reading:
            time.sleep(0.001)
            beats += 1

    thread = threading.Thread(target=beat)
    text = "Once upon a time there was a book. " * 100_000
    thread.start()
    try:
        before = beats
        assert len(plain.encode(text)) > 100_000
        assert beats - before > 5
    finally:
        reading = False
        thread.join()


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


# -- every kind of tokenizer, beside transformers


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Tokenizer, Any]]:
    """Ours and transformers' tokenizer of a kind, from one folder."""

    @functools.cache
    def of(kind: str, clean_up: bool = False) -> tuple[Tokenizer, Any]:
        settings = {"clean_up_tokenization_spaces": clean_up}
        folder = vocabularies.save(vocabularies.KINDS[kind], tmp_path_factory.mktemp(kind), **settings)
        auto: Any = PreTrainedTokenizerFast
        return Tokenizer(folder), auto.from_pretrained(folder)

    return of


class ScriptedRing:
    """A ring that says what it is given, a token a step."""

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids, self._results = iter(ids), deque[Result]()

    def push(self, step: Step) -> None:
        ids = tuple(next(self._ids) for row in step.rows for _ in range(row.outputs))
        self._results.append(Result(epoch=step.epoch, number=step.number, ids=ids))

    def pop(self, timeout: float | None = None) -> Result | StatsRound | None:
        return self._results.popleft() if self._results else None

    def request_stats(self, epoch: int, *, redial: bool = False) -> None: ...
    def stop(self, epoch: int) -> None: ...
    def stats_round(self, epoch: int) -> tuple[StageStats, ...]:
        return ()


def said(text: TextStream, ids: Sequence[int], prompt: Sequence[int] = (1,)) -> tuple[Stream, list[str]]:
    """What an engine makes of a model that says ``ids``."""
    scheduler = Scheduler(slots=1, context=1000, stages=1)
    engine = Engine(ScriptedRing(ids), scheduler, vocab=2**31, depth=1, wake=lambda: None, sleep=lambda: None)
    pieces: list[str] = []
    request = Request(ids=tuple(prompt), max_new_tokens=len(ids))
    stream = engine.submit(request, text, lambda stream, piece: pieces.append(piece))
    engine.drain()
    return stream, pieces


IDS = st.lists(st.integers(0, 330) | st.sampled_from([0, 1, 2, 10**5, 2**31 - 1]), min_size=1, max_size=40)


@pytest.mark.parametrize("clean_up", [False, True])
@pytest.mark.parametrize("kind", vocabularies.KINDS)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(ids=IDS | st.lists(st.integers(0, 24), min_size=1, max_size=40))
def test_random_ids_are_transformers_text(both: Any, kind: str, clean_up: bool, ids: list[int]) -> None:
    """Special, unknown and out-of-range ids among them; bytes that are no characters; and nothing is taken back."""
    ours, theirs = both(kind, clean_up)
    stream, pieces = said(ours.stream(), ids)
    assert (stream.finish_reason, stream.error) == ("length", "")
    assert "".join(pieces) == stream.text == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("clean_up", [False, True])
@pytest.mark.parametrize("kind", vocabularies.KINDS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(prompt=IDS, ids=IDS)
def test_a_continuation_is_what_is_added(
    both: Any, kind: str, clean_up: bool, prompt: list[int], ids: list[int]
) -> None:
    """Where the prompt's text stays what it was: new bytes can make its last ones a character."""
    ours, theirs = both(kind, clean_up)
    before = theirs.decode(prompt, skip_special_tokens=True)
    whole = theirs.decode(prompt + ids, skip_special_tokens=True)
    stream, pieces = said(ours.stream(after=prompt), ids, prompt)
    assert "".join(pieces) == stream.text and not stream.error
    if whole.startswith(before):
        assert before + stream.text == whole
    else:
        assert whole.endswith(stream.text)


@pytest.mark.parametrize("kind", ["llama", "metaspace", "word-piece", "none", "bpe-suffix", "byte-level", "ctc"])
def test_of_a_long_prompt_only_the_ends_are_looked_at(both: Any, kind: str) -> None:
    ours, theirs = both(kind)
    prompt = [id for id in range(3, 12)] * 100
    for ids in ([3, 4, 5], [11, 11, 3], [5, 9, 9]):
        whole = theirs.decode(prompt + ids)
        assert theirs.decode(prompt) + said(ours.stream(after=prompt), ids, prompt[:9])[0].text == whole


def test_a_first_space_is_text_only_behind_a_prompt(both: Any) -> None:
    ours, _ = both("llama")
    prompt = ours.encode("the capital is")
    (paris,) = (id for id in range(400) if ours.bytes_of(id) == b" Paris")
    assert "".join(streamed(ours.stream(after=prompt), [paris])) == " Paris"
    assert "".join(streamed(ours.stream(), [paris])) == "Paris"
    assert "".join(streamed(ours.stream(after=[0]), [paris])) == "Paris", "nothing but <s> before it"


@pytest.mark.parametrize("kind", ["llama", "byte-level"])
def test_a_prompt_that_ends_inside_a_character(both: Any, kind: str) -> None:
    """The new text has the whole character, and what else ended the prompt is not said again."""
    ours, _ = both(kind)
    ids = [next(id for id in range(400) if ours.bytes_of(id) == bytes([byte])) for byte in "\n🙂x".encode()]
    assert "".join(streamed(ours.stream(after=ids[:1]), ids[1:])) == "🙂x"
    assert "".join(streamed(ours.stream(after=ids[:3]), ids[3:]))[-2:] == "🙂x"


# -- bytes that are held back


def test_the_bytes_that_broke_servers(both: Any) -> None:
    """A newline, half a character, a letter: SentencePiece takes none of the three bytes for a character."""
    ours, theirs = both("llama")
    vocabulary = vocabularies.KINDS["llama"].get_vocab()
    ids = [vocabulary[name] for name in ("<0x0A>", "<0xF0>", "<0x9F>", "b")]
    stream, pieces = said(ours.stream(), ids)
    assert stream.text == "".join(pieces) == "\ufffd\ufffd\ufffdb" == theirs.decode(ids)


@pytest.mark.parametrize("stop", ["\n", "b\n", "🙂"])
def test_a_stop_of_held_bytes_is_complete_at_once(both: Any, stop: str) -> None:
    """Not a token later, when the run of bytes is over."""
    ours, _ = both("llama")
    vocabulary = vocabularies.KINDS["llama"].get_vocab()
    ids = [vocabulary["b"], *(vocabulary[f"<0x{byte:02X}>"] for byte in stop.lstrip("b").encode()), vocabulary["a"]]
    stream, _ = said(ours.stream([stop]), ids)
    assert (stream.finish_reason, stream.text, len(stream.ids)) == ("stop", "b".removesuffix(stop[:-1]), len(ids) - 1)


# -- where each token begins


def test_tokens_begin_where_their_text_does(both: Any) -> None:
    ours, _ = both("byte-level")
    vocabulary = vocabularies.KINDS["byte-level"].get_vocab()
    stream = ours.stream()
    streamed(stream, [vocabulary[name] for name in ("a", "ðŁ", "ĻĤ", "Ġa", "</s>", "b")])
    assert (stream.text, stream.starts) == ("a🙂 ab", [0, 1, 1, 2, 4, 4])


def test_bytes_that_are_no_character_begin_before_what_follows(both: Any) -> None:
    ours, _ = both("byte-level")
    vocabulary = vocabularies.KINDS["byte-level"].get_vocab()
    stream = ours.stream()
    streamed(stream, [vocabulary[name] for name in ("a", "ð", "Ł", "b", "ð", "Ł", "Ļ", "Ĥ", "c")])
    assert (stream.text, stream.starts) == ("a\ufffdb🙂c", [0, 1, 1, 2, 3, 3, 3, 3, 4])


def test_tokens_of_held_text_begin_in_it(both: Any) -> None:
    ours, _ = both("byte-level")
    vocabulary = vocabularies.KINDS["byte-level"].get_vocab()
    stream = ours.stream(["abab!"])
    assert streamed(stream, [vocabulary[name] for name in "xababx"]) == ["x", "", "", "", "", "ababx", ""]
    assert stream.starts == [0, 1, 2, 3, 4, 5]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(ids=IDS, stop=st.sampled_from(["", "a", " a", "\n", "ab"]))
def test_starts_rise_and_the_text_is_long_enough(both: Any, ids: list[int], stop: str) -> None:
    ours, _ = both("llama")
    stream, _ = said(text := ours.stream([stop]), ids)
    assert len(text.starts) == len(stream.ids) and text.starts == sorted(text.starts) and text.starts[0] == 0
    if not text.stopped:
        assert text.starts[-1] <= len(stream.text)


# -- names of tokens


def test_labels_are_distinct(both: Any) -> None:
    """As far as they can be, their text; of the same text the first has it; bytes of no text as OpenAI names them."""
    ours, _ = both("llama")
    vocabulary = vocabularies.KINDS["llama"].get_vocab()
    letter, byte, half, other = (vocabulary[name] for name in ("a", "<0x61>", "<0xF0>", "<0x9F>"))
    assert ours.labels_of([letter, byte, half, other, letter]) == [
        "a",
        "bytes:\\x61",
        "bytes:\\xf0",
        "bytes:\\x9f",
        "a",
    ]
    assert ours.labels_of([byte, letter]) == ["a", "bytes:\\x61"]
    assert ours.labels_of([10**5, 10**6, 10**7]) == ["", "token_id:1000000", "token_id:10000000"]
    everything = range(vocabularies.KINDS["llama"].get_vocab_size() + 5)
    assert len(set(ours.labels_of(everything))) == len(everything)


# -- tokenizer.json alone says which ids


PROMPTS = [
    "  7",
    "2023 and 12345",
    "def f(x):\n    return x ** 2  # 10\n",
    " a",
    "a",
    "Ünïcödé\t日本語 🙂",
    "<|im_start|>x",
    "",
]
CLASSES = ["GPT2Tokenizer", "GPT2TokenizerFast", "Qwen2Tokenizer", "LlamaTokenizer", "LlamaTokenizerFast",
           "T5Tokenizer", "BertTokenizer", "PreTrainedTokenizerFast", "NoSuchTokenizer", None]  # fmt: skip


@pytest.mark.parametrize("named", CLASSES)
def test_ids_are_those_of_tokenizer_json(smollm2: Path, tmp_path: Path, named: str | None) -> None:
    for name in ("tokenizer.json", "config.json", "generation_config.json", "chat_template.jinja"):
        shutil.copy(smollm2 / name, tmp_path / name)
    settings = json.loads((smollm2 / "tokenizer_config.json").read_text())
    settings = {key: value for key, value in settings.items() if key not in ("tokenizer_class", "backend")}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | ({"tokenizer_class": named} if named else {}))
    )
    theirs: Any = Backend.from_file(str(smollm2 / "tokenizer.json"))
    ours, whole = Tokenizer(tmp_path), Tokenizer(smollm2)
    for prompt in PROMPTS:
        ids = ours.encode(prompt)
        assert ids == theirs.encode(prompt).ids
        assert "".join(streamed(ours.stream(), ids)) == theirs.decode(ids)
    messages = [{"role": "user", "content": "What is  7?"}]
    rendered: Any = transformers.PreTrainedTokenizerFast
    asked = rendered.from_pretrained(smollm2).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.encode_chat(messages) == theirs.encode(asked, add_special_tokens=False).ids
    assert (ours.stop_ids, ours.can_chat) == (whole.stop_ids, True)


@pytest.mark.parametrize("add", [None, True, False])
@pytest.mark.parametrize("kind", ["llama", "byte-level", "word-piece"])
@pytest.mark.parametrize("named", ["LlamaTokenizer", "GPT2Tokenizer"])
def test_the_post_processor_is_the_files(tmp_path: Path, kind: str, named: str, add: bool | None) -> None:
    """Whether a prompt begins with a special token, tokenizer.json says; and it never cuts one off."""
    vocabularies.save(vocabularies.KINDS[kind], tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole | {"truncation": cut}))
    settings = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>"} | (
        {} if add is None else {"add_bos_token": add}
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer(tmp_path)
    for text in ("a b a. b", "</s> ab", "Köln"):
        assert ours.encode(text) == vocabularies.KINDS[kind].encode(text).ids
    assert ours.stop_ids == {1}


def test_a_special_token_that_only_the_settings_name_is_one(tmp_path: Path) -> None:
    """Of the vocabulary, but no added token of tokenizer.json: one id in a chat, and no text in an answer."""
    save(tmp_path, template="{{ messages[0].content }}<|user|>")
    path = tmp_path / "tokenizer.json"
    whole = json.loads(path.read_text())
    whole["added_tokens"] = [token for token in whole["added_tokens"] if token["content"] != "<|user|>"]
    path.write_text(json.dumps(whole))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<|user|>"}))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode_chat([{"role": "user", "content": "a"}]) == [*ids_of("a"), USER]
    assert "".join(streamed(tokenizer.stream(), [*ids_of("a"), USER])) == "a"
    assert tokenizer.stop_ids == {USER}


def test_vocabulary_and_merges_alone_are_read_as_the_class_says(tmp_path: Path) -> None:
    BACKEND.model.save(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    theirs: Any = transformers.AutoTokenizer
    reference = theirs.from_pretrained(tmp_path)
    tokenizer = Tokenizer(tmp_path)
    for text in [*SENTENCES, "  7"]:
        ids = tokenizer.encode(text)
        assert ids == reference(text).input_ids and "".join(streamed(tokenizer.stream(), ids)) == reference.decode(ids)


# -- a tokenizer.model alone


SAMPLES = [
    *SENTENCES,
    "Numbers 12345 and 678, spaces  and   more.",
    "the fox, the dog, the lazy lazy fox",
    "ab ba abab",
]
ODD = ["", " ", "  two", "trail ", "a  b   c", "12345", "日本語", "🙂 x", "\n", "a\nb", "\t", "▁", "▁a", "a▁b",
       "ﬁ ① x²", "x<turn>y", "<x> y<x>", "Straße\u00a0x", "a\u200bb", "never seen: Ω≈ç√"]  # fmt: skip
IDENTITY = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False}
PIECES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "vocab_size": 340, "split_digits": True, **IDENTITY},
    "gemma": {"model_type": "bpe", "vocab_size": 360, "add_dummy_prefix": False, **IDENTITY,
              "user_defined_symbols": ["<turn>", "\n\n"]},
    "bpe": {"model_type": "bpe", "vocab_size": 120},
    "unigram": {"model_type": "unigram", "vocab_size": 90},
    "unigram-bytes": {"model_type": "unigram", "vocab_size": 340, "byte_fallback": True},
    "char": {"model_type": "char", "vocab_size": 70, "control_symbols": ["<ctl>"]},
}  # fmt: skip


def trained(**options: Any) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    trainer: Any = sentencepiece.SentencePieceTrainer
    trainer.train(
        sentence_iterator=iter(SAMPLES * 3), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    return model.getvalue()


@pytest.mark.parametrize("kind", PIECES)
def test_a_sentencepiece_model_alone_is_read(tmp_path: Path, kind: str) -> None:
    """Its ids are the sentencepiece library's own, and so is the text."""
    import sentencepiece

    model = trained(**PIECES[kind])
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    theirs: Any = sentencepiece.SentencePieceProcessor(model_proto=model)
    ours = Tokenizer(tmp_path)
    for text in [*SAMPLES, *ODD]:
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text
        if not {0, *range(3, 10)}.intersection(ids):
            assert "".join(streamed(ours.stream(), ids)) == theirs.decode(ids)
    assert ours.stop_ids == {theirs.eos_id()} and not ours.can_chat


def test_a_sentencepiece_model_with_settings(tmp_path: Path) -> None:
    """A template, special tokens in what it writes, and whether a prompt begins with one."""
    (tmp_path / "tokenizer.model").write_bytes(trained(**PIECES["llama"]))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "chat_template": "<s>{{ messages[0].content }}</s>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = Tokenizer(tmp_path)
    plain = ours.encode("the fox")
    assert plain[0] == 1
    assert ours.encode_chat([{"role": "user", "content": "the fox"}]) == [1, *plain[1:], 2]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no SentencePiece model"),
        (b"IQ== 0\nIg== 1\nIw== 2\n", "is no SentencePiece model .*tokenizer.json is needed"),
        (b"\xff" * 100, "is no SentencePiece model"),
    ],
)
def test_what_is_no_sentencepiece_model_is_refused(tmp_path: Path, content: bytes, sentence: str) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match=sentence):
        Tokenizer(tmp_path)


def test_a_sentencepiece_model_of_words_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(model_type="word", vocab_size=20))
    with pytest.raises(ModelError, match="of kind word, which is not supported"):
        Tokenizer(tmp_path)


def test_a_byte_level_entry_that_is_no_bytes_is_its_own_text(both: Any) -> None:
    ours, theirs = both("byte-level")
    vocabulary = vocabularies.KINDS["byte-level"].get_vocab()
    for name in ("two words", "Ġa", "ðŁ", "added word"):
        raw = ours.bytes_of(vocabulary[name])
        assert raw.decode(errors="replace") == theirs.decode([vocabulary[name]])
