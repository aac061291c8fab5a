"""A series as the eye gets it: smoothed, and thinned to what the pixels can show."""

from __future__ import annotations

import math

import numpy as np

from colab_qlora.curves.picture.curve import Array, Curve, Runs, as_curves, loss_text
from colab_qlora.curves.words import describe_curves

__all__ = [
    "HALF_LIFE",
    "Array",
    "Curve",
    "Runs",
    "as_curves",
    "describe_curves",
    "loss_text",
    "smooth_losses",
    "thin",
]

# of the points; a twentieth takes the noise of single batches away and keeps the shape
HALF_LIFE = 0.05
# within one block the weights grow 2^32-fold, far from where float64 ends
_BLOCK_HALF_LIVES = 32


def smooth_losses(losses: Array, half_life: float = HALF_LIFE) -> Array:
    """Smooths a curve for the eye: a moving average with exponential weights, without start bias.

    It lags behind the data, so no rule should read it.

    Args:
        losses: float64 `(points,)`; nan is skipped and stays nan.
        half_life: points after which a loss has half its weight, as a share of all points, above 0;
            never less than one point.

    Returns:
        The smoothed losses, float64 `(points,)`.
    """
    smoothed = np.full(losses.size, math.nan)
    known = np.flatnonzero(~np.isnan(losses))
    if known.size:
        smoothed[known] = _average(losses[known], max(1.0, losses.size * half_life))
    return smoothed


def _average(values: Array, half_life: float) -> Array:
    """The moving average of finite values, at least one; `half_life` is in points.

    With keep = 0.5^(1 / half_life) the sum of keep^(i - j) v_j over j <= i is keep^i times the
    running sum of v_j / keep^j. Blocks keep the powers in range, and a block begins with what the
    one before it has left.
    """
    width = min(values.size, math.ceil(_BLOCK_HALF_LIVES * half_life))
    blocks: Array = np.zeros((-(-values.size // width), width))
    blocks.reshape(-1)[: values.size] = values
    log_keep = -math.log(2) / half_life
    powers = np.exp(log_keep * np.arange(width))
    sums = np.cumsum(blocks / powers, axis=1) * powers
    left, carried = 0.0, []
    for last in sums[:, -1].tolist():
        carried.append(left)
        left = last + left * math.exp(log_keep * width)
    sums += np.outer(carried, powers * math.exp(log_keep))
    # the weights so far are a geometric series too; a constant stays itself from the first point on
    weights = np.expm1(log_keep * np.arange(1, values.size + 1)) / math.expm1(log_keep)
    return sums.reshape(-1)[: values.size] / weights


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
