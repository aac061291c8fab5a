"""Statistics that a few wild points cannot move: levels, scatter and trend of noisy series.

A level is a median, so its standard error is 1.253 s / sqrt(points) for scatter s. The trend is the
median of all pairwise slopes (Theil 1950, Sen 1968), with Sen's confidence interval.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

# a median's standard error in units of the mean's, for normal scatter: sqrt(pi / 2)
_MEDIAN_ERROR = math.sqrt(math.pi / 2)
# from the median of absolute deviations to a standard deviation, for normal scatter
_FROM_MAD = 1.4826
_NORMAL_975 = 1.959964


class Trend(NamedTuple):
    """A slope a step, and the ends of its 95 % interval."""

    slope: float
    low: float
    high: float


def scatter(values: Array) -> float:
    """The scatter of one point of a series, in its unit, whatever its trend.

    Args:
        values: float64 `(points,)`, finite; fewer than 3 give 0.

    Returns:
        1.4826 times the median absolute deviation of the differences of neighbours, over sqrt(2).
    """
    if values.size < 3:
        return 0.0
    return from_deviations(np.diff(values)) / math.sqrt(2)


def from_deviations(values: Array) -> float:
    """Standard deviation, in the unit of the values, from their median absolute deviation."""
    return float(_FROM_MAD * np.median(np.abs(values - np.median(values))))


def level_error(noise: float, points: int) -> float:
    """Standard error of the median of so many points with that scatter, in its unit."""
    return _MEDIAN_ERROR * noise / math.sqrt(max(1, points))


def trailing_medians(values: Array, window: int) -> Array:
    """The median of the last `window` points at every point; of all so far where there are fewer.

    Args:
        values: float64 `(points,)`, finite.
        window: 1 or more.

    Returns:
        float64 `(points,)`.
    """
    window = min(window, max(1, values.size))
    early = [float(np.median(values[: i + 1])) for i in range(min(window - 1, values.size))]
    if values.size < window:
        return np.array(early)
    views = np.lib.stride_tricks.sliding_window_view(values, window)
    return np.concatenate([np.array(early), np.median(views, axis=1)])


def centred_medians(values: Array, window: int) -> Array:
    """The median of the `window` points around every point, an odd number of them; fewer at ends.

    Args:
        values: float64 `(points,)`, finite.
        window: 1 or more; the next odd number is taken.

    Returns:
        float64 `(points,)`.
    """
    half = window // 2
    padded = np.pad(values, half, mode="reflect" if values.size > half else "edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * half + 1), axis=1)


def trend(steps: Array, values: Array) -> Trend:
    """The median slope of a series with the ends of its 95 % interval.

    Args:
        steps: `(points,)`, rising.
        values: float64 `(points,)`, finite.

    Returns:
        Slopes in units a step; of fewer than 3 points all are 0, -inf and inf.
    """
    count = values.size
    if count < 3:
        return Trend(0.0, -math.inf, math.inf)
    first, second = np.triu_indices(count, 1)
    slopes = np.sort((values[second] - values[first]) / (steps[second] - steps[first]))
    pairs = slopes.size
    # the spread of Kendall's statistic where there is no trend
    spread = math.sqrt(count * (count - 1) * (2 * count + 5) / 18)
    low = round((pairs - _NORMAL_975 * spread) / 2) - 1
    high = round((pairs + _NORMAL_975 * spread) / 2)
    return Trend(
        float(np.median(slopes)),
        float(slopes[low]) if low >= 0 else -math.inf,
        float(slopes[high]) if high < pairs else math.inf,
    )


def in_blocks(values: Array, most: int) -> Array:
    """Means of equal stretches, so that at most `most` values are left.

    Args:
        values: float64 or integers `(points,)`.
        most: 1 or more.

    Returns:
        float64; the values themselves where there are few.
    """
    if values.size <= most:
        return values.astype(np.float64)
    size = -(-values.size // most)
    whole = values.size // size * size
    means = values[:whole].reshape(-1, size).mean(axis=1)
    rest = values[whole:]
    return np.append(means, rest.mean()) if rest.size else means
