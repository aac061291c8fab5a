"""Where the words of a figure go, in pixels: labels at line ends, notes above the axes.

Direct labels replace a legend box, so they must not overlap. Text widths are measured with the
renderer before anything is placed, and the axes get the room that is left. Positions are stored as
fractions of the figure and fonts in points, so a figure saved at another dpi looks the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DPI", "EndLabel", "Note", "lay_out", "pack_rows", "shorten", "spread"]

DPI = 100
TEXT_PT, TITLE_PT = 11, 13
_LINE_PX = 21  # 11 pt are 15.3 px at 100 dpi; the rest keeps ascenders and descenders apart
_TITLE_LINE_PX = 28
_PAD_PX = 10
_SWATCH_PX, _SWATCH_GAP_PX = 28, 7
_LABEL_START_PX = _PAD_PX + _SWATCH_PX + _SWATCH_GAP_PX
_EDGE_MARKER_PX = 8  # half a marker that sits on the top edge, and some air


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
    """

    text: str
    x: float


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
        right = left + width + 2 * _PAD_PX
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


def shorten(text: str, limit: int) -> str:
    """Cuts the middle out of a text of more than `limit` characters; names differ at the ends."""
    if len(text) <= limit:
        return text
    kept = max(2, limit - 3)
    return text[: (kept + 1) // 2] + "..." + text[len(text) - kept // 2 :]


def lay_out(
    fig: Figure,
    ax: Axes,
    ends: list[EndLabel],
    notes: list[Note],
    *,
    title: str | None,
    ink: str,
) -> None:
    """Places the axes, the end labels, the notes and the title; the data limits are final by now.

    Args:
        fig: the figure, at `DPI` and with an Agg canvas.
        ax: its only axes.
        ends: the labels to the right of the axes.
        notes: the notes above the axes, the most important first.
        title: the title, or None.
        ink: the colour of all text.
    """
    sheet = _Sheet(fig, ink)
    fitted = [sheet.fit(end.text, 0.4 * sheet.width - _LABEL_START_PX) for end in ends]
    left, bottom = sheet.room_for_ticks(ax)
    right = sheet.width - 2 * _PAD_PX
    if ends:
        right -= max(wide for _, wide in fitted) + _LABEL_START_PX - _PAD_PX
    x_px = _Scale(*ax.get_xlim(), left, right)

    fitted_notes = [sheet.fit(note.text, sheet.width - left - _PAD_PX) for note in notes]
    spots = pack_rows(
        [x_px(note.x) for note in notes],
        [wide for _, wide in fitted_notes],
        left,
        sheet.width - _PAD_PX,
    )
    top = sheet.height - _PAD_PX - _EDGE_MARKER_PX - (_TITLE_LINE_PX if title else 0)
    top -= _LINE_PX * max((row + 1 for _, row in spots), default=0)
    y_px = _Scale(*ax.get_ylim(), bottom, top)
    sheet.place(ax, x_px, y_px)

    for (text, _), (text_left, row) in zip(fitted_notes, spots, strict=True):
        sheet.put(text_left, top + _EDGE_MARKER_PX + _LINE_PX * (row + 0.5), text, gid="note")
    if title:
        sheet.put_title(title, left)
    _put_end_labels(sheet, ends, [text for text, _ in fitted], x_px, y_px)


@dataclass(frozen=True)
class _Scale:
    """Data units to px along one side of the axes."""

    low: float
    high: float
    first_px: float
    last_px: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return float(self.first_px + share * (self.last_px - self.first_px))


class _Sheet:
    """The figure in px: measures words, and puts words and lines where it is told."""

    def __init__(self, fig: Figure, ink: str) -> None:
        self.fig, self.ink = fig, ink
        self.renderer: Any = fig.canvas.get_renderer()  # type: ignore[attr-defined]
        self.width, self.height = fig.get_size_inches() * DPI

    def fit(self, text: str, room: float, size: float = TEXT_PT, weight: str = "normal") -> Any:
        """The text, cut so that it fits into the room in px, and its width in px."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight=weight)
        limit = len(text)
        while True:
            cut = shorten(text, limit)
            wide = self.renderer.get_text_width_height_descent(cut, font, False)[0]
            if wide <= room or limit <= 5:
                return cut, wide
            limit = min(limit - 1, int(limit * room / wide) + 1)

    def room_for_ticks(self, ax: Axes) -> tuple[float, float]:
        """Px that the axes need to their left and below them."""
        # tick labels and axis names reach from the axes as far out as here; they move with the axes
        box: Any = ax.get_window_extent(self.renderer)
        y_box: Any = ax.yaxis.get_tightbbox(self.renderer)
        x_box: Any = ax.xaxis.get_tightbbox(self.renderer)
        return box.x0 - y_box.x0 + _PAD_PX, box.y0 - x_box.y0 + _PAD_PX

    def place(self, ax: Axes, x_px: _Scale, y_px: _Scale) -> None:
        left, bottom = x_px.first_px, y_px.first_px
        wide, high = x_px.last_px - left, y_px.last_px - bottom
        ax.set_position(
            (left / self.width, bottom / self.height, wide / self.width, high / self.height)
        )

    def put(self, x: float, y: float, text: str, **style: Any) -> None:
        usual: dict[str, Any] = {"fontsize": TEXT_PT, "color": self.ink, "va": "center"}
        # a dollar sign in a run name is no formula
        where = x / self.width, y / self.height
        self.fig.text(*where, text, parse_math=False, **(usual | style))

    def put_title(self, title: str, left: float) -> None:
        room = self.width - left - _PAD_PX
        text, _ = self.fit(" ".join(title.split()), room, TITLE_PT, "bold")
        middle = self.height - _PAD_PX - _TITLE_LINE_PX / 2 + 2
        self.put(left, middle, text, fontsize=TITLE_PT, fontweight="bold", gid="title")

    def add_line(self, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:
        from matplotlib.lines import Line2D

        xs, ys = [x / self.width for x in xs], [y / self.height for y in ys]
        self.fig.add_artist(Line2D(xs, ys, transform=self.fig.transFigure, **style))


def _put_end_labels(
    sheet: _Sheet, ends: list[EndLabel], texts: list[str], x_px: _Scale, y_px: _Scale
) -> None:
    """Put the labels to the right of the axes, each tied to the end of its line."""
    right, bottom, top = x_px.last_px, y_px.first_px, y_px.last_px
    # the labels may use the height of the axes, and half a line below it
    room = int((top - 4 - bottom) // _LINE_PX) + 1
    kept = list(range(len(ends)))
    while len(kept) > room and (lowest := max(ends[index].rank for index in kept)) > 0:
        kept = [index for index in kept if ends[index].rank < lowest]
    aims = [y_px(ends[index].y) for index in kept]
    for index, aim, y in zip(kept, aims, spread(aims, _LINE_PX, bottom, top - 4), strict=True):
        end, start = ends[index], right + _PAD_PX
        sheet.put(right + _LABEL_START_PX, y, texts[index], gid="end-label")
        # dotted, because from a line that ended early it crosses the picture and is no data
        leader = {"color": end.style["color"], "linewidth": 1.0, "linestyle": (0, (1, 2))}
        sheet.add_line((x_px(end.x), start), (aim, y), **leader)
        marker = {"markevery": [1]} if end.style.get("marker") else {}
        swatch = (start, start + _SWATCH_PX / 2, start + _SWATCH_PX)
        sheet.add_line(swatch, (y, y, y), **(end.style | marker))
