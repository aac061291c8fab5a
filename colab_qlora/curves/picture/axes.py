"""The axes of a loss picture: which losses and steps they show, their ticks, and a second panel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from colab_qlora.curves.picture.curve import Array, Curve
from colab_qlora.curves.picture.layout import Note, Panel
from colab_qlora.curves.picture.series import thin
from colab_qlora.curves.picture.sheet import TEXT_PT
from colab_qlora.curves.picture.theme import DASHES, Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["add_rate_panel", "loss_range", "set_up_axes"]

# a series of fewer points has no tail to speak of, so all of it is shown
_CLIP_FROM_POINTS = 10


def loss_range(curves: list[Curve]) -> tuple[float, float]:
    """Gives the lowest and the highest loss to show, with a margin; spikes may lie above."""
    series = [s for c in curves for s in (c.losses, c.eval_losses)]
    series = [finite for s in series if (finite := s[np.isfinite(s)]).size]
    if not series:
        return 0.0, 1.0
    low = min(s.min() for s in series)
    # the loss before training is a line with a label, so it is always inside
    high = max([_visible_high(s) for s in series] + [c.base for c in curves if c.base is not None])
    margin = 0.05 * (high - low) or max(0.05 * abs(high), 0.05)
    return float(low - margin), float(high + margin)


def set_up_axes(
    ax: Axes,
    curves: list[Curve],
    limits: tuple[float, float],
    theme: Theme,
    width_px: int,
    *,
    room_below: float = 0,
) -> None:
    """Sets limits, ticks and names of the axes of the losses.

    Args:
        ax: the axes.
        curves: the runs.
        limits: the lowest and the highest loss shown.
        theme: the colours.
        width_px: width of the picture.
        room_below: the share of the height to leave empty below the lowest loss.
    """
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    low, high = limits
    _set_up_steps(ax, curves, theme, width_px)
    ax.set_ylim(low - room_below / (1 - room_below) * (high - low), high)
    ax.set_ylabel("loss", fontsize=TEXT_PT, color=theme.ink)
    if any(np.isfinite(s).any() for c in curves for s in (c.losses, c.eval_losses)):
        ticks: Any = MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
        # none in the room below, where there are no losses
        ax.set_yticks([tick for tick in ticks if low <= tick <= high])
    else:
        ax.set_yticks([])  # the range is made up
    ax.yaxis.set_major_formatter(StrMethodFormatter("{x:.6g}"))
    ax.grid(True, axis="y", color=theme.grid, linewidth=0.8)
    ax.set_axisbelow(True)


def add_rate_panel(
    fig: Figure, ax: Axes, curves: list[Curve], theme: Theme, width_px: int
) -> tuple[Panel | None, list[Note]]:
    """Draws the learning rate in low axes of its own below the losses, which give it their steps.

    Args:
        fig: the figure.
        ax: the axes of the losses.
        curves: the runs.
        theme: the colours.
        width_px: width of the picture.

    Returns:
        The panel, and no note; or no panel, and the note that no learning rate was logged.
    """
    known = [(index, curve) for index, curve in enumerate(curves) if curve.rates.size]
    if not known:
        return None, [Note("the log has no learning rate", ax.get_xlim()[0])]
    panel = fig.add_axes((0.1, 0.1, 0.6, 0.1))
    _set_up_steps(panel, curves, theme, width_px)
    panel.set_yticks([])
    peaks = [float(curve.rates.max()) for _, curve in known]
    panel.set_ylim(0, 1.15 * max(peaks) or 1.0)
    for index, curve in known:
        chosen = thin(curve.rates, width_px)
        steps, rates = curve.rate_steps[chosen], curve.rates[chosen]
        style: dict[str, Any] = {"color": theme.muted, "linewidth": 1.6, "linestyle": "solid"}
        if len(curves) > 1:
            style |= {"color": theme.colours[index], "linestyle": DASHES[index]}
        # one point alone, or one step between two, shows as a line only with a marker
        marker: dict[str, Any] = {"marker": "o", "markersize": 4} if rates.size < 3 else {}
        panel.plot(steps, rates, **style, **marker, zorder=4, gid="learning-rate")
        top = int(rates.argmax())
        panel.plot(steps[top], rates[top], "o", color=style["color"], ms=5, zorder=5, gid="peak")
    ax.set_xlabel("")
    ax.tick_params(axis="x", labelbottom=False, length=0)
    if len(curves) == 1:
        return Panel(panel, ("learning rate", f"peak {peaks[0]:.3g}"), style), []
    least, most = (f"{peak:.2g}" for peak in (min(peaks), max(peaks)))
    words = least if least == most else f"{least} to {most}"
    return Panel(panel, ("peak learning rate", words)), []


def _set_up_steps(ax: Axes, curves: list[Curve], theme: Theme, width_px: int) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    first = min(curve.step_range[0] for curve in curves)
    last = max(curve.step_range[1] for curve in curves)
    margin = 0.02 * (last - first) or 1.0
    ax.set(xlim=(first - margin, last + margin), facecolor=theme.paper)
    ax.set_xlabel("step", fontsize=TEXT_PT, color=theme.ink)
    # digits are 9 px wide at most, and the axes have at least 35 % of the width
    step_px = 9 * len(f"{last:,}") + 16
    step_ticks = min(5, max(2, int(0.35 * width_px / step_px)))
    ax.xaxis.set_major_locator(MaxNLocator(step_ticks, integer=True, steps=[1, 2, 5, 10]))
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.tick_params(labelsize=TEXT_PT, labelcolor=theme.ink, color=theme.muted)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=theme.muted)


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
