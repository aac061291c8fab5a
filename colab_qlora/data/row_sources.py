"""What may be passed as rows: a list, `Records` or a `datasets.Dataset` of at least one row."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from colab_qlora.data.wording import first_few, shown
from colab_qlora.errors import UserError


def is_dataset(value: object) -> bool:
    """Whether `value` is a `datasets.Dataset`; never imports the library, which takes seconds."""
    # who holds a data set has imported its library before
    kind = getattr(sys.modules.get("datasets"), "Dataset", None)
    return kind is not None and isinstance(value, kind)


def require_rows(rows: Any) -> None:
    """Raise UserError unless `rows` is a list, `Records` or `datasets.Dataset` with a row."""
    is_list = isinstance(rows, Sequence) and not isinstance(rows, (str, bytes))
    if not is_list and not is_dataset(rows):
        got, do = _refusal(rows)
        raise UserError(
            "these are not rows",
            got=got,
            allowed="a list of objects, what read_records returned, or one datasets.Dataset",
            do=do,
        )
    if len(rows) == 0:
        raise UserError(
            "there is no row",
            got="0 rows",
            allowed="at least one",
            do="Read a file with read_records(path), or check the filter that was applied",
        )


def column_names(rows: Any) -> list[str]:
    """Every field that some row has, in order of first sight."""
    if is_dataset(rows):
        return list(rows.column_names)
    return list(dict.fromkeys(key for row in rows if isinstance(row, Mapping) for key in row))


def _refusal(rows: Any) -> tuple[str, str]:
    """What was got, and the next step."""
    kind = f"type {type(rows).__name__}"
    if isinstance(rows, Mapping):
        names = [shown(key) for key in rows]
        got = f"{kind} with {first_few(names, separator=', ') or 'no key'}"
        if names and all(hasattr(part, "column_names") for part in rows.values()):
            return got, f"Pass one of its parts, such as dataset[{names[0]}]"
        return got, "Put one row into a list: [row]"
    if isinstance(rows, str):
        return f"text ({shown(rows)})", "Read the file first with read_records(path)"
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):
        return kind, "Pass frame.to_dict('records')"
    if "IterableDataset" in kind:
        return kind, "Load it without streaming=True, or pass list(dataset.take(1000))"
    return kind, "Pass a list of rows"
