"""One run's numbers in arrays, from which pictures and sentences are made; nothing judges here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colab_qlora.curves.logs.points import eval_points, points_of, train_points
from colab_qlora.curves.logs.records import step_of
from colab_qlora.errors import UserError

__all__ = ["Array", "Curve", "Runs", "as_curves", "loss_text"]

Array = NDArray[Any]
Records = Iterable[Mapping[str, Any]]  # a LossLog is one too


def _no_steps() -> Array:
    return np.empty(0, np.int64)


def _no_values() -> Array:
    return np.empty(0, np.float64)


@dataclass(frozen=True)
class Curve:
    """One run's losses, each against its own steps.

    Attributes:
        name: the run's name in a comparison, "" for a run on its own.
        steps: train steps, int64 `(points,)`, rising.
        losses: train losses, float64 `(points,)`; nan and inf both stand as nan.
        eval_steps: eval steps, int64 `(evals,)`, rising.
        eval_losses: eval losses, float64 `(evals,)`; nan and inf both stand as nan.
        rate_steps: steps at which the learning rate was logged, int64 `(rates,)`, rising.
        rates: learning rates, finite float64 `(rates,)`.
        events: step and words of what happened during the run, by step.
    """

    name: str
    steps: Array
    losses: Array
    eval_steps: Array
    eval_losses: Array
    rate_steps: Array = field(default_factory=_no_steps)
    rates: Array = field(default_factory=_no_values)
    events: tuple[tuple[int, str], ...] = ()

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
    def chosen_best(self) -> tuple[int, float] | None:
        """`best`, where there are two evals to choose from: one is the lowest of itself."""
        return self.best if np.isfinite(self.eval_losses).sum() > 1 else None

    @property
    def non_finite_steps(self) -> Array:
        """The steps of train and eval losses that are nan or inf, rising."""
        bad = self.steps[np.isnan(self.losses)], self.eval_steps[np.isnan(self.eval_losses)]
        return np.sort(np.concatenate(bad))

    @property
    def step_range(self) -> tuple[int, int]:
        """The first and the last step at which something was logged."""
        events = np.array([step for step, _ in self.events], np.int64)
        known = [steps for steps in (self.steps, self.eval_steps, events) if steps.size]
        return min(int(steps[0]) for steps in known), max(int(steps[-1]) for steps in known)

    def eval_at(self, step: int) -> tuple[int, float] | None:
        """The last finite eval loss at a step or before it, as its step and loss, or None."""
        known = np.flatnonzero(np.isfinite(self.eval_losses) & (self.eval_steps <= step))
        if not known.size:
            return None
        return int(self.eval_steps[known[-1]]), float(self.eval_losses[known[-1]])


Runs = Records | Curve | Mapping[str, Records | Curve]


def as_curves(runs: Runs, *, with_rates: bool = True) -> list[Curve]:
    """Gives the curves of one log, or of several by name.

    Args:
        runs: a LossLog, a list of records, a Curve, or a dict from run name to any of these. Who
            draws a long log often makes its Curve once.
        with_rates: whether to read the learning rates too.

    Returns:
        One curve a run, in the order given.

    Raises:
        UserError: `runs` is none of these, or a run has no loss.
    """
    if not isinstance(runs, Mapping):
        return [_curve("", runs, with_rates)]
    if "step" in runs and not isinstance(runs["step"], (Iterable, Curve)):
        raise UserError("that is one record", got=dict(runs), do="Pass a list of records")
    if not runs:
        raise UserError("there is no run to show", allowed="a log, or a dict of 1 or more logs")
    return [_curve(one_line(name), records, with_rates) for name, records in runs.items()]


def one_line(text: object) -> str:
    """Gives a text without line breaks, which labels of one line cannot hold."""
    return " ".join(str(text).split())


def loss_text(loss: float) -> str:
    """Writes a loss with the digits that matter: 1.234, 0.00123, 1.23e+04."""
    return f"{loss:.3f}" if 0.01 <= abs(loss) < 1000 or loss == 0 else f"{loss:.3g}"


def _curve(name: str, records: Records | Curve, with_rates: bool) -> Curve:
    if isinstance(records, Curve):
        return replace(records, name=name)
    if isinstance(records, (str, bytes)) or hasattr(records, "__fspath__"):
        raise UserError("that is a path, not a log", got=records, do="Pass read_log(path)")
    rows = list(records) if isinstance(records, Iterable) else None
    # asking for the plain type first is several times faster, which 10^6 records show
    if rows is None or not all(type(row) is dict or isinstance(row, Mapping) for row in rows):
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
    rates = _rates(rows) if with_rates else (_no_steps(), _no_values())
    return Curve(name, steps, losses, eval_steps, eval_losses, *rates, _events(rows))


def _rates(rows: list[Mapping[str, Any]]) -> tuple[Array, Array]:
    steps, rates = points_of(rows, "learning_rate")
    # of a step that a resumed run repeated, the last record counts
    steps, index = np.unique(steps[::-1], return_index=True)
    rates = rates[::-1][index]
    is_known = np.isfinite(rates)
    return steps[is_known], rates[is_known]


def _events(rows: list[Mapping[str, Any]]) -> tuple[tuple[int, str], ...]:
    found = [row for row in rows if "event" in row and row["event"]]
    pairs = [(step_of(row, "the record"), one_line(row["event"])) for row in found]
    # a resumed run repeats what happened after its checkpoint
    return tuple(sorted(dict.fromkeys(pairs), key=lambda pair: pair[0]))
