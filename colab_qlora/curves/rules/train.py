"""Rules about how much was learnt from the train loss: not learning, slow, and how a run ends."""

from __future__ import annotations

import numpy as np

from colab_qlora.curves.picture.series import loss_text
from colab_qlora.curves.rules.readings import Readings
from colab_qlora.curves.verdicts import Verdict


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
