"""Colours of a quantisation picture: the more bits, the further from the paper's lightness.

Rungs are one hue in steps of at least 15 in Lab's lightness, so that they read the same in grey and
for colour-blind eyes; narrow cells are told apart by a hatch besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from colab_qlora.curves.picture.theme import DARK, LIGHT, Theme
from colab_qlora.quantization.budget import INT8, NF4_32, NF4_64, SIXTEEN_BIT

_HATCHED = {"linewidth": 0.0, "hatch_linewidth": 0.7}


@dataclass(frozen=True)
class RungStyle:
    """Face of a rung, what is written or hatched on it, and the hatch ("" for none)."""

    face: str
    ink: str
    hatch: str = ""

    def patch(self, *, is_hatched: bool, outline: str) -> dict[str, Any]:
        """Keyword arguments of `Sheet.add_patch`; hatches take the colour of the edge."""
        if is_hatched and self.hatch:
            return {"facecolor": self.face, "edgecolor": self.ink, "hatch": self.hatch, **_HATCHED}
        return {"facecolor": self.face, "edgecolor": outline, "linewidth": 0.6}


@dataclass(frozen=True)
class PictureStyle:
    """Paper and ink, a style a rung (`other` for formats that are none), and the price bars."""

    theme: Theme
    rungs: Mapping[str, RungStyle]
    other: RungStyle
    price: str

    def of(self, rung: str) -> RungStyle:
        return self.rungs.get(rung, self.other)


ON_LIGHT = PictureStyle(
    LIGHT,
    {
        NF4_64: RungStyle("#dce8f4", LIGHT.ink),
        NF4_32: RungStyle("#8fb9df", LIGHT.ink, "..."),
        INT8: RungStyle("#2a6cab", "#ffffff", "///"),
        SIXTEEN_BIT: RungStyle("#0a2440", "#ffffff"),
    },
    RungStyle("#d8d3c8", LIGHT.ink, "xxx"),
    "#953a1e",
)
ON_DARK = PictureStyle(
    DARK,
    {
        NF4_64: RungStyle("#2a3746", DARK.ink),
        NF4_32: RungStyle("#3f5f80", "#ffffff", "..."),
        INT8: RungStyle("#86bbec", "#16181d", "///"),
        SIXTEEN_BIT: RungStyle("#f2f7fc", "#16181d"),
    },
    RungStyle("#6b6457", DARK.ink, "xxx"),
    "#e0925c",
)
