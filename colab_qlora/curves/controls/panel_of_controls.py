"""The controls of a curve explorer: widgets that are built from a `View` and read as one."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from colab_qlora.curves.controls.view import MOST_SMOOTH, View, loss_bounds
from colab_qlora.curves.controls.widget_parts import (
    SWITCH_LAYOUT,
    control_style,
    folded,
    row,
    tooltip,
)
from colab_qlora.curves.picture.curve import Curve
from colab_qlora.curves.thresholds import Thresholds

__all__ = ["THRESHOLD_WORDS", "Controls"]

# threshold -> (what its control is called, what it says on hovering)
THRESHOLD_WORDS: Mapping[str, tuple[str, str]] = {
    "generalisation_loss": (
        "overfitting from",
        "rise of the eval loss above its lowest, as a share of the lowest",
    ),
    "confirmed_rise": ("confirmed from", "both of the last two evals lie this share above"),
    "unstable_rise": (
        "unstable from",
        "rise of the train level above its lowest, as a share of the lowest",
    ),
    "spike_scatters": (
        "spike from",
        "a single loss this many times the usual scatter above the level",
    ),
    "stair_fall": ("by heart from", "fall of the train level where an epoch begins, as a share"),
    "leak_gap": ("leak below", "eval loss at most this share above the train loss"),
}


class Controls:
    """Widgets for all of a `View`.

    Attributes:
        by_name: field of the view, or of its thresholds -> widget; the runs' checkboxes are
            "chosen: NAME".
        box: all of them, for display.

    Args:
        curves: the runs by name.
        view: what the widgets start with.
        on_change: called when a user has changed one, once at a time; `read` gives the new view
            then, with all that has been changed up to there.
    """

    def __init__(
        self, curves: Mapping[str, Curve], view: View, on_change: Callable[[], None]
    ) -> None:
        self._curves = curves
        self._thresholds = view.thresholds
        self._on_change = on_change
        self._is_fitting = False
        # JupyterLab has ipykernel 7 take changes of widgets in other threads, several at a time
        self._lock = threading.RLock()
        self.by_name: dict[str, Any] = {
            **_run_boxes(curves, view),
            **_sliders(view),
            **_switches(view),
            **_threshold_fields(view),
        }
        self._fit_to_runs(view.chosen, view.stop_at, view.y_range)
        self.box = self._arranged()
        for widget in self.by_name.values():
            widget.observe(self._changed, "value")

    @property
    def chosen(self) -> tuple[str, ...]:
        """The names of the runs that are ticked."""
        return tuple(name for name in self._curves if self.by_name[f"chosen: {name}"].value)

    def read(self) -> View:
        """The view that the widgets stand for.

        Raises:
            UserError: no run is ticked, or too many are.
        """
        value = {name: widget.value for name, widget in self.by_name.items()}
        thresholds = {name: value[name] for name in THRESHOLD_WORDS}
        return View(
            chosen=self.chosen,
            smooth=round(value["smooth"], 6),
            y_range=self._y_range(),
            stop_at=self._stop_at(),
            thresholds=replace(self._thresholds, **thresholds),
            dark=value["dark"],
            learning_rate=value["learning_rate"],
        )

    def _y_range(self) -> tuple[float, float] | None:
        slider = self.by_name["y_range"]
        low, high = slider.value
        # both handles at their ends: the picture takes what the curves need; a browser rounds
        slack = slider.step / 2
        is_all = low <= slider.min + slack and high >= slider.max - slack
        return None if is_all or not low < high else (low, high)

    def _stop_at(self) -> int | None:
        slider = self.by_name["stop_at"]
        return None if slider.value >= slider.max else slider.value

    def _changed(self, change: Any) -> None:
        with self._lock:
            # one change of a bound may move the value, and is not the user's
            if self._is_fitting:
                return
            is_run = change["owner"].description in self._curves
            if is_run and self.chosen:
                self._fit_to_runs(self.chosen, self._stop_at(), self._y_range())
            self._on_change()

    def _fit_to_runs(
        self,
        chosen: tuple[str, ...],
        stop_at: int | None,
        y_range: tuple[float, float] | None,
    ) -> None:
        """Gives the sliders the bounds of the chosen runs, and keeps what was set."""
        curves = [self._curves[name] for name in chosen]
        last = max(curve.step_range[1] for curve in curves)
        low, high = loss_bounds(curves)
        if y_range is not None:
            low, high = min(low, y_range[0]), max(high, y_range[1])
        step, digits = _step_of_range(high - low)
        low, high = (round(step * end, 12) for end in (low // step, high // step + 1))
        self._is_fitting = True
        try:
            stop, range_ = self.by_name["stop_at"], self.by_name["y_range"]
            stop.max = last
            stop.value = last if stop_at is None else min(stop_at, last)
            # first wide enough for old and new, because a bound may not pass the other one
            range_.min, range_.max = min(range_.min, low), max(range_.max, high)
            range_.value = y_range or (low, high)
            range_.min, range_.max, range_.step = low, high, step
            range_.readout_format = f".{digits}f"
            range_.value = y_range or (low, high)
        finally:
            self._is_fitting = False

    def _arranged(self) -> Any:
        from ipywidgets import Layout, VBox

        names = self.by_name
        boxes = [widget for name, widget in names.items() if name.startswith("chosen: ")]
        sliders = [names["smooth"], names["y_range"], names["stop_at"]]
        fold, thresholds = folded(
            "change the thresholds", row(names[name] for name in THRESHOLD_WORDS)
        )
        switches = [names["learning_rate"], names["dark"], fold]
        layout = Layout(width="auto", max_width="800px")
        return VBox([row(boxes), row(sliders), row(switches), thresholds], layout=layout)


def _step_of_range(span: float) -> tuple[float, int]:
    """The step of a slider over a range, a round number, and the decimal digits that it needs."""
    # few digits, because the browser gives the two numbers little room
    least = span / 30
    power = math.floor(math.log10(least))
    factor = next(factor for factor in (1, 2, 5, 10) if factor * 10.0**power >= least)
    power += factor == 10
    return (factor % 9) * 10.0**power, max(0, -power)


def _run_boxes(names: Iterable[str], view: View) -> dict[str, Any]:
    from ipywidgets import Checkbox, Layout

    return {
        f"chosen: {name}": Checkbox(
            value=name in view.chosen,
            description=name,
            indent=False,
            layout=Layout(**SWITCH_LAYOUT),
            **tooltip(f"show the run {name}"),
        )
        for name in names
    }


def _sliders(view: View) -> dict[str, Any]:
    from ipywidgets import FloatRangeSlider, FloatSlider, IntSlider

    def common(description: str, hint: str) -> dict[str, Any]:
        # a picture takes about 0.2 s, so it is drawn when the handle is let go
        shared = {"description": description, "continuous_update": False}
        return {**shared, **control_style(is_field=False), **tooltip(hint)}

    return {
        "smooth": FloatSlider(
            value=view.smooth,
            min=0.0,
            max=MOST_SMOOTH,
            step=0.01,
            **common("smoothing", "half-life of the smoothed train loss, as a share of the run"),
        ),
        "y_range": FloatRangeSlider(
            value=(0.0, 1.0),
            min=0.0,
            max=1.0,
            **common("loss range", "lowest and highest loss shown; both at their ends: automatic"),
        ),
        "stop_at": IntSlider(
            value=0,
            min=0,
            max=1,
            **common("stopped at step", "what if you had stopped here? At its end: the whole run"),
        ),
    }


def _switches(view: View) -> dict[str, Any]:
    from ipywidgets import Checkbox, Layout

    return {
        "learning_rate": Checkbox(
            value=view.learning_rate,
            description="show the learning rate",
            indent=False,
            layout=Layout(**SWITCH_LAYOUT),
            **tooltip("a second panel below the losses"),
        ),
        "dark": Checkbox(
            value=view.dark,
            description="dark background",
            indent=False,
            layout=Layout(**SWITCH_LAYOUT),
            **tooltip("light lines on dark paper"),
        ),
    }


def _threshold_fields(view: View) -> dict[str, Any]:
    from ipywidgets import BoundedFloatText

    usual = {each.name: each.default for each in fields(Thresholds)}
    found = {}
    for name, (description, hint) in THRESHOLD_WORDS.items():
        value, step = getattr(view.thresholds, name), 0.5 if name == "spike_scatters" else 0.005
        found[name] = BoundedFloatText(
            value=value,
            # a threshold of 0 would call everything a fault
            min=min(step, value),
            max=max(100.0 if step == 0.5 else 2.0, value),
            step=step,
            description=description,
            continuous_update=False,
            **control_style(is_field=True),
            **tooltip(f"{hint}; usually {usual[name]:g}"),
        )
    return found
