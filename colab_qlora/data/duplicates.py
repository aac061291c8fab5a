"""Drop rows that repeat an earlier one, which would weigh more than the others in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from colab_qlora.data.records import Records, where
from colab_qlora.data.row_sources import column_names, is_dataset, require_rows
from colab_qlora.data.split import row_key
from colab_qlora.data.wording import counted, first_few, shown
from colab_qlora.errors import UserError


@dataclass(frozen=True)
class DuplicateReport:
    """Which rows were dropped; print it for one sentence.

    Args:
        rows: number of rows before.
        dropped: (index of the dropped row, index of the row that it repeats), in row order.
        places: the same pairs in words, "train.jsonl:5 = train.jsonl:2".
    """

    rows: int
    dropped: tuple[tuple[int, int], ...] = ()
    places: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Number of rows that are left."""
        return self.rows - len(self.dropped)

    def __str__(self) -> str:
        if not self.dropped:
            return f"None of {counted(self.rows, 'row')} repeats another."
        verb = "repeats" if len(self.dropped) == 1 else "repeat"
        return (
            f"{len(self.dropped):,} of {counted(self.rows, 'row')} {verb} an earlier row, and "
            f"{self.kept:,} {'is' if self.kept == 1 else 'are'} kept: {first_few(self.places)}."
        )


def drop_duplicates(rows: Any, fields: Sequence[str] | None = None) -> tuple[Any, DuplicateReport]:
    """Keep the first of the rows that read the same (see `row_key`).

    Args:
        rows: a list of objects, `Records` or a `datasets.Dataset`.
        fields: compare these fields only, for instance ("instruction", "input") to keep one answer
            a question; None compares all. A row that fills none of them is kept.

    Returns:
        The rows that are kept, in their order and of the same kind, and the report.

    Raises:
        UserError: there is no row, or no row has one of `fields`.
    """
    require_rows(rows)
    if fields is not None:
        _check_fields(fields, column_names(rows))
    first: dict[str, int] = {}
    kept: list[int] = []
    dropped: list[tuple[int, int]] = []
    nothing = row_key({})
    for index, row in enumerate(rows.with_format(None) if is_dataset(rows) else rows):
        key = row_key(row, fields)
        earlier = first.setdefault(key, index)
        if earlier == index or (fields is not None and key == nothing):
            kept.append(index)
        else:
            dropped.append((index, earlier))
    places = tuple(f"{where(rows, i)} = {where(rows, j)}" for i, j in dropped)
    can_select = isinstance(rows, Records) or is_dataset(rows)
    chosen = rows.select(kept) if can_select else [rows[i] for i in kept]
    return chosen, DuplicateReport(len(rows), tuple(dropped), places)


def _check_fields(fields: Sequence[str], names: list[str]) -> None:
    wanted = [fields] if isinstance(fields, str) else list(fields)
    missing = [shown(name) for name in wanted if name not in names]
    if isinstance(fields, str) or missing or not wanted:
        raise UserError(
            "fields does not list fields of the rows",
            got=shown(fields) if not missing else first_few(missing, separator=", "),
            allowed="a list of " + first_few([shown(name) for name in names], 12, ", "),
            do="Pass fields=None to compare all fields",
        )
