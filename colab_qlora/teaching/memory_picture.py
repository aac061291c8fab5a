"""The parts of a training step's memory as one stacked bar, and in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from colab_qlora.curves.picture.layout import spread
from colab_qlora.errors import UserError
from colab_qlora.teaching.figures import (
    INK,
    LINE_PX,
    MUTED,
    PAPER,
    blank_figure,
    fill_rectangle,
    line,
    put_text,
    put_title,
    shortened,
    text_width,
)
from colab_qlora.teaching.memory import MemoryPart

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# the Okabe-Ito palette, neighbours far apart in lightness
_COLOURS = (
    "#0072b2",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
    "#009e73",
    "#cc79a7",
    "#5f6670",
    "#e69f00",
    "#b8bec6",
)
_LEFT, _RIGHT = 24.0, 776.0
_BAR_PX = 46.0
_KEY_GAP_PX = 22.0  # a key of two digits at 11 pt, and some air
_LEAST_SEGMENT_PX = 1.5


def draw_memory(parts: Sequence[MemoryPart], limit_gib: float | None = None) -> Figure:
    """Draw the parts as one bar, with a list of all of them beneath.

    Args:
        parts: from `memory_parts` or `weight_parts`; those of size 0 are left out, and those that
            are not there at the peak are in the list only.
        limit_gib: the GPU's memory in GiB, drawn as a line; 14.74 for a Colab T4.

    Returns:
        A figure 800 px wide. What is measured is plain, what is computed or assumed is hatched.
        A number leads from each segment to its line in the list; segments wide enough carry their
        name as well. A segment too thin to be seen is drawn 1.5 px wide.

    Raises:
        UserError: there is nothing to draw, or the limit is not positive.
    """
    parts, others, total = _check(parts, limit_gib)
    rows = len(parts) + len(others)
    end = max(total, limit_gib or 0.0) * 1.01
    scale = (_RIGHT - _LEFT) / end
    limit = None if limit_gib is None else min(_LEFT + limit_gib * scale, _RIGHT)
    fig = blank_figure(800, 246 + LINE_PX * rows)
    bar = 84 + LINE_PX * rows
    left, centres = _LEFT, []
    for number, part in enumerate(parts):
        wide = max(part.gib * scale, _LEAST_SEGMENT_PX)
        _swatch(fig, left, bar, wide, _BAR_PX, number, part)
        centres.append(left + wide / 2)
        _label_wide_segment(fig, part, (left, left + wide), bar + _BAR_PX, limit)
        left += wide
    _draw_keys(fig, centres, bar)
    _draw_list(fig, parts, others)
    title = f"{_size(total)} in all"
    if limit_gib is not None and limit is not None:
        _draw_limit(fig, limit, limit_gib, bar)
        title += f", {_fits(total, limit_gib)}"
    put_title(fig, _LEFT, title)
    return fig


def describe_memory(parts: Sequence[MemoryPart], limit_gib: float | None = None) -> str:
    """The bar in words.

    Args:
        parts: from `memory_parts` or `weight_parts`.
        limit_gib: the GPU's memory in GiB.

    Returns:
        Two or three sentences: the total and how much of it is measured; with a limit, whether the
        total fits; the largest part.

    Raises:
        UserError: there is nothing to describe, or the limit is not positive.
    """
    parts, _, total = _check(parts, limit_gib)
    largest = max(parts, key=lambda part: part.gib)
    measured = sum(part.gib for part in parts if part.is_measured)
    kinds = "all of it measured"
    if measured < total:
        kinds = f"{_size(measured)} measured and {_size(total - measured)} computed or assumed"
    fits = "" if limit_gib is None else f" That {_fits(total, limit_gib)}."
    return (
        f"The memory comes to {_size(total)}: {kinds}.{fits} The largest part is {largest.name} "
        f"with {_size(largest.gib)}, {largest.gib / total:.0%} of the total."
    )


def _swatch(
    fig: Figure, left: float, bottom: float, wide: float, high: float, number: int, part: MemoryPart
) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    style: dict[str, Any] = {"facecolor": colour, "linewidth": 0}
    if not part.is_measured and wide > 3:
        style |= {"hatch": "///", "edgecolor": PAPER}
    fill_rectangle(fig, left, bottom, wide, high, gid=f"segment {part.name}", **style)
    if wide > 5:  # a gap keeps neighbours apart in grey; a thinner segment would vanish in it
        line(fig, (left + wide - 0.5,) * 2, (bottom, bottom + high), color=PAPER, linewidth=1.2)


def _label_wide_segment(
    fig: Figure, part: MemoryPart, span: tuple[float, float], top: float, limit: float | None
) -> None:
    """Name a segment above the bar if there is room, beside the limit's line if that is in it."""
    lines = (_size(part.gib), part.name)
    needed = max(text_width(fig, text) for text in lines) + 10
    rooms = [span]
    if limit is not None and span[0] < limit + 8 and limit - 8 < span[1]:
        rooms = [(span[0], limit - 8), (limit + 8, span[1])]
    left, right = max(rooms, key=lambda room: room[1] - room[0])
    if right - left < needed:
        return
    for row, text in enumerate(lines):
        put_text(fig, (left + right) / 2, top + 12 + 18 * row, text, ha="center", gid="name")


def _draw_keys(fig: Figure, centres: Sequence[float], bar: float) -> None:
    """Numbers below the bar, moved apart, each with a line to its segment."""
    places = spread(centres, _KEY_GAP_PX, _LEFT + 8, _RIGHT - 8)
    for number, (centre, x) in enumerate(zip(centres, places, strict=True), 1):
        line(fig, (centre, centre, x), (bar - 1, bar - 5, bar - 18), color=MUTED, linewidth=1.0)
        put_text(fig, x, bar - 28, str(number), ha="center", gid="key")


def _draw_list(fig: Figure, parts: Sequence[MemoryPart], others: Sequence[MemoryPart]) -> None:
    rows = [*parts, *others]
    head = max(text_width(fig, part.name) for part in rows) + 66
    size = head + 84
    legend = "plain: measured; hatched: computed or assumed"
    if others:
        legend += "; not numbered: at another moment"
    put_text(fig, _LEFT, 20 + LINE_PX * len(rows), legend, gid="legend")
    for number, part in enumerate(rows):
        y = 14 + LINE_PX * (len(rows) - 1 - number)
        if number < len(parts):
            put_text(fig, _LEFT + 16, y, str(number + 1), ha="right", gid="row")
            _swatch(fig, _LEFT + 26, y - 6, 24, 13, number, part)
        put_text(fig, _LEFT + 58, y, part.name, gid="row")
        put_text(fig, _LEFT + size, y, _size(part.gib), ha="right", gid="row")
        note = shortened(fig, part.note, _RIGHT - _LEFT - size - 16)
        put_text(fig, _LEFT + size + 16, y, note, color=MUTED, gid="row")


def _draw_limit(fig: Figure, x: float, limit_gib: float, bar: float) -> None:
    top = bar + _BAR_PX + 52
    line(fig, (x, x), (bar - 4, top), color=PAPER, linewidth=5.0)
    line(fig, (x, x), (bar - 4, top), color=INK, linewidth=2.0, linestyle=(0, (4, 2)))
    text = f"limit {limit_gib:g} GiB"
    half = text_width(fig, text) / 2
    put_text(fig, min(x, _RIGHT - half), top + 11, text, ha="center", gid="limit")


def _size(gib: float) -> str:
    return f"{gib:.2f} GiB" if gib >= 0.0995 else f"{gib * 1024:.1f} MiB"


def _fits(total: float, limit_gib: float) -> str:
    left = limit_gib - total
    if left >= 0:
        return f"fits in {limit_gib:g} GiB with {_size(left)} to spare"
    return f"does not fit in {limit_gib:g} GiB: {_size(-left)} too much"


def _check(
    parts: Sequence[MemoryPart], limit_gib: float | None
) -> tuple[list[MemoryPart], list[MemoryPart], float]:
    """The parts at the peak, the others, and the total of the former; empty ones are left out."""
    shown = [part for part in parts if part.gib > 0 and part.is_at_peak]
    others = [part for part in parts if part.gib > 0 and not part.is_at_peak]
    if not shown:
        raise UserError("there is no memory to show", got=f"{len(parts)} parts, all empty")
    if limit_gib is not None and limit_gib <= 0:
        raise UserError(
            "limit_gib is not a size", got=limit_gib, allowed="GiB, e.g. 14.74 for a Colab T4"
        )
    return shown, others, sum(part.gib for part in shown)
