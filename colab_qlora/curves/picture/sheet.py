"""The figure in pixels: measures words, puts words and lines where it is told.

Positions are stored as fractions of the figure and fonts in points, so a figure saved at another
dpi looks the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["DPI", "LINE_PX", "PAD_PX", "TEXT_PT", "TITLE_LINE_PX", "TITLE_PT", "Scale", "Sheet"]

DPI = 100
TEXT_PT, TITLE_PT = 11, 13
LINE_PX = 21  # 11 pt are 15.3 px at 100 dpi; the rest keeps ascenders and descenders apart
TITLE_LINE_PX = 28
PAD_PX = 10


@dataclass(frozen=True)
class Scale:
    """Data units to px along one side of the axes."""

    low: float
    high: float
    first_px: float
    last_px: float

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return float(self.first_px + share * (self.last_px - self.first_px))


class Sheet:
    """A figure at `DPI` with an Agg canvas, in px from its lower left corner."""

    def __init__(self, fig: Figure, ink: str) -> None:
        self.fig, self.ink = fig, ink
        self.renderer: Any = fig.canvas.get_renderer()  # type: ignore[attr-defined]
        self.width, self.height = fig.get_size_inches() * DPI

    def measure(self, text: str, size: float = TEXT_PT, weight: str = "normal") -> float:
        """The width of a text in px."""
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=size, weight=weight)
        return float(self.renderer.get_text_width_height_descent(text, font, False)[0])

    def fit(
        self, text: str, room: float, size: float = TEXT_PT, weight: str = "normal"
    ) -> tuple[str, float]:
        """The text, cut so that it fits into the room in px, and its width in px."""
        limit = len(text)
        while True:
            cut = shorten(text, limit)
            wide = self.measure(cut, size, weight)
            if wide <= room or limit <= 5:
                return cut, wide
            limit = min(limit - 1, int(limit * room / wide) + 1)

    def room_for_ticks(self, ax: Axes) -> tuple[float, float]:
        """Px that the axes need to their left and below them."""
        # tick labels and axis names reach from the axes as far out as here, and move with the axes;
        # without any there is no box
        box: Any = ax.get_window_extent(self.renderer)
        y_box: Any = ax.yaxis.get_tightbbox(self.renderer) or box
        x_box: Any = ax.xaxis.get_tightbbox(self.renderer) or box
        return box.x0 - y_box.x0 + PAD_PX, box.y0 - x_box.y0 + PAD_PX

    def place(self, ax: Axes, left: float, right: float, bottom: float, top: float) -> None:
        """Gives axes their place."""
        wide, high = right - left, top - bottom
        ax.set_position(
            (left / self.width, bottom / self.height, wide / self.width, high / self.height)
        )

    def put(self, x: float, y: float, text: str, **style: Any) -> None:
        """Puts a text, vertically centred at y."""
        usual: dict[str, Any] = {"fontsize": TEXT_PT, "color": self.ink, "va": "center"}
        # a dollar sign in a run name is no formula
        where = x / self.width, y / self.height
        self.fig.text(*where, text, parse_math=False, **(usual | style))

    def put_title(self, title: str, left: float) -> None:
        """Puts the title at the upper edge."""
        room = self.width - left - PAD_PX
        text, _ = self.fit(" ".join(title.split()), room, TITLE_PT, "bold")
        middle = self.height - PAD_PX - TITLE_LINE_PX / 2 + 2
        self.put(left, middle, text, fontsize=TITLE_PT, fontweight="bold", gid="title")

    def add_line(self, xs: Sequence[float], ys: Sequence[float], **style: Any) -> None:
        """Draws a line through points."""
        from matplotlib.lines import Line2D

        xs, ys = [x / self.width for x in xs], [y / self.height for y in ys]
        self.fig.add_artist(Line2D(xs, ys, transform=self.fig.transFigure, **style))

    def add_patch(self, left: float, bottom: float, wide: float, high: float, **style: Any) -> None:
        """Fills a rectangle."""
        from matplotlib.patches import Rectangle

        corner = left / self.width, bottom / self.height
        size = wide / self.width, high / self.height
        hatch_width = style.pop("hatch_linewidth", None)
        patch = Rectangle(corner, *size, transform=self.fig.transFigure, **style)
        if hatch_width:
            patch.set_hatch_linewidth(hatch_width)
        self.fig.add_artist(patch)


def shorten(text: str, limit: int) -> str:
    """Cuts the middle out of a text of more than `limit` characters; names differ at the ends."""
    if len(text) <= limit:
        return text
    kept = max(2, limit - 3)
    return text[: (kept + 1) // 2] + "..." + text[len(text) - kept // 2 :]
