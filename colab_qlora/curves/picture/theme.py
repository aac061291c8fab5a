"""The colours of a loss picture, on light and on dark paper.

The colours were searched for: any two of a theme are at least 27 apart in Lab (delta E 1976) for
normal, protanope, deuteranope and tritanope eyes, at least 7 in lightness, so that they differ in
grey too, and 3:1 in contrast with the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["DARK", "DASHES", "HATCHES", "LIGHT", "MARKERS", "MOST_RUNS", "Theme"]


@dataclass(frozen=True)
class Theme:
    """The colours of a picture, as hexadecimal RGB; `colours` are those of the series, in order."""

    paper: str
    ink: str
    muted: str
    grid: str
    colours: tuple[str, ...]


LIGHT = Theme(
    "#ffffff",
    "#1f2328",
    "#5f6670",
    "#e3e6ea",
    ("#206ad2", "#462526", "#909b00", "#953a1e", "#ae6d81", "#423b71"),
)
DARK = Theme(
    "#16181d",
    "#e6e8eb",
    "#a3abb5",
    "#30353d",
    ("#a88fff", "#c3f897", "#aa5779", "#2de4ee", "#479a44", "#ceba19"),
)
# what tells the runs of a comparison apart besides their colour, in the same order
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (6, 1.5)),
    (0, (2, 1)),
    (0, (7, 1.5, 1.5, 1.5)),
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (12, 2)),
)
MARKERS = ("o", "s", "D", "P", "v", "*")
HATCHES = ("//", "\\\\", "||", "--", "xx", "++")
MOST_RUNS = len(DASHES)
