"""`LossPlot`, which shows the loss curves and their reading as they come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from colab_qlora.curves.live import LivePlot
from colab_qlora.curves.live_words import eval_line
from colab_qlora.errors import UserError
from colab_qlora.training.early_stopping import EarlyStopping
from colab_qlora.training.log_reader import Diagnose, LogReader
from colab_qlora.training.non_finite import StopOnNonFinite

__all__ = ["LossPlot", "readers_for"]


class LossPlot(LogReader):
    """A plot that is redrawn in place in a notebook's kernel, lines of progress elsewhere.

    Args:
        plot: True for the plot, False for lines; None: the plot in a notebook's kernel.
        every_seconds: at least this many seconds between two redraws, or two lines.
        width_px: width of the picture in pixels, 480 or more.
        dark: light lines on dark paper.
        line_every_steps: with lines, one every so many steps instead of every `every_seconds`.
        diagnose: what reads the log; None: `colab_qlora.curves.diagnose.diagnose`.
        display: stands in for `IPython.display.display`.

    Attributes:
        live: the `LivePlot` of the last run, or None.

    Raises:
        UserError: a number out of its range.
    """

    def __init__(
        self,
        *,
        plot: bool | None = None,
        every_seconds: float = 2.0,
        width_px: int = 800,
        dark: bool = False,
        line_every_steps: int | None = None,
        diagnose: Diagnose | None = None,
        display: Any = None,
    ) -> None:
        super().__init__(diagnose=diagnose)
        self.live: LivePlot | None = None
        self._seen = 0
        self._options: dict[str, Any] = {
            "plot": plot,
            "every_seconds": every_seconds,
            "width_px": width_px,
            "dark": dark,
            "line_every_steps": line_every_steps,
            "diagnose": diagnose,
            "display": display,
        }
        LivePlot(**{**self._options, "plot": False})  # wrong numbers are an error here and now

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        # a plot a run: training again, in another cell, leaves the first run's picture alone
        self.live = LivePlot(state.max_steps, **self._options)
        self.live.begin(self.log)
        self._seen = len(self.log)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        if self.is_running and self.live is not None:
            if len(self.log) != self._seen:
                self._seen = len(self.log)
                self.live.update(self.log)
        elif "eval_loss" in (logs or {}):
            # trainer.evaluate() outside of training is no part of a run's log
            print(eval_line(float((logs or {})["eval_loss"]), state.global_step, state.max_steps))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self.live is not None:
            self.live.finish(self.log)

    def run_ended(self) -> None:
        """Show the last state of a run that an interrupt or an error ended."""
        if self.is_running and self.live is not None:
            self.live.finish(self.log, is_interrupted=True)
        super().run_ended()


def readers_for(
    given: Sequence[Any],
    live_plot: bool | LossPlot | None,
    early_stopping: bool | EarlyStopping,
    stop_on_non_finite: bool,
) -> list[LogReader]:
    """The callbacks that read the log, but for those that a trainer was given already.

    Args:
        given: the trainer's callbacks.
        live_plot, early_stopping, stop_on_non_finite: as `SFTTrainer`.

    Raises:
        UserError: a value of another type.
    """
    _check(live_plot, (bool, LossPlot, type(None)), "live_plot", "True, False, None or a LossPlot")
    _check(early_stopping, (bool, EarlyStopping), "early_stopping", "True, False or EarlyStopping")
    stopping = next((c for c in given if isinstance(c, EarlyStopping)), None)
    readers: list[LogReader] = []
    if stopping is None and early_stopping is not False:
        stopping = EarlyStopping() if early_stopping is True else early_stopping
        readers.append(stopping)
    if stop_on_non_finite and not any(isinstance(c, StopOnNonFinite) for c in given):
        # first, because it decides on a record before anything is kept of that step
        readers.insert(0, StopOnNonFinite(stopping))
    if not any(isinstance(c, LossPlot) for c in given):
        plot = live_plot if isinstance(live_plot, LossPlot) else LossPlot(plot=live_plot)
        readers.append(plot)
    return readers


def _check(value: Any, kinds: tuple[type, ...], name: str, allowed: str) -> None:
    if not isinstance(value, kinds):
        raise UserError(f"{name} is not understood", got=repr(value), allowed=allowed)
