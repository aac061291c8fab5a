"""What the rules of a diagnosis read off a log: the numbers of the evals, with the train ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from operator import itemgetter
from typing import Any

import numpy as np

from colab_qlora.curves.logs.points import eval_points, train_points
from colab_qlora.curves.rules.statistics import Array, from_deviations
from colab_qlora.curves.rules.train_readings import TrainReadings
from colab_qlora.curves.thresholds import Thresholds

_LEAST_GAPS = 3
_LEAST_NOISE_EVALS = 6


@dataclass(frozen=True)
class Readings(TrainReadings):
    """One run's numbers; steps rise, losses are in nat.

    Attributes:
        all_evals: steps and eval losses as they were logged, nan and inf included.
    """

    all_evals: tuple[Array, Array]

    @cached_property
    def eval_steps(self) -> Array:
        """Steps of `evals`, float64."""
        return self.all_evals[0][self._is_later].astype(np.float64)

    @cached_property
    def evals(self) -> Array:
        """Finite eval losses after step 0, float64 `(evals,)`."""
        return self.all_evals[1][self._is_later]

    @property
    def _is_later(self) -> Array:
        steps, losses = self.all_evals
        return (steps > 0) & np.isfinite(losses)

    @cached_property
    def base(self) -> float | None:
        """Eval loss at step 0, or None."""
        steps, losses = self.all_evals
        found = losses[(steps == 0) & np.isfinite(losses)]
        return float(found[0]) if found.size else None

    @cached_property
    def eval_noise(self) -> float:
        """Scatter of one eval loss, in nat; 0 where there are too few to tell."""
        if self.evals.size < _LEAST_NOISE_EVALS:
            return 0.0
        # a curve that turns has no one slope, so neighbours of neighbours are compared too
        return from_deviations(np.diff(self.evals, 2)) / math.sqrt(6)

    @cached_property
    def lowest_eval(self) -> float:
        """Lowest eval loss after step 0, in nat; of three evals or more the lowest median of 3."""
        if self.evals.size < _LEAST_GAPS:
            return float(self.evals.min())
        return float(np.median(np.lib.stride_tricks.sliding_window_view(self.evals, 3), 1).min())

    @cached_property
    def gaps(self) -> Array | None:
        """How far the last evals (half of them, 3 or more) lie below the train level there, as
        shares of that level; None with fewer evals or where a level is not positive."""
        if self.evals.size < _LEAST_GAPS or not self.points:
            return None
        count = max(_LEAST_GAPS, self.evals.size // 2)
        levels = [self.mean_near(step) for step in self.eval_steps[-count:]]
        if any(level is None or not level > 0 for level in levels):
            return None
        train = np.array(levels, np.float64)
        return (train - self.evals[-count:]) / train

    @cached_property
    def best(self) -> int | None:
        """Index of the lowest eval loss after step 0, the earliest of equals."""
        return int(self.evals.argmin()) if self.evals.size else None


def read_numbers(
    log: Iterable[Mapping[str, Any]],
    run: Mapping[str, Any] | None,
    limits: Thresholds,
    is_finished: bool,
) -> Readings:
    """Takes a log apart.

    Args:
        log: records in any order; where a resumed run repeated a step, the last one counts.
        run: hyperparameters.
        limits: thresholds.
        is_finished: whether the run is over.

    Returns:
        The readings.
    """
    records = sorted(log, key=itemgetter("step"))
    return Readings(
        all_losses=train_points(records),
        records=records,
        run=dict(run or {}),
        limits=limits,
        is_finished=is_finished,
        all_evals=eval_points(records),
    )
