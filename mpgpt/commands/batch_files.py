"""Prompts in, records out: the files of a batch run.

Knows: the keys of a prompts file's line and of a record, and how a broken run is taken up again.
Must not know: models, ranks, how text is made.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mpgpt.display import counted
from mpgpt.errors import OutputError, ReaderGone, UsageError
from mpgpt.files import append, destination, open_at_end, replace
from mpgpt.model.tokenizer import Message
from mpgpt.stdio import output_error

JSON_LINES = (".jsonl", ".ndjson")
ROLES = ("system", "developer", "user", "assistant")
RECORD_KEYS = (
    "id", "prompt", "text", "token_ids", "prompt_tokens", "completion_tokens", "finish_reason", "error",
    "ttft_s", "seconds",
)  # fmt: skip


def _complete(message: Message) -> Message:
    """A message for chat templates, which know no developer role, only system."""
    for key in ("role", "content"):
        if key not in message:
            raise ValueError(f"a message needs a {key}")
    if message["role"] not in ROLES:
        raise ValueError(f"the role is {message['role']!r}; it can be {', '.join(ROLES)}")
    return message | {"role": "system"} if message["role"] == "developer" else message


class Line(BaseModel):
    """A line of a .jsonl prompts file: ``prompt`` or ``messages``, and its own parameters."""

    model_config = ConfigDict(extra="forbid", strict=True)

    id: int | str | None = None
    prompt: str | None = None
    messages: Annotated[list[Annotated[Message, AfterValidator(_complete)]], Field(min_length=1)] | None = None
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a run. ``error`` says why it cannot even be tried."""

    id: int | str
    prompt: str | list[Message] | None
    line: int | None = field(default=None, compare=False)
    """Its line in its file."""
    max_new_tokens: int | None = None
    overrides: dict[str, float | None] = field(default_factory=dict)
    """This prompt's own sampling parameters, by ``core.Sampling``'s names, without the seed."""
    seed: int | None = None
    stops: tuple[str, ...] | None = None
    error: str = ""


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: .jsonl or .ndjson with an object a line, any other with a prompt a line.

    Blank lines are passed over. A bad line of a .jsonl file becomes a Prompt with ``error``, which names the line. Ids
    default to the number of the line. Raises ``UsageError`` when the file cannot be read or is not UTF-8.
    """
    try:
        raw = path.read_bytes()
    except IsADirectoryError:
        raise UsageError(f"--prompts {path} is a directory, not a file") from None
    except OSError as error:
        raise UsageError(f"--prompts {path} cannot be read: {error.strerror}") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        at = error.start + len(raw) - len(error.object)  # a byte order mark is not counted there
        line = raw[:at].count(b"\n") + 1
        raise UsageError(f"--prompts {path} is not UTF-8: byte {at + 1}, in line {line}") from None
    json_lines = path.suffix.lower() in JSON_LINES
    # Not splitlines: a form feed or U+2028 is part of a prompt.
    lines = text.split("\n") if json_lines else re.split("\r\n|\r|\n", text)
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise UsageError(f"--prompts {path} holds no prompts")
    if not json_lines:
        return [Prompt(id=n, prompt=line, line=n) for n, line in numbered]
    return _unique(_read_line(n, line) for n, line in numbered)


def _read_line(number: int, text: str) -> Prompt:
    try:
        line = Line.model_validate(json.loads(text))
        if (line.prompt is None) == (line.messages is None):
            raise ValueError("give either prompt or messages")
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        return Prompt(id=number, prompt=None, line=number, error=f"line {number}: {where}: {message}")
    except ValueError as error:
        return Prompt(id=number, prompt=None, line=number, error=f"line {number}: {error}")
    except RecursionError:
        return Prompt(id=number, prompt=None, line=number, error=f"line {number}: nested too deeply")
    overrides = {key: getattr(line, key) for key in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")}
    return Prompt(
        id=number if line.id is None else line.id,
        prompt=line.messages if line.prompt is None else line.prompt,
        line=number,
        max_new_tokens=line.max_new_tokens,
        overrides={key: value for key, value in overrides.items() if value is not None},
        seed=line.seed,
        stops=None if line.stop is None else (line.stop,) if isinstance(line.stop, str) else tuple(line.stop),
    )


def _unique(prompts: Iterator[Prompt]) -> list[Prompt]:
    """An id that came before makes a line bad: its record could not be told from the other's."""
    seen: dict[int | str, None] = {}
    kept = []
    for prompt in prompts:
        if prompt.id in seen:
            error = prompt.error or f"line {prompt.line}: the id {prompt.id!r} came before"
            fresh = next(name for i in count(prompt.line or 1) if (name := f"{prompt.id}#{i}") not in seen)
            prompt = Prompt(id=fresh, prompt=prompt.prompt, line=prompt.line, error=error)
        seen[prompt.id] = None
        kept.append(prompt)
    return kept


def record(
    prompt: Prompt, *, text: str = "", token_ids: list[int] | None = None, prompt_tokens: int = 0,
    finish_reason: str | None = None, error: str | None = None, times: tuple[float | None, float] = (None, 0.0),
) -> dict[str, Any]:  # fmt: skip
    """The line of one prompt. ``token_ids`` are the new tokens only; ``times`` are the seconds to the first of them,
    and to the last."""
    ids, (ttft_s, seconds) = token_ids or [], times
    values = (
        prompt.id, prompt.prompt, text, ids, prompt_tokens, len(ids), finish_reason, error,
        None if ttft_s is None else round(ttft_s, 6), round(seconds, 6),
    )  # fmt: skip
    return dict(zip(RECORD_KEYS, values, strict=True))


class Records:
    """A .jsonl file of records that grows by whole lines and can be taken up again.

    Records of an earlier run of the same prompts are kept, and their prompts are ``done``; those with an error,
    of other prompts, or broken off in the middle of the last line are dropped, to be made anew. What is no regular
    file, such as a pipe, is only written to.
    """

    def __init__(self, path: Path, prompts: list[Prompt]) -> None:
        """Raises ``UsageError`` when the file cannot be written or holds something else than records."""
        self._path, self._kept = path, 0
        self.done: frozenset[int | str] = frozenset()
        try:
            target = destination(path)
            if target.regular and not target.path.parent.is_dir():
                raise UsageError(f"--out {path}: the folder {target.path.parent} does not exist")
            if target.regular and target.path.exists():
                self._take_up(target.path, prompts)
            self._descriptor = open_at_end(target)
        except IsADirectoryError:
            raise UsageError(f"--out {path} is a directory, not a file") from None
        except OSError as error:
            raise UsageError(f"--out {path} cannot be written: {error.strerror or error}") from None
        self._regular = target.regular

    def _take_up(self, file: Path, prompts: list[Prompt]) -> None:
        asked = {prompt.id: prompt.prompt for prompt in prompts}
        content, kept = file.read_bytes(), []
        for old in _old_records(self._path, content):
            if not old["error"] and old["id"] in asked and asked[old["id"]] == old["prompt"]:
                kept.append(old)
                del asked[old["id"]]
        fresh = "".join(map(as_line, kept)).encode()
        if fresh != content:
            replace(file, fresh)
        self.done, self._kept = frozenset(old["id"] for old in kept), len(kept)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record as one line, at once. Raises ``OutputError``; the records before it are whole."""
        try:
            append(self._descriptor, as_line(record).encode())
        except OSError as error:
            raise self._failure(error) from None
        self._kept += 1

    def close(self) -> None:
        """Raises ``OutputError`` where a disk far away reports only now that it is full."""
        try:
            os.close(self._descriptor)
        except OSError as error:
            raise self._failure(error) from None

    def _failure(self, error: OSError) -> OutputError:
        failure = output_error(error, f"--out {self._path}")
        if isinstance(failure, ReaderGone) or not self._regular:
            return failure
        records = counted(self._kept, "record")
        return OutputError(f"{failure}; it holds {records}, and the same command goes on from there")


def as_line(record: dict[str, Any], *, ascii_only: bool = False) -> str:
    """A record as a line of JSON, of text that UTF-8 can write."""
    line = json.dumps(record, ensure_ascii=ascii_only)
    try:
        line.encode()
    except UnicodeEncodeError:  # half a surrogate pair, for which there is only the escape
        line = json.dumps(record)
    return line + "\n"


def _old_records(path: Path, content: bytes) -> Iterator[dict[str, Any]]:
    lines = content.split(b"\n")
    for n, line in enumerate(lines[:-1], 1):
        try:
            old = json.loads(line)
        except (ValueError, RecursionError):
            old = None
        if not isinstance(old, dict) or set(old) != set(RECORD_KEYS) or type(old["id"]) not in (int, str):
            raise UsageError(
                f"--out {path} exists, and its line {n} is not a record of an earlier run; give another name"
            )
        yield old
    if len(lines) == 1 and lines[0] and not lines[0].startswith(b'{"id": '):
        raise UsageError(f"--out {path} exists and holds no records of an earlier run; give another name")
