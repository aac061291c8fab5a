"""From the text of a CSV to rows of cells, and from cells to numbers.

Cells are separated by commas, semicolons or tabs: whichever makes most names of the first row known
ones. Between semicolons or tabs a number may have a decimal comma.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from colab_qlora.errors import UserError

__all__ = ["Rows", "column_of_numbers", "first_line", "read_rows"]

_SEPARATORS = ",;\t"
_ABSENT = {"", "-", "none", "null", "n/a", "na", "no log"}
_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")
# a spreadsheet may write its separator into a line of its own
_HINT = re.compile(r"\s*sep=([,;\t])\r?\n")


@dataclass(frozen=True)
class Rows:
    """The rows of a file that are not blank.

    Attributes:
        path: the file.
        lines: line number of every row, from 1.
        cells: the cells of every row.
        has_decimal_comma: whether a comma in a number is a decimal comma.
    """

    path: Path
    lines: list[int]
    cells: list[list[str]]
    has_decimal_comma: bool

    def part(self, start: int, end: int | None) -> Rows:
        """The rows from `start` to before `end`."""
        lines, cells = self.lines[start:end], self.cells[start:end]
        return Rows(self.path, lines, cells, self.has_decimal_comma)


def read_rows(text: str, path: Path, count_known: Callable[[Sequence[str]], int]) -> Rows:
    """Cuts a text into rows of cells.

    Args:
        text: the file's content.
        path: the file, for the errors.
        count_known: how many of the names of a header row are known.

    Returns:
        The rows; a last one that a kill cut off is left out.

    Raises:
        UserError: the quotes make no sense.
    """
    separator = separator_of(text, count_known)[0]
    hint = _HINT.match(text)
    skipped = text[: hint.end()].count("\n") if hint else 0
    reader = csv.reader(
        io.StringIO(text[hint.end() :] if hint else text, newline=""),
        delimiter=separator,
        skipinitialspace=True,
    )
    lines: list[int] = []
    rows: list[list[str]] = []
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                lines.append(reader.line_num + skipped)
                rows.append(cells)
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num + skipped} is not CSV", got=error) from error
    is_cut = len(rows) > 1 and len(rows[-1]) < len(rows[0]) and not text.endswith(("\n", "\r"))
    return Rows(path, lines, rows, separator != ",").part(0, -1 if is_cut else None)


def separator_of(text: str, count_known: Callable[[Sequence[str]], int]) -> tuple[str, int]:
    """Gives the separator that makes most names of the first row known, and how many those are."""
    hint = _HINT.match(text)
    first = first_line(text[hint.end() :] if hint else text)
    known = {each: count_known(_cells(first, each)) for each in (hint[1] if hint else _SEPARATORS)}
    return max(known.items(), key=lambda item: item[1])


def first_line(text: str) -> str:
    """Gives the first line that is not blank."""
    found = re.search(r"\S[^\r\n]*", text)
    return found[0] if found else ""


def _cells(line: str, separator: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=separator, skipinitialspace=True), [])
    except csv.Error:
        return []


def column_of_numbers(rows: Rows, index: int, name: str, *, or_text: bool = False) -> list:
    """Reads one column.

    Args:
        rows: the rows below the header.
        index: the column; rows that are too short have no value there.
        name: the column's name, for the error.
        or_text: whether a cell that is no number is a text, and not an error.

    Returns:
        A float a row, nan and inf included, or None where the cell stands for no value.

    Raises:
        UserError: a cell is no number.
    """
    cells = [row[index] if index < len(row) else "" for row in rows.cells]
    try:
        return list(map(float, cells))
    except ValueError:
        pass
    values: list[float | str | None] = []
    for line, cell in zip(rows.lines, cells, strict=True):
        try:
            values.append(_number(cell.strip(), rows.has_decimal_comma))
        except ValueError:
            if not or_text:
                raise UserError(
                    f"{rows.path}:{line} has a {name} that is no number",
                    got=repr(cell[:40]),
                    allowed="a number, nan, inf or an empty cell",
                    do="Correct that cell, or remove the line",
                ) from None
            values.append(cell.strip())
    return values


def _number(cell: str, has_decimal_comma: bool) -> float | None:
    if cell.lower() in _ABSENT:
        return None
    if "," in cell:
        if has_decimal_comma:
            cell = cell.replace(".", "").replace(",", ".")
        elif _THOUSANDS.fullmatch(cell):
            cell = cell.replace(",", "")
    return float(cell)
