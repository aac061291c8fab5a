"""A formatting_func of tutorials, for rows or for batches, as one for rows.

TRL once passed a batch of rows and took a list of texts; today it passes one row and takes its
text. A function for batches need not fail at a row: it reads the row's texts letter by letter. But
of the same row twice it makes two texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from colab_qlora.errors import UserError

# what a function for batches may raise at a row, and one for rows at a batch
_MISFITS = (AttributeError, IndexError, KeyError, TypeError)


def row_formatting(formatting: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], str]:
    """A formatting_func that gives the text of one row.

    Args:
        formatting: for a row, a text or a list of one text; or for a batch, a list of texts.

    Returns:
        The function; it raises UserError where `formatting` gives no text.
    """

    def formatted(row: dict[str, Any]) -> str:
        failure = None
        try:
            text = formatting(row)
        except _MISFITS as error:
            text, failure = None, error
        if isinstance(text, str):
            return text
        try:
            texts = formatting({name: [value, value] for name, value in row.items()})
        except _MISFITS:
            texts = None
        for found, count in ((texts, 2), (text, 1)):
            if isinstance(found, list) and len(found) == count and isinstance(found[0], str):
                return found[0]
        if failure is not None:
            raise failure
        raise UserError(
            "formatting_func gives no text",
            got=type(text).__name__,
            allowed="the text of a row, or a list of the texts of a batch",
            do="Return one of these; a function that gives columns is for dataset.map",
        )

    return formatted
