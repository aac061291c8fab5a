"""Marks on the edges of a loss picture: values that are not finite or lie beyond it, and events.

Each function returns the note that says in words what it drew.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from colab_qlora.curves.picture.artists import run_label
from colab_qlora.curves.picture.curve import Array, Curve, loss_text
from colab_qlora.curves.picture.layout import Note, shorten
from colab_qlora.curves.picture.marks import Marks, count_words
from colab_qlora.curves.picture.sheet import TEXT_PT
from colab_qlora.curves.picture.theme import Theme

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["EVENT_PX", "mark_beyond", "mark_non_finite", "note_events", "number_events"]

# the height that numbered ticks need above the bottom edge
EVENT_PX = 28
_TICK_PX, _NUMBER_PX, _DIGIT_PX, _BESIDE_PX = 9, 18, 9, 4
_MOST_EDGE_MARKERS = 40


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


def mark_beyond(ax: Axes, curves: list[Curve], marks: list[Marks], theme: Theme) -> list[Note]:
    """Marks the steps of losses above or below the picture with triangles on that edge.

    Args:
        ax: the axes.
        curves: the runs.
        marks: what is marked on them; where every value above is a spike, the note says so.
        theme: the colours.

    Returns:
        A note for each edge that is passed, with the number and the farthest of the values.
    """
    low, high = ax.get_ylim()
    above = _beyond(ax, curves, marks, theme, high, sign=1)
    return above + _beyond(ax, curves, marks, theme, low, sign=-1)


def note_events(curves: list[Curve]) -> list[Note]:
    """Gives the note that counts the events of all runs; none without any."""
    events = [(step, text, curve) for curve in curves for step, text in curve.events]
    if not events:
        return []
    step, text, curve = min(events, key=lambda event: event[0])
    if len(events) == 1:
        return [Note(f"event at step {step:,}: {run_label(curve, text)}", step)]
    owner = f" ({shorten(curve.name, 28)})" if curve.name else ""
    numbered = f"numbered 1 to {len(events):,}, first at step {step:,}{owner}"
    return [Note(f"{count_words(len(events), 'event')}, {numbered}", step)]


def number_events(ax: Axes, curves: list[Curve], theme: Theme) -> None:
    """Draws events as numbered ticks on the bottom edge; the axes have their final place by now.

    Events are counted run by run. Where ticks are too close for their numbers, one text gives the
    first and the last number of a group.
    """
    events = [(step, index) for index, curve in enumerate(curves) for step, _ in curve.events]
    if not events:
        return
    colours = [theme.colours[index] if len(curves) > 1 else theme.ink for _, index in events]
    height = ax.get_window_extent().height
    for (step, _), colour in zip(events, colours, strict=True):
        tick = [0, _TICK_PX / height]
        edge = ax.get_xaxis_transform()
        ax.plot([step] * 2, tick, color=colour, lw=1.6, transform=edge, zorder=6, gid="event-tick")
    to_px = ax.transData.transform
    groups: list[list[tuple[float, int]]] = []
    order = sorted(range(len(events)), key=lambda number: events[number][0])
    for number in order:
        x = float(to_px((events[number][0], 0))[0])
        # two numbers, a dash and some air: what a group would need that took this one in
        needed = _DIGIT_PX * (len(str(len(events))) * 2 + 2) + _BESIDE_PX
        if groups and x - groups[-1][-1][0] < needed:
            groups[-1].append((x, number + 1))
        else:
            groups.append([(x, number + 1)])
    for group in groups:
        _put_number(ax, group, height, theme)


def _put_number(ax: Axes, group: list[tuple[float, int]], height: float, theme: Theme) -> None:
    numbers = [number for _, number in group]
    text = str(numbers[0]) if len(group) == 1 else f"{min(numbers)}-{max(numbers)}"
    box = ax.get_window_extent()
    half = _DIGIT_PX * len(text) / 2
    middle = (group[0][0] + group[-1][0]) / 2
    if len(group) == 1:
        # beside its tick, where a vertical line at the same step does not cross it
        middle += half + _BESIDE_PX if middle + 2 * half + _BESIDE_PX < box.x1 else -half
    # a number at the rim stays inside
    middle = min(max(middle, box.x0 + half), box.x1 - half)
    ax.text(
        (middle - box.x0) / box.width,
        _NUMBER_PX / height,
        text,
        transform=ax.transAxes,
        fontsize=TEXT_PT,
        color=theme.ink,
        ha="center",
        va="center",
        bbox={"facecolor": theme.paper, "alpha": 0.7, "linewidth": 0, "pad": 0.5},
        zorder=6,
        gid="event-number",
    )


def _beyond(
    ax: Axes, curves: list[Curve], marks: list[Marks], theme: Theme, edge: float, *, sign: int
) -> list[Note]:
    count, all_spikes, farthest = 0, True, (edge * sign, 0)
    marker, gid = ("^", "clipped") if sign > 0 else ("v", "clipped-below")
    for index, (curve, mark) in enumerate(zip(curves, marks, strict=True)):
        for steps, losses in ((curve.steps, curve.losses), (curve.eval_steps, curve.eval_losses)):
            is_beyond = losses * sign > edge * sign
            if not is_beyond.any():
                continue
            found, values = steps[is_beyond], losses[is_beyond] * sign
            _mark_edge(ax, found, marker, theme.colours[index], gid, 1 if sign > 0 else 0)
            count += found.size
            all_spikes &= bool(np.isin(found, mark.spikes).all())
            top = int(values.argmax())
            farthest = max(farthest, (float(values[top]), int(found[top])))
    if not count:
        return []
    noun = "spike" if all_spikes else "value"
    place, extreme = ("above", "highest") if sign > 0 else ("below", "lowest")
    what = f"{count_words(count, noun)} {place},{'' if count == 1 else f' {extreme}'}"
    glyph, loss = "\u25b2" if sign > 0 else "\u25bc", loss_text(farthest[0] * sign)
    return [Note(f"{glyph} {what} {loss} at step {farthest[1]:,}", farthest[1])]


def _mark_edge(
    ax: Axes, steps: Array, marker: str, colour: str, gid: str, height: float = 1
) -> None:
    low, high = ax.get_xlim()
    columns = ((steps - low) / (high - low) * _MOST_EDGE_MARKERS).astype(int)
    shown = steps[np.unique(columns, return_index=True)[1]]
    ax.plot(
        shown,
        np.full(shown.size, height),
        marker,
        color=colour,
        markersize=7,
        markeredgewidth=2 if marker == "x" else 0,
        transform=ax.get_xaxis_transform(),
        clip_on=False,
        zorder=7,
        gid=gid,
    )
