"""A picture of loss curves in words: numbers and marks, without a judgement of its own.

Start and end of a train loss are medians, because a single logged loss is the mean of a few batches
and moves by tens of percent from one to the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from colab_qlora.curves.picture.curve import Curve, Runs, as_curves, loss_text
from colab_qlora.curves.picture.marks import Diagnoses, as_marks, count_words

__all__ = ["describe_curves", "stop_words"]

# below this many points a median over "the first three" would reach into the middle of the run
_MEDIAN_FROM_POINTS = 10
_MOST_EVENTS = 12


def describe_curves(
    runs: Runs,
    diagnosis: Diagnoses = None,
    *,
    learning_rate: bool = False,
    stop_at: int | None = None,
) -> str:
    """Says in a few sentences what the picture shows; the text alternative to it.

    Args:
        runs: as for `draw_curves`; so are the others.
        diagnosis: what is marked on the curves.
        learning_rate: whether the picture has the learning rate.
        stop_at: the step at which one might have stopped.

    Returns:
        Where the train and the eval loss start and end, the lowest eval loss and its step, the loss
        before training, values that are not finite, the marks of the diagnosis, the events.
        Numbers only, without a judgement beyond the diagnosis.

    Raises:
        UserError: as for `draw_curves`.
    """
    curves = as_curves(runs, with_rates=learning_rate)
    marks = as_marks(diagnosis, curves)
    sentences = [
        _sentence("Train loss", curves, partial(_train_words, is_alone=len(curves) == 1)),
        _sentence("Eval loss", curves, _eval_words),
    ]
    broken = [curve for curve in curves if curve.non_finite_steps.size]
    if broken:
        what = "Values that are nan or inf" if curves[0].name else "The log"
        sentences.append(_sentence(what, broken, _non_finite_words))
    for curve, mark in zip(curves, marks, strict=True):
        if said := mark.texts():
            sentences.append(f"Marked{_of(curve)}: {'; '.join(said)}.")
    if learning_rate:
        sentences.append(_sentence("Learning rate", curves, _rate_words))
    sentences += [_event_sentence(curve) for curve in curves if curve.events]
    if stop_at is not None:
        sentences += [f"Stop{_of(curve)} {stop_words(curve, stop_at)}." for curve in curves]
    return " ".join(sentences)


def stop_words(curve: Curve, step: int) -> str:
    """Says which eval loss a run had at a step: "at step 20: eval 1.320"."""
    found = curve.eval_at(step)
    if found is None:
        return f"at step {step:,}: no eval loss by then"
    if found[0] == step:
        return f"at step {step:,}: eval {loss_text(found[1])}"
    return f"at step {step:,}: last eval {loss_text(found[1])}, at step {found[0]:,}"


def _of(curve: Curve) -> str:
    return f" in {curve.name}" if curve.name else ""


def _sentence(subject: str, curves: list[Curve], words: Callable[[Curve], str]) -> str:
    if not curves[0].name:
        return f"{subject} {words(curves[0])}."
    return f"{subject}: " + "; ".join(f"{curve.name} {words(curve)}" for curve in curves) + "."


def _train_words(curve: Curve, is_alone: bool) -> str:
    finite = np.isfinite(curve.losses)
    steps, losses, count = curve.steps[finite], curve.losses[finite], int(finite.sum())
    if not curve.steps.size:
        return "was not logged"
    if count == 0:
        return "has no finite value"
    if count == 1:
        return f"is {loss_text(losses[0])} at step {steps[0]}"
    first, last, note = 1, 1, ""
    if count >= _MEDIAN_FROM_POINTS:
        first, last = max(3, count // 20), max(5, math.ceil(count / 10))
        note = f" (medians of the first {first} and last {last} of {count} points)"
    start, end = np.median(losses[:first]), np.median(losses[-last:])
    span = f"over steps {steps[0]} to {steps[-1]}"
    # in a comparison the note would be repeated for every run
    return f"goes from {loss_text(start)} to {loss_text(end)} {span}{note if is_alone else ''}"


def _eval_words(curve: Curve) -> str:
    finite = np.isfinite(curve.eval_losses)
    steps, losses = curve.eval_steps[finite], curve.eval_losses[finite]
    if not curve.eval_steps.size:
        return "was not logged"
    if curve.best is None:
        return "has no finite value"
    before = " before training" if curve.base is not None else ""
    if losses.size == 1:
        return f"is {loss_text(losses[0])} at step {steps[0]}{before and ',' + before}"
    start = f"{loss_text(losses[0])}{before or f' at step {steps[0]}'}"
    end = f"{loss_text(losses[-1])} at step {steps[-1]}"
    lowest = f"lowest {loss_text(curve.best[1])} at step {curve.best[0]}"
    return f"goes from {start} to {end}, {lowest}"


def _non_finite_words(curve: Curve) -> str:
    bad = curve.non_finite_steps
    if not curve.name:
        values = "value that is" if bad.size == 1 else "values that are"
        return f"has {bad.size} {values} nan or inf, the first at step {bad[0]}"
    return f"{bad.size}, the first at step {bad[0]}"


def _rate_words(curve: Curve) -> str:
    if not curve.rates.size:
        return "was not logged"
    top = int(curve.rates.argmax())
    peak = f"{curve.rates[top]:.3g} at step {curve.rate_steps[top]}"
    return f"peaks at {peak} and ends at {curve.rates[-1]:.3g}"


def _event_sentence(curve: Curve) -> str:
    shown = [f"step {step} {text}" for step, text in curve.events[:_MOST_EVENTS]]
    if more := len(curve.events) - len(shown):
        shown.append(f"{more:,} more")
    return f"{count_words(len(curve.events), 'event')}{_of(curve)}: {'; '.join(shown)}."
