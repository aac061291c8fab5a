"""The lines of a loss picture, one function each.

Each draws on the axes that it is given and returns the labels that belong to what it drew. A run on
its own gets one colour for train and one for eval; in a comparison a run has one colour and one
line style, and its eval line has markers. Where points are few they are shown, for a line between
five of them looks like data that is not there; train points are hollow then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from colab_qlora.curves.picture.curve import Array, Curve
from colab_qlora.curves.picture.layout import EndLabel, shorten
from colab_qlora.curves.picture.series import smooth_losses, thin
from colab_qlora.curves.picture.theme import DARK, DASHES, LIGHT, MARKERS, MOST_RUNS, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "DARK",
    "LIGHT",
    "MOST_RUNS",
    "Theme",
    "draw_base",
    "draw_eval",
    "draw_train",
    "run_label",
]


_BASE_DASHES = (0, (4, 3))
# of fewer points the average is mostly the first ones
_SMOOTH_FROM_POINTS = 10
# lines closer than this share of the height, about a line of text, look like one
_SHARED_BASE = 0.05
_MOST_MARKERS = 25
# up to so many logged losses each is shown as a point, where they are the main line and behind it
_MOST_HOLLOW, _MOST_DOTS = 30, 100
_RAW_ALPHA, _RAW_ALPHA_COMPARED = 0.35, 0.2


def draw_train(
    ax: Axes,
    curve: Curve,
    index: int,
    theme: Theme,
    *,
    is_compared: bool,
    half_life: float | None,
    columns: int,
) -> list[EndLabel]:
    """Draws the logged train loss, thin and light, and the smoothed one in front.

    Args:
        ax: the axes.
        curve: the run.
        index: its place among the runs, which chooses the style.
        theme: the colours.
        is_compared: whether there are other runs.
        half_life: half-life of the smoothed loss as a share of the points; it is drawn from 10
            points up. With None the logged loss is the main line.
        columns: pixel columns of the picture; more points than it can show are thinned.

    Returns:
        The label of the main line; none if no loss is finite.
    """
    if not curve.steps.size:
        return []
    colour = theme.colours[index]
    style: dict[str, Any] = {"color": colour, "linestyle": DASHES[index], "linewidth": 2.0}
    count = int(np.isfinite(curve.losses).sum())
    is_smoothed = half_life is not None and count >= _SMOOTH_FROM_POINTS
    chosen = thin(curve.losses, columns)
    steps, losses = curve.steps[chosen], curve.losses[chosen]
    main = losses
    if is_smoothed:
        assert half_life is not None
        _draw_logged(ax, steps, losses, colour, count, is_compared=is_compared)
        # a spike that leaves the picture counts as its top, or the line would decay for many steps
        smoothed = smooth_losses(np.minimum(curve.losses, ax.get_ylim()[1]), half_life)
        main = smoothed[chosen]
    elif losses.size > columns:
        style |= {"linewidth": 0.8}
    elif count <= _MOST_HOLLOW:
        marker = MARKERS[index] if is_compared else MARKERS[1]
        style |= {"marker": marker, "markersize": 5, "markerfacecolor": theme.paper}
    ax.plot(steps, main, **style, zorder=4, gid="train")
    if "marker" not in style:
        _dot_lone_points(ax, steps, main, colour)
    words = "train, smoothed" if is_smoothed and not is_compared else "train"
    return _end_label(steps, main, run_label(curve, words), style, rank=0)


def draw_eval(
    ax: Axes, curve: Curve, index: int, theme: Theme, *, is_compared: bool, columns: int
) -> list[EndLabel]:
    """Draws the eval loss as markers on a line, with a ring around the lowest.

    Args:
        ax: the axes.
        curve: the run.
        index: its place among the runs.
        theme: the colours.
        is_compared: whether there are other runs.
        columns: pixel columns of the picture; more points than it can show are thinned.

    Returns:
        The label of the line; none if no loss after step 0 is finite.
    """
    if not curve.eval_steps.size:
        return []
    style: dict[str, Any] = {
        "color": theme.colours[index if is_compared else 1],
        "linestyle": DASHES[index],
        "linewidth": 1.4,
        "marker": MARKERS[index],
        "markersize": 6,
    }
    chosen = thin(curve.eval_losses, columns)
    steps, losses = curve.eval_steps[chosen], curve.eval_losses[chosen]
    every = max(1, -(-steps.size // _MOST_MARKERS))
    ax.plot(steps, losses, **style, markevery=every, zorder=5, gid="eval")
    if every > 1:
        _dot_lone_points(ax, steps, losses, style["color"])
    best = curve.chosen_best
    if best is not None:
        ring: dict[str, Any] = {
            "marker": "o",
            "markersize": 12,
            "markerfacecolor": "none",
            "linestyle": "none",
        }
        ax.plot(*best, **ring, markeredgecolor=style["color"], zorder=6, gid="best-ring")
    if not steps[np.isfinite(losses)].any():
        return []  # the one eval is at step 0, and the line before training says so
    return _end_label(steps, losses, run_label(curve, "eval"), style, rank=1)


def draw_base(ax: Axes, curves: list[Curve], theme: Theme) -> list[EndLabel]:
    """Draws the eval loss before training as a dashed line across.

    Runs of the same model on the same eval rows start equal, and share one line then.

    Returns:
        The labels of the lines.
    """
    bases = [(index, curve, curve.base) for index, curve in enumerate(curves)]
    y_low, y_high = ax.get_ylim()
    known = [
        (index, curve, base)
        for index, curve, base in bases
        if base is not None and y_low <= base <= y_high
    ]
    if not known:
        return []
    values = [base for _, _, base in known]
    style: dict[str, Any] = {"color": theme.muted, "linestyle": _BASE_DASHES, "linewidth": 1.3}
    is_shared = len(known) == len(curves) and max(values) - min(values) <= _SHARED_BASE * (
        y_high - y_low
    )
    if is_shared:
        lines = [("before training", values[0], style)]
    else:
        lines = [
            (run_label(curve, "before training"), base, style | {"color": theme.colours[index]})
            for index, curve, base in known
        ]
    for _, base, line_style in lines:
        ax.axhline(base, **line_style, zorder=1.5, gid="base")
    x_high = ax.get_xlim()[1]
    return [EndLabel(text, x_high, base, line_style, 2) for text, base, line_style in lines]


def _end_label(
    steps: Array, losses: Array, text: str, style: dict[str, Any], rank: int
) -> list[EndLabel]:
    finite = np.flatnonzero(np.isfinite(losses))
    if not finite.size:
        return []
    last = finite[-1]
    return [EndLabel(text, float(steps[last]), float(losses[last]), style, rank)]


def _draw_logged(
    ax: Axes, steps: Array, losses: Array, colour: str, count: int, *, is_compared: bool
) -> None:
    """Draws the logged train loss behind the smoothed one; few points are shown one by one."""
    alpha = _RAW_ALPHA_COMPARED if is_compared else _RAW_ALPHA
    style: dict[str, Any] = {"color": colour, "linewidth": 0.8, "alpha": alpha}
    if count <= _MOST_DOTS:
        style |= {"marker": "o", "markersize": 2.5}
    ax.plot(steps, losses, **style, linestyle="solid", zorder=2, gid="train-raw")


def _dot_lone_points(ax: Axes, steps: Array, losses: Array, colour: str) -> None:
    """Draws points whose neighbours are nan or missing, which a line leaves out."""
    padded = np.isfinite(np.concatenate([[np.nan], losses, [np.nan]]))
    lone = padded[1:-1] & ~padded[:-2] & ~padded[2:]
    if lone.any():
        ax.plot(steps[lone], losses[lone], "o", color=colour, markersize=5, zorder=4, gid="lone")


def run_label(curve: Curve, text: str) -> str:
    """The words of a label, behind the run's name if it has one."""
    return f"{shorten(curve.name, 28)}: {text}" if curve.name else text
