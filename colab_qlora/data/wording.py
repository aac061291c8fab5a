"""The words in which data faults are told: types, values, and the first few of many."""

from __future__ import annotations

from collections.abc import Sequence

FAULTS_SHOWN = 3

_KINDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number"}


def kind_of(value: object) -> str:
    """Name a JSON value's type in words: "a list", "a number", "null"."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    return _KINDS.get(type(value), f"of type {type(value).__name__}")


def shown(value: object, width: int = 40) -> str:
    """Return `repr(value)` on one line of at most `width` characters."""
    text = repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."


def first_few(items: Sequence[str], limit: int = FAULTS_SHOWN, separator: str = "; ") -> str:
    """Join the first `limit` items and count the rest, on one line."""
    rest = len(items) - limit
    more = f"{separator}and {rest:,} more" if rest > 0 else ""
    return separator.join(items[:limit]) + more


def counted(count: int, noun: str) -> str:
    """Return "1 row" or "1,200 rows"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
