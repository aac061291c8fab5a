"""Draws loss curves: a pure function from logs to a matplotlib figure.

The figure is built without pyplot, so it touches no backend and nothing keeps it alive. Series
differ by colour, by line style or marker, and by a label at the line's end.
"""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from colab_qlora.curves.artists import (
    DARK,
    LIGHT,
    MOST_RUNS,
    Theme,
    draw_base,
    draw_best,
    draw_eval,
    draw_train,
    mark_clipped,
    mark_non_finite,
)
from colab_qlora.curves.layout import DPI, TEXT_PT, EndLabel, lay_out
from colab_qlora.curves.log import write_atomically
from colab_qlora.curves.series import (
    Array,
    Curve,
    Runs,
    as_curves,
    describe_curves,
)
from colab_qlora.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["describe_curves", "draw_curves", "figure_bundle", "save_png"]


_LEAST_PX = (480, 300)
# a series of fewer points has no tail to speak of, so all of it is shown
_CLIP_FROM_POINTS = 10


def draw_curves(
    runs: Runs,
    *,
    title: str | None = None,
    smooth: bool = True,
    dark: bool = False,
    width_px: int = 800,
    height_px: int = 450,
) -> Figure:
    """Draws the train and eval loss of one run, or of several runs to compare.

    Args:
        runs: a LossLog, a list of records, or a dict of 1 to 6 run names to either.
        title: a title above the picture.
        smooth: whether to draw a smoothed train loss in front of the logged one. It is for the eye;
            its half-life is a twentieth of the points.
        dark: light lines on dark paper.
        width_px: width in pixels at 100 dpi, 480 or more.
        height_px: height in pixels at 100 dpi, 300 or more.

    Returns:
        The figure. The lowest eval loss has a ring and, for the best run, a vertical line; a dashed
        line is the eval loss before training; values that are nan or inf, and values too high to
        show, are marked on the top edge. With more lines than room, the lines before training lose
        their labels first, then the eval lines.

    Raises:
        UserError: a run has no loss, there are more than 6 runs, or the picture is too small.

    Example:
        >>> fig = draw_curves(read_log("work/loss.jsonl"))
        >>> save_png(fig, "work/loss.png")
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = as_curves(runs)
    _check_size(len(curves), width_px, height_px)
    theme = DARK if dark else LIGHT
    fig = Figure((width_px / DPI, height_px / DPI), dpi=DPI, facecolor=theme.paper)
    FigureCanvasAgg(fig)  # measures text; it attaches to this figure alone
    ax = fig.add_axes((0.1, 0.15, 0.6, 0.7))
    low, high, is_clipped = _loss_range(curves)
    _set_up_axes(ax, curves, (low, high), theme, width_px)

    ends: list[EndLabel] = []
    several = len(curves) > 1
    for index, curve in enumerate(curves):
        ends += draw_train(
            ax, curve, index, theme, is_compared=several, smooth=smooth, columns=width_px
        )
        ends += draw_eval(ax, curve, index, theme, is_compared=several)
    ends += draw_base(ax, curves, theme)
    # a line that leaves the picture is labelled where it leaves
    ends = [
        EndLabel(end.text, end.x, min(max(end.y, low), high), end.style, end.rank) for end in ends
    ]
    notes = [*draw_best(ax, curves, theme), *mark_non_finite(ax, curves, theme)]
    if is_clipped:
        notes += mark_clipped(ax, curves, high, theme)
    lay_out(fig, ax, ends, notes, title=title, ink=theme.ink)
    return fig


def save_png(fig: Figure, path: str | os.PathLike[str], dpi: float | None = None) -> Path:
    """Saves a figure as PNG, whole or not at all; the same figure gives the same bytes.

    Args:
        fig: the figure.
        path: the file, ending in .png; its folder is created.
        dpi: pixels per inch; None keeps the pixels that the figure was drawn for, 200 doubles them.

    Returns:
        The path written.

    Raises:
        UserError: the path does not end in .png.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".png":
        raise UserError("the picture is saved as PNG", got=path, allowed="a path ending in .png")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _png(fig, dpi))
    return path


def figure_bundle(fig: Figure, text: str) -> dict[str, str]:
    """Gives a figure and its text alternative as a MIME bundle.

    Args:
        fig: the figure.
        text: what the picture says, for instance from `describe_curves`.

    Returns:
        What `IPython.display.display(bundle, raw=True)` shows: "image/png" in base64, "text/plain".
    """
    return {"image/png": base64.b64encode(_png(fig, None)).decode("ascii"), "text/plain": text}


def _png(fig: Figure, dpi: float | None) -> bytes:
    buffer = io.BytesIO()
    # without the version of matplotlib in it, a picture changes only when its content does
    fig.savefig(buffer, format="png", dpi=dpi or "figure", metadata={"Software": None})
    return buffer.getvalue()


def _check_size(run_count: int, width_px: int, height_px: int) -> None:
    if run_count > MOST_RUNS:
        raise UserError(
            "too many runs to tell apart in one picture",
            got=run_count,
            allowed=f"1 to {MOST_RUNS}",
            do="Leave some out, or draw two pictures",
        )
    if width_px < _LEAST_PX[0] or height_px < _LEAST_PX[1]:
        raise UserError(
            "the picture is too small for its labels",
            got=f"{width_px} x {height_px} px",
            allowed=f"{_LEAST_PX[0]} x {_LEAST_PX[1]} px or more",
            do="Pass a larger width_px or height_px",
        )


def _loss_range(curves: list[Curve]) -> tuple[float, float, bool]:
    """Gives the lowest and highest loss to show, and whether some values lie above."""
    series = [s for c in curves for s in (c.losses, c.eval_losses)]
    series = [finite for s in series if (finite := s[np.isfinite(s)]).size]
    if not series:
        return 0.0, 1.0, False
    low, true_high = min(s.min() for s in series), max(s.max() for s in series)
    # the loss before training is a line with a label, so it is always inside
    high = max([_visible_high(s) for s in series] + [c.base for c in curves if c.base is not None])
    margin = 0.05 * (high - low) or max(0.05 * abs(high), 0.05)
    return float(low - margin), float(high + margin), bool(true_high > high + margin)


def _visible_high(losses: Array) -> float:
    """Gives the highest finite loss of a series to show: all of it, or all but its spikes."""
    highest = float(losses.max())
    if losses.size < _CLIP_FROM_POINTS:
        return highest
    usual = float(np.quantile(losses, 0.98, method="lower"))
    span = usual - float(losses.min())
    # a spike may double the height of the picture, and no more
    if highest <= usual + span:
        return highest
    # a run starts high and falls fast, so its first value is shown while a tenth of the height is
    # left for the rest
    start = float(losses[0])
    return max(usual + 0.25 * span, start if start <= usual + 9 * span else usual)


def _set_up_axes(
    ax: Axes, curves: list[Curve], limits: tuple[float, float], theme: Theme, width_px: int
) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    steps = np.concatenate([s for c in curves for s in (c.steps, c.eval_steps)])
    margin = 0.02 * float(steps.max() - steps.min()) or 1.0
    ax.set(xlim=(steps.min() - margin, steps.max() + margin), ylim=limits, facecolor=theme.paper)
    ax.set_xlabel("step", fontsize=TEXT_PT, color=theme.ink)
    ax.set_ylabel("loss", fontsize=TEXT_PT, color=theme.ink)
    # digits are 9 px wide at most, and the axes have at least 35 % of the width
    step_px = 9 * len(f"{steps.max():,}") + 16
    step_ticks = min(5, max(2, int(0.35 * width_px / step_px)))
    ax.xaxis.set_major_locator(MaxNLocator(step_ticks, integer=True, steps=[1, 2, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))
    ax.tick_params(labelsize=TEXT_PT, labelcolor=theme.ink, color=theme.muted)
    if not any(np.isfinite(s).any() for c in curves for s in (c.losses, c.eval_losses)):
        ax.set_yticks([])  # the range is made up
    ax.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=theme.muted)
