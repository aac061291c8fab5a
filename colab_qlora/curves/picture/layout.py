"""Where the words of a figure go: labels at line ends, notes above the axes, a panel below them.

Direct labels replace a legend box, so they must not overlap. Text widths are measured with the
renderer before anything is placed, and the axes get the room that is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from colab_qlora.curves.picture.sheet import (
    DPI,
    LINE_PX,
    PAD_PX,
    TEXT_PT,
    TITLE_LINE_PX,
    TITLE_PT,
    Scale,
    Sheet,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DPI",
    "TEXT_PT",
    "TITLE_PT",
    "EndLabel",
    "Note",
    "Panel",
    "lay_out",
    "pack_rows",
    "shorten",
    "spread",
]

_SWATCH_PX, _SWATCH_GAP_PX = 28, 7
_LABEL_START_PX = PAD_PX + _SWATCH_PX + _SWATCH_GAP_PX
_EDGE_MARKER_PX = 8  # half a marker that sits on the top edge, and some air
_PANEL_PX, _PANEL_GAP_PX = 48, 18
# less height than this share, and the picture would be about its words
_LEAST_PLOT = 0.36


@dataclass(frozen=True)
class EndLabel:
    """A label for a line, to the right of the axes.

    Attributes:
        text: the words.
        x: where the line ends, in data units.
        y: where the line ends, in data units, inside the axes.
        style: keyword arguments of the Line2D that stands beside the words.
        rank: where there is no room for all, those of the highest rank go; rank 0 stays.
    """

    text: str
    x: float
    y: float
    style: dict[str, Any]
    rank: int


@dataclass(frozen=True)
class Note:
    """A note above the axes.

    Attributes:
        text: the words.
        x: the data coordinate that it should stand above.
        also: further words, behind a semicolon; a note of their own where the row is too short.
        line: keyword arguments of the Line2D of which a piece stands before the words, or None.
        patch: keyword arguments of the Rectangle that stands there, or None.
    """

    text: str
    x: float
    also: str = ""
    line: dict[str, Any] | None = None
    patch: dict[str, Any] | None = None

    @property
    def indent(self) -> float:
        """Px before the words."""
        return 0 if self.line is None and self.patch is None else _SWATCH_PX + _SWATCH_GAP_PX


@dataclass(frozen=True)
class Panel:
    """Low axes below the others, with the same steps.

    Attributes:
        ax: the axes.
        label: the lines of words to their right, two at most.
        style: keyword arguments of the Line2D that stands beside the first of them.
    """

    ax: Axes
    label: tuple[str, ...]
    style: dict[str, Any] = field(default_factory=dict)


def spread(targets: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves positions apart, each as little as the others allow (least squares).

    Args:
        targets: where each label would like to be, in any order.
        gap: the least distance between two positions.
        low: the least position.
        high: the greatest position; there must be room for all.

    Returns:
        The positions, in the order of `targets`.
    """
    order = sorted(range(len(targets)), key=lambda index: targets[index])
    # minus rank * gap, "at least gap apart" reads "not falling", which pooling neighbours solves
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, size = targets[index] - rank * gap, 1
        while blocks and blocks[-1][0] >= mean:
            other_mean, other_size = blocks.pop()
            mean = (mean * size + other_mean * other_size) / (size + other_size)
            size += other_size
        blocks.append((mean, size))
    highest = high - gap * (len(targets) - 1)
    flat = [min(max(mean, low), highest) for mean, size in blocks for _ in range(size)]
    placed = [0.0] * len(targets)
    for rank, index in enumerate(order):
        placed[index] = flat[rank] + rank * gap
    return placed


def pack_rows(
    centres: Sequence[float], widths: Sequence[float], low: float, high: float
) -> list[tuple[float, int]]:
    """Puts texts in as few rows as a first-fit needs, each near its centre.

    Args:
        centres: where the middle of each text would like to be, in px.
        widths: the widths, in px.
        low: the left limit, in px.
        high: the right limit, in px; a text wider than the room starts at `low`.

    Returns:
        For each text its left edge in px and its row, 0 being the lowest.
    """
    rows: list[list[tuple[float, float]]] = []
    placed = []
    for centre, width in zip(centres, widths, strict=True):
        left = max(low, min(centre - width / 2, high - width))
        right = left + width + 2 * PAD_PX
        fits = (
            all(right <= other_left or other_right <= left for other_left, other_right in row)
            for row in rows
        )
        number = next((number for number, is_free in enumerate(fits) if is_free), len(rows))
        if number == len(rows):
            rows.append([])
        rows[number].append((left, right))
        placed.append((left, number))
    return placed


def lay_out(
    fig: Figure,
    ax: Axes,
    ends: list[EndLabel],
    notes: list[Note],
    *,
    title: str | None,
    ink: str,
    panel: Panel | None = None,
) -> None:
    """Places the axes, the end labels, the notes and the title; the data limits are final by now.

    Args:
        fig: the figure, at `DPI` and with an Agg canvas.
        ax: its axes.
        ends: the labels to the right of the axes.
        notes: the notes above the axes, the most important first; where the height is short the
            last of them go.
        title: the title, or None.
        ink: the colour of all text.
        panel: axes to place below, or None.
    """
    sheet = Sheet(fig, ink)
    room = 0.4 * sheet.width - _LABEL_START_PX
    fitted = [sheet.fit(end.text, room) for end in ends]
    beside = [sheet.fit(text, room) for text in (panel.label if panel else ())]
    left, bottom = sheet.room_for_ticks(ax)
    if panel:
        panel_left, panel_bottom = sheet.room_for_ticks(panel.ax)
        left, bottom = max(left, panel_left), panel_bottom
    right = sheet.width - 2 * PAD_PX
    if labels := fitted + beside:
        right -= max(wide for _, wide in labels) + _LABEL_START_PX - PAD_PX
    x_px = Scale(*ax.get_xlim(), left, right)
    if panel:
        _place_panel(sheet, panel, [text for text, _ in beside], x_px, bottom)
        bottom += _PANEL_PX + _PANEL_GAP_PX

    top = sheet.height - PAD_PX - _EDGE_MARKER_PX - (TITLE_LINE_PX if title else 0)
    most_rows = int((top - bottom - _LEAST_PLOT * sheet.height) // LINE_PX)
    placed = _place_notes(sheet, notes, x_px, most_rows)
    top -= LINE_PX * max((row + 1 for _, _, row in placed), default=0)
    y_px = Scale(*ax.get_ylim(), bottom, top)
    sheet.place(ax, left, right, bottom, top)
    for note, note_left, row in placed:
        _put_note(sheet, note, note_left, top + _EDGE_MARKER_PX + LINE_PX * (row + 0.5))
    if title:
        sheet.put_title(title, left)
    _put_end_labels(sheet, ends, [text for text, _ in fitted], x_px, y_px)


def _place_notes(
    sheet: Sheet, notes: list[Note], x_px: Scale, most_rows: int
) -> list[tuple[Note, float, int]]:
    """The notes that there is room for, each with its left edge in px and its row from below."""
    low, high = x_px.first_px, sheet.width - PAD_PX
    ready: list[tuple[Note, float]] = []
    for note in notes:
        room = high - low - note.indent
        joint = f"{note.text}; {note.also}" if note.also else note.text
        apart = [joint] if sheet.measure(joint) <= room or not note.also else [note.text, note.also]
        for text in apart:
            cut, wide = sheet.fit(text, room)
            ready.append((Note(cut, note.x, "", note.line, note.patch), wide + note.indent))
    kept: list[tuple[Note, float]] = []
    spots: list[tuple[float, int]] = []
    for each in ready:
        centres = [x_px(note.x) for note, _ in [*kept, each]]
        tried = pack_rows(centres, [wide for _, wide in [*kept, each]], low, high)
        # a later note may still fit into a row that is there already
        if tried[-1][1] < max(1, most_rows):
            kept, spots = [*kept, each], tried
    return [(note, *spot) for (note, _), spot in zip(kept, spots, strict=True)]


def _put_note(sheet: Sheet, note: Note, left: float, middle: float) -> None:
    if note.patch is not None:
        # twice as dense, or the small piece would show one stroke
        patch = note.patch | {"hatch": 2 * note.patch.get("hatch", "")}
        sheet.add_patch(left, middle - 7, _SWATCH_PX, 14, **patch)
    if note.line is not None and note.patch is not None:
        edge = note.line | {"linestyle": "solid"}
        sheet.add_line((left, left), (middle - 7, middle + 7), **edge)
    elif note.line is not None:
        sheet.add_line((left, left + _SWATCH_PX), (middle, middle), **note.line)
    sheet.put(left + note.indent, middle, note.text, gid="note")


def _place_panel(sheet: Sheet, panel: Panel, label: list[str], x_px: Scale, bottom: float) -> None:
    sheet.place(panel.ax, x_px.first_px, x_px.last_px, bottom, bottom + _PANEL_PX)
    middle = bottom + _PANEL_PX / 2
    start = x_px.last_px + PAD_PX
    for row, text in enumerate(label):
        y = middle + LINE_PX * ((len(label) - 1) / 2 - row)
        sheet.put(start + _SWATCH_PX + _SWATCH_GAP_PX, y, text, gid="panel-label")
        if row == 0 and panel.style:
            sheet.add_line((start, start + _SWATCH_PX), (y, y), **panel.style)


def _put_end_labels(
    sheet: Sheet, ends: list[EndLabel], texts: list[str], x_px: Scale, y_px: Scale
) -> None:
    """Put the labels to the right of the axes, each tied to the end of its line."""
    right, bottom, top = x_px.last_px, y_px.first_px, y_px.last_px
    # the labels may use the height of the axes, and half a line below it
    room = int((top - 4 - bottom) // LINE_PX) + 1
    kept = list(range(len(ends)))
    while len(kept) > room and (lowest := max(ends[index].rank for index in kept)) > 0:
        kept = [index for index in kept if ends[index].rank < lowest]
    aims = [y_px(ends[index].y) for index in kept]
    for index, aim, y in zip(kept, aims, spread(aims, LINE_PX, bottom, top - 4), strict=True):
        end, start = ends[index], right + PAD_PX
        sheet.put(right + _LABEL_START_PX, y, texts[index], gid="end-label")
        # dotted, because from a line that ended early it crosses the picture and is no data
        leader = {"color": end.style["color"], "linewidth": 1.0, "linestyle": (0, (1, 2))}
        sheet.add_line((x_px(end.x), start), (aim, y), **leader)
        marker = {"markevery": [1]} if end.style.get("marker") else {}
        swatch = (start, start + _SWATCH_PX / 2, start + _SWATCH_PX)
        sheet.add_line(swatch, (y, y, y), **(end.style | marker))
