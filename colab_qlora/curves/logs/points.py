"""From records to arrays: the losses against the step, a million of them in a fraction of a second.

What a record holds is looked at once for all records, by the set of their types; only where that
set is unusual is each record looked at on its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from itertools import compress, repeat
from operator import contains, itemgetter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colab_qlora.curves.logs.records import MOST_STEPS, is_number, number_or_none, step_of

__all__ = ["eval_points", "points_of", "train_points"]

Array = NDArray[Any]


def train_points(records: Iterable[Mapping[str, Any]]) -> tuple[Array, Array]:
    """The train loss against the step.

    Args:
        records: a LossLog or its records, in any order.

    Returns:
        steps, int64 `(points,)`, rising, and losses, float64 `(points,)`, in which nan and inf
        stay. Where a resumed run repeated a step the last record counts.

    Raises:
        UserError: a record with a loss has no step.
    """
    return _by_step(*points_of(records, "loss"))


def eval_points(records: Iterable[Mapping[str, Any]]) -> tuple[Array, Array]:
    """The eval loss against the step; otherwise as `train_points`."""
    return _by_step(*points_of(records, "eval_loss"))


def points_of(records: Iterable[Mapping[str, Any]], key: str) -> tuple[Array, Array]:
    """The steps and values of the records that hold a number under `key`, in their own order.

    Args:
        records: a LossLog or its records.
        key: for instance "learning_rate" or "seconds".

    Returns:
        steps, int64 `(points,)`, and values, float64 `(points,)`.
    """
    rows = records if isinstance(records, list) else list(records)
    holds = list(map(contains, rows, repeat(key)))
    # a list of a million chosen records would cost as much as reading them
    values = list(map(itemgetter(key), compress(rows, holds)))
    kinds = set(map(type, values))
    numbers = {kind for kind in kinds if is_number(kind)}
    if numbers != kinds:
        holds = [key in row and type(row[key]) in numbers for row in rows]
        values = [value for value in values if type(value) in numbers]
    return _steps(rows, holds), _floats(values)


def _steps(rows: list[Mapping[str, Any]], chosen: list[bool]) -> Array:
    with contextlib.suppress(KeyError, OverflowError):
        steps = list(map(itemgetter("step"), compress(rows, chosen)))
        if set(map(type, steps)) == {int}:
            array = np.fromiter(steps, np.int64, len(steps))
            if array.min() >= 0 and array.max() <= MOST_STEPS:
                return array
    return np.array([step_of(row, "the record") for row in compress(rows, chosen)], np.int64)


def _floats(values: list[Any]) -> Array:
    try:
        return np.fromiter(values, np.float64, len(values))
    except OverflowError:  # a whole number of more than 308 digits
        return np.array([number_or_none(value) for value in values], np.float64)


def _by_step(steps: Array, values: Array) -> tuple[Array, Array]:
    if steps.size < 2 or (np.diff(steps) > 0).all():
        return steps, values
    # stable, so that of equal steps the record that came last stays last
    order = np.argsort(steps, kind="stable")
    steps, values = steps[order], values[order]
    is_last = np.append(steps[1:] != steps[:-1], True)
    return steps[is_last], values[is_last]
