"""Read a training file into rows that remember where they came from.

JSON lines, a JSON list of objects, CSV, Parquet and a `datasets.Dataset` are read. Each row keeps
its line number, so that every later check can say "train.jsonl:17" instead of "row 16". Parquet and
data sets have no lines; there it is "train.parquet row 16", the index that the library counts by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from colab_qlora.data.data_file import check_file, read_text
from colab_qlora.data.read_json import read_json
from colab_qlora.data.read_tables import read_csv, read_parquet
from colab_qlora.data.row_sources import is_dataset, require_rows
from colab_qlora.data.wording import counted
from colab_qlora.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, repr=False)
class Records(Sequence[dict[str, Any]]):
    """Rows of a file or a data set, in its order, with their line or row numbers.

    It is a read-only sequence: reordering in place would silently detach rows from their lines.
    Slices and `select` keep the lines; `list(records)` gives a plain list.

    Args:
        rows: one dict a row.
        source: the file's name as errors show it, for instance "train.jsonl".
        lines: number of each row, as long as `rows`: its line, counted from 1, or its index,
            counted from 0.
        unit: what `lines` counts, "line" or "row".
    """

    rows: tuple[dict[str, Any], ...]
    source: str
    lines: tuple[int, ...]
    unit: str = "line"

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
            return replace(self, rows=self.rows[index], lines=self.lines[index])
        return self.rows[index]

    def __repr__(self) -> str:
        # the default would print every row into the notebook
        return f"Records({len(self)} rows from {self.source})"

    def select(self, indexes: Iterable[int]) -> Records:
        """Return the rows at `indexes`, in that order, with their line numbers."""
        chosen = list(indexes)
        return replace(
            self,
            rows=tuple(self.rows[i] for i in chosen),
            lines=tuple(self.lines[i] for i in chosen),
        )

    def where(self, index: int) -> str:
        """Return "file:line" of one row, or "source row index" where there are no lines."""
        separator = ":" if self.unit == "line" else " row "
        return f"{self.source}{separator}{self.lines[index]}"


def where(rows: object, index: int, name: str = "row") -> str:
    """Say where a row is: "train.jsonl:17" if `rows` knows its lines, otherwise "row 16"."""
    return rows.where(index) if isinstance(rows, Records) else f"{name} {index}"


def read_records(path: str | PathLike[str] | Dataset) -> Records:
    """Read a .jsonl, .json, .csv or .parquet file, or a `datasets.Dataset`.

    UTF-8 with or without a byte order mark, LF or CRLF; blank lines are skipped. A .json file may
    hold a list of objects or, as many downloads do, JSON lines. A .csv file has its column names in
    its first row, and every cell is text.

    Args:
        path: the file ("~" is expanded), or the data set.

    Returns:
        The rows, in file order, at least one.

    Raises:
        UserError: the file is missing, is a directory, has another suffix, is empty, is not UTF-8,
            or cannot be read as what its suffix says. Faulty lines are named as "file:line". Or the
            data set has no row, is streamed, or is a dictionary of several.
    """
    if not isinstance(path, (str, PathLike)):
        return _read_dataset(path)
    file = Path(path).expanduser()
    check_file(file)
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        found = read_parquet(file)
        return Records(found, file.name, tuple(range(len(found))), "row")
    read = read_csv if suffix == ".csv" else read_json
    objects, lines = read(file.name, read_text(file))
    return Records(objects, file.name, lines)


def _read_dataset(dataset: Any) -> Records:
    require_rows(dataset)
    if not is_dataset(dataset):
        raise UserError(
            "the rows are read already",
            got=f"a {type(dataset).__name__} of {counted(len(dataset), 'row')}",
            allowed="the path of a file, or a datasets.Dataset",
            do="Use these rows as they are",
        )
    # a format would turn the cells into tensors or arrays
    rows = tuple(dict(row) for row in dataset.with_format(None))
    return Records(rows, "dataset", tuple(range(len(rows))), "row")
