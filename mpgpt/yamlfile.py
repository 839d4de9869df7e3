"""A YAML file as a mapping, and what is wrong with it as sentences.

Knows: YAML, its traps, and how pydantic's complaints read in plain words.
Must not know: any key of any file.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mpgpt.errors import UsageError

MAX_FILE_BYTES = 256 * 1024


def read_yaml(path: Path) -> tuple[dict[Any, Any], list[str]]:
    """The mapping in a file, and a sentence for each key that it gives twice.

    Raises UsageError when the file cannot be read or is not YAML, not UTF-8, too large, or not a mapping.
    """
    return parse_yaml(_read(path), path)


def problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """A sentence for each thing that pydantic found wrong: the key's path, what it is, what is allowed."""
    sentences = []
    for found in error.errors(include_url=False):
        where, message = ".".join(map(printable, found["loc"])), found["msg"]
        if found["type"] == "extra_forbidden":
            known = _keys(model, found["loc"][:-1])
            near = difflib.get_close_matches(str(found["loc"][-1]), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            sentences.append(f"{where} is not a known key; {hint}")
        elif found["type"] == "missing":
            sentences.append(f"{where} is missing")
        elif found["type"] == "value_error":
            sentences.append(f"{where} {found['ctx']['error']}".lstrip())
        else:
            wanted = message.replace("Input should", "it should").partition(" or instance of")[0]
            sentences.append(f"{where} is {shown(found['input'])}; {wanted.replace('a valid tuple', 'a list')}")
    return sentences


def shown(value: object) -> str:
    """A value in YAML's words; never all of a big one."""
    if value is None or isinstance(value, bool):
        return {None: "empty", True: "true", False: "false"}[value]
    short = reprlib.Repr()
    short.maxstring, short.maxlevel, short.maxlist = 60, 2, 12
    try:
        return short.repr(value)
    except ValueError:  # Python writes no number of more than some thousand digits
        return "an overlong number"


def _keys(model: Any, path: Iterable[int | str]) -> list[str]:
    for part in path:  # an int is a place in a list
        model = get_args(model)[0] if isinstance(part, int) else model.model_fields[part].annotation
        if type(None) in get_args(model):  # a section that may be left out
            model = get_args(model)[0]
    return list(model.model_fields)


def printable(part: object) -> str:
    """A key from the file, without letting it play tricks on the terminal."""
    text = str(part)
    return text if text.isprintable() and len(text) <= 60 else shown(text)


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path}: these settings cannot be read: {error.strerror}") from None
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path}: this is no settings file, it is larger than {MAX_FILE_BYTES // 1024} KiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"{path}: line {line}: not UTF-8; save the file as UTF-8 text") from None


class _Loader(yaml.SafeLoader):
    """SafeLoader that notes duplicate keys, of which YAML's last would win silently."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.duplicates: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        # Here and not in construct_mapping, where merge keys (<<) have already brought in keys of their own.
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                name, line = printable(key.value), key.start_mark.line + 1
                if name in lines:
                    self.duplicates.append(f"line {line}: {name} is given twice, first in line {lines[name]}")
                lines.setdefault(name, line)
        return node


def parse_yaml(text: str, path: Path) -> tuple[dict[Any, Any], list[str]]:
    """The file's mapping, and what duplicate keys it has."""
    try:
        loader = _Loader(text)
        tree = loader.get_single_data()
    except RecursionError:
        raise UsageError(f"{path}: this is no settings file, it is nested too deeply") from None
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError) as error:
        # All but the first are what PyYAML lets out for such things as the date 2024-13-45 or `!!int x`.
        mark, reason = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = mark.index if mark else getattr(error, "position", None)
        line = "" if place is None else f"line {text.count(chr(10), 0, place) + 1}: "
        reason = reason or str(error).partition("\n")[0]
        raise UsageError(f"{path}: {line}this is not YAML: {reason}") from None
    if tree is not None and not isinstance(tree, dict):
        raise UsageError(f"{path}: this is {shown(tree)}; it should be a mapping, `key: value` in each line")
    return tree or {}, loader.duplicates
