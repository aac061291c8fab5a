"""What the rules of a diagnosis read off the train losses: levels, scatter, trends, epochs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from colab_qlora.curves.logs.points import points_of
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
_LEAST_DRIFTS = 30
_DRIFT_LAG = 5
# a few dozen independent points have such a ratio by chance
_CHANCE_RATIO = 2.0
# steps at less than this share of the peak learning rate are warm-up
_WARM_UP_RATE = 0.25


@dataclass(frozen=True)
class TrainReadings:
    """One run's numbers without its evals; losses are in nat.

    Attributes:
        all_losses: steps, rising, and train losses as they were logged, nan and inf included.
        records: all records, by step.
        run: hyperparameters.
        limits: where the rules draw their lines.
        is_finished: whether the run is over.
    """

    all_losses: tuple[Array, Array]
    records: list[Mapping[str, Any]]
    run: Mapping[str, Any]
    limits: Thresholds
    is_finished: bool
    # a million records are gone through once for each key, not once for each rule
    _series: dict[str, tuple[Array, Array]] = field(default_factory=dict, init=False, repr=False)

    @cached_property
    def raw_steps(self) -> Array:
        """Steps of the finite train losses, float64."""
        steps, losses = self.all_losses
        return steps[np.isfinite(losses)].astype(np.float64)

    @cached_property
    def raw_losses(self) -> Array:
        """The finite train losses, float64 `(logged,)`."""
        losses = self.all_losses[1]
        return losses[np.isfinite(losses)]

    @cached_property
    def steps(self) -> Array:
        """Steps of the train points, float64 `(points,)`."""
        return in_blocks(self.raw_steps, _MOST_POINTS)

    @cached_property
    def losses(self) -> Array:
        """Finite losses, float64 `(points,)`; means of blocks where there are over 2,000."""
        return in_blocks(self.raw_losses, _MOST_POINTS)

    @property
    def last_step(self) -> int:
        """The last step of any record."""
        return int(self.records[-1]["step"]) if self.records else 0

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
        if key not in self._series:
            steps, values = points_of(self.records, key)
            self._series[key] = steps.astype(np.float64), values.astype(np.float64)
        return self._series[key]

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
