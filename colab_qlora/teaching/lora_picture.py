"""A frozen weight and the two thin matrices that LoRA puts beside it, drawn to one scale."""

from __future__ import annotations

from typing import TYPE_CHECKING

from colab_qlora.errors import UserError
from colab_qlora.teaching.figures import (
    INK,
    LINE_PX,
    blank_figure,
    fill_rectangle,
    put_text,
    put_title,
    text_width,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FROZEN, _A, _B = "#d0d4da", "#206ad2", "#e69f00"
_LONGEST_PX = 250.0
_THINNEST_PX = 7.0
_MARGIN_PX = 24.0
_LEAST_GAP_PX = 40.0


def draw_lora_shapes(in_features: int, out_features: int, rank: int, name: str = "") -> Figure:
    """Draw W, B and A as rectangles, as wide as their columns and as high as their rows are many.

    Args:
        in_features: columns of W and of A.
        out_features: rows of W and of B.
        rank: columns of B and rows of A.
        name: name of the layer, for the title.

    Returns:
        A figure 800 px wide. Matrices too thin to be seen are drawn 7 px thick, and a caption
        says by how much that exaggerates.

    Raises:
        UserError: a size is below 1.
    """
    _check(in_features, out_features, rank)
    # W, B and A stand side by side: also a rank as large as W must fit
    side_by_side = (800 - 2 * _MARGIN_PX - 2 * _LEAST_GAP_PX) / (2 * in_features + rank)
    scale = min(_LONGEST_PX / max(in_features, out_features), side_by_side)
    wide, high, thin = (max(n * scale, _THINNEST_PX) for n in (in_features, out_features, rank))
    captions = _captions(in_features, out_features, rank, scale)
    below = 3 * LINE_PX + 16 + (6 + LINE_PX * len(captions) if captions else 0)
    fig = blank_figure(800, 88 + high + below)
    foot = below + 4
    matrices = (
        ("W  frozen, 4-bit", wide, high, out_features, in_features, _FROZEN, "///"),
        ("B  trained", thin, high, out_features, rank, _B, None),
        ("A  trained", wide, thin, rank, in_features, _A, None),
    )
    texts = [_lines(title, rows, columns) for title, _, _, rows, columns, _, _ in matrices]
    slots = [
        max(box[1], *(text_width(fig, text) for text in lines))
        for box, lines in zip(matrices, texts, strict=True)
    ]
    # what is left of the width goes to the signs between the matrices
    gap = min(80.0, (800 - 2 * _MARGIN_PX - sum(slots)) / 2)
    left = _MARGIN_PX
    signs = ("+", "\u00d7", "")
    for box, lines, slot, sign in zip(matrices, texts, slots, signs, strict=True):
        _, box_wide, box_high, _, _, colour, hatch = box
        bottom = foot + (high - box_high) / 2
        style = {"facecolor": colour, "edgecolor": INK, "linewidth": 1.0, "hatch": hatch}
        fill_rectangle(fig, left, bottom, box_wide, box_high, gid=lines[0][0], **style)
        _put_lines(fig, left, foot, high, lines)
        centre = left + slot + gap / 2
        put_text(fig, centre, foot + high / 2, sign, fontsize=18, ha="center", gid="sign")
        left += slot + gap
    share = _share_line(in_features, out_features, rank)
    put_text(fig, _MARGIN_PX, foot - 26 - 2 * LINE_PX, share, gid="share")
    _put_captions(fig, captions)
    put_title(fig, _MARGIN_PX, f"{name or 'One layer'}: y = W x + (alpha / {rank}) B A x")
    return fig


def describe_lora_shapes(in_features: int, out_features: int, rank: int, name: str = "") -> str:
    """The shapes in words.

    Returns:
        Two sentences with the shapes and the numbers of parameters.

    Raises:
        UserError: a size is below 1.
    """
    _check(in_features, out_features, rank)
    added, base = rank * (in_features + out_features), in_features * out_features
    return (
        f"{name or 'The layer'} has a frozen 4-bit weight W of {out_features:,} x {in_features:,} "
        f"= {base:,} numbers. Beside it, LoRA of rank {rank} trains A ({rank} x {in_features:,}) "
        f"and B ({out_features:,} x {rank}), together {added:,} numbers, {added / base:.2%} of W."
    )


def _lines(title: str, rows: int, columns: int) -> tuple[str, str, str]:
    return title, f"{rows:,} x {columns:,}", f"{rows * columns:,} parameters"


def _put_lines(
    fig: Figure, left: float, foot: float, high: float, lines: tuple[str, str, str]
) -> None:
    """The name above a matrix, its shape and its number of parameters below."""
    title, shape, parameters = lines
    put_text(fig, left, foot + high + 16, title, fontweight="bold", gid="label")
    put_text(fig, left, foot - 18, shape, gid="label")
    put_text(fig, left, foot - 18 - LINE_PX, parameters, gid="label")


def _put_captions(fig: Figure, captions: list[str]) -> None:
    for row, caption in enumerate(reversed(captions)):
        put_text(fig, _MARGIN_PX, 16 + LINE_PX * row, caption, gid="caption")


def _share_line(in_features: int, out_features: int, rank: int) -> str:
    added = rank * (in_features + out_features)
    return f"A and B: {added:,} parameters, {added / (in_features * out_features):.2%} of W"


def _captions(in_features: int, out_features: int, rank: int, scale: float) -> list[str]:
    sides = (
        ("the short side of A and B", rank),
        ("the height of W and B", out_features),
        ("the width of W and A", in_features),
    )
    factors = [(side, _THINNEST_PX / (numbers * scale)) for side, numbers in sides]
    return [
        f"Not to scale: {side} is {factor:.0f} times too long, so that it can be seen."
        for side, factor in factors
        if factor >= 1.5
    ]


def _check(in_features: int, out_features: int, rank: int) -> None:
    for what, n in (("in_features", in_features), ("out_features", out_features), ("rank", rank)):
        if n < 1:
            raise UserError(f"{what} is not a size", got=n, allowed="an integer from 1 up")
