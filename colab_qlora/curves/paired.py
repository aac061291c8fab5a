"""Two runs compared row by row on the same eval rows.

The noise of a difference is then that of the differences of the rows, which is far smaller than
that of the losses. With d_i = tokens_i (a_i - b_i) the difference of two runs is
sum(d) / sum(tokens), and its standard error that of a ratio: rows, not tokens, are the independent
samples. That is the noise of the eval rows; what another seed would change is not in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

__all__ = ["RowLosses", "paired_difference"]

Array = NDArray[Any]


@dataclass(frozen=True)
class RowLosses:
    """The loss of each eval row.

    Attributes:
        losses: mean loss of a row's labelled tokens in nat, float64 `(rows,)`.
        tokens: labelled tokens of a row, int64 `(rows,)`, each 1 or more.
    """

    losses: Array
    tokens: Array

    @property
    def mean(self) -> float:
        """Mean loss of all labelled tokens."""
        return float((self.losses * self.tokens).sum() / self.tokens.sum())


def paired_difference(one: RowLosses, other: RowLosses) -> tuple[float, float]:
    """How much higher the loss of one run is than that of another on the same rows.

    Returns:
        The difference and half the width of its 95 % interval, in nat; the latter is inf for a
        single row.
    """
    tokens = one.tokens
    difference = one.mean - other.mean
    rows = len(tokens)
    if rows < 2:
        return difference, math.inf
    residuals = tokens * (one.losses - other.losses - difference)
    error = math.sqrt(rows / (rows - 1) * float((residuals**2).sum())) / float(tokens.sum())
    return difference, _student(rows - 1) * error


def _student(freedom: int) -> float:
    """The 97.5 % quantile of Student's t; exact to 1 % from 3 degrees of freedom up."""
    if freedom < 3:
        return (12.706, 4.303)[freedom - 1]
    z = 1.959964
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3
