"""Print rows as a table with aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def number(value: float | None, digits: int = 3) -> str:
    """A number in `digits` significant digits without an exponent; "-" if there is none."""
    if value is None:
        return "-"
    if value != value or value == 0:
        return str(value)
    places = digits - 1
    size = abs(value)
    while size >= 10 and places > 0:
        size, places = size / 10, places - 1
    while size < 1 and places < 9:
        size, places = size * 10, places + 1
    return f"{value:,.{places}f}"


def exponent(value: float | None) -> str:
    """An error, such as 2.3e-03; "-" if there is none."""
    return "-" if value is None else f"{value:.1e}"


def format_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[str] = ()
) -> str:
    """The table as text; the first column and those named in `left` are aligned to the left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    is_left = [name in left or i == 0 for i, name in enumerate(head)]
    lines = []
    for row in (head, *rows):
        cells = [
            cell.ljust(width) if at_left else cell.rjust(width)
            for cell, width, at_left in zip(row, widths, is_left, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
