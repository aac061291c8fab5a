"""Rules about train losses that jump: unstable levels, and single spikes."""

from __future__ import annotations

import numpy as np

from colab_qlora.curves.picture.series import loss_text
from colab_qlora.curves.rules.readings import Readings
from colab_qlora.curves.rules.statistics import centred_medians, scatter
from colab_qlora.curves.verdicts import Verdict

_MOST_SPIKES_MARKED = 50
# of a handful of points: how far the last must lie above the lowest, and how often they turn
_SHORT_LEAST, _SHORT_RISE, _SHORT_TURNS = 4, 0.25, 2


def unstable(r: Readings) -> Verdict | None:
    """The train level rises far above the lowest one, for as long as a window."""
    if not r.has_levels:
        return None
    if r.is_short:
        return _short_swings(r)
    levels, window = r.levels, r.window
    # the level of fewer points than a window is no level yet
    best = np.minimum.accumulate(np.where(np.arange(r.points) < window - 1, np.inf, levels))
    needed = max(r.limits.unstable_rise, r.limits.unstable_errors * np.sqrt(2) * r.error(1)) * best
    high = levels - best >= np.maximum(needed, 0.05 * r.start)
    high &= (np.arange(r.points) >= 2 * window) & (best > 0)
    found = _first_row(high, window)
    if found is None:
        return _early_jump(r)
    # where it left the best level, not where that was certain
    at = int(np.flatnonzero(levels[: found + 1] <= best[found])[-1]) + 1
    step, low, top = int(r.steps[at]), float(best[found]), float(levels[found:].max())
    moved = f"{loss_text(low)} to {loss_text(top)}"
    ended = "and stayed there" if high[-1] else f"and came back to {loss_text(r.end)}"
    confidence = "sure" if top >= low * (1 + 2 * r.limits.unstable_rise) else "likely"
    action = _halve(r)
    if _eval_still_improved(r, step):
        confidence, action = (
            "watch",
            f"look at the rows from step {step:,} on: the eval loss fell on",
        )
    return Verdict(
        "unstable",
        "fault",
        confidence,
        step,
        f"the train loss rose from {moved} after step {step:,} {ended}",
        action,
        {"lowest_level": low, "highest_level": top, "rise": top / low - 1 if low else 0.0},
    )


def _eval_still_improved(r: Readings, step: int) -> bool:
    """Whether the eval loss came to a new lowest after a step: then other rows came, not chaos."""
    earlier = list(r.evals[r.eval_steps <= step])
    if r.base is not None:
        earlier.append(r.base)
    later = r.evals[r.eval_steps > step]
    return bool(later.size and earlier and later[-1] < min(earlier))


def _halve(r: Readings) -> str:
    rate = r.run.get("learning_rate")
    value = f" (to {rate / 2:.1e})" if isinstance(rate, float) and rate > 0 else ""
    return f"halve the learning rate{value}"


def _first_row(flags: np.ndarray, length: int) -> int | None:
    if flags.size < length:
        return None
    rows = np.lib.stride_tricks.sliding_window_view(flags, length).all(axis=1)
    return int(rows.argmax()) if rows.any() else None


def _early_jump(r: Readings) -> Verdict | None:
    """A jump in the first points, which may be over before it means anything."""
    early = r.losses[: 2 * r.window]
    if early.size < 6:
        return None
    middle = np.median(np.lib.stride_tricks.sliding_window_view(early, 3), axis=1)
    errors = r.limits.unstable_errors * np.sqrt(2) * r.error(r.start, 3)
    needed = max(r.limits.unstable_rise * r.start, errors)
    at = _first_row(middle - r.start > needed, 2)
    if at is None:
        return None
    top = float(middle[at:].max())
    return Verdict(
        "unstable",
        "warning",
        "watch",
        int(r.steps[at]),
        f"the train loss jumped from {loss_text(r.start)} to {loss_text(top)} in its first steps",
        "lengthen the warm-up, and evaluate before the first step: a rate that is too high never "
        "gets below that",
        {"start": r.start, "highest_level": top},
    )


def _short_swings(r: Readings) -> Verdict | None:
    """Of a handful of points: up and down, and in the end above the start."""
    if not r.is_finished or r.evals.size >= r.limits.least_evals or r.points < _SHORT_LEAST:
        return None
    moves = np.sign(np.diff(r.losses))
    turns = int((moves[1:] * moves[:-1] < 0).sum())
    lowest, last = float(r.losses.min()), float(r.losses[-1])
    if turns < _SHORT_TURNS or last < r.losses.max() or last < (1 + _SHORT_RISE) * lowest:
        return None
    return Verdict(
        "unstable",
        "fault",
        "watch" if r.points >= 2 * _SHORT_LEAST else "likely",
        None,
        f"the train loss swings, and ends at {loss_text(last)}, above its start of "
        f"{loss_text(float(r.losses[0]))}; {r.points} points are few",
        _halve(r),
        {"lowest": lowest, "last": last, "turns": float(turns)},
    )


def spikes(r: Readings) -> Verdict | None:
    """Single losses far above the level around them."""
    if r.is_short or not r.has_levels or not r.noise > 0:
        return None
    # a spike of one step drowns in the mean of a block
    losses, noise = r.raw_losses, r.noise
    if losses.size > r.points and losses.min() > 0:
        noise = scatter(np.log(losses))
    around = np.interp(r.raw_steps, r.steps, centred_medians(r.losses, r.window))
    found = np.flatnonzero(losses > around * (1 + r.limits.spike_scatters * noise))
    # the first points of a run are high because nothing is learnt yet
    found = found[found >= max(3, losses.size // 20)]
    if not found.size:
        return None
    steps = r.raw_steps[found].astype(int)
    worst = int(found[losses[found].argmax()])
    highest, at = float(losses[worst]), int(r.raw_steps[worst])
    one = found.size == 1
    return Verdict(
        "spikes",
        "info",
        "likely",
        None,
        f"{found.size} of {losses.size} losses {'stands' if one else 'stand'} out, the highest "
        f"{loss_text(highest)} at step {at:,}",
        f"look at the rows of step {at:,}",
        {"spikes": float(found.size), "highest": highest},
        tuple(steps[:_MOST_SPIKES_MARKED].tolist()),
    )
