"""What a picture or a sentence needs from a loss log: numbers in arrays, and the same in words.

A `Curve` is one run. Its start and end are medians, because a single logged loss is the mean of a
few batches and moves by tens of percent from one to the next. Nothing here judges a curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colab_qlora.curves.log import eval_points, train_points
from colab_qlora.errors import UserError

__all__ = ["Curve", "Runs", "as_curves", "describe_curves", "smooth_losses", "thin"]

Array = NDArray[Any]
Records = Iterable[Mapping[str, Any]]  # a LossLog is one too
Runs = Records | Mapping[str, Records]

# below this many points a median over "the first three" would reach into the middle of the run
_MEDIAN_FROM_POINTS = 10


@dataclass(frozen=True)
class Curve:
    """One run's losses, each against its own steps.

    Attributes:
        name: the run's name in a comparison, "" for a run on its own.
        steps: train steps, int64 `(points,)`, rising.
        losses: train losses, float64 `(points,)`; nan and inf both stand as nan.
        eval_steps: eval steps, int64 `(evals,)`, rising.
        eval_losses: eval losses, float64 `(evals,)`; nan and inf both stand as nan.
    """

    name: str
    steps: Array
    losses: Array
    eval_steps: Array
    eval_losses: Array

    @property
    def base(self) -> float | None:
        """The eval loss at step 0, before training, or None."""
        at_zero = self.eval_losses[(self.eval_steps == 0) & np.isfinite(self.eval_losses)]
        return float(at_zero[0]) if at_zero.size else None

    @property
    def best(self) -> tuple[int, float] | None:
        """The step of the lowest eval loss, the earliest of equals, and that loss, or None."""
        if not np.isfinite(self.eval_losses).any():
            return None
        index = int(np.nanargmin(self.eval_losses))
        return int(self.eval_steps[index]), float(self.eval_losses[index])

    @property
    def non_finite_steps(self) -> Array:
        """The steps of train and eval losses that are nan or inf, rising."""
        bad = self.steps[np.isnan(self.losses)], self.eval_steps[np.isnan(self.eval_losses)]
        return np.sort(np.concatenate(bad))


def as_curves(runs: Runs) -> list[Curve]:
    """Gives the curves of one log, or of several by name.

    Args:
        runs: a LossLog, a list of records, or a dict from run name to either.

    Returns:
        One curve a run, in the order given.

    Raises:
        UserError: `runs` is none of these, or a run has no loss.
    """
    if not isinstance(runs, Mapping):
        return [_curve("", runs)]
    if "step" in runs and not isinstance(runs["step"], Iterable):
        raise UserError("that is one record", got=dict(runs), do="Pass a list of records")
    if not runs:
        raise UserError("there is no run to show", allowed="a log, or a dict of 1 or more logs")
    # a line break in a name would break the one-line labels
    return [_curve(" ".join(str(name).split()), records) for name, records in runs.items()]


def _curve(name: str, records: Records) -> Curve:
    if isinstance(records, (str, bytes)) or hasattr(records, "__fspath__"):
        raise UserError("that is a path, not a log", got=records, do="Pass read_log(path)")
    rows = list(records) if isinstance(records, Iterable) else None
    if rows is None or not all(isinstance(row, Mapping) for row in rows):
        raise UserError(
            "that is not a loss log",
            got=type(records).__name__,
            allowed="a LossLog, a list of records, or a dict of run name to either",
        )
    (steps, losses), (eval_steps, eval_losses) = train_points(rows), eval_points(rows)
    if not steps.size and not eval_steps.size:
        raise UserError(
            f"run {name!r} has no loss values" if name else "the log has no loss values",
            got=f"{len(rows)} records",
            allowed="records with loss or eval_loss",
            do="Wait for the first logged step",
        )
    losses[np.isinf(losses)] = math.nan
    eval_losses[np.isinf(eval_losses)] = math.nan
    return Curve(name, steps, losses, eval_steps, eval_losses)


def smooth_losses(losses: Array) -> Array:
    """Smooths a curve for the eye: a moving average with exponential weights, without start bias.

    The half-life is a twentieth of the points. It lags behind the data, so no rule should read it.

    Args:
        losses: float64 `(points,)`; nan is skipped and stays nan.

    Returns:
        The smoothed losses, float64 `(points,)`.
    """
    keep = 0.5 ** (1 / max(1.0, losses.size / 20))
    smoothed = np.full(losses.size, math.nan)
    mean = weight = 0.0
    for index, value in enumerate(losses.tolist()):
        if not math.isnan(value):
            mean = keep * mean + (1 - keep) * value
            weight = keep * weight + (1 - keep)
            smoothed[index] = mean / weight
    return smoothed


def thin(losses: Array, buckets: int) -> Array:
    """Chooses the points that a picture of `buckets` columns needs.

    Args:
        losses: float64 `(points,)`, with nan or without.
        buckets: how many equal stretches to cut the points into.

    Returns:
        Indices, int64, rising: all where there are few points, otherwise the first, lowest, highest
        and last of every stretch, so that no peak is lost and no gap is closed.
    """
    if losses.size <= 4 * buckets:
        return np.arange(losses.size)
    low, high = np.nan_to_num(losses, nan=math.inf), np.nan_to_num(losses, nan=-math.inf)
    chosen = []
    for part in np.array_split(np.arange(losses.size), buckets):
        chosen += [part[0], part[low[part].argmin()], part[high[part].argmax()], part[-1]]
        chosen += part[np.isnan(losses[part])][:1].tolist()
    return np.unique(chosen)


def describe_curves(runs: Runs) -> str:
    """Says in one to three sentences what the picture shows; the text alternative to it.

    Args:
        runs: as for `draw_curves`.

    Returns:
        Where the train and the eval loss start and end, the lowest eval loss and its step, the loss
        before training, and values that are not finite. Numbers only, without a judgement.

    Raises:
        UserError: as for `draw_curves`.
    """
    curves = as_curves(runs)
    sentences = [
        _sentence("Train loss", curves, partial(_train_words, is_alone=len(curves) == 1)),
        _sentence("Eval loss", curves, _eval_words),
    ]
    broken = [curve for curve in curves if curve.non_finite_steps.size]
    if broken:
        what = "Values that are nan or inf" if curves[0].name else "The log"
        sentences.append(_sentence(what, broken, _non_finite_words))
    return " ".join(sentences)


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


def loss_text(loss: float) -> str:
    """Writes a loss with the digits that matter: 1.234, 0.00123, 1.23e+04."""
    return f"{loss:.3f}" if 0.01 <= abs(loss) < 1000 or loss == 0 else f"{loss:.3g}"
