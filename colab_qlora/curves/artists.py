"""The lines and marks of a loss picture, one function each.

Each draws on the axes that it is given and returns the labels or notes that belong to what it drew.
A run on its own gets one colour for train and one for eval; in a comparison a run has one colour
and one line style, and its eval line has markers.

The colours were searched for: any two of a theme are at least 27 apart in Lab (delta E 1976) for
normal, protanope, deuteranope and tritanope eyes, at least 7 in lightness, so that they differ in
grey too, and 3:1 in contrast with the paper.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from colab_qlora.curves.layout import EndLabel, Note, shorten
from colab_qlora.curves.series import Array, Curve, loss_text, smooth_losses, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
_DASHES: tuple[Any, ...] = (
    "solid",
    (0, (6, 1.5)),
    (0, (2, 1)),
    (0, (7, 1.5, 1.5, 1.5)),
    (0, (4, 1, 1, 1, 1, 1)),
    (0, (12, 2)),
)
_MARKERS = ("o", "s", "D", "P", "v", "*")
MOST_RUNS = len(_DASHES)
_BASE_DASHES = (0, (4, 3))
# of fewer points the average is mostly the first ones
_SMOOTH_FROM_POINTS = 10
# lines closer than this share of the height, about a line of text, look like one
_SHARED_BASE = 0.05
_MOST_MARKERS = 25
_MOST_EDGE_MARKERS = 40
_RAW_ALPHA, _RAW_ALPHA_COMPARED = 0.35, 0.2


def draw_train(
    ax: Axes,
    curve: Curve,
    index: int,
    theme: Theme,
    *,
    is_compared: bool,
    smooth: bool,
    columns: int,
) -> list[EndLabel]:
    """Draws the logged train loss, thin and light, and the smoothed one in front.

    Args:
        ax: the axes.
        curve: the run.
        index: its place among the runs, which chooses the style.
        theme: the colours.
        is_compared: whether there are other runs.
        smooth: whether to draw the smoothed loss, from 10 points up; otherwise the logged loss is
            the main line.
        columns: pixel columns of the picture; more points than it can show are thinned.

    Returns:
        The label of the main line; none if no loss is finite.
    """
    if not curve.steps.size:
        return []
    style: dict[str, Any] = {
        "color": theme.colours[index],
        "linestyle": _DASHES[index],
        "linewidth": 2.0,
    }
    is_smoothed = smooth and np.isfinite(curve.losses).sum() >= _SMOOTH_FROM_POINTS
    chosen = thin(curve.losses, columns)
    steps, losses = curve.steps[chosen], curve.losses[chosen]
    main = losses
    if is_smoothed:
        alpha = _RAW_ALPHA_COMPARED if is_compared else _RAW_ALPHA
        raw_style = style | {"linestyle": "solid", "linewidth": 0.8, "alpha": alpha}
        ax.plot(steps, losses, **raw_style, zorder=2, gid="train-raw")
        # a spike that leaves the picture counts as its top, or the line would decay for many steps
        main = smooth_losses(np.minimum(curve.losses, ax.get_ylim()[1]))[chosen]
    elif losses.size > columns:
        style |= {"linewidth": 0.8}
    ax.plot(steps, main, **style, zorder=4, gid="train")
    _dot_lone_points(ax, steps, main, style["color"])
    words = "train, smoothed" if is_smoothed and not is_compared else "train"
    return _end_label(steps, main, _label(curve, words), style, rank=0)


def draw_eval(
    ax: Axes, curve: Curve, index: int, theme: Theme, *, is_compared: bool
) -> list[EndLabel]:
    """Draws the eval loss as markers on a line, with a ring around the lowest.

    Args:
        ax: the axes.
        curve: the run.
        index: its place among the runs.
        theme: the colours.
        is_compared: whether there are other runs.

    Returns:
        The label of the line; none if no loss after step 0 is finite.
    """
    if not curve.eval_steps.size:
        return []
    style: dict[str, Any] = {
        "color": theme.colours[index if is_compared else 1],
        "linestyle": _DASHES[index],
        "linewidth": 1.4,
        "marker": _MARKERS[index],
        "markersize": 6,
    }
    every = max(1, -(-curve.eval_steps.size // _MOST_MARKERS))
    ax.plot(curve.eval_steps, curve.eval_losses, **style, markevery=every, zorder=5, gid="eval")
    if every > 1:
        _dot_lone_points(ax, curve.eval_steps, curve.eval_losses, style["color"])
    best = _shown_best(curve)
    if best is not None:
        ring: dict[str, Any] = {
            "marker": "o",
            "markersize": 12,
            "markerfacecolor": "none",
            "linestyle": "none",
        }
        ax.plot(*best, **ring, markeredgecolor=style["color"], zorder=6, gid="best-ring")
    if not curve.eval_steps[np.isfinite(curve.eval_losses)].any():
        return []  # the one eval is at step 0, and the line before training says so
    return _end_label(curve.eval_steps, curve.eval_losses, _label(curve, "eval"), style, rank=1)


def draw_base(ax: Axes, curves: list[Curve], theme: Theme) -> list[EndLabel]:
    """Draws the eval loss before training as a dashed line across.

    Runs of the same model on the same eval rows start equal, and share one line then.

    Returns:
        The labels of the lines.
    """
    bases = [(index, curve, curve.base) for index, curve in enumerate(curves)]
    known = [(index, curve, base) for index, curve, base in bases if base is not None]
    if not known:
        return []
    values = [base for _, _, base in known]
    y_low, y_high = ax.get_ylim()
    style: dict[str, Any] = {"color": theme.muted, "linestyle": _BASE_DASHES, "linewidth": 1.3}
    is_shared = len(known) == len(curves) and max(values) - min(values) <= _SHARED_BASE * (
        y_high - y_low
    )
    if is_shared:
        lines = [("before training", values[0], style)]
    else:
        lines = [
            (_label(curve, "before training"), base, style | {"color": theme.colours[index]})
            for index, curve, base in known
        ]
    for _, base, line_style in lines:
        ax.axhline(base, **line_style, zorder=1.5, gid="base")
    x_high = ax.get_xlim()[1]
    return [EndLabel(text, x_high, base, line_style, 2) for text, base, line_style in lines]


def draw_best(ax: Axes, curves: list[Curve], theme: Theme) -> list[Note]:
    """Draws a vertical line at the lowest eval loss of all runs.

    Returns:
        The note with the loss and the step; none without two evals to choose from.
    """
    found = [(best, curve) for curve in curves if (best := _shown_best(curve)) is not None]
    if not found:
        return []
    (step, loss), curve = min(found, key=lambda item: item[0][1])
    ax.axvline(step, color=theme.ink, linewidth=1.0, linestyle=(0, (1, 2)), zorder=1.6, gid="best")
    owner = f" ({shorten(curve.name, 28)})" if curve.name else ""
    return [Note(f"best eval {loss_text(loss)} at step {step:,}{owner}", step)]


def mark_non_finite(ax: Axes, curves: list[Curve], theme: Theme) -> list[Note]:
    """Marks the steps of nan and inf with crosses on the top edge.

    Returns:
        The note with their number; none without any.
    """
    count, first = 0, None
    for index, curve in enumerate(curves):
        bad = curve.non_finite_steps
        if bad.size:
            _mark_edge(ax, bad, "x", theme.colours[index], "non-finite")
            count += bad.size
            first = min(bad[0], bad[0] if first is None else first)
    if first is None:
        return []
    what = "nan or inf at" if count == 1 else f"{count:,} values nan or inf, first at"
    return [Note(f"\u00d7 {what} step {first:,}", float(first))]


def mark_clipped(ax: Axes, curves: list[Curve], high: float, theme: Theme) -> list[Note]:
    """Marks the steps of losses above the picture with triangles on the top edge.

    Args:
        ax: the axes.
        curves: the runs.
        high: the highest loss shown.
        theme: the colours.

    Returns:
        The note with their number and the highest; none without any.
    """
    count, highest = 0, (high, 0)
    for index, curve in enumerate(curves):
        pairs = ((curve.steps, curve.losses), (curve.eval_steps, curve.eval_losses))
        for steps, losses in pairs:
            above = losses > high
            if above.any():
                _mark_edge(ax, steps[above], "^", theme.colours[index], "clipped")
                count += int(above.sum())
                top = int(np.nanargmax(losses))
                highest = max(highest, (float(losses[top]), int(steps[top])))
    if not count:
        return []
    what = "1 value above," if count == 1 else f"{count:,} values above, highest"
    return [Note(f"\u25b2 {what} {loss_text(highest[0])} at step {highest[1]:,}", highest[1])]


def _shown_best(curve: Curve) -> tuple[int, float] | None:
    # one eval is the lowest of itself, which says nothing
    return curve.best if np.isfinite(curve.eval_losses).sum() > 1 else None


def _end_label(
    steps: Array, losses: Array, text: str, style: dict[str, Any], rank: int
) -> list[EndLabel]:
    finite = np.flatnonzero(np.isfinite(losses))
    if not finite.size:
        return []
    last = finite[-1]
    return [EndLabel(text, float(steps[last]), float(losses[last]), style, rank)]


def _dot_lone_points(ax: Axes, steps: Array, losses: Array, colour: str) -> None:
    """Draws points whose neighbours are nan or missing, which a line leaves out."""
    padded = np.isfinite(np.concatenate([[np.nan], losses, [np.nan]]))
    lone = padded[1:-1] & ~padded[:-2] & ~padded[2:]
    if lone.any():
        ax.plot(steps[lone], losses[lone], "o", color=colour, markersize=5, zorder=4, gid="lone")


def _mark_edge(ax: Axes, steps: Array, marker: str, colour: str, gid: str) -> None:
    low, high = ax.get_xlim()
    columns = ((steps - low) / (high - low) * _MOST_EDGE_MARKERS).astype(int)
    shown = steps[np.unique(columns, return_index=True)[1]]
    ax.plot(
        shown,
        np.ones(shown.size),
        marker,
        color=colour,
        markersize=7,
        markeredgewidth=2 if marker == "x" else 0,
        transform=ax.get_xaxis_transform(),
        clip_on=False,
        zorder=7,
        gid=gid,
    )


def _label(curve: Curve, text: str) -> str:
    return f"{shorten(curve.name, 28)}: {text}" if curve.name else text
