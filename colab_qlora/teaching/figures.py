"""What the pictures share: paper, text in pixels, number formats.

Colours are never the only difference: every picture reads the same in grey, by hatches, labels and
positions. All text is 11 pt or larger at 100 dpi.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from colab_qlora.curves.picture.artists import LIGHT
from colab_qlora.curves.picture.layout import DPI, TEXT_PT, TITLE_PT

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

__all__ = [
    "LINE_PX",
    "blank_figure",
    "fill_rectangle",
    "line",
    "put_text",
    "shortened",
    "text_width",
]

LINE_PX = 21  # a line of 11 pt text at 100 dpi, with the space to the next
INK, MUTED, GRID, PAPER = LIGHT.ink, LIGHT.muted, LIGHT.grid, LIGHT.paper


def blank_figure(width_px: float, height_px: float) -> Figure:
    """An empty figure of that many pixels at 100 dpi, with a canvas of its own to measure text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure((width_px / DPI, height_px / DPI), dpi=DPI, facecolor=PAPER)
    FigureCanvasAgg(fig)
    return fig


def text_width(fig: Figure, text: str, size: float = TEXT_PT, weight: str = "normal") -> float:
    """Width in px that the text will have."""
    from matplotlib.font_manager import FontProperties

    renderer: Any = fig.canvas.get_renderer()  # type: ignore[attr-defined]
    font = FontProperties(size=size, weight=weight)
    return float(renderer.get_text_width_height_descent(text, font, False)[0])


def shortened(fig: Figure, text: str, room: float) -> str:
    """The text, or as many of its words as fit into so many px, with "..." in place of the rest."""
    if text_width(fig, text) <= room:
        return text
    words = text.split()
    while words and text_width(fig, " ".join(words) + " ...") > room:
        words.pop()
    return " ".join([*words, "..."])


def put_text(fig: Figure, x_px: float, y_px: float, text: str, **style: Any) -> Text:
    """Put a text at a position in px from the lower left corner; vertically centred there."""
    width, height = fig.get_size_inches() * DPI
    usual: dict[str, Any] = {"fontsize": TEXT_PT, "color": INK, "va": "center"}
    # a module's name is no formula
    return fig.text(x_px / width, y_px / height, text, parse_math=False, **(usual | style))


def put_title(fig: Figure, x_px: float, text: str) -> Text:
    """Put the title at the upper edge, from x_px on."""
    top = fig.get_size_inches()[1] * DPI - 20
    return put_text(fig, x_px, top, text, fontsize=TITLE_PT, fontweight="bold", gid="title")


def fill_rectangle(fig: Figure, left: float, bottom: float, wide: float, high: float, **style: Any):
    """Draw a rectangle given in px; returns the patch."""
    from matplotlib.patches import Rectangle

    width, height = fig.get_size_inches() * DPI
    corner, size = (left / width, bottom / height), (wide / width, high / height)
    patch = Rectangle(corner, *size, transform=fig.transFigure, **style)
    fig.add_artist(patch)
    return patch


def line(fig: Figure, xs: tuple[float, ...], ys: tuple[float, ...], **style: Any) -> None:
    """Draw a line through points given in px."""
    from matplotlib.lines import Line2D

    width, height = fig.get_size_inches() * DPI
    points = [x / width for x in xs], [y / height for y in ys]
    fig.add_artist(Line2D(*points, transform=fig.transFigure, **style))
