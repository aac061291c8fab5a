"""Where one run ends and the next begins, in records that came from one file.

The rule, on the records in their own order. A run begins

- at the first record;
- at a header line (of a loss log) or header row (of a CSV) in the middle;
- where the train loss comes back to the run's first step, or to an earlier one, after the run had
  gone on past it, and steps are logged that were logged before. Evals that stand directly
  before that record, at no later step, belong to the new run.

So these are one run: steps that fall back into the middle (a run that was resumed, whose later
records count), an eval at step 0 that is repeated, a first step that is logged twice in a row, and
records in any order that repeat no step. A log without a train loss is read by its evals after
step 0 instead. What steps cannot tell: a run that is resumed from before its first logged step
looks like a second run, and a second run that is logged less often than the first, so that it
begins at a later step, looks like a resumed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from colab_qlora.curves.logs.points import points_of
from colab_qlora.curves.logs.records import is_number, step_of

__all__ = ["has_ended", "run_starts", "split_runs"]

Array = NDArray[Any]


def split_runs(records: Iterable[Mapping[str, Any]]) -> list[list[dict[str, Any]]]:
    """Splits records into the runs that they are of, by the rule at the top of this file.

    Args:
        records: a LossLog or its records, in the order in which they were written.

    Returns:
        One list a run, oldest first, with the records as they are; none where there is no record.

    Raises:
        UserError: a record with a loss has no step.
    """
    rows: list[Any] = list(records)
    if not rows:
        return []
    starts = run_starts(rows)
    return [rows[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]


def has_ended(records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last record says that its run is over; a log without such a record may be, too.

    Args:
        records: those of one run, in the order in which they were written.
    """
    return bool(records) and records[-1].get("is_end") is True


def run_starts(records: Sequence[Mapping[str, Any]]) -> list[int]:
    """Gives the index of the first record of every run; that of the first run is 0."""
    key = "loss"
    steps, _ = points_of(records, key)
    counted = np.arange(steps.size)
    if not steps.size:
        key = "eval_loss"
        steps, _ = points_of(records, key)
        # an eval before training may be repeated by any run that is resumed
        counted = np.flatnonzero(steps > 0)
    starts = _starts(steps[counted])
    if not starts:
        return [0]
    indices = [index for index, record in enumerate(records) if is_number(type(record.get(key)))]
    return [0] + [_with_evals_before(records, indices[counted[start]]) for start in starts]


def _starts(steps: Array) -> list[int]:
    """Gives the indices at which a second and further run begins in a run of steps."""
    falls = np.flatnonzero(np.diff(steps) < 0) + 1
    if not falls.size:
        return []
    # a run begins at or below all that came before, so the lowest so far is its own run's lowest
    is_lowest = steps[falls] <= np.minimum.accumulate(steps)[falls - 1]
    previous = _previous_of_same_step(steps)
    stretch_start = np.zeros(steps.size, np.int64)
    stretch_start[falls] = falls
    stretch_start = np.maximum.accumulate(stretch_start)
    previous[previous >= stretch_start] = -1
    is_repeat = np.maximum.reduceat(previous, falls) >= 0
    return falls[is_lowest & is_repeat].tolist()


def _previous_of_same_step(steps: Array) -> Array:
    """Gives for every point the index of the last one before it with its step, or -1."""
    order = np.argsort(steps, kind="stable")
    previous = np.full(steps.size, -1, np.int64)
    same = steps[order][1:] == steps[order][:-1]
    previous[order[1:][same]] = order[:-1][same]
    return previous


def _with_evals_before(records: Sequence[Mapping[str, Any]], index: int) -> int:
    """Goes back from a run's first counted record over the evals that were logged before it."""
    step = step_of(records[index], "the record")
    while (
        index > 0
        and not is_number(type(records[index - 1].get("loss")))
        and step_of(records[index - 1], "the record") <= step
    ):
        index -= 1
    return index
