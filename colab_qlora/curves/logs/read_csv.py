"""Reads a loss log from a CSV: of a spreadsheet, pandas, a notebook's table, wandb or TensorBoard.

Columns are known by the names in names.py, in any case; others are kept under their own name. An
empty cell is an absent value, and so is the "No log" of transformers' table; "nan" and "inf" are
values. A second header row begins a second run, and so does a second column for the same field that
has another run's name before " - ".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colab_qlora.curves.logs.csv_cells import (
    Rows,
    column_of_numbers,
    first_line,
    read_rows,
    separator_of,
)
from colab_qlora.curves.logs.names import FIELDS, field_of, is_bound, run_and_name
from colab_qlora.curves.logs.records import Record, Section, step_of
from colab_qlora.errors import UserError

__all__ = ["looks_like_csv", "parse_csv"]

_SUFFIXES = (".csv", ".tsv")
_NUMBER_STARTS = set("0123456789+-.")
# seconds above this are a date, counted from 1970
_DATE_FROM_SECONDS = 1e8
_LOSSES = ("loss", "eval_loss")
_NEEDED = "a first row that names a step and a loss column, for instance step,loss,eval_loss"


@dataclass(frozen=True)
class _Column:
    index: int
    title: str
    field: str
    rank: int
    run: str


def looks_like_csv(text: str, path: Path) -> bool:
    """Whether the file is meant as a CSV: by its name, or by a first row with a known name."""
    if text.lstrip().startswith(("{", "[")):
        return False
    known = separator_of(text, lambda cells: len(_columns(cells, path)))[1]
    return known > 0 or path.suffix.lower() in _SUFFIXES


def parse_csv(text: str, path: Path) -> list[Section]:
    """Reads the rows of a CSV.

    Args:
        text: the file's content.
        path: the file; in TensorBoard's export only its name tells what the value is.

    Returns:
        One section a header row and, in a chart of several runs, a run; at least one.

    Raises:
        UserError: there is no header, no step column or no loss column, two columns stand for the
            same field, a cell is no number, or a row has more cells than the header.
    """
    rows = read_rows(text, path, lambda cells: len(_columns(cells, path)))
    if not rows.cells or not _columns(rows.cells[0], path):
        raise UserError(f"{path} has no header", got=repr(first_line(text)[:60]), allowed=_NEEDED)
    heads = _head_rows(rows)
    sections: list[Section] = []
    for start, end in zip(heads, [*heads[1:], None], strict=True):
        sections += _sections(rows.cells[start], rows.part(start + 1, end))
    return [section for section in sections if section.records] or sections[:1]


def _columns(titles: Sequence[str], path: Path) -> list[_Column]:
    """Gives the columns whose names are known."""
    columns = []
    is_tag = [title.strip().lower() for title in titles] == ["wall time", "step", "value"]
    for index, title in enumerate(titles):
        run, name = run_and_name(title.strip())
        if is_bound(title):
            continue
        found = _field_of_tag(path) if is_tag and index == 2 else field_of(name)
        if found is not None:
            columns.append(_Column(index, title.strip(), *found, run))
    return columns


def _field_of_tag(path: Path) -> tuple[str, int]:
    """Gives the field in an export of TensorBoard's, which is named run-NAME-tag-train_loss.csv."""
    # a browser adds (1) to the name of a second download, and writes _ for /
    name = re.sub(r"\s*\(\d+\)$", "", path.stem).lower()
    _, has_tag, tag = name.rpartition("tag-")
    found = field_of(tag) or field_of(tag.replace("_", "/", 1))
    if found is not None:
        return found
    is_eval = re.search(r"(?<![a-z])(eval|val|valid|validation)(?![a-z])", tag)
    if has_tag and "loss" not in tag:
        return tag, 0
    return ("eval_loss" if is_eval else "loss"), 0


def _head_rows(rows: Rows) -> list[int]:
    """Gives the indices of the header rows: of the first row, and of what looks like one below."""
    first = rows.cells[0]
    # where a count stands in every row that is no header
    counts = [
        c.index
        for field in ("step", "epoch")
        for c in _columns(first, rows.path)
        if c.field == field
    ]
    at = counts[0] if counts else 0
    return [0] + [
        index
        for index, cells in enumerate(rows.cells)
        if index > 0
        and (at >= len(cells) or cells[at].strip()[:1] not in _NUMBER_STARTS)
        and len(_columns(cells, rows.path)) > 1
    ]


def _sections(titles: list[str], rows: Rows) -> list[Section]:
    """Gives the section below one header row, or one for each run that the columns name."""
    _check_widths(titles, rows)
    columns = _columns(titles, rows.path)
    losses = [column for column in columns if column.field in _LOSSES]
    if not losses:
        raise UserError(f"{rows.path} has no loss column", got=", ".join(titles), allowed=_NEEDED)
    steps, notes = _steps(titles, columns, rows)
    known = {column.index for column in columns}
    others = {
        title.strip(): index
        for index, title in enumerate(titles)
        if title.strip() and index not in known and not is_bound(title)
    }
    sections = [
        _section([c for c in columns if c.run in ("", run)], others, rows, steps, run)
        for run in dict.fromkeys(c.run for c in losses if c.run) or [""]
    ]
    for section in sections:
        section.notes = notes
    return sections


def _check_widths(titles: list[str], rows: Rows) -> None:
    width = len(titles)
    for line, cells in zip(rows.lines, rows.cells, strict=True):
        if len(cells) > width and any(map(str.strip, cells[width:])):
            raise UserError(
                f"{rows.path}:{line} has more cells than the header has names",
                got=f"{len(cells)} and {width}",
                allowed="a decimal comma only where cells are separated by semicolons or tabs",
                do="Save the table with semicolons, or with decimal points",
            )


def _steps(
    titles: list[str], columns: list[_Column], rows: Rows
) -> tuple[list[Any], tuple[str, ...]]:
    """Gives the step of every row, and a note where epochs stand for steps."""
    found = [column for column in columns if column.field == "step"]
    if found:
        best = min(found, key=lambda column: column.rank)
        return column_of_numbers(rows, best.index, "step"), ()
    epochs = [column for column in columns if column.field == "epoch"]
    values = column_of_numbers(rows, epochs[0].index, "epoch") if epochs else [None]
    if not all(value is not None and value.is_integer() for value in values):
        raise UserError(
            f"{rows.path} has no step column",
            got=", ".join(titles),
            allowed=", ".join(FIELDS["step"][:4]),
            do="Name the column that counts the steps step",
        )
    return values, ("The table has no steps, so its epochs stand in their place.",)


def _section(
    columns: list[_Column], others: dict[str, int], rows: Rows, steps: list[Any], name: str
) -> Section:
    """Gives one run's section.

    Args:
        columns: those with a known name, without those of other runs.
        others: name and index of the rest.
        rows: the rows below the header.
        steps: a step a row, or None.
        name: the run's name, or "".
    """
    values: dict[str, list[Any]] = {}
    for field in dict.fromkeys(column.field for column in columns):
        if field != "step":
            index = _best(field, columns, rows.path).index
            values[field] = column_of_numbers(rows, index, field, or_text=field == "event")
    if "seconds" in values:
        values["seconds"] = _from_first(values["seconds"])
    if "event" in values:
        values["event"] = [None if each is None else str(each) for each in values["event"]]
    for title, index in others.items():
        values.setdefault(title, column_of_numbers(rows, index, title, or_text=True))
    section = Section(name=name)
    for line, step, *cells in zip(rows.lines, steps, *values.values(), strict=True):
        record: Record = {
            field: cell for field, cell in zip(values, cells, strict=True) if cell is not None
        }
        # the summary of a finished run comes last in a table of transformers' log
        if not record or "train_runtime" in record:
            continue
        if step is not None:
            record = {"step": step} | record
        elif not any(field in record for field in _LOSSES):
            continue
        record["step"] = step_of(record, f"{rows.path}:{line}")
        section.add([record], [line])
    return section


def _best(field: str, columns: list[_Column], path: Path) -> _Column:
    """Gives the column of a field: the one whose name counts first."""
    found = [column for column in columns if column.field == field]
    rank = min(column.rank for column in found)
    best = [column for column in found if column.rank == rank]
    if len(best) > 1:
        raise UserError(
            f"{path} has two columns for {field}",
            got=" and ".join(column.title for column in best[:2]),
            do="Remove or rename one of them",
        )
    return best[0]


def _from_first(seconds: list[Any]) -> list[Any]:
    """Counts from the first row where the column holds dates."""
    first = next((value for value in seconds if value is not None), 0.0)
    if first < _DATE_FROM_SECONDS:
        return seconds
    return [None if value is None else round(value - first, 3) for value in seconds]
