"""Commands whose standard input, output and error are closed, full, unread, or of an encoding of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tests.support.launch import ENV, ROOT, mpgpt, mpirun

WHAT_IF = ("plan", "--what-if", ROOT / "hostfiles" / "what-if" / "standard.yaml")
SHORT = ("--raw", "--ignore-eos", "--max-new-tokens", "5", "--threads", "1")
PRINTING = [("--version",), ("--help",), ("generate", "--help"), WHAT_IF]


def run(
    *arguments: str | Path, stdout: int | IO[Any] = subprocess.PIPE, closed: str = "",
    stdin: bytes = b"", env: dict[str, str] | None = None,
) -> tuple[int, bytes, str]:  # fmt: skip
    """The exit status and the two outputs of mpgpt; ``closed`` is what a shell takes, such as ``>&-``."""
    command = mpirun(0, "-m", "mpgpt", *arguments)
    if closed:
        command = ["sh", "-c", f'exec "$@" {closed}', "sh", *command]
    done = subprocess.run(
        command, input=stdin, stdout=stdout, stderr=subprocess.PIPE, timeout=120,
        env=ENV | (env or {}), cwd=ROOT, check=False,
    )  # fmt: skip
    errors = done.stderr.decode()
    assert "Traceback" not in errors and "Exception ignored" not in errors, errors
    return done.returncode, done.stdout or b"", errors


@pytest.fixture
def unread() -> Iterator[int]:
    """The writing end of a pipe that nobody reads."""
    reading, writing = os.pipe()
    os.close(reading)
    yield writing
    os.close(writing)


# -- standard output


@pytest.mark.parametrize("arguments", PRINTING)
def test_output_that_cannot_be_written_is_one_sentence(arguments: tuple[str | Path, ...], unread: int) -> None:
    with open("/dev/full", "wb") as full:
        status, _, errors = run(*arguments, stdout=full)
    assert (status, errors) == (1, "mpgpt: standard output cannot be written: No space left on device\n")
    status, output, errors = run(*arguments, closed=">&-")
    assert (status, output, errors) == (1, b"", "mpgpt: standard output cannot be written: it is closed\n")
    status, _, errors = run(*arguments, stdout=unread)
    assert (status, errors) == (141, "")


def test_generating_for_nobody(models: dict[str, Path], tmp_path: Path, unread: int) -> None:
    source = tmp_path / "in.txt"
    source.write_text("".join(f"prompt {n}\n" for n in range(40)))
    one = ("generate", "--model", models["llama"], "--prompt", "hello", *SHORT)
    many = ("generate", "--model", models["llama"], "--prompts", source, *SHORT)
    out = (*many, "--out", "/dev/stdout")
    for arguments in (one, many, out):
        assert run(*arguments, stdout=unread)[::2] == (141, "")
    for arguments, what, closed in ((one, "standard output", 1), (out, "--out /dev/stdout", 2)):
        with open("/dev/full", "wb") as full:
            status, _, errors = run(*arguments, stdout=full)
        assert (status, errors) == (1, f"mpgpt: {what} cannot be written: No space left on device\n")
        status, _, errors = run(*arguments, closed=">&-")
        assert status == closed and errors.startswith(f"mpgpt: {what} cannot be written: it is closed")
        assert errors.count("\n") == 1


def test_the_head_of_a_text(models: dict[str, Path]) -> None:
    long = ("generate", "--model", models["llama"], "--prompt", "hello", "--raw", "--ignore-eos", "--threads", "1",
            "--max-new-tokens", "400", "--seed", "1", "--temperature", "1")  # fmt: skip
    whole = run(*long)[1]
    assert len(whole) > 200
    command = mpirun(0, "-m", "mpgpt", *long)
    script = '"$@" | head -c 5; echo " ${PIPESTATUS[0]}"'
    done = subprocess.run(["bash", "-c", script, "bash", *command], capture_output=True, env=ENV, cwd=ROOT, check=True)
    assert (done.stdout, done.stderr) == (whole[:5] + b" 141\n", b"")


def test_pull_says_that_its_answer_is_lost(models: dict[str, Path], tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        status, _, errors = run("pull", models["llama"], "--dir", tmp_path / "m", stdout=full)
    assert status == 1 and errors.endswith("\nmpgpt: standard output cannot be written: No space left on device\n")
    assert run("pull", models["llama"], "--dir", tmp_path / "m")[1].decode() == f"{tmp_path / 'm'}\n"


def test_pull_names_a_folder_by_its_bytes(models: dict[str, Path], tmp_path: Path) -> None:
    """Which a script takes over, whatever the terminal can show."""
    for name, encoding in ((os.fsdecode(b"caf\xe9"), "utf-8"), ("é☃", "ascii")):
        status, output, _ = run("pull", models["llama"], "--dir", tmp_path / name, env={"PYTHONIOENCODING": encoding})
        assert (status, output) == (0, os.fsencode(tmp_path / name) + b"\n")


# -- all three


def test_everything_closed(models: dict[str, Path], tmp_path: Path) -> None:
    """What is opened meanwhile must not take their places: a record would be among the frames."""
    out = tmp_path / "out.jsonl"
    arguments = ("generate", "--model", models["llama"], "--prompt", "hello", "--out", out, *SHORT)
    assert run(*arguments, closed="<&- >&- 2>&-") == (0, b"", "")
    (line,) = out.read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["completion_tokens"] == 5


def test_messages_that_cannot_be_said_are_lost_and_no_more(models: dict[str, Path], unread: int) -> None:
    arguments = ("generate", "--model", models["llama"], "--prompt", "hello", *SHORT)
    whole = run(*arguments)[1]
    for closed in (" 2>&-", " 2>/dev/full", ""):
        command = ["sh", "-c", f'exec "$@"{closed}', "sh", *mpirun(0, "-m", "mpgpt", *arguments)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=unread, env=ENV, cwd=ROOT, check=False)
        assert (done.returncode, done.stdout) == (0, whole)
        bad = subprocess.run([*command, "--nonsense"], stdout=subprocess.PIPE, stderr=unread, env=ENV, check=False)
        assert (bad.returncode, bad.stdout) == (2, b"")


def test_standard_input_that_cannot_be_read(models: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("generate", "--model", models["llama"], *SHORT)
    assert run(*arguments, closed="<&-") == (1, b"", "mpgpt: the prompt is empty\n")
    status, _, errors = run(*arguments, closed=f"0>{tmp_path / 'out'}")
    assert (status, errors.count("\n")) == (2, 1) and errors.startswith("mpgpt: standard input cannot be read: ")
    assert run(*arguments, stdin=b"\xef\xbb\xbf\xff")[2] == "mpgpt: standard input is not UTF-8: byte 4\n"


def test_a_byte_order_mark_is_no_part_of_a_prompt(models: dict[str, Path]) -> None:
    arguments = ("generate", "--model", models["llama"], *SHORT)
    marked, plain = (run(*arguments, stdin=mark + "Grüße\r\n".encode()) for mark in (b"\xef\xbb\xbf", b""))
    assert plain[0] == 0 and "[7 prompt" in plain[2] and marked[1] == plain[1] and "[7 prompt" in marked[2]
    assert run(*arguments, stdin=b"\xef\xbb\xbf\n")[2] == "mpgpt: the prompt is empty\n"


# -- encodings


ASCII, LATIN = {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}
PLAIN_C = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}


def test_characters_that_an_encoding_lacks_are_escaped(models: dict[str, Path]) -> None:
    arguments = ("generate", "--model", models["llama"], "--prompt", "hé☃🙂", *SHORT)
    status, text, _ = run(*arguments)
    assert status == 0 and not text.isascii()
    for env, encoding in ((ASCII, "ascii"), (LATIN, "latin-1"), (PLAIN_C, "ascii")):
        status, escaped, _ = run(*arguments, env=env)
        assert (status, escaped) == (0, text.decode().encode(encoding, "backslashreplace"))


def test_records_are_json_in_any_encoding(models: dict[str, Path]) -> None:
    arguments = ("generate", "--model", models["llama"], "--prompt", "hé☃🙂", "--prompt", "x", *SHORT)
    outputs = [run(*arguments, env=env)[1] for env in ({}, ASCII, LATIN)]
    assert not outputs[0].isascii() and outputs[1].isascii() and outputs[2].isascii()
    records = [[json.loads(line) for line in output.splitlines()] for output in outputs]
    for one, *others in zip(*records, strict=True):
        for other in others:
            assert [one[key] for key in ("id", "prompt", "text")] == [other[key] for key in ("id", "prompt", "text")]


@pytest.mark.parametrize("command", [WHAT_IF, ("simulate", *WHAT_IF[2:])])
def test_tables_are_drawn_in_any_encoding(command: tuple[str | Path, ...]) -> None:
    status, output, _ = run(*command, env=ASCII)
    assert status == 0 and output.isascii()


def test_arguments_that_are_no_text(models: dict[str, Path]) -> None:
    arguments = ("generate", "--model", models["llama"], *SHORT, "--prompt", os.fsdecode(b"caf\xe9"))
    assert run(*arguments) == (1, b"", "mpgpt: --prompt is not UTF-8: byte 4\n")
    status, output, errors = run(*arguments, "--prompt", "x")
    bad, good = (json.loads(line) for line in output.decode().splitlines())
    assert status == 1 and "1 of 2 prompts failed" in errors
    assert (bad["error"], bad["prompt"], good["error"]) == ("--prompt is not UTF-8: byte 4", "caf\udce9", None)
    status, _, errors = run("generate", "--model", os.fsdecode(b"/caf\xe9"), "--prompt", "x")
    assert status == 1 and "\\udce9" in errors


def test_lines_of_halves_among_good_ones(models: dict[str, Path], tmp_path: Path) -> None:
    source, out = tmp_path / "in.NDJSON", tmp_path / "out.jsonl"
    lines = ['{"prompt": "a\\ud83d"}', '{"id": "\\ud83d", "prompt": "Grüße"}', '{"\\ud83d": 1}', '{"prompt": "🙂"}']
    source.write_text("\n".join(lines), encoding="utf-8")
    arguments = ("generate", "--model", models["llama"], "--prompts", source, *SHORT)
    status, output, errors = run(*arguments)
    assert status == 1 and "2 of 4 prompts failed" in errors
    assert run(*arguments, "--out", out)[0] == 1
    for content in (output, out.read_bytes()):
        got = {one["id"]: one for one in map(json.loads, content.decode().splitlines())}
        assert [bool(got[key]["error"]) for key in (1, "\ud83d", 3, 4)] == [True, False, True, False]
        assert got["\ud83d"]["completion_tokens"] == 5 and '"prompt": "🙂"' in content.decode()


# -- --out


def test_records_to_what_is_open_already(models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "all"
    path.write_bytes(b"before\n")
    number = path.stat().st_ino
    for way in ("/dev/stdout", "/proc/self/fd/1"):
        arguments = ("generate", "--model", models["llama"], "--prompt", "hello", "--out", way, *SHORT)
        with path.open("ab") as file:
            assert run(*arguments, stdout=file)[0] == 0
    assert json.loads(run(*arguments)[1])["text"]
    first, *lines = path.read_bytes().splitlines()
    assert first == b"before" and [json.loads(line)["prompt"] for line in lines] == ["hello", "hello"]
    assert path.stat().st_ino == number


LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.argv = ["mpgpt", *sys.argv[2:]]
runpy.run_module("mpgpt", run_name="__main__")
"""


def test_a_disk_that_is_full_for_a_while(models: dict[str, Path], tmp_path: Path) -> None:
    source, out = tmp_path / "in.txt", tmp_path / "out.jsonl"
    source.write_text("".join(f"prompt {n}\n" for n in range(12)))
    arguments = ("generate", "--model", models["llama"], "--prompts", source, "--out", out, *SHORT)
    command = [sys.executable, "-c", LIMITED, "1000", *map(str, arguments)]
    full = subprocess.run(command, capture_output=True, text=True, env=ENV, cwd=ROOT, check=False)
    kept = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert full.returncode == 1 and 1 < len(kept) < 6
    assert full.stderr == (
        f"mpgpt: --out {out} cannot be written: File too large; it holds {len(kept)} records, and the same command "
        "goes on from there\n"
    )
    before = out.read_bytes()
    assert mpgpt(0, *arguments).returncode == 0
    assert out.read_bytes().startswith(before) and out.read_bytes().count(b"\n") == 12


def test_figures_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "plan.json"
    link.symlink_to("far/real.json")
    assert run(*WHAT_IF, "--json", link)[0] == 0
    assert link.is_symlink() and json.loads((tmp_path / "far" / "real.json").read_text())
    status, output, _ = run("simulate", *WHAT_IF[2:], "--json", "/dev/stdout")
    assert status == 0 and json.loads(output[output.index(b"\n{\n") :])
    status, _, errors = run(*WHAT_IF, "--json", "/dev/full")
    assert (status, errors) == (1, "mpgpt: --json /dev/full cannot be written: No space left on device\n")
