"""Prompts files as people write them, and records files as broken runs leave them."""

from __future__ import annotations

import json
import os
import resource
import stat
import threading
from pathlib import Path
from typing import Any

import pytest

from mpgpt.commands.batch_files import RECORD_KEYS, Prompt, Records, as_line, read_prompts, record
from mpgpt.errors import OutputError, ReaderGone, UsageError


def prompts_of(folder: Path, content: str | bytes, name: str = "prompts.jsonl") -> list[Prompt]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts(path)


def only(folder: Path, line: str) -> Prompt:
    (prompt,) = prompts_of(folder, line)
    return prompt


# -- .txt


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "prompts.json", "jsonl", "prompts.jsonl.txt"])
def test_a_text_file_has_a_prompt_a_line(tmp_path: Path, name: str) -> None:
    assert prompts_of(tmp_path, "Once upon\n\n  \t\n  two spaces kept \nGrüße 🙂", name) == [
        Prompt(id=1, prompt="Once upon"),
        Prompt(id=4, prompt="  two spaces kept "),
        Prompt(id=5, prompt="Grüße 🙂"),
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_line_ends_and_byte_order_marks_are_no_part_of_prompts(tmp_path: Path, end: str, mark: bytes) -> None:
    prompts = prompts_of(tmp_path, mark + f"a{end}{end}b{end}".encode(), "p.txt")
    assert [(p.id, p.prompt) for p in prompts] == [(1, "a"), (3, "b")]


def test_odd_white_space_does_not_cut_a_prompt(tmp_path: Path) -> None:
    text = "a\u2028b\x0cc\x85d"
    assert [p.prompt for p in prompts_of(tmp_path, text, "p.txt")] == [text]
    assert only(tmp_path, json.dumps({"prompt": text}, ensure_ascii=False)).prompt == text


# -- files that cannot be


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"good\n\nbad \xff\n", "byte 11, in line 3"),
        (b"\xc3", "byte 1, in line 1"),
        (b"\xef\xbb\xbf\n\xff", "byte 5, in line 2"),
        (b"\xff\xfea\0\n\0", "byte 1, in line 1"),
    ],
)
def test_what_is_not_utf8_is_refused_with_its_line(tmp_path: Path, name: str, content: bytes, where: str) -> None:
    with pytest.raises(UsageError, match=f"{name} is not UTF-8: {where}$"):
        prompts_of(tmp_path, content, name)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
@pytest.mark.parametrize("content", [b"", b"\n", b" \n\t\r\n", b"\xef\xbb\xbf"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(UsageError, match="holds no prompts"):
        prompts_of(tmp_path, content, name)


def test_a_file_that_is_absent_or_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"absent\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="is a directory"):
        read_prompts(tmp_path)


# -- .jsonl


def test_a_line_says_what_it_wants(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    wants: dict[str, float | None] = {
        "temperature": 1,
        "top_k": 5,
        "top_p": 0.5,
        "min_p": 0.1,
        "repetition_penalty": 1.2,
    }
    lines = [
        {"id": "x", "prompt": "Once", "max_new_tokens": 7, "seed": 9, "stop": "END"} | wants,
        {"messages": messages, "stop": ["a", "b"], "top_k": 0},
        {"id": -5, "prompt": ""},
    ]
    assert prompts_of(tmp_path, "\r\n".join(map(json.dumps, lines)) + "\n") == [
        Prompt(id="x", prompt="Once", max_new_tokens=7, seed=9, stops=("END",), overrides=wants),
        Prompt(id=2, prompt=messages, stops=("a", "b"), overrides={"top_k": 0}),
        Prompt(id=-5, prompt=""),
    ]


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ('{"prompt": "a"', "delimiter"),
        ("prompt", "Expecting value"),
        ('{"prompt": "a"} {}', "Extra data"),
        pytest.param("[" * 100_000, "nested too deeply", id="brackets"),
        ('"a"', "dictionary"),
        ("null", "dictionary"),
        ("[]", "dictionary"),
        ("{}", "either prompt or messages"),
        ('{"prompt": null}', "either prompt or messages"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}', "either prompt or messages"),
        ('{"prompt": "a", "max_tokens": 5}', "max_tokens: Extra inputs"),
        ('{"prompt": 5}', "prompt: Input should be a valid string"),
        ('{"prompt": ["a"]}', "prompt: "),
        ('{"messages": []}', "messages: "),
        ('{"messages": ["a"]}', "messages.0: "),
        ('{"messages": [{"role": "user", "content": 1}]}', "messages.0.content: "),
        ('{"messages": [{"role": "user", "content": null}]}', "messages.0.content: "),
        ('{"messages": [{"content": "a"}]}', "messages.0: a message needs a role"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "user"}]}', "messages.1: a message needs a content"),
        ('{"messages": [{"role": "user", "text": "a"}]}', "messages.0: a message needs a content"),
        ('{"messages": [{}]}', "messages.0: a message needs a role"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "messages.0: the role is 'robot'; it can be system, "),
        ('{"messages": [{"role": "", "content": "a"}]}', "messages.0: the role is ''; "),
        ('{"prompt": "a", "id": 1.5}', "id"),
        ('{"prompt": "a", "id": true}', "id"),
        ('{"prompt": "a", "id": ["a"]}', "id"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens: "),
        ('{"prompt": "a", "max_new_tokens": "9"}', "max_new_tokens: "),
        ('{"prompt": "a", "max_new_tokens": 1000001}', "max_new_tokens: "),
        ('{"prompt": "a", "temperature": "hot"}', "temperature: "),
        ('{"prompt": "a", "top_k": 1.5}', "top_k: "),
        ('{"prompt": "a", "seed": false}', "seed: "),
        ('{"prompt": "a", "stop": 5}', "stop"),
        ('{"prompt": "a", "stop": ["b", 5]}', "stop"),
    ],
)
def test_a_bad_line_is_an_error_of_that_prompt_alone(tmp_path: Path, line: str, word: str) -> None:
    before, bad, after = prompts_of(tmp_path, f'{{"prompt": "1"}}\n\n{line}\n{{"prompt": "4"}}\n')
    assert (before, after) == (Prompt(id=1, prompt="1"), Prompt(id=4, prompt="4"))
    assert (bad.id, bad.prompt) == (3, None)
    assert bad.error.startswith("line 3: ")
    assert word in bad.error
    assert "pydantic" not in bad.error and "Value error" not in bad.error


@pytest.mark.parametrize("name", ["p.jsonl", "p.JSONL", "p.JsonL", "p.ndjson", "p.NDJSON", "p.txt.ndjson"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_of_json_by_any_of_their_names(tmp_path: Path, name: str, mark: bytes) -> None:
    (good, bad) = prompts_of(tmp_path, mark + b'{"prompt": "a", "id": "x"}\nb\n', name)
    assert good == Prompt(id="x", prompt="a") and bad.error.startswith("line 2: ")


def test_a_developer_is_a_system(tmp_path: Path) -> None:
    """As the API has it; templates know no developer."""
    said = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": "Hi", "name": "Ada"}]
    prompt = only(tmp_path, json.dumps({"messages": said}))
    assert prompt.prompt == [{"role": "system", "content": "Be kind."}, said[1]]


def test_an_id_that_came_before_makes_a_line_bad(tmp_path: Path) -> None:
    lines = ['{"id": "a", "prompt": "1"}', '{"id": "a", "prompt": "2"}', '{"id": "1", "prompt": "3"}']
    good, bad, other = prompts_of(tmp_path, "\n".join(lines))
    assert (good.error, other.error) == ("", "")
    assert "'a' came before" in bad.error


def test_ids_stay_distinct_whatever_the_file_says(tmp_path: Path) -> None:
    ids = ["a#3", "a", "a", "a", 6, None, "a#3", 9]
    lines = [json.dumps({"prompt": str(n)} | ({} if i is None else {"id": i})) for n, i in enumerate(ids)]
    prompts = prompts_of(tmp_path, "\n".join([*lines, "broken"]))
    assert len({p.id for p in prompts}) == len(prompts) == 9
    assert [bool(p.error) for p in prompts] == [False, False, True, True, False, True, True, False, True]
    assert prompts[-1].error.startswith("line 9: "), "its own error says more than that its number was taken"


# -- records


HELLO = Prompt(id=1, prompt="Hello")
CHAT = Prompt(id="c", prompt=[{"role": "user", "content": "Grüße 🙂\nzwei"}])
LAST = Prompt(id=3, prompt="Last")
PROMPTS = [HELLO, CHAT, LAST]


def lines_of(path: Path) -> list[Any]:
    content = path.read_bytes()
    assert content == b"" or content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def write(path: Path, *records: dict[str, Any], more: bytes = b"") -> bytes:
    content = b"".join(json.dumps(one).encode() + b"\n" for one in records) + more
    path.write_bytes(content)
    return content


def test_a_record_has_all_keys_in_order() -> None:
    full = record(
        HELLO, text="x", token_ids=[1, 2], prompt_tokens=3, finish_reason="stop", times=(0.12345678, 1.23456789)
    )
    assert tuple(full) == tuple(record(CHAT, error="no")) == RECORD_KEYS
    assert list(full.values()) == [1, "Hello", "x", [1, 2], 3, 2, "stop", None, 0.123457, 1.234568]
    assert list(record(CHAT, error="no").values()) == ["c", CHAT.prompt, "", [], 0, 0, None, "no", None, 0.0]


def test_records_are_written_by_whole_lines_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    records = Records(path, PROMPTS)
    assert records.done == frozenset()
    assert path.read_bytes() == b""
    written = [record(HELLO, text="a\nb\u2028c"), record(CHAT, text="é" * 100_000), record(LAST, text="\ud83d")]
    for n, one in enumerate(written, 1):
        records.write(one)
        assert lines_of(path) == written[:n], "on disk before the next one is made, and without a flush"
    records.close()
    assert "Grüße 🙂" in path.read_bytes().decode(errors="replace"), "people read these files"
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_a_run_is_taken_up_where_it_broke_off(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    kept = [record(CHAT, text="c"), record(HELLO, text="h")]
    write(path, kept[0], record(LAST, error="too long"), kept[1], more=b'{"id": 3, "pro')
    records = Records(path, PROMPTS)
    assert records.done == {1, "c"}
    assert lines_of(path) == kept
    records.write(record(LAST, text="l"))
    records.close()
    assert lines_of(path) == [*kept, record(LAST, text="l")]
    again = Records(path, PROMPTS)
    again.close()
    assert again.done == {1, "c", 3}


HALVES = [
    Prompt(id=1, prompt="a\ud800"),
    Prompt(id="\ud83d", prompt="Grüße"),
    Prompt(id=3, prompt=[{"role": "user", "content": "\udcff"}]),
]


@pytest.mark.parametrize("odd", HALVES)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_half_a_surrogate_pair_is_escaped_again(odd: Prompt, ascii_only: bool) -> None:
    line = as_line(record(odd, text="\udfff", error="\ud800"), ascii_only=ascii_only)
    assert json.loads(line.encode()) == record(odd, text="\udfff", error="\ud800")
    assert "\\udfff" in line and line.endswith("}\n") and line.count("\n") == 1
    assert "Grüße 🙂" in as_line(record(CHAT)), "the others are as people read them"
    assert as_line(record(CHAT), ascii_only=True).isascii()


@pytest.mark.parametrize("raw", [False, True], ids=["escaped", "as it was written once"])
def test_half_a_surrogate_pair_survives_being_taken_up(tmp_path: Path, raw: bool) -> None:
    path = tmp_path / "out.jsonl"
    written = [record(odd, text="\udfff") for odd in [*HALVES, CHAT]]
    records = Records(path, [*HALVES, CHAT])
    for one in written:
        records.write(one)
    records.close()
    whole = path.read_text(encoding="utf-8")
    if raw:
        path.write_bytes(
            b"".join(json.dumps(r, ensure_ascii=False).encode(errors="surrogatepass") + b"\n" for r in written)
        )
    again = Records(path, [*HALVES, CHAT])
    again.close()
    assert again.done == {1, "\ud83d", 3, "c"}
    assert path.read_text(encoding="utf-8") == whole


@pytest.mark.parametrize(
    "old",
    [
        record(Prompt(id=1, prompt="Hullo"), text="h"),
        record(Prompt(id=1, prompt=[{"role": "user", "content": "Hello"}]), text="h"),
        record(Prompt(id="1", prompt="Hello"), text="h"),
        record(Prompt(id=8, prompt="Hello"), text="h"),
        record(HELLO, text="h", error="no"),
    ],
    ids=["prompt changed", "became a chat", "id of another type", "no longer asked", "failed"],
)
def test_records_of_other_prompts_are_dropped(tmp_path: Path, old: dict[str, Any]) -> None:
    path = tmp_path / "out.jsonl"
    write(path, old, record(LAST, text="l"))
    records = Records(path, PROMPTS)
    records.close()
    assert records.done == {3}
    assert lines_of(path) == [record(LAST, text="l")]


def test_a_prompt_has_one_record(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, record(HELLO, text="first"), record(HELLO, text="second"))
    Records(path, PROMPTS).close()
    assert lines_of(path) == [record(HELLO, text="first")]


@pytest.mark.parametrize("more", [b'{"id": 1, "prompt": "Hello", "te', b'{"id": ', b""])
def test_a_first_line_that_broke_off_is_begun_anew(tmp_path: Path, more: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(more)
    Records(path, PROMPTS).close()
    assert path.read_bytes() == b""


FOREIGN = {
    "text": b"Dear diary,\nno JSON here.\n",
    "one line": b"secrets",
    "other objects": b'{"id": 1, "prompt": "Hello"}\n',
    "a key too many": json.dumps(record(HELLO) | {"more": 1}).encode() + b"\n",
    "no object": b"[1, 2]\n",
    "an empty line": b"\n",
    "an id that is none": json.dumps(record(HELLO) | {"id": [1]}).encode() + b"\n",
    "an id that only seems equal": json.dumps(record(HELLO) | {"id": True}).encode() + b"\n",
    "nested deeply": b"[" * 100_000 + b"\n",
    "binary": bytes(range(256)),
    "a good line, then text": json.dumps(record(HELLO)).encode() + b"\nnotes\n",
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_file_of_something_else_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    with pytest.raises(UsageError, match="give another name"):
        Records(path, PROMPTS)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["out.jsonl"]


def test_the_line_that_is_no_record_is_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, record(HELLO), more=b"notes\n")
    with pytest.raises(UsageError, match="its line 2 is not a record"):
        Records(path, PROMPTS)


def test_places_where_no_file_can_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"the folder .*absent does not exist"):
        Records(tmp_path / "absent" / "out.jsonl", PROMPTS)
    with pytest.raises(UsageError, match="is a directory"):
        Records(tmp_path, PROMPTS)
    with pytest.raises(UsageError, match="cannot be written: File name too long"):
        Records(tmp_path / ("n" * 256), PROMPTS)
    assert os.listdir(tmp_path) == []


def test_a_link_is_written_through_and_the_file_stays_as_it_was(tmp_path: Path) -> None:
    real, link = tmp_path / "far" / "real.jsonl", tmp_path / "out.jsonl"
    real.parent.mkdir()
    link.symlink_to("far/real.jsonl")
    for error in ("no", None):
        records = Records(link, PROMPTS)
        records.write(record(HELLO, text="h", error=error))
        records.close()
        assert lines_of(real) == [record(HELLO, text="h", error=error)], "what failed is dropped from the real file"
        real.chmod(0o600)
    assert link.is_symlink() and stat.S_IMODE(real.stat().st_mode) == 0o600
    assert (os.listdir(real.parent), sorted(os.listdir(tmp_path))) == (["real.jsonl"], ["far", "out.jsonl"])
    Records(link, PROMPTS).close()
    write(real, more=b"notes\n")
    with pytest.raises(UsageError, match=r"out\.jsonl exists, and its line 1 is not a record"):
        Records(link, PROMPTS)


def test_hard_links_stay_one_file(tmp_path: Path) -> None:
    path, other = tmp_path / "out.jsonl", tmp_path / "other"
    write(path, record(HELLO, error="no"), record(LAST, text="l"))
    other.hardlink_to(path)
    Records(path, PROMPTS).close()
    assert lines_of(other) == [record(LAST, text="l")] and path.samefile(other)


def test_a_file_with_nothing_to_drop_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    records = Records(path, PROMPTS)
    records.write(record(CHAT, text="c"))
    records.close()
    before = path.stat()
    again = Records(path, PROMPTS)
    again.close()
    assert again.done == {"c"}
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_devices_and_pipes_are_appended_to_and_stay(tmp_path: Path) -> None:
    (tmp_path / "null").symlink_to(os.devnull)
    records = Records(tmp_path / "null", PROMPTS)
    records.write(record(HELLO))
    records.close()
    assert records.done == frozenset()
    assert (tmp_path / "null").is_symlink() and Path(os.devnull).is_char_device()
    records = Records(Path("/dev/full"), PROMPTS)
    with pytest.raises(OutputError, match=r"^--out /dev/full cannot be written: No space left on device$"):
        records.write(record(HELLO))
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    records = Records(pipe, PROMPTS)
    records.write(record(HELLO, text="h"))
    records.close()
    reader.join()
    assert [json.loads(line) for line in got] == [record(HELLO, text="h")] and pipe.is_fifo()


def test_a_pipe_whose_reader_has_gone_says_so_without_words(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    records = Records(Path(f"/dev/fd/{writing}"), PROMPTS)
    os.close(reading)
    with pytest.raises(ReaderGone, match=r"^$"):
        records.write(record(HELLO))
    records.close()
    os.close(writing)


def test_a_full_disk_is_named_and_whole_records_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    write(path, record(CHAT, text="c"))
    records = Records(path, PROMPTS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 300, limits[1]))
    try:
        records.write(record(HELLO, text="h"))
        with pytest.raises(OutputError, match=r"out\.jsonl cannot be written: File too large; it holds 2 records, and"):
            records.write(record(LAST, text="l" * 300))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    records.close()
    assert lines_of(path) == [record(CHAT, text="c"), record(HELLO, text="h")]
    again = Records(path, PROMPTS)
    again.write(record(LAST, text="l"))
    again.close()
    assert again.done == {"c", 1} and len(lines_of(path)) == 3


def test_nothing_is_lost_when_the_new_file_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.jsonl"
    content = write(path, record(HELLO, text="h"), record(LAST, error="no"))

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UsageError, match=r"out\.jsonl cannot be written: No space left on device"):
        Records(path, PROMPTS)
    assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["out.jsonl"]
