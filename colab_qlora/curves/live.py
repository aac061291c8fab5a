"""`LivePlot`: a run's loss curves and their reading, redrawn in place while it trains.

In a notebook's kernel there is one picture with a status line and the verdict in words under it;
elsewhere one line of progress, and the verdict at the end.

Drawing has a budget: after a redraw of c seconds the next one waits for 60 c, so that drawing takes
less than 2 % of the time, however long the run or slow the machine. An evaluation is drawn at once
and its redraw paid back later; only where evaluations come so often that two are still owed does
it wait too. What is drawn at the end comes after the training.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from colab_qlora.curves.live_display import PlotDisplay, has_kernel, has_shell
from colab_qlora.curves.live_words import (
    Records,
    Start,
    eval_line,
    progress_line,
    status_line,
)
from colab_qlora.curves.verdicts import Diagnosis
from colab_qlora.errors import UserError

__all__ = ["LivePlot"]

Log = Iterable[Mapping[str, Any]]
Diagnose = Callable[..., Diagnosis]

# 1.7 % of the time, which leaves some for the first redraw and for those that are owed
_LEAST_SECONDS_BETWEEN = 60
_MOST_OWED = 2


class LivePlot:
    """Shows a run: `begin(log)`, then `update(log)` after every record, then `finish(log)`.

    An error while drawing never reaches the training: it is said in one line, and lines of progress
    take the plot's place. KeyboardInterrupt passes.

    Args:
        total_steps: steps of the whole run, for the time left; None if unknown.
        every_seconds: at least this many seconds between two redraws, or two lines; 0 or more.
        width_px: width of the picture in pixels, 480 or more.
        dark: light lines on dark paper.
        diagnose: what reads the log; None: `colab_qlora.curves.diagnose.diagnose`.
        line_every_steps: outside a kernel a line every so many steps, 1 or more, instead of every
            `every_seconds`.
        plot: True for the picture, False for lines; None: the picture in a notebook's kernel.
        display: stands in for `IPython.display.display`.
        clock: seconds that only rise.

    Attributes:
        drawing_seconds: time spent in redraws so far, in s, without what `begin` loads.
        redraws: how many there were.

    Raises:
        UserError: a number out of its range.

    Example:
        >>> live = LivePlot(total_steps=100)
        >>> live.begin(log)
        >>> log.append({"step": 1, "loss": 2.4})
        >>> live.update(log)
        >>> live.finish(log)
    """

    def __init__(
        self,
        total_steps: int | None = None,
        *,
        every_seconds: float = 2.0,
        width_px: int = 800,
        dark: bool = False,
        diagnose: Diagnose | None = None,
        line_every_steps: int | None = None,
        plot: bool | None = None,
        display: Callable[..., Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        _check(every_seconds, width_px, line_every_steps)
        self.total_steps, self.every_seconds = total_steps, every_seconds
        self.width_px, self.dark = width_px, dark
        self.line_every_steps = line_every_steps
        self.drawing_seconds, self.redraws = 0.0, 0
        self._diagnose, self._clock = diagnose, clock
        self._display = PlotDisplay(display) if _is_plot(plot, display) else None
        self._start = Start()
        self._next_redraw = self._next_line = self._budget_from = -float("inf")
        self._redraw_seconds = 0.0
        self._line_step: int | None = None
        self._is_finished = False
        self._complaints: set[str] = set()

    def begin(self, log: Log = ()) -> None:
        """Take note of what an earlier session of the run left, and load what drawing needs.

        The first picture of a process takes a second or more (imports, fonts). It is paid for here,
        before the first step, and not counted in `drawing_seconds`.
        """
        self._start = Start.after(_records(log))
        if self._display is not None:
            self._protected(self._warm_up)

    def update(self, log: Log) -> None:
        """Show the log's last record, now or, where that would take too much time, later."""
        if not self._is_finished:
            self._protected(self._update, log)

    def finish(self, log: Log, *, is_interrupted: bool = False) -> None:
        """Show the last state and the verdict; a second call does nothing.

        Args:
            log: the log.
            is_interrupted: whether the run ended before its time; the status line says so.
        """
        if self._is_finished:
            return
        self._is_finished = True
        records = _records(log)
        if not records:
            return
        if not _has_loss(records):
            said = "no loss was logged, so there is no curve to read: lower logging_steps"
            self._protected(print, f"colab_qlora: {said}", flush=True)
            return
        if self._display is not None:
            self._protected(self._redraw, log, is_finished=True, is_interrupted=is_interrupted)
        # where drawing has just failed, the words are said all the same
        if self._display is None:
            self._protected(self._last_lines, log)

    def _update(self, log: Log) -> None:
        records = _records(log)
        if not _has_loss(records):
            return
        is_eval = "eval_loss" in records[-1]
        if self._display is None:
            self._line(records, is_eval)
        elif self._clock() >= (self._next_eval_redraw if is_eval else self._next_redraw):
            self._redraw(log, is_finished=False)

    @property
    def _next_eval_redraw(self) -> float:
        return self._budget_from - _MOST_OWED * _LEAST_SECONDS_BETWEEN * self._redraw_seconds

    def _redraw(self, log: Log, *, is_finished: bool, is_interrupted: bool = False) -> None:
        from colab_qlora.curves.draw import draw_curves
        from colab_qlora.curves.words import describe_curves

        assert self._display is not None
        began = self._clock()
        diagnosis = self._reading(log, is_finished)
        records = _records(log)
        status = status_line(records, self._start, self.total_steps, is_finished=is_finished)
        lines = [f"interrupted | {status}" if is_interrupted else status]
        lines += [] if diagnosis is None else diagnosis.text().splitlines()
        height_px = max(300, round(self.width_px * 0.5625))
        fig = draw_curves(
            records,
            diagnosis=diagnosis,
            dark=self.dark,
            width_px=self.width_px,
            height_px=height_px,
        )
        self._display.show(fig, describe_curves(records, diagnosis), lines)
        ended = self._clock()
        self._redraw_seconds = ended - began
        self.drawing_seconds += self._redraw_seconds
        self.redraws += 1
        # time without a redraw is not saved up, but what evaluations took is paid back
        self._budget_from = max(self._budget_from, began)
        self._budget_from += _LEAST_SECONDS_BETWEEN * self._redraw_seconds
        self._next_redraw = max(self._budget_from, ended + self.every_seconds)

    def _reading(self, log: Log, is_finished: bool) -> Diagnosis | None:
        """The diagnosis, or None where it failed; then the curves are shown without it."""
        from colab_qlora.curves.diagnose import diagnose

        try:
            return (self._diagnose or diagnose)(log, is_finished=is_finished)
        except Exception as error:
            self._complain("the curves are shown without a verdict", error)
            return None

    def _line(self, records: Records, is_eval: bool) -> None:
        last, now = records[-1], self._clock()
        step = int(last["step"])
        if is_eval:
            print(eval_line(last["eval_loss"], step, self.total_steps), flush=True)
        if "loss" not in last:
            return
        if self.line_every_steps is not None:
            is_due = step % self.line_every_steps == 0
        else:
            is_due = now >= self._next_line
        if is_due or (self.total_steps and step >= self.total_steps):
            self._next_line, self._line_step = now + self.every_seconds, step
            print(progress_line(records, self._start, self.total_steps), flush=True)

    def _last_lines(self, log: Log) -> None:
        records = _records(log)
        trained = next((i for i in reversed(range(len(records))) if "loss" in records[i]), None)
        if trained is not None and records[trained]["step"] != self._line_step:
            said = records[: trained + 1]
            print(progress_line(said, self._start, self.total_steps), flush=True)
        diagnosis = self._reading(log, is_finished=True)
        if diagnosis is not None:
            print(diagnosis.text(), flush=True)

    def _warm_up(self) -> None:
        from colab_qlora.curves.draw import draw_curves, figure_bundle

        figure_bundle(draw_curves([{"step": 0, "loss": 1.0}, {"step": 1, "loss": 1.0}]), "")

    def _protected(self, work: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Do the work; an error ends the plot, and not the training."""
        try:
            work(*args, **kwargs)
        except Exception as error:
            self._display = None
            self._complain("the live plot stopped, training goes on", error)

    def _complain(self, what: str, error: Exception) -> None:
        if what in self._complaints:
            return
        self._complaints.add(what)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        # if not even that can be printed, there is nobody to tell
        with contextlib.suppress(Exception):
            print(f"colab_qlora: {what} ({reason})", flush=True)


def _records(log: Log) -> Records:
    """The records themselves, without a copy of them wherever that can be."""
    found = getattr(log, "records", log)
    return found if isinstance(found, (list, tuple)) else list(found)


def _has_loss(records: Records) -> bool:
    return any("loss" in record or "eval_loss" in record for record in records)


def _is_plot(plot: bool | None, display: Callable[..., Any] | None) -> bool:
    if plot is None:
        return display is not None or has_kernel()
    if plot and display is None and not has_shell():
        print("colab_qlora: there is no notebook to draw in: lines of progress instead", flush=True)
        return False
    return plot


def _check(every_seconds: float, width_px: int, line_every_steps: int | None) -> None:
    if not every_seconds >= 0:
        raise UserError("every_seconds is negative", got=every_seconds, allowed="0 or more")
    if width_px < 480:
        raise UserError("the live plot is too narrow", got=f"{width_px} px", allowed="480 or more")
    if line_every_steps is not None and line_every_steps < 1:
        raise UserError("line_every_steps is not a count", got=line_every_steps, allowed="1 or up")
