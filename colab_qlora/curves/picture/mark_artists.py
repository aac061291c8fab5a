"""Draws what a diagnosis marks on a loss picture, the best checkpoint, and a step to stop at.

Vertical lines differ by their dashes, and each has a note with a piece of the same line before it.
The zone behind a divergence point is shaded and hatched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from colab_qlora.curves.picture.curve import Curve, loss_text
from colab_qlora.curves.picture.layout import Note, shorten
from colab_qlora.curves.picture.marks import Marks, count_words
from colab_qlora.curves.picture.theme import HATCHES, Theme
from colab_qlora.curves.words import stop_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["draw_divergence", "draw_spikes", "draw_stop", "draw_turns"]

_BEST_LINE: dict[str, Any] = {"linewidth": 1.0, "linestyle": (0, (1, 2))}
_DIVERGENCE_LINE: dict[str, Any] = {"linewidth": 1.6, "linestyle": (0, (5, 2))}
_TURN_LINE: dict[str, Any] = {"linewidth": 1.3, "linestyle": (0, (7, 2, 1, 2))}
_STOP_LINE: dict[str, Any] = {"linewidth": 1.6, "linestyle": "solid"}
_ZONE_ALPHA, _HATCH_ALPHA, _HATCH_WIDTH = 0.1, 0.4, 0.8
_VEIL_ALPHA = 0.72
# the marks on the top edge stick out by half, and the veil covers them too
_VEIL_TOP = 1.03


def draw_divergence(ax: Axes, curves: list[Curve], marks: list[Marks], theme: Theme) -> list[Note]:
    """Draws lines at the lowest eval loss of all runs and where runs diverge, and what lies behind.

    Where both are the same step of the same run there is one line and one note. For a run on its
    own the zone has the height of the picture; in a comparison it lies between the run's eval loss
    and the level of the divergence point.

    Returns:
        The notes, that of the best checkpoint first.
    """
    best = _best(curves)
    low, high = ax.get_xlim()
    diverging = [
        (index, mark.divergence)
        for index, mark in enumerate(marks)
        if mark.divergence is not None and low <= mark.divergence <= high
    ]
    notes = []
    for index, step in diverging:
        style = _zone_style(index, len(curves), theme)
        if marks[index].has_zone:
            _fill_zone(ax, curves[index], marks[index], style, is_alone=len(curves) == 1)
        line = _DIVERGENCE_LINE | {"color": _colour(index, curves, theme)}
        ax.axvline(step, **line, zorder=1.7, gid="divergence")
        text = f"{marks[index].zone_text}{_owner(curves[index])}"
        notes.append(Note(text, step, line=line, patch=style if marks[index].has_zone else None))
    notes = _at_most_two(notes, [marks[index].zone_text for index, _ in diverging])
    if best is None:
        return notes
    index, step, loss = best
    before = ", before training" if step == 0 else ""
    text = f"best eval {loss_text(loss)} at step {step:,}{before}{_owner(curves[index])}"
    if (index, step) not in diverging:
        line = _BEST_LINE | {"color": theme.ink}
        ax.axvline(step, **line, zorder=1.6, gid="best")
        return [Note(text, step, line=line), *notes]
    if len(diverging) > 2:
        return [Note(text, step), *notes]
    own = notes.pop(diverging.index((index, step)))
    also = f"{marks[index].zone} from here"
    return [Note(text, step, also, line=own.line, patch=own.patch), *notes]


def draw_turns(ax: Axes, curves: list[Curve], marks: list[Marks], theme: Theme) -> list[Note]:
    """Draws lines where other verdicts have their place.

    Returns:
        Their notes; in a comparison two at most.
    """
    low, high = ax.get_xlim()
    taken = {
        int(np.asarray(line.get_xdata())[0]) for line in ax.lines if line.get_gid() in _VERTICAL
    }
    notes, texts = [], []
    for index, (curve, mark) in enumerate(zip(curves, marks, strict=True)):
        line = _TURN_LINE | {"color": _colour(index, curves, theme)}
        for turn in mark.turns:
            if not low <= turn.step <= high:
                continue
            is_free = turn.step not in taken
            for step in sorted({turn.step, *turn.further_steps} - taken):
                if low <= step <= high:
                    ax.axvline(step, **line, zorder=1.65, gid="turn")
                    taken.add(step)
            texts.append(turn.text)
            text = f"{turn.text}{_owner(curve)}"
            notes.append(Note(text, turn.step, line=line if is_free else None))
    return _at_most_two(notes, texts) if len(curves) > 1 else notes


def draw_spikes(ax: Axes, curves: list[Curve], marks: list[Marks], theme: Theme) -> list[Note]:
    """Draws a hollow diamond on every spike that lies in the picture.

    Returns:
        The note that counts them; none where all lie above the picture, which is noted already.
    """
    count, first, high = 0, None, ax.get_ylim()[1]
    for index, (curve, mark) in enumerate(zip(curves, marks, strict=True)):
        is_spike = np.isin(curve.steps, mark.spikes) & (curve.losses <= high)
        if not is_spike.any():
            continue
        steps, losses = curve.steps[is_spike], curve.losses[is_spike]
        style: dict[str, Any] = {"markersize": 8, "markeredgewidth": 1.5, "linestyle": "none"}
        colour = _colour(index, curves, theme)
        ax.plot(
            steps,
            losses,
            marker="D",
            markerfacecolor="none",
            markeredgecolor=colour,
            **style,
            zorder=6,
            gid="spike",
        )
        count += steps.size
        first = int(steps[0]) if first is None else min(first, int(steps[0]))
    if first is None:
        return []
    what = "1 spike," if count == 1 else f"{count_words(count, 'spike')}, first"
    return [Note(f"\u25c7 {what} at step {first:,}", first)]


def draw_stop(axes: list[Axes], curves: list[Curve], stop_at: int, theme: Theme) -> list[Note]:
    """Draws a line at the step to stop at, and a veil over what lies behind it.

    Args:
        axes: those that share the steps, the losses first.
        curves: the runs.
        stop_at: the step; nothing is drawn where no run goes farther.
        theme: the colours.

    Returns:
        The note with the eval loss at that step; in a comparison that of the best run.
    """
    if stop_at >= max(curve.step_range[1] for curve in curves):
        return []
    line = _STOP_LINE | {"color": theme.ink}
    for ax in axes:
        ax.axvspan(
            stop_at,
            ax.get_xlim()[1],
            0,
            _VEIL_TOP,
            facecolor=theme.paper,
            alpha=_VEIL_ALPHA,
            linewidth=0,
            clip_on=False,
            zorder=8,
            gid="veil",
        )
        # the axis itself stays as it is
        for spine in ax.spines.values():
            spine.set_zorder(9)
        ax.axvline(stop_at, **line, zorder=9, gid="stop")
    known = [(found[1], curve) for curve in curves if (found := curve.eval_at(stop_at))]
    if len(curves) == 1 or not known:
        return [Note(f"stop {stop_words(curves[0], stop_at)}", stop_at, line=line)]
    loss, curve = min(known, key=lambda each: each[0])
    text = f"stop at step {stop_at:,}: lowest last eval {loss_text(loss)}{_owner(curve)}"
    return [Note(text, stop_at, line=line)]


_VERTICAL = ("best", "divergence", "turn")


def _best(curves: list[Curve]) -> tuple[int, int, float] | None:
    """Index of the run with the lowest eval loss, the step and the loss."""
    found = [
        (index, *best)
        for index, curve in enumerate(curves)
        if (best := curve.chosen_best) is not None
    ]
    return min(found, key=lambda each: each[2]) if found else None


def _zone_style(index: int, run_count: int, theme: Theme) -> dict[str, Any]:
    from matplotlib.colors import to_rgba

    colour = theme.colours[index] if run_count > 1 else theme.muted
    return {
        "facecolor": to_rgba(colour, _ZONE_ALPHA),
        "edgecolor": to_rgba(colour, _HATCH_ALPHA),
        "hatch": HATCHES[index],
        "hatch_linewidth": _HATCH_WIDTH,
        "linewidth": 0,
    }


def _fill_zone(
    ax: Axes, curve: Curve, mark: Marks, style: dict[str, Any], *, is_alone: bool
) -> None:
    assert mark.divergence is not None
    style = dict(style)
    width = style.pop("hatch_linewidth")
    if is_alone:
        end = min(mark.zone_end, ax.get_xlim()[1])
        zone: Any = ax.axvspan(mark.divergence, end, **style, zorder=0.6, gid="zone")
    else:
        inside = (curve.eval_steps >= mark.divergence) & (curve.eval_steps <= mark.zone_end)
        inside &= np.isfinite(curve.eval_losses)
        if inside.sum() < 2:
            return
        steps, losses = curve.eval_steps[inside], curve.eval_losses[inside]
        zone = ax.fill_between(steps, losses[0], losses, **style, zorder=0.6, gid="zone")
    zone.set_hatch_linewidth(width)


def _colour(index: int, curves: list[Curve], theme: Theme) -> str:
    return theme.colours[index] if len(curves) > 1 else theme.ink


def _owner(curve: Curve) -> str:
    return f" ({shorten(curve.name, 28)})" if curve.name else ""


def _at_most_two(notes: list[Note], texts: list[str]) -> list[Note]:
    """Two notes as they are; of more one, the earliest without its run's name, and a count."""
    if len(notes) <= 2:
        return notes
    first = min(range(len(notes)), key=lambda index: notes[index].x)
    note, text = notes[first], f"{texts[first]}, and {len(notes) - 1} more"
    return [Note(text, note.x, line=note.line, patch=note.patch)]
