"""Read CSV and Parquet into rows, one dict a row.

CSV is read by RFC 4180: commas, and double quotes around a field that holds a comma, a quote or a
line break. A quoted field may therefore span lines, and a row is named by the line it starts on.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

from colab_qlora.data.data_file import empty_file
from colab_qlora.data.read_json import Rows
from colab_qlora.data.wording import counted, first_few, shown
from colab_qlora.errors import UserError

# a column name longer than this is more likely the first row's text
_LONGEST_NAME = 80
_SENTENCE = re.compile(r"[.?!]\s*$|\n")
_NUMBER = re.compile(r"[-+]?[\d.,]+(e[-+]?\d+)?", re.IGNORECASE)
_LFS_POINTER = b"version https://git-lfs"


def read_csv(name: str, text: str) -> Rows:
    """Read the text of a .csv file whose first row names the columns.

    Args:
        name: the file's name as errors show it.
        text: its content, with line feeds as line ends.

    Returns:
        One dict of texts a row and, for each, the line it starts on, counted from 1. An empty cell
        is an empty text; a row without any text is skipped; names lose white space at their ends.

    Raises:
        UserError: the first row is no header, no row follows it, a row has more or fewer cells than
            the header, or a quote is wrong. Faulty rows are named as "file:line".
    """
    found = _csv_records(name, text)
    if not found:
        raise _no_row(name, "cells without any text")
    line, header = found[0][0], [cell.strip() for cell in found[0][1]]
    _check_header(name, line, header)
    if len(found) == 1:
        raise _no_row(name, f"only the header {_listed(header)}")
    faults = [
        f"{name}:{line}: {counted(len(cells), 'cell')}"
        for line, cells in found
        if len(cells) != len(header)
    ]
    if faults:
        raise UserError(
            f"{counted(len(faults), 'row')} of {name} cannot be read",
            got=first_few(faults),
            allowed=f"{counted(len(header), 'cell')} in every row, as in the header",
            do='Put double quotes around a cell that holds a comma, as in "one, two"',
        )
    rows = tuple(dict(zip(header, cells, strict=True)) for _, cells in found[1:])
    return rows, tuple(line for line, _ in found[1:])


def _csv_records(name: str, text: str) -> list[tuple[int, list[str]]]:
    """(first line, cells) of every row with some text in it; the header is the first."""
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    found, line = [], 1
    # the limit is the interpreter's own and 128 KiB by default, less than a long document
    limit = csv.field_size_limit(max(len(text), 1))
    try:
        for cells in reader:
            # spreadsheets leave rows of commas alone at the end
            if any(cell.strip() for cell in cells):
                found.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{name}:{line}: broken CSV",
            got=f"a row that starts here and fails at line {reader.line_num}: {error}",
            allowed='cells between commas; one with a quote inside as "say ""yes"" now"',
            do="Close the quote that is open in this row, and write a quote inside a cell twice",
        ) from None
    finally:
        csv.field_size_limit(limit)
    return found


def _no_row(name: str, got: str) -> UserError:
    return UserError(
        f"{name} has no row",
        got=got,
        allowed="column names and at least one row",
        do="Write the file again with its rows; the first row of a CSV names the columns",
    )


def _listed(names: list[str]) -> str:
    return first_few([shown(name) for name in names], separator=", ")


def _check_header(name: str, line: int, header: list[str]) -> None:
    """Refuse a first row that does not look like column names."""
    if len(header) == 1 and re.search(r"[;\t]", header[0]):
        raise UserError(
            f"{name}:{line}: the columns are not apart",
            got=f"one column named {shown(header[0])}",
            allowed="commas between the columns",
            do="Save it with commas, for instance with pandas' "
            "read_csv(path, sep=None, engine='python').to_csv(path, index=False)",
        )
    faults = [fault for i, cell in enumerate(header) if (fault := _name_fault(cell, i))]
    faults += [f"{shown(cell)} twice" for cell in dict.fromkeys(header) if header.count(cell) > 1]
    if faults:
        is_index = header[0] == "" and len(faults) == 1
        raise UserError(
            f"{name}:{line}: the first row is not a header",
            got=first_few(faults),
            allowed="a first row of column names, such as instruction,input,output",
            do="Name the first column or drop it: pandas writes none with to_csv(path, index=False)"
            if is_index
            else "Put a row of different column names above the first row",
        )


def _name_fault(cell: str, index: int) -> str | None:
    if not cell:
        return f"column {index + 1} without a name"
    if len(cell) > _LONGEST_NAME:
        return f"{shown(cell)} with {len(cell):,} characters as a name"
    if _SENTENCE.search(cell) or _NUMBER.fullmatch(cell):
        return f"{shown(cell)} as a name"
    return None


def read_parquet(file: Path) -> tuple[dict[str, Any], ...]:
    """Read a .parquet file with pyarrow, which comes with the library datasets.

    Args:
        file: an existing file.

    Returns:
        One dict a row, in file order; a missing value is None.

    Raises:
        UserError: the file is empty, has no row, is broken, or has two columns of one name; or
            pyarrow is not installed.
    """
    pyarrow, parquet = _import_pyarrow()
    if file.stat().st_size == 0:
        raise empty_file(file)
    try:
        # not read_table(path): it takes folder names like "lang=en" for columns
        with parquet.ParquetFile(file) as opened:
            table = opened.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken_parquet(file, error) from None
    names = table.column_names
    doubled = [shown(name) for name in dict.fromkeys(names) if names.count(name) > 1]
    if doubled:
        raise UserError(
            f"{file.name} has columns of one name",
            got=first_few(doubled, separator=", ") + " more than once",
            allowed="each column name once",
            do="Rename or drop one of them where the file is written",
        )
    if table.num_rows == 0:
        raise _no_row(file.name, f"columns {_listed(names)} and 0 rows")
    return tuple(table.to_pylist())


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet cannot be read",
            got=f"no pyarrow ({error})",
            allowed="an installed pyarrow",
            do="Run pip install pyarrow, or save the rows as JSON lines",
        ) from None
    return pyarrow, pyarrow.parquet


def _broken_parquet(file: Path, error: Exception) -> UserError:
    with file.open("rb") as opened:
        is_pointer = opened.read(len(_LFS_POINTER)) == _LFS_POINTER
    first_line = (str(error).splitlines() or [type(error).__name__])[0].rstrip(". ")
    return UserError(
        f"{file.name} is not whole",
        got="a Git LFS pointer instead of the data" if is_pointer else first_line,
        allowed="a Parquet file that was written to its end",
        do="Run git lfs pull" if is_pointer else "Download or write the file again",
    )
