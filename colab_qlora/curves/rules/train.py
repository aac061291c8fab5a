"""Rules about the train loss: unstable, spikes, steps at epochs, not learning, slow, its end."""

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


def stairs(r: Readings) -> Verdict | None:
    """The train level falls where an epoch begins and is flat in between: rows are known by heart.

    The levels of half an epoch before and after are compared, less what the trend inside the two
    halves explains (fast.ai 2023; Whitaker 2023).
    """
    if r.is_short or not r.has_levels:
        return None
    found: list[tuple[float, float]] = []
    for boundary in r.epoch_steps:
        fall = _fall_at(r, boundary)
        if fall is not None:
            found.append((boundary, fall))
    if not found:
        return _repeated(r)
    steps = tuple(int(step) for step, _ in found)
    largest = max(fall for _, fall in found)
    known = f"at {len(found)} epoch{'s' if len(found) > 1 else ''}"
    if r.evals.size >= 2 and r.evals[-1] <= (1 + r.limits.confirmed_rise) * r.evals.min():
        action, kind = "stop near the end of this epoch, while the eval loss still falls", "info"
    elif r.evals.size:
        action, kind = "train one epoch fewer", "warning"
    else:
        action, kind = "train one epoch fewer, and add an eval set to see what it costs", "warning"
    return Verdict(
        "memorising",
        kind,
        "sure" if len(found) >= 2 else "likely",
        steps[0],
        f"the train loss falls by up to {largest:.0%} at once where an epoch begins ({known})",
        action,
        {"largest_fall": largest, "epochs": float(len(found))},
        steps,
    )


def _repeated(r: Readings) -> Verdict | None:
    """A deep fall on rows that were all seen before, which no eval loss vouches for."""
    if r.evals.size or not r.epoch_steps:
        return None
    first = r.level_until(r.epoch_steps[0])
    if first is None or not first > 0:
        return None
    fall = (first - r.end) / first
    errors = np.hypot(r.error(first), r.error(r.end))
    if fall < r.limits.repeat_fall or first - r.end < r.limits.stair_errors * errors:
        return None
    return Verdict(
        "memorising",
        "warning",
        "likely",
        int(r.epoch_steps[0]),
        f"after the first epoch, on rows that it had seen, the train loss fell another {fall:.0%}, "
        "and there is no eval loss",
        "add an eval set: only new rows tell what that was worth",
        {"fall_since_first_epoch": fall, "epochs": r.epochs},
    )


def _fall_at(r: Readings, boundary: float) -> float | None:
    """Fall of the level at a step as a share of it, or None where it is chance or too small."""
    ends = [0.0, *r.epoch_steps, float(r.steps[-1]) + 1]
    at = ends.index(boundary)
    before = r.losses[(r.steps > (ends[at - 1] + boundary) / 2) & (r.steps <= boundary)]
    after = r.losses[(r.steps > boundary) & (r.steps <= (boundary + ends[at + 1]) / 2)]
    if min(before.size, after.size) < 4:
        return None
    high, low = float(np.median(before)), float(np.median(after))
    inside = _slope(before) * before.size / 2 + _slope(after) * after.size / 2
    fall = high - low + min(0.0, inside)
    error = np.hypot(r.error(high, before.size), r.error(low, after.size))
    if fall < r.limits.stair_errors * error or fall < r.limits.stair_fall * high:
        return None
    return fall / high


def _slope(values: np.ndarray) -> float:
    """Fall a point between the two halves of a stretch."""
    half = values.size // 2
    return float(np.median(values[half:]) - np.median(values[:half])) / max(1, values.size - half)


def not_learning(r: Readings) -> Verdict | None:
    """Neither loss moved by more than chance."""
    norms = r.series("grad_norm")[1]
    is_frozen = norms.size >= 3 and not np.nan_to_num(norms, nan=1.0).any()
    moved = r.has_levels and r.start - r.end > 3 * r.fall_error
    if r.base is not None and r.evals.size:
        if not r.base > 0:
            return None
        gain = 1 - r.lowest_eval / r.base
        if (gain >= r.limits.little_learnt or moved) and not is_frozen:
            return None
        confidence = "sure" if r.evals.size >= 3 and gain < 0.005 else "likely"
        because = (
            f"the eval loss moved by {abs(gain):.1%} of the {loss_text(r.base)} before training"
        )
        numbers = {"gain": gain}
    else:
        if r.is_short or not r.has_levels:
            return None
        if (r.fall >= r.limits.little_fall or moved) and not is_frozen:
            return None
        # a model that knows the data already has little to learn; only an eval tells
        confidence = "watch"
        because = f"the train loss fell by {r.fall:.1%}, no more than chance"
        numbers = {"fall": r.fall}
    if is_frozen:
        because += ", and every gradient norm is 0"
        numbers["grad_norm"] = 0.0
        action = "check that trainable parameters are above 0 and that rows have labels"
        return Verdict("not learning", "fault", "sure", None, because, action, numbers)
    rate = r.run.get("learning_rate")
    value = f" (to {rate * 10:.1e})" if isinstance(rate, float) and rate > 0 else ""
    action = f"check trainable parameters and labels; then raise the learning rate tenfold{value}"
    return Verdict("not learning", "fault", confidence, None, because, action, numbers)


def slow(r: Readings) -> Verdict | None:
    """Still falling, as fast as ever, and not far yet: the learning rate is low."""
    if r.is_short or not r.has_levels or not r.is_finished:
        return None
    # a low rate falls evenly, so two thirds of the run say more than the last one
    most = r.trend_of_last(2 / 3)
    falls = most.high < 0 and most.slope < -2 * r.limits.tail_fall
    little = r.fall < r.limits.slow_fall and r.shape < r.limits.slow_shape
    barely = False
    if r.base is not None and r.evals.size and r.base > 0:
        barely = 0 <= 1 - r.lowest_eval / r.base < r.limits.little_learnt
    if not (falls and little) and not barely:
        return None
    rate = r.run.get("learning_rate")
    value = f" (to {rate * 3:.1e})" if isinstance(rate, float) and rate > 0 else ""
    return Verdict(
        "slow",
        "warning",
        "likely",
        None,
        f"the train loss fell {r.fall:.0%} in all, "
        + ("and falls as fast as at the start" if falls and little else "hardly more than chance"),
        f"raise the learning rate three times{value}, or train longer",
        {"fall": r.fall, "shape": r.shape, "trend": most.slope},
    )


def ending(r: Readings) -> Verdict | None:
    """How a sound run ends: still falling, or level."""
    if r.is_short or not r.has_levels or not r.is_finished:
        return None
    numbers = {"tail": r.tail.slope, "tail_low": r.tail.low, "tail_high": r.tail.high}
    if r.tail.high < 0 and r.tail.slope < -r.limits.tail_fall:
        because = f"over the last third the train loss fell {-r.tail.slope:.0%} more"
        return Verdict(
            "still improving", "info", "likely", None, because, "train more steps", numbers
        )
    if r.fall >= r.limits.little_fall:
        because = f"over the last third the train loss moved by {r.tail.slope:+.1%}"
        action = "stop here; for more, add data or raise the rank"
        return Verdict("plateau", "info", "likely", None, because, action, numbers)
    return None
