"""Draws loss curves: a pure function from logs to a matplotlib figure.

The figure is built without pyplot, so it touches no backend and nothing keeps it alive. Series
differ by colour, by line style or marker, and by a label at the line's end.
"""

from __future__ import annotations

import base64
import io
import math
import os
from numbers import Integral, Real
from pathlib import Path
from typing import TYPE_CHECKING

from colab_qlora.curves.logs.atomic import write_atomically
from colab_qlora.curves.picture.artists import draw_base, draw_eval, draw_train
from colab_qlora.curves.picture.axes import add_rate_panel, loss_range, set_up_axes
from colab_qlora.curves.picture.curve import Curve, Runs, as_curves
from colab_qlora.curves.picture.edge_marks import (
    EVENT_PX,
    mark_beyond,
    mark_non_finite,
    note_events,
    number_events,
)
from colab_qlora.curves.picture.layout import DPI, EndLabel, Note, lay_out
from colab_qlora.curves.picture.mark_artists import (
    draw_divergence,
    draw_spikes,
    draw_stop,
    draw_turns,
)
from colab_qlora.curves.picture.marks import Diagnoses, Marks, as_marks
from colab_qlora.curves.picture.series import HALF_LIFE
from colab_qlora.curves.picture.theme import DARK, LIGHT, MOST_RUNS, Theme
from colab_qlora.curves.words import describe_curves
from colab_qlora.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["describe_curves", "draw_curves", "figure_bundle", "save_png"]

_LEAST_PX = (480, 300)
# where notes and the axis need much of the height, the axes still have this share of it
_PLOT_SHARE = 0.45


def draw_curves(
    runs: Runs,
    *,
    diagnosis: Diagnoses = None,
    title: str | None = None,
    smooth: bool | float = True,
    learning_rate: bool = False,
    y_range: tuple[float, float] | None = None,
    stop_at: int | None = None,
    dark: bool = False,
    width_px: int = 800,
    height_px: int = 450,
) -> Figure:
    """Draws the train and eval loss of one run, or of several runs to compare.

    Args:
        runs: a LossLog, a list of records, or a dict of 1 to 6 run names to either.
        diagnosis: what `diagnose` says of the run, or a dict from run name to that. It marks the
            divergence point, the zone behind it, spikes, and the places of other verdicts.
        title: a title above the picture.
        smooth: whether to draw a smoothed train loss in front of the logged one. It is for the eye;
            its half-life is a twentieth of the points, or the share of them given here, 0 to 1.
        learning_rate: whether to draw the learning rate in a panel below.
        y_range: the lowest and the highest loss shown; None chooses them, and cuts spikes.
        stop_at: a step at which one might have stopped: what lies behind it is drawn faint.
        dark: light lines on dark paper.
        width_px: width in pixels at 100 dpi, 480 or more.
        height_px: height in pixels at 100 dpi, 300 or more.

    Returns:
        The figure. The lowest eval loss has a ring and, for the best run, a vertical line; a dashed
        line is the eval loss before training; values that are nan or inf, and values too high to
        show, are marked on the edge; records with an "event" are numbered ticks at the bottom.
        With more lines than room, the lines before training lose their labels first, then the eval
        lines; with less height than the notes need, the last notes go.

    Raises:
        UserError: a run has no loss, there are more than 6 runs, the picture is too small, or a
            value is not allowed.

    Example:
        >>> log = read_log("work/loss.jsonl")
        >>> fig = draw_curves(log, diagnosis=diagnose(log))
        >>> save_png(fig, "work/loss.png")
    """
    curves = as_curves(runs, with_rates=learning_rate)
    marks = as_marks(diagnosis, curves)
    _check_size(len(curves), width_px, height_px)
    half_life, stop_at = _half_life(smooth), _step(stop_at)
    theme = DARK if dark else LIGHT
    fig, ax = _new_figure(width_px, height_px, theme)
    limits = loss_range(curves) if y_range is None else _checked_range(y_range)
    # numbered ticks get room of their own, unless the range was asked for
    has_events = y_range is None and any(curve.events for curve in curves)
    room = EVENT_PX / (_PLOT_SHARE * height_px) if has_events else 0
    set_up_axes(ax, curves, limits, theme, width_px, room_below=room)

    ends = _draw_lines(ax, curves, theme, half_life, width_px)
    notes = _draw_marks(ax, curves, marks, theme)
    panel = None
    if learning_rate:
        panel, missing = add_rate_panel(fig, ax, curves, theme, width_px)
        notes += missing
    if stop_at is not None:
        axes = [ax, panel.ax] if panel else [ax]
        notes = draw_stop(axes, curves, stop_at, theme) + notes
    lay_out(fig, ax, ends, notes, title=title, ink=theme.ink, panel=panel)
    number_events(ax, curves, theme)
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


def _new_figure(width_px: int, height_px: int, theme: Theme) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure((width_px / DPI, height_px / DPI), dpi=DPI, facecolor=theme.paper)
    FigureCanvasAgg(fig)  # measures text; it attaches to this figure alone
    return fig, fig.add_axes((0.1, 0.15, 0.6, 0.7))


def _draw_marks(ax: Axes, curves: list[Curve], marks: list[Marks], theme: Theme) -> list[Note]:
    """Draws what is marked on the lines; gives the notes, in the order in which they are shown."""
    notes = draw_divergence(ax, curves, marks, theme)
    notes += mark_non_finite(ax, curves, theme)
    notes += draw_turns(ax, curves, marks, theme)
    notes += draw_spikes(ax, curves, marks, theme)
    notes += mark_beyond(ax, curves, marks, theme)
    return notes + note_events(curves)


def _draw_lines(
    ax: Axes, curves: list[Curve], theme: Theme, half_life: float | None, columns: int
) -> list[EndLabel]:
    several = len(curves) > 1
    ends: list[EndLabel] = []
    longest = max(_span(curve) for curve in curves)
    for index, curve in enumerate(curves):
        # one half-life in steps for all, or equal losses of two runs would be two lines
        share = half_life and half_life * longest / _span(curve)
        ends += draw_train(
            ax, curve, index, theme, is_compared=several, half_life=share, columns=columns
        )
        ends += draw_eval(ax, curve, index, theme, is_compared=several, columns=columns)
    ends += draw_base(ax, curves, theme)
    low, high = ax.get_ylim()
    # a line that leaves the picture is labelled where it leaves
    return [
        EndLabel(end.text, end.x, min(max(end.y, low), high), end.style, end.rank) for end in ends
    ]


def _span(curve: Curve) -> float:
    """Steps that the train points stand for, each for as many as lie between two; 1 at least."""
    points = curve.steps.size
    if points < 2:
        return 1.0
    return float(curve.steps[-1] - curve.steps[0]) * points / (points - 1)


def _half_life(smooth: bool | float) -> float | None:
    """The half-life as a share of the points, or None for no smoothing."""
    if isinstance(smooth, bool):
        return HALF_LIFE if smooth else None
    if not isinstance(smooth, Real) or not 0 <= smooth <= 1:
        raise UserError(
            "smooth is no share of the points",
            got=repr(smooth),
            allowed="True, False, or 0 to 1",
            do=f"Leave it out for the usual {HALF_LIFE:g}",
        )
    return float(smooth) or None


def _step(stop_at: int | None) -> int | None:
    if stop_at is None:
        return None
    if isinstance(stop_at, bool) or not isinstance(stop_at, Integral) or stop_at < 0:
        raise UserError(
            "stop_at is no step",
            got=repr(stop_at),
            allowed="an integer from 0 up, or None",
            do="Pass the step after which the run would have ended",
        )
    return int(stop_at)


def _checked_range(y_range: tuple[float, float]) -> tuple[float, float]:
    try:
        low, high = (float(edge) for edge in y_range)
    except (TypeError, ValueError):
        low = high = math.nan
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(
            "y_range is no range of losses",
            got=repr(y_range),
            allowed="(lowest, highest), finite, or None",
            do="Pass for instance (0, 3)",
        )
    return low, high


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
