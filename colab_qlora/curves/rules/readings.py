"""What the rules of a diagnosis read off a log: finite points, levels, scatter, epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from colab_qlora.curves.logs.points import eval_points, points_of, train_points
from colab_qlora.curves.logs.records import number_or_none
from colab_qlora.curves.rules.statistics import (
    Array,
    Trend,
    from_deviations,
    in_blocks,
    level_error,
    scatter,
    trailing_medians,
    trend,
)
from colab_qlora.curves.thresholds import Thresholds

# the trend compares all pairs of points, so long runs are averaged in blocks first
_MOST_POINTS = 2000
_LEAST_WINDOW = 5
_LEAST_TAIL = 8
_LEAST_GAPS = 3
_LEAST_NOISE_EVALS = 6
_LEAST_DRIFTS = 30
_DRIFT_LAG = 5
# a few dozen independent points have such a ratio by chance
_CHANCE_RATIO = 2.0
# steps at less than this share of the peak learning rate are warm-up
_WARM_UP_RATE = 0.25


@dataclass(frozen=True)
class Readings:
    """One run's numbers; steps rise, losses are finite and in nat.

    Attributes:
        steps, losses: train points, float64 `(points,)`; means of blocks in runs of over 2,000.
        raw_steps, raw_losses: the same as they were logged.
        eval_steps, evals: evaluations after step 0, `(evals,)`.
        base: eval loss at step 0, or None.
        last_step: the last step of any record.
        records: all records, by step.
        run: hyperparameters.
        limits: where the rules draw their lines.
        is_finished: whether the run is over.
    """

    steps: Array
    losses: Array
    raw_steps: Array
    raw_losses: Array
    eval_steps: Array
    evals: Array
    base: float | None
    last_step: int
    records: list[Mapping[str, Any]]
    run: Mapping[str, Any]
    limits: Thresholds
    is_finished: bool

    @property
    def points(self) -> int:
        """Train points."""
        return int(self.losses.size)

    @property
    def has_levels(self) -> bool:
        """Whether there are train losses, none below 0: rules about shares of a level need that."""
        return self.points > 0 and float(self.losses.min()) >= 0

    @cached_property
    def progress(self) -> float | None:
        """Share of the planned run that is done, or None where the settings do not say."""
        steps = number_or_none(self.run.get("max_steps"))
        if steps is not None and steps > 0:
            return self.last_step / steps
        planned = number_or_none(self.run.get("num_train_epochs"))
        return self.epochs / planned if planned and self.epochs else None

    @property
    def is_short(self) -> bool:
        """Whether there are too few train points for windows."""
        return self.points < self.limits.least_points

    @cached_property
    def window(self) -> int:
        """Points that a level is the median of."""
        if self.is_short:
            # five points of a table are five levels; of nineteen, three make one
            return max(1, self.points // 5)
        return max(_LEAST_WINDOW, math.ceil(self.limits.window_share * self.points))

    @cached_property
    def noise(self) -> float:
        """Scatter of one train point as a share of its level: losses scatter in proportion."""
        if not self.points or self.losses.min() <= 0:
            return scatter(self.losses) / self.end if self.points and self.end > 0 else 0.0
        return scatter(np.log(self.losses))

    @cached_property
    def drift(self) -> float:
        """How much more a level scatters than independent points explain; 1 where they are that.

        Losses of neighbouring steps belong together where rows are sorted by length or topic, and
        then a level of ten of them is worth less than ten. In an AR(1) process of correlation c,
        second differences of neighbours have 6 - 8 c + 2 c^2 times the variance, those of points
        five apart about 6 times, and a trend is in neither.
        """
        if not self.noise or self.losses.min() <= 0:
            return 1.0
        logs, lag = np.log(self.losses), _DRIFT_LAG
        epoch = np.searchsorted(np.array(self.epoch_steps), self.steps)
        far = logs[2 * lag :] - 2 * logs[lag:-lag] + logs[: -2 * lag]
        # what falls where an epoch begins is no drift
        far = far[epoch[2 * lag :] == epoch[: -2 * lag]]
        if far.size < _LEAST_DRIFTS:
            return 1.0
        near, far = from_deviations(np.diff(logs, 2)), from_deviations(far)
        if not near or (far / near) ** 2 < _CHANCE_RATIO:
            return 1.0
        correlation = 2 - math.sqrt(1 + 3 * (near / far) ** 2)
        spread = far / math.sqrt(6) / self.noise
        return spread * math.sqrt((1 + correlation) / (1 - correlation))

    def error(self, level: float, points: int | None = None) -> float:
        """Standard error of a level, in nat, of a window's points or of so many."""
        return self.drift * level_error(self.noise, points or self.window) * abs(level)

    @cached_property
    def levels(self) -> Array:
        """Median of the last `window` points, at each point."""
        return trailing_medians(self.losses, self.window)

    @cached_property
    def start(self) -> float:
        """Train level at the start, in nat."""
        if not self.points:
            return 0.0
        return float(np.median(self.losses[: 1 if self.is_short else max(3, self.points // 20)]))

    @cached_property
    def end(self) -> float:
        """Train level at the end, in nat."""
        return float(self.levels[-1]) if self.points else 0.0

    @property
    def fall(self) -> float:
        """Fall of the train level from start to end, as a share of the start."""
        return (self.start - self.end) / self.start if self.start else 0.0

    @cached_property
    def fall_error(self) -> float:
        """Standard error of `start - end`, in nat."""
        first = 1 if self.is_short else max(3, self.points // 20)
        return math.hypot(self.error(self.start, first), self.error(self.end))

    def level_near(self, step: float) -> float | None:
        """Train level around a step (half a window to either side), or None without points."""
        part = self._near(step)
        return float(np.median(part)) if part.size else None

    def mean_near(self, step: float) -> float | None:
        """Mean train loss around a step, what stands out cut off: an eval loss is a mean too."""
        part = self._near(step)
        if not part.size:
            return None
        most = float(np.median(part)) * (1 + self.limits.spike_scatters * self.noise)
        return float(np.minimum(part, most).mean()) if self.noise else float(part.mean())

    def _near(self, step: float) -> Array:
        at = int(np.searchsorted(self.steps, step))
        half = max(1, (self.window + 1) // 2)
        return self.losses[max(0, at - half) : at + half]

    def level_until(self, step: float) -> float | None:
        """Train level of the window that ends at a step, or None without points up to it."""
        count = int(np.searchsorted(self.steps, step, side="right"))
        return float(self.levels[count - 1]) if count else None

    @cached_property
    def tail(self) -> Trend:
        """Trend of the last third; see `trend_of_last`."""
        return self.trend_of_last(1 / 3)

    def trend_of_last(self, share: float) -> Trend:
        """Trend of the last share of the points, warm-up left out.

        Returns:
            Change over that stretch as a share of the end, and its 95 % interval; negative is
            falling. Of too few points 0, -inf and inf.
        """
        first = max(0, self.points - max(_LEAST_TAIL, int(self.points * share)))
        first = max(first, self._warm_up_points)
        steps, losses = self.steps[first:], self.losses[first:]
        if losses.size < _LEAST_TAIL or self.end <= 0:
            return Trend(0.0, -math.inf, math.inf)
        length = float(steps[-1] - steps[0]) / self.end
        return Trend(*(slope * length for slope in trend(steps, losses)))

    @cached_property
    def shape(self) -> float:
        """Share of the fall between the levels of the first and the last third of the points that
        came before the second third: 0.5 for a straight line, 0.8 and more where a run falls fast
        and flattens."""
        first, second, third = (np.median(p) for p in np.array_split(self.losses, 3))
        return float((first - second) / (first - third)) if first != third else 0.0

    @cached_property
    def _warm_up_points(self) -> int:
        steps, rates = self.series("learning_rate")
        if not rates.size or not self.points:
            return 0
        peak = int(rates.argmax())
        low = np.flatnonzero(rates[:peak] < _WARM_UP_RATE * rates[peak])
        if not low.size:
            return 0
        return int(np.searchsorted(self.steps, steps[low[-1]], side="right"))

    def series(self, key: str) -> tuple[Array, Array]:
        """Steps and values of any number in the records, nan and inf included."""
        steps, values = points_of(self.records, key)
        return steps.astype(np.float64), values.astype(np.float64)

    @cached_property
    def epochs(self) -> float:
        """Passes over the training rows so far; 0 where the log does not say."""
        _, epochs = self.series("epoch")
        return float(epochs.max()) if epochs.size else 0.0

    @cached_property
    def epoch_steps(self) -> list[float]:
        """Steps after which a second, third, ... epoch began."""
        steps, epochs = self.series("epoch")
        if epochs.size < 2 or epochs[-1] <= 1:
            return []
        ends = range(1, math.ceil(epochs[-1] - 1e-6))
        return [float(np.interp(end, epochs, steps)) for end in ends]

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
    records = sorted(log, key=lambda record: record["step"])
    (steps, losses), (eval_steps, evals) = train_points(records), eval_points(records)
    is_base = (eval_steps == 0) & np.isfinite(evals)
    later = (eval_steps > 0) & np.isfinite(evals)
    finite = np.isfinite(losses)
    return Readings(
        in_blocks(steps[finite], _MOST_POINTS),
        in_blocks(losses[finite], _MOST_POINTS),
        steps[finite].astype(np.float64),
        losses[finite],
        eval_steps[later].astype(np.float64),
        evals[later],
        float(evals[is_base][0]) if is_base.any() else None,
        max((int(record["step"]) for record in records), default=0),
        records,
        dict(run or {}),
        limits,
        is_finished,
    )
