"""The curve explorer: choose runs, smooth, zoom, and ask what if one had stopped there.

Every control is a keyword argument too, and the widgets are built only when a notebook displays
the explorer, so the same call serves papermill and plain Python.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from colab_qlora.curves.controls.panel_of_controls import Controls
from colab_qlora.curves.controls.run_choice import Log, named_runs
from colab_qlora.curves.controls.view import (
    Diagnose,
    RunReader,
    View,
    view_alternative,
    view_figure,
    view_words,
)
from colab_qlora.curves.controls.widget_parts import DisplaySlot, words_bundle
from colab_qlora.curves.diagnose import diagnose as usual_diagnose
from colab_qlora.curves.draw import figure_bundle
from colab_qlora.curves.live_display import has_kernel
from colab_qlora.curves.picture.artists import MOST_RUNS
from colab_qlora.curves.thresholds import Thresholds
from colab_qlora.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CurveExplorer", "explore_curves"]


def explore_curves(
    runs: Any = None,
    *,
    chosen: Iterable[str] | str | None = None,
    smooth: float = 0.05,
    y_range: tuple[float, float] | None = None,
    stop_at: int | None = None,
    thresholds: Thresholds | Mapping[str, float] | None = None,
    dark: bool = False,
    learning_rate: bool = False,
    diagnose: Diagnose | None = None,
) -> CurveExplorer:
    """Explores finished or recorded runs; as the last line of a cell it shows its controls.

    Args:
        runs: a log, the path of one, a list of paths, a dict from name to log or path, or None:
            the three runs that the kit brings, and work/loss_log.jsonl if it is there.
        chosen: the runs to show first, by name, 1 to 6; None: all that were passed, up to 6, or
            of the runs that are there without passing any, your own or the first.
        smooth: half-life of the smoothed train loss as a share of the run, 0 (none) to 0.5.
        y_range: lowest and highest loss shown; None: what the curves need.
        stop_at: "what if I had stopped here?", a step; None: the whole run.
        thresholds: where the diagnosis draws its lines, or some of them by name.
        dark: light lines on dark paper.
        learning_rate: whether to show the learning rate below the losses.
        diagnose: reads a log, in place of `colab_qlora.curves.diagnose.diagnose`.

    Returns:
        The explorer. `.figure()` and `.text()` give the picture and the words for what is set, with
        or without a notebook.

    Raises:
        UserError: a run that is not there or has no loss, or a value outside its range.

    Example:
        >>> print(explore_curves(chosen="overfitting", stop_at=60).text())
    """
    logs = named_runs(runs)
    view = View(
        chosen=_chosen(logs, chosen, is_usual=runs is None),
        smooth=smooth,
        y_range=None if y_range is None else (float(y_range[0]), float(y_range[1])),
        stop_at=stop_at,
        thresholds=_thresholds(thresholds),
        dark=dark,
        learning_rate=learning_rate,
    )
    return CurveExplorer(RunReader(logs, diagnose or usual_diagnose), view)


class CurveExplorer:
    """Runs and the view of them; made by `explore_curves`.

    Attributes:
        view: what is shown of them; the controls replace it.
    """

    def __init__(self, reader: RunReader, view: View) -> None:
        self._reader, self.view = reader, view
        self._controls: Controls | None = None
        self._picture, self._words = DisplaySlot(), DisplaySlot()

    def figure(self) -> Figure:
        """The picture of the present view."""
        return view_figure(self._reader, self.view)

    def text(self) -> str:
        """The words of the present view."""
        return self._said()["text/plain"]

    @property
    def controls(self) -> Mapping[str, Any]:
        """The widgets by the name of what they set; setting a `value` acts like a hand.

        Needs ipywidgets, but no notebook.
        """
        return self._widgets().by_name

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {', '.join(self.view.chosen)}; see .figure(), .text()"

    def _widgets(self) -> Controls:
        if self._controls is None:
            self._controls = Controls(self._reader.curves, self.view, self._show_view)
        return self._controls

    def _ipython_display_(self) -> None:
        if not has_kernel():
            print(self.text())
            return
        from IPython.display import display

        # before anything is shown, so that an error stands alone
        picture, words = self._bundles()
        display(self._widgets().box)
        self._picture.show(picture)
        self._words.show(words)

    def _said(self) -> dict[str, str]:
        words = view_words(self._reader, self.view)
        # the name of a run on its own is the title of the picture
        return words_bundle(words if len(words) > 1 else {"": next(iter(words.values()))})

    def _bundles(self) -> tuple[dict[str, str], dict[str, str]]:
        alternative = view_alternative(self._reader, self.view)
        return figure_bundle(self.figure(), alternative), self._said()

    def _show_view(self) -> None:
        before = self.view
        try:
            self.view = self._widgets().read()
            picture, words = self._bundles()
        except UserError as error:  # no run is ticked, for instance; the picture stays
            self.view = before
            self._words.update(words_bundle({"": [str(error)]}))
            return
        self._picture.update(picture)
        self._words.update(words)


def _chosen(
    logs: Mapping[str, Log], chosen: Iterable[str] | str | None, *, is_usual: bool
) -> tuple[str, ...]:
    if chosen is None:
        return tuple(logs)[: 1 if is_usual else MOST_RUNS]
    names = (chosen,) if isinstance(chosen, str) else tuple(dict.fromkeys(chosen))
    for name in names:
        if name not in logs:
            raise UserError("there is no such run", got=repr(name), allowed=", ".join(logs))
    return names


def _thresholds(given: Thresholds | Mapping[str, float] | None) -> Thresholds:
    if isinstance(given, Thresholds):
        return given
    usual = Thresholds()
    for name in given or {}:
        if not hasattr(usual, name):
            allowed = ", ".join(vars(usual))
            raise UserError("there is no such threshold", got=repr(name), allowed=allowed)
    changes: dict[str, Any] = dict(given or {})
    return replace(usual, **changes)
