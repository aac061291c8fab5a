"""Read a training file into rows that remember the line they came from.

Two layouts are read: JSON lines (one object a line) and a JSON list of objects. Each row keeps its
line number, so that every later check can say "train.jsonl:17" instead of "row 16".
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from colab_qlora.data.wording import FAULTS_SHOWN, counted, first_few, kind_of, shown
from colab_qlora.errors import UserError

SUFFIXES = (".jsonl", ".json")
_BOM = b"\xef\xbb\xbf"
_JSON_SPACE = " \t\r\n"


@dataclass(frozen=True, repr=False)
class Records(Sequence[dict[str, Any]]):
    """Rows of a file, in file order, with their line numbers.

    It is a read-only sequence: reordering in place would silently detach rows from their lines.
    Slices and `select` keep the lines; `list(records)` gives a plain list.

    Args:
        rows: one dict a row.
        source: the file's name as errors show it, for instance "train.jsonl".
        lines: line number of each row, counted from 1; as long as `rows`.
    """

    rows: tuple[dict[str, Any], ...]
    source: str
    lines: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.rows) == len(self.lines), "one line number a row"

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> Records: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | Records:
        if isinstance(index, slice):
            return Records(self.rows[index], self.source, self.lines[index])
        return self.rows[index]

    def __repr__(self) -> str:
        # the default would print every row into the notebook
        return f"Records({len(self)} rows from {self.source})"

    def select(self, indexes: Iterable[int]) -> Records:
        """Return the rows at `indexes`, in that order, with their line numbers."""
        chosen = list(indexes)
        return Records(
            tuple(self.rows[i] for i in chosen), self.source, tuple(self.lines[i] for i in chosen)
        )

    def where(self, index: int) -> str:
        """Return "file:line" of one row."""
        return f"{self.source}:{self.lines[index]}"


def where(rows: object, index: int, name: str = "row") -> str:
    """Say where a row is: "train.jsonl:17" if `rows` knows its lines, otherwise "row 16"."""
    return rows.where(index) if isinstance(rows, Records) else f"{name} {index}"


def read_records(path: str | Path) -> Records:
    """Read a .jsonl or .json file of objects.

    UTF-8 with or without a byte order mark, LF or CRLF; blank lines are skipped. A .json file may
    hold a list of objects or, as many downloads do, JSON lines.

    Args:
        path: the file; "~" is expanded.

    Returns:
        The rows, in file order, at least one.

    Raises:
        UserError: the file is missing, is a directory, has another suffix, is empty, is not UTF-8,
            or holds anything that is not an object. Faulty lines are named as "file:line".
    """
    file = Path(path).expanduser()
    _check_file(file)
    text = _decode(file, file.read_bytes())
    if not text.strip():
        raise UserError(
            f"{file.name} is empty",
            got=f"{file.stat().st_size} bytes without an object",
            allowed="at least one object",
            do="Write the file again, or check that its upload has finished",
        )
    if file.suffix.lower() == ".json" and not _looks_like_lines(text):
        return _read_document(file.name, text)
    return _read_lines(file.name, text)


def _check_file(file: Path) -> None:
    """Refuse what cannot be opened as a training file, and name what could be."""
    if file.is_dir():
        inside = first_few(_data_files(file), separator=", ")
        raise UserError(
            f"{file} is a directory",
            got=f"a directory with {inside or 'no .jsonl or .json file'}",
            allowed="one .jsonl or .json file",
            do="Add the file's name to the path",
        )
    if not file.exists():
        absolute = file.absolute()
        folder = absolute.parent
        if not folder.is_dir():
            near = f"the folder {folder} does not exist"
        else:
            names = first_few(_like_named(file.name, folder), separator=", ")
            near = f"{folder} has {names or 'no .jsonl or .json file'}"
        raise UserError(
            "the file does not exist",
            got=f"{absolute} (working directory {Path.cwd()}; {near})",
            allowed="the path of a .jsonl or .json file",
            do="Correct the path, or upload the file first",
        )
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{file.name} is of a type that is not read",
            got=f"suffix {file.suffix!r}",
            allowed=" or ".join(SUFFIXES),
            do="Save it as JSON lines, for instance with "
            "pandas' to_json('train.jsonl', orient='records', lines=True)",
        )


def _data_files(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.suffix.lower() in SUFFIXES)


def _like_named(name: str, folder: Path) -> list[str]:
    """Names in `folder` close to `name`, or its data files where none is close."""
    lowered = {p.name.lower(): p.name for p in folder.iterdir() if p.is_file()}
    close = difflib.get_close_matches(name.lower(), lowered, n=FAULTS_SHOWN, cutoff=0.6)
    return [lowered[c] for c in close] or _data_files(folder)


def _decode(file: Path, raw: bytes) -> str:
    # the mark is cut by hand: the codec utf-8-sig counts error offsets from behind it
    skip = len(_BOM) if raw.startswith(_BOM) else 0
    try:
        text = raw[skip:].decode("utf-8")
    except UnicodeDecodeError as error:
        offset = error.start + skip
        line = raw.count(b"\n", 0, offset) + 1
        raise UserError(
            f"{file.name}:{line}: not UTF-8",
            got=f"byte 0x{raw[offset]:02x} at offset {offset:,}",
            allowed="UTF-8 text",
            do="Save the file as UTF-8 (most editors: Save with encoding)",
        ) from None
    # not str.splitlines(): it also cuts at U+2028 and others, which JSON allows inside a text
    return text.replace("\r\n", "\n").replace("\r", "\n")


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


def _read_lines(name: str, text: str) -> Records:
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
    return Records(tuple(rows), name, tuple(numbers))


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


def _read_document(name: str, text: str) -> Records:
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
    return Records(tuple(document), name, lines)


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
