"""Which linears of a group are decoded and multiplied together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from colab_qlora.layers.linear import LinearPart


@dataclass(frozen=True)
class Span:
    """Consecutive parts whose weights are decoded and multiplied together."""

    parts: tuple[int, ...]
    first_row: int
    last_row: int


def spans_of(
    parts: Sequence[LinearPart],
    rows: Sequence[int],
    row_bytes: int,
    max_bytes: int | None,
    only: frozenset[int] | None,
) -> list[Span]:
    """Runs of neighbouring parts that are decoded, each within the byte budget.

    Args:
        rows: where each part's outputs begin, and where the last one's end.
        row_bytes: bytes of one decoded row.
        max_bytes: for a span of several parts; a single part may be larger. None: no limit.
        only: the parts that are wanted; None for all.
    """
    spans: list[Span] = []
    current: list[int] = []

    def close() -> None:
        if current:
            spans.append(Span(tuple(current), rows[current[0]], rows[current[-1] + 1]))
            current.clear()

    for index, part in enumerate(parts):
        if part.kind == "module" or (only is not None and index not in only):
            close()
            continue
        height = rows[index + 1] - rows[current[0] if current else index]
        if current and max_bytes is not None and height * row_bytes > max_bytes:
            close()
        current.append(index)
    close()
    return spans
