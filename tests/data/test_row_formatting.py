"""A formatting_func for rows or for batches gives the text of one row."""

from __future__ import annotations

from typing import Any

import pytest

from colab_qlora import UserError
from colab_qlora.data.row_formatting import row_formatting

ROW = {"ask": "after 1?", "say": "2"}


def _row(row: Any) -> str:
    return f"{row['ask']} {row['say']}"


def _row_in_a_list(row: Any) -> list[str]:
    return [f"{row['ask']} {row['say']}"]


def _batch(rows: Any) -> list[str]:
    # of a row it makes one text, of the first letters
    return [f"{a} {s}" for a, s in zip(rows["ask"], rows["say"], strict=False)]


def _batch_by_index(rows: Any) -> list[str]:
    return [rows["ask"][i].strip() + " " + rows["say"][i] for i in range(len(rows["ask"]))]


def _both(rows: Any) -> Any:
    return _batch(rows) if isinstance(rows["ask"], list) else _row(rows)


def _row_by_addition(row: Any) -> list[str]:
    return [row["ask"] + " " + row["say"]]


@pytest.mark.parametrize(
    "formatting", [_row, _row_in_a_list, _batch, _batch_by_index, _both, _row_by_addition]
)
def test_the_text_of_a_row(formatting: Any) -> None:
    assert row_formatting(formatting)(ROW) == "after 1? 2"


@pytest.mark.parametrize("given", [None, {"text": ["a"]}, ["a", "b", "c"], [3], 3])
def test_what_is_no_text(given: Any) -> None:
    with pytest.raises(UserError, match=f"gives no text: got {type(given).__name__}; allowed: the"):
        row_formatting(lambda row: given)(ROW)


def test_a_mistake_in_it_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError, match="answer"):
        row_formatting(lambda row: row["answer"])(ROW)
    with pytest.raises(ZeroDivisionError):
        row_formatting(lambda row: 1 / 0)(ROW)
