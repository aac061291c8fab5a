"""Rules about train losses that fall where rows are seen again: learning by heart."""

from __future__ import annotations

import numpy as np

from colab_qlora.curves.rules.readings import Readings
from colab_qlora.curves.verdicts import Verdict


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
