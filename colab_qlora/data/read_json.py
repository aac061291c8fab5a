"""Read JSON lines, or a JSON list, into objects that remember their lines.

The readers return rows and line numbers apart, so that they know nothing of `Records`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colab_qlora.data.wording import counted, first_few, kind_of, shown
from colab_qlora.errors import UserError

_JSON_SPACE = " \t\r\n"

Rows = tuple[tuple[dict[str, Any], ...], tuple[int, ...]]


def read_json(name: str, text: str) -> Rows:
    """Read the text of a .jsonl or .json file.

    Args:
        name: the file's name, whose suffix says which layout is expected. A .json file may hold a
            list of objects or, as many downloads do, JSON lines.
        text: its content, with line feeds as line ends and at least one value.

    Returns:
        The objects and, for each, the line it starts on, counted from 1.

    Raises:
        UserError: the text is broken JSON, or holds anything that is not an object.
    """
    if name.lower().endswith(".json") and not _looks_like_lines(text):
        return _read_document(name, text)
    return _read_lines(name, text)


def _looks_like_lines(text: str) -> bool:
    """Whether a .json file holds JSON lines: not a list, and some line is an object by itself."""
    if text.lstrip().startswith("["):
        return False
    lines = [line for line in text.split("\n") if line.strip()]
    return len(lines) > 1 and any(isinstance(_parsed(line), dict) for line in lines)


@dataclass(frozen=True)
class _Broken:
    """What stands in for a value where the text is not JSON."""

    reason: str
    line: int


def _parsed(text: str) -> Any:
    """The JSON value, or a `_Broken`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return _Broken(f"{error.msg} at column {error.colno}", error.lineno)
    except (ValueError, RecursionError) as error:  # a number too long, nesting too deep
        return _Broken(str(error), 1)


def _read_lines(name: str, text: str) -> Rows:
    rows, numbers, faults = [], [], []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        value = _parsed(line)
        if isinstance(value, dict):
            rows.append(value)
            numbers.append(number)
        elif isinstance(value, _Broken):
            faults.append(f"{name}:{number}: {value.reason}")
        else:
            faults.append(f"{name}:{number}: {kind_of(value)}, not an object")
    if faults:
        _raise_faulty_lines(name, text, faults)
    return tuple(rows), tuple(numbers)


def _raise_faulty_lines(name: str, text: str, faults: list[str]) -> None:
    if isinstance(_parsed(text), list):
        raise UserError(
            f"{name} holds one JSON list",
            got="a list over the whole file",
            allowed="one object a line in a .jsonl file, a list in a .json file",
            do=f"Rename it to {Path(name).with_suffix('.json')}",
        )
    raise UserError(
        f"{counted(len(faults), 'line')} of {name} cannot be read",
        got=first_few(faults),
        allowed="one JSON object a line, such as "
        '{"instruction": "...", "input": "", "output": "..."}',
        do="Mend or delete each line named here",
    )


def _read_document(name: str, text: str) -> Rows:
    document = _parsed(text)
    if isinstance(document, _Broken):
        raise UserError(
            f"{name}:{document.line}: broken JSON",
            got=document.reason,
            allowed="a list of objects, or one object a line",
            do="Mend that place; an editor that knows JSON shows it in colour",
        )
    if not isinstance(document, list):
        raise UserError(
            f"{name} does not hold a list of objects",
            got=kind_of(document) + _lists_inside(document),
            allowed="a list of objects, or one object a line",
            do=_next_step(document),
        )
    if not document:
        raise UserError(
            f"{name} is empty",
            got="a list without an element",
            allowed="at least one object",
            do="Write the file again with its rows",
        )
    lines = _element_lines(text)
    faults = [
        f"{name}:{line}: element {i} is {kind_of(element)}, not an object"
        for i, (element, line) in enumerate(zip(document, lines, strict=True))
        if not isinstance(element, dict)
    ]
    if faults:
        raise UserError(
            f"{counted(len(faults), 'element')} of {name} cannot be used",
            got=first_few(faults),
            allowed="a list of objects only",
            do="Mend or delete each element named here",
        )
    return tuple(document), lines


def _list_keys(document: object) -> list[str]:
    if not isinstance(document, dict):
        return []
    return [key for key, value in document.items() if isinstance(value, list)]


def _lists_inside(document: object) -> str:
    keys = _list_keys(document)
    return f" whose key {shown(keys[0])} holds a list" if len(keys) == 1 else ""


def _next_step(document: object) -> str:
    keys = _list_keys(document)
    if len(keys) == 1:
        return f"Save the list under {shown(keys[0])} as the whole file"
    return "Put the objects between [ and ], with commas between them"


def _element_lines(text: str) -> tuple[int, ...]:
    """Line number of each element of a list that is known to parse."""
    decoder = json.JSONDecoder()
    lines: list[int] = []
    position, line, seen = text.index("[") + 1, 1, 0
    while True:
        while text[position] in _JSON_SPACE or text[position] == ",":
            position += 1
        if text[position] == "]":
            return tuple(lines)
        line += text.count("\n", seen, position)
        seen = position
        lines.append(line)
        _, position = decoder.raw_decode(text, position)
