"""Split rows into training and evaluation, and find rows that stand on both sides.

An evaluation row that was also trained on measures memory, not skill. Two rows count as one when
their fields agree after Unicode NFKC, case folding and collapsing of white space.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from colab_qlora.data.records import Records, where
from colab_qlora.data.wording import counted, first_few, shown
from colab_qlora.errors import UserError

Row = TypeVar("Row", bound=Mapping[str, Any])


def row_key(row: Mapping[str, Any], fields: Sequence[str] | None = None) -> str:
    """Hash the normalised content of a row.

    Args:
        row: the row; field order does not matter, and a blank field counts as a missing one.
        fields: compare these fields only; None compares all.

    Returns:
        64 hexadecimal digits.
    """
    chosen = row if fields is None else {name: row.get(name) for name in fields}
    content = {name: _normalised(value) for name, value in chosen.items()}
    filled = {name: value for name, value in content.items() if value not in (None, "")}
    text = json.dumps(filled, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _normalised(value: Any) -> Any:
    if isinstance(value, str):
        # folding can undo the composed form, so it stands between two normalisations
        folded = unicodedata.normalize("NFKC", value).casefold()
        return " ".join(unicodedata.normalize("NFKC", folded).split())
    if isinstance(value, Mapping):
        return {str(key): _normalised(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_normalised(item) for item in value]
    return value


def find_overlap(
    train_rows: Sequence[Mapping[str, Any]],
    eval_rows: Sequence[Mapping[str, Any]],
    fields: Sequence[str] | None = None,
) -> list[tuple[int, int]]:
    """Find rows that stand on both sides.

    Args:
        train_rows: rows to train on.
        eval_rows: rows to evaluate on.
        fields: compare these fields only, for instance ("instruction", "input") to catch a question
            with two answers; None compares all.

    Returns:
        Every pair (index in `train_rows`, index in `eval_rows`), sorted.
    """
    eval_indexes: dict[str, list[int]] = {}
    for j, row in enumerate(eval_rows):
        eval_indexes.setdefault(row_key(row, fields), []).append(j)
    return [
        (i, j)
        for i, row in enumerate(train_rows)
        for j in eval_indexes.get(row_key(row, fields), ())
    ]


def check_no_overlap(
    train_rows: Sequence[Mapping[str, Any]],
    eval_rows: Sequence[Mapping[str, Any]],
    fields: Sequence[str] | None = None,
) -> None:
    """Raise UserError if a row stands on both sides; see `find_overlap` for the arguments."""
    pairs = find_overlap(train_rows, eval_rows, fields)
    if pairs:
        shared = len({j for _, j in pairs})
        verb = "is a training row" if shared == 1 else "are training rows"
        same = [
            f"{where(train_rows, i, 'train row')} = {where(eval_rows, j, 'eval row')}"
            for i, j in pairs
        ]
        raise UserError(
            f"{shared:,} of {counted(len(eval_rows), 'eval row')} {verb} too",
            got=first_few(same),
            allowed="no row on both sides",
            do="Split all rows with split_rows, or delete these from one side",
        )


def split_rows(
    rows: Sequence[Row], eval_share: float = 0.1, seed: int = 42
) -> tuple[Sequence[Row], Sequence[Row]]:
    """Split rows into training and evaluation without a duplicate on both sides.

    The order in which rows are drawn comes from a hash of `seed` and the row's content, so it does
    not change with the order of the file, the Python version or the machine.

    Args:
        rows: at least two different rows.
        eval_share: wanted share of evaluation rows, between 0 and 1. A group of duplicates goes to
            evaluation only as a whole, so the share can come out smaller.
        seed: any integer.

    Returns:
        (training rows, evaluation rows), each with at least one row and in the order of `rows`;
        `Records` if `rows` is `Records`, otherwise lists.

    Raises:
        UserError: `eval_share` is not between 0 and 1, or there are not two different rows.
    """
    is_number = isinstance(eval_share, (int, float)) and not isinstance(eval_share, bool)
    if not is_number or not 0 < eval_share < 1:
        raise UserError(
            "eval_share is not a share",
            got=shown(eval_share),
            allowed="a number between 0 and 1, both excluded",
            do="Pass eval_share=0.1 to keep a tenth for evaluation",
        )
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row_key(row), []).append(i)
    if len(groups) < 2:
        raise UserError(
            "the rows cannot be split",
            got=f"{counted(len(rows), 'row')}, {len(groups)} of them different",
            allowed="at least two different rows",
            do="Add rows, or train without evaluation",
        )
    chosen = _draw(groups, target=round(eval_share * len(rows)), seed=seed)
    rest = [i for i in range(len(rows)) if i not in chosen]
    return _take(rows, rest), _take(rows, sorted(chosen))


def _draw(groups: Mapping[str, list[int]], target: int, seed: int) -> set[int]:
    """Indexes of whole groups, at most `target` in all; the smallest group where none fits."""

    def draw_order(key: str) -> str:
        return hashlib.sha256(f"{seed}:{key}".encode()).hexdigest()

    order = sorted(groups, key=draw_order)
    chosen: set[int] = set()
    taken = 0
    for key in order:
        # the last group stays in training, whatever the share
        if taken < len(order) - 1 and len(chosen) + len(groups[key]) <= target:
            chosen.update(groups[key])
            taken += 1
    if not chosen:
        chosen.update(groups[min(order, key=lambda key: len(groups[key]))])
    return chosen


def _take(rows: Sequence[Row], indexes: list[int]) -> Any:
    return rows.select(indexes) if isinstance(rows, Records) else [rows[i] for i in indexes]
