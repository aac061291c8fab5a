"""What an explorer shows of its runs, as plain values: the same picture and words without widgets.

A `View` holds one value a control. `view_figure` and `view_words` follow from the runs and a view
alone, so that papermill and plain Python reach whatever a slider does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from colab_qlora.curves.controls.run_choice import Log
from colab_qlora.curves.draw import draw_curves
from colab_qlora.curves.log import LossLog
from colab_qlora.curves.picture.artists import MOST_RUNS
from colab_qlora.curves.picture.curve import Curve, as_curves, loss_text
from colab_qlora.curves.thresholds import Thresholds
from colab_qlora.curves.verdicts import Diagnosis
from colab_qlora.curves.words import describe_curves
from colab_qlora.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "MOST_SMOOTH",
    "Diagnose",
    "RunReader",
    "View",
    "loss_bounds",
    "view_alternative",
    "view_figure",
    "view_words",
]

Diagnose = Callable[..., Diagnosis]
# more of a run than this would be a straight line
MOST_SMOOTH = 0.5


@dataclass(frozen=True)
class View:
    """One value for each control of an explorer.

    Attributes:
        chosen: names of the runs that are shown, 1 to 6.
        smooth: half-life of the smoothed train loss as a share of the run, 0 (none) to 0.5.
        y_range: lowest and highest loss shown, or None for what the curves need.
        stop_at: the step at which the runs are imagined to have been stopped, or None.
        thresholds: where the diagnosis draws its lines.
        dark: light lines on dark paper.
        learning_rate: whether the learning rate has a panel below the losses.
    """

    chosen: tuple[str, ...]
    smooth: float = 0.05
    y_range: tuple[float, float] | None = None
    stop_at: int | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)
    dark: bool = False
    learning_rate: bool = False

    def __post_init__(self) -> None:
        if not 1 <= len(self.chosen) <= MOST_RUNS:
            raise UserError(
                "that many runs cannot be shown",
                got=len(self.chosen),
                allowed=f"1 to {MOST_RUNS}",
                do="Choose fewer" if self.chosen else "Choose a run",
            )
        if not 0 <= self.smooth <= MOST_SMOOTH:
            raise UserError(
                "smooth is no share of the run", got=self.smooth, allowed=f"0 to {MOST_SMOOTH}"
            )
        if self.y_range is not None and not self.y_range[0] < self.y_range[1]:
            raise UserError(
                "y_range is no range", got=self.y_range, allowed="(lowest, highest), or None"
            )
        if self.stop_at is not None and self.stop_at < 0:
            raise UserError("stop_at is no step", got=self.stop_at, allowed="0 or more, or None")


class RunReader:
    """Runs by name, with their curves and, read when first asked for, their diagnoses.

    Args:
        logs: logs by name.
        diagnose: reads one.
    """

    def __init__(self, logs: Mapping[str, Log], diagnose: Diagnose) -> None:
        self.logs = dict(logs)
        self.curves: dict[str, Curve] = {name: as_curves(log)[0] for name, log in logs.items()}
        self._diagnose = diagnose
        self._read: dict[tuple[str, Thresholds, int | None], Diagnosis] = {}

    def diagnosis(self, name: str, thresholds: Thresholds, stop_at: int | None = None) -> Diagnosis:
        """The diagnosis of a run, or the one that could be read while it went on, at a step."""
        key = (name, thresholds, stop_at)
        if key not in self._read:
            log, is_finished = self.logs[name], stop_at is None
            if stop_at is not None:
                before = [dict(record) for record in log if record["step"] <= stop_at]
                log = LossLog(before, log.run) if isinstance(log, LossLog) else before
            self._read[key] = self._diagnose(log, thresholds=thresholds, is_finished=is_finished)
        return self._read[key]


def view_figure(reader: RunReader, view: View) -> Figure:
    """Draws the chosen runs of a view, 800 px wide, with the marks of their diagnoses."""
    runs, diagnosis = _shown(reader, view)
    return draw_curves(
        runs,
        diagnosis=diagnosis,
        title=view.chosen[0] if len(view.chosen) == 1 else None,
        smooth=view.smooth,
        y_range=view.y_range,
        stop_at=view.stop_at,
        learning_rate=view.learning_rate,
        dark=view.dark,
    )


def view_alternative(reader: RunReader, view: View) -> str:
    """The figure of a view in words."""
    runs, diagnosis = _shown(reader, view)
    return describe_curves(runs, diagnosis, learning_rate=view.learning_rate, stop_at=view.stop_at)


def view_words(reader: RunReader, view: View) -> dict[str, list[str]]:
    """Says what a view shows: the diagnosis of each chosen run, in lines, by the run's name.

    With `stop_at` it says what the eval loss was at that step beside the lowest of the whole run,
    and what the diagnosis would have been then.
    """
    return {name: _lines(reader, name, view) for name in view.chosen}


def loss_bounds(curves: Sequence[Curve]) -> tuple[float, float]:
    """The lowest and the highest finite loss of some curves, a little apart at least."""
    values = np.concatenate([s for c in curves for s in (c.losses, c.eval_losses)])
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    return (low, high) if high - low > 1e-6 else (low - 0.5, high + 0.5)


def _shown(reader: RunReader, view: View) -> tuple[Any, Any]:
    """The chosen curves and their diagnoses, as `draw_curves` takes them."""
    if len(view.chosen) == 1:
        name = view.chosen[0]
        return reader.curves[name], reader.diagnosis(name, view.thresholds)
    curves = {name: reader.curves[name] for name in view.chosen}
    return curves, {name: reader.diagnosis(name, view.thresholds) for name in view.chosen}


def _lines(reader: RunReader, name: str, view: View) -> list[str]:
    curve, stop = reader.curves[name], view.stop_at
    first, last = curve.step_range
    if stop is None or stop >= last:
        return str(reader.diagnosis(name, view.thresholds)).splitlines()
    if stop < first:
        return [f"Nothing had been logged by step {stop:,}; the first record is of step {first:,}."]
    then = str(reader.diagnosis(name, view.thresholds, stop)).splitlines()
    return [_stop_words(curve, stop), f"At step {stop:,} one would have read:", *then]


def _stop_words(curve: Curve, stop: int) -> str:
    """What the adapter of that step would be worth, told by the whole run."""
    start = f"If you had stopped at step {stop:,}:"
    found = curve.eval_at(stop)
    if found is None or curve.best is None:
        return f"{start} no eval loss had been logged yet."
    (step, loss), (best_step, best) = found, curve.best
    said = f"{start} eval loss {loss_text(loss)} (step {step:,}),"
    if step == best_step:
        return f"{said} the lowest of the whole run."
    place = "was still to come" if best_step > stop else "had passed"
    lowest = f"the lowest, {loss_text(best)} at step {best_step:,}, which {place}"
    return f"{said} {loss_text(loss - best)} above {lowest}."
