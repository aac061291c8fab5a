"""Rules about the eval loss: worse than before, turned, too close to the train loss, below it."""

from __future__ import annotations

import numpy as np

from colab_qlora.curves.picture.series import loss_text
from colab_qlora.curves.rules.readings import Readings
from colab_qlora.curves.verdicts import Verdict

_LEAK_EPOCHS = 3
# a rise this many times the least one is beyond doubt
_SURE = 2.0
_CLEARLY_WORSE = 0.05
_FALL_ERRORS = 2.5
_EARLY_SHARE = 0.1
_EARLY_STEPS = 50


def worse_than_base(r: Readings) -> Verdict | None:
    """No eval loss gets down to what it was before training."""
    if r.base is None or not r.evals.size or not r.base > 0:
        return None
    best = float(r.evals.min())
    worse = best / r.base - 1
    if worse < r.limits.worse_than_base:
        return None
    is_clear = worse >= _CLEARLY_WORSE
    if _is_early(r) or (r.evals.size < 2 and not (r.is_finished and is_clear)):
        confidence = "watch"
    else:
        confidence = "sure" if r.evals.size >= 3 and is_clear else "likely"
    rate = r.run.get("learning_rate")
    value = f" (to {rate / 10:.1e})" if isinstance(rate, float) and rate > 0 else ""
    return Verdict(
        "worse than base",
        "fault",
        confidence,
        int(r.eval_steps[0]),
        f"the eval loss was {loss_text(r.base)} before training and is at best {loss_text(best)} "
        "since",
        f"divide the learning rate by 10{value}; if that does not help, check prompt template and "
        "tokenizer",
        {"base": r.base, "best": best, "worse": worse},
    )


def _is_early(r: Readings) -> bool:
    """Whether a running run may still be in the jump that a rate makes while it warms up."""
    if r.is_finished:
        return False
    if r.progress is not None:
        return r.progress < _EARLY_SHARE
    return r.points < r.limits.least_points and r.last_step < _EARLY_STEPS


def turned(r: Readings) -> Verdict | None:
    """The eval loss rises for good: overfitting if the train loss goes on falling."""
    if r.best is None or r.evals.size < 2 or not r.evals[r.best] > 0:
        return None
    lowest, last = float(r.evals[r.best]), float(r.evals[-1])
    after = r.evals.size - 1 - r.best
    rise = last / lowest - 1
    if after < 1 or rise < r.limits.generalisation_loss or last - lowest < 3 * r.eval_noise:
        return None
    step = int(r.eval_steps[r.best])
    if after < 2:
        confidence = "watch"
    elif (r.evals[-2:] / lowest - 1 < r.limits.confirmed_rise).any():
        return None
    else:
        is_clear = rise >= _SURE * r.limits.generalisation_loss and after >= 3
        confidence = "sure" if is_clear else "likely"
    falls = _train_falls(r, step)
    name = "overfitting" if falls else "eval rising"
    because = (
        f"the eval loss rose {rise:.1%} from {loss_text(lowest)} at step {step:,} to "
        f"{loss_text(last)} at step {int(r.eval_steps[-1]):,}"
    )
    if falls:
        because += ", while the train loss went on falling"
        action = f"keep the checkpoint of step {step:,} and stop early: EarlyStopping does both"
    elif r.points:
        because += ", and the train loss did not fall either"
        action = "halve the learning rate, or let it decay towards the end"
    else:
        because += "; no train loss was logged to compare with"
        action = f"keep the checkpoint of step {step:,}, and log the train loss too"
    numbers = {"lowest": lowest, "last": last, "rise": rise, "evals_after": float(after)}
    return Verdict(name, "fault", confidence, step, because, action, numbers)


def _train_falls(r: Readings, step: int) -> bool:
    """Whether the train level at the end is below that of the step by more than chance."""
    then = r.level_near(step)
    return then is not None and then - r.end > _FALL_ERRORS * np.hypot(
        r.error(then), r.error(r.end)
    )


def leakage(r: Readings) -> Verdict | None:
    """Rows seen several times teach the eval set as much as the training set."""
    gaps = r.gaps
    if gaps is None or r.epochs < _LEAK_EPOCHS or not r.epoch_steps:
        return None
    first, gap = r.level_until(r.epoch_steps[0]), float(np.median(gaps))
    if first is None or not first > 0:
        return None
    learnt = (first - r.end) / first
    if learnt < r.limits.leak_fall or first - r.end < 3 * np.hypot(r.error(first), r.error(r.end)):
        return None
    is_deep = learnt >= _SURE * r.limits.leak_fall
    # what falls this far by heart parts widely from honest eval rows, so chance is allowed for; a
    # run that learnt less after its first epoch may have little to part with
    chance = r.error(1.0) / np.sqrt(gaps.size)
    # an eval set that is easier from the start parts from the train loss all the same
    easier = _first_gap(r)
    least = max(0.0, easier or 0.0) - r.limits.leak_gap
    if gap < least - (chance if is_deep else 0.0):
        return None
    if gap < least or not is_deep or easier is None:
        confidence = "watch"
    else:
        confidence = "sure" if gap >= chance + least else "likely"
    return Verdict(
        "suspected leakage",
        "fault",
        confidence,
        int(r.eval_steps[-gaps.size]),
        f"in {r.epochs:.3g} epochs the train loss fell {learnt:.0%} below that of the first one, "
        f"and the eval loss, which should lie well above it by now, is {abs(gap):.0%} "
        + ("below it" if gap > 0 else "above it"),
        "look for eval rows among the training rows, and split again without duplicates",
        {"gap": gap, "fall_since_first_epoch": learnt, "epochs": r.epochs},
    )


def _first_gap(r: Readings) -> float | None:
    """How far the eval loss lay below the train loss before rows repeated, as a share of it: before
    training if that was measured, else in the first epoch; None if no eval tells."""
    if r.base is not None:
        return (r.start - r.base) / r.start if r.start else None
    new = np.flatnonzero(r.eval_steps <= r.epoch_steps[0])
    pairs = [(r.mean_near(r.eval_steps[i]), float(r.evals[i])) for i in new]
    gaps = [(train - loss) / train for train, loss in pairs if train]
    return float(np.median(gaps)) if gaps else None


def below_train(r: Readings) -> Verdict | None:
    """The eval loss lies well below the train loss."""
    gaps = r.gaps
    if gaps is None or r.is_short or not r.end > 0:
        return None
    gap = float(np.median(gaps))
    if gap < r.limits.gap_below or (gaps <= 0).any() or gap * r.end <= 4 * r.error(r.end):
        return None
    dropout = r.run.get("lora_dropout") or 0
    action = "check that train and eval rows are made, masked and packed alike"
    if dropout:
        action = f"nothing for now: lora_dropout={dropout:g} raises the train loss alone"
    return Verdict(
        "eval below train",
        "info" if dropout else "warning",
        "likely",
        int(r.eval_steps[-gaps.size]),
        f"the eval loss is {gap:.0%} below the train loss, at all of the last {gaps.size} evals",
        action,
        {"gap": gap},
    )
