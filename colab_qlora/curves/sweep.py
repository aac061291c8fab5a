"""What a learning-rate sweep found: which rate is best, by a comparison row by row (`paired.py`).

Two rates count as the same when their difference is within its 95 % interval, or is a small share
(`least_gain`) of what the best run learnt: another seed changes as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from colab_qlora.curves.advise import Advice
from colab_qlora.curves.log import LossLog
from colab_qlora.curves.paired import RowLosses, paired_difference
from colab_qlora.curves.picture.series import loss_text
from colab_qlora.curves.remedies.changes import rate_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["SweepResult", "SweepRun", "first_broken_step", "in_order"]

# a loss that moved by a smaller share of itself has not been learnt from
_LEAST_MOVE = 0.005
_OVER_TIME = (
    "whether that rate is still the best one over a long run, of which a short one favours rates "
    "somewhat too high, or with another seed"
)


@dataclass(frozen=True)
class SweepRun:
    """One rate of the sweep.

    Attributes:
        learning_rate: the rate after warm-up.
        log: the run's loss log, also on disk.
        rows: the losses of the eval rows at the end.
        broken_step: the first step whose loss was nan or inf, or None.
        seconds: of the training, without loading.
    """

    learning_rate: float
    log: LossLog
    rows: RowLosses
    broken_step: int | None = None
    seconds: float = 0.0

    @property
    def is_broken(self) -> bool:
        """Whether its numbers stopped being finite."""
        return self.broken_step is not None or not math.isfinite(self.rows.mean)

    @property
    def eval_loss(self) -> float:
        """Mean eval loss at the end in nat; nan if the run broke."""
        return math.nan if self.is_broken else self.rows.mean


@dataclass(frozen=True)
class SweepResult:
    """The runs of a sweep, and what they say.

    Attributes:
        runs: in the order of their rates, the lowest first.
        learning_rate: the rate that was asked about.
        steps: steps of each run.
        base: the losses of the eval rows before training.
        least_gain: a difference below this share of what the best run learnt does not count.
    """

    runs: tuple[SweepRun, ...]
    learning_rate: float
    steps: int
    base: RowLosses
    least_gain: float = 0.05

    @cached_property
    def best(self) -> SweepRun | None:
        """The run with the lowest eval loss; None if all broke."""
        sound = [run for run in self.runs if not run.is_broken]
        return min(sound, key=lambda run: run.eval_loss) if sound else None

    def is_tied(self, run: SweepRun) -> bool:
        """Whether a run cannot be told from the best one."""
        if self.best is None or run.is_broken:
            return False
        difference, margin = paired_difference(run.rows, self.best.rows)
        learnt = self.base.mean - self.best.rows.mean
        return difference <= max(margin, self.least_gain * learnt)

    def _tie(self, run: SweepRun) -> str:
        """In which way a run is tied with the best one; empty if it is not."""
        if self.best is None or not self.is_tied(run):
            return ""
        difference, margin = paired_difference(run.rows, self.best.rows)
        return "within noise" if difference <= margin else "too little to count"

    @cached_property
    def outcome(self) -> str:
        """What was found.

        "all broken": no rate survived; "none learnt": no rate is better than no training;
        "within noise": all rates end equal; "edge low" or "edge high": the best rate is the lowest
        or the highest one, so a better one may lie beyond; "inside": the best rate is between.
        """
        if self.best is None:
            return "all broken"
        if not _is_above(self.base, self.best.rows):
            return "none learnt"
        tied = [self.is_tied(run) for run in self.runs]
        if all(tied):
            return "within noise"
        if any(tied[1:-1]):
            return "inside"
        # a tie of the lowest with the highest, with a worse one between, is no direction
        if tied[0] and tied[-1]:
            return "within noise"
        return "edge low" if tied[0] else "edge high"

    @cached_property
    def chosen(self) -> float | None:
        """The rate to train with, or to try next where the best one is at an edge; None if no rate
        can be named.

        Where the rate asked about is as good as the best, it is kept.
        """
        rates = [run.learning_rate for run in self.runs]
        if self.outcome == "all broken":
            return _rounded(rates[0] / 10)
        if self.outcome == "none learnt":
            return _rounded(rates[0] / 10 if self._got_worse else rates[-1] * 10)
        tied = [run for run in self.runs if self.is_tied(run)]
        if self.outcome.startswith("edge"):
            low, high = (rates[0], rates[1]) if self.outcome == "edge low" else rates[-2:]
            ratio = high / low if high > low else 3.0
            return _rounded(low / ratio if self.outcome == "edge low" else high * ratio)
        if any(_same(run.learning_rate, self.learning_rate) for run in tied):
            return self.learning_rate
        inner = [run for run in tied if rates[0] < run.learning_rate < rates[-1]] or tied
        return min(inner, key=lambda run: run.eval_loss).learning_rate

    @property
    def _got_worse(self) -> bool:
        worse = [run.is_broken or _is_above(run.rows, self.base) for run in self.runs]
        return any(worse)

    def names(self) -> list[str]:
        """A name for each run, "2e-4"; equal rates are numbered."""
        texts = [rate_text(run.learning_rate) for run in self.runs]
        numbers = [texts[: index + 1].count(text) for index, text in enumerate(texts)]
        pairs = zip(texts, numbers, strict=True)
        return [text if number == 1 else f"{text} ({number})" for text, number in pairs]

    def table(self) -> str:
        """A line a rate: its eval loss, the difference to the best, and what that means."""
        head = ("learning rate", "eval loss", "above the best", "verdict")
        rows = [head, ("no training", loss_text(self.base.mean), "", "")]
        for name, run in zip(self.names(), self.runs, strict=True):
            rows.append((name, *self._cells(run)))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    def _cells(self, run: SweepRun) -> tuple[str, str, str]:
        if run.is_broken or self.best is None:
            at = "" if run.broken_step is None else f" at step {run.broken_step}"
            return "nan", "", f"broke{at}"
        if run is self.best:
            return loss_text(run.eval_loss), "", "lowest"
        difference, margin = paired_difference(run.rows, self.best.rows)
        verdict = self._tie(run) or "worse"
        return loss_text(run.eval_loss), f"{difference:.3f} +- {margin:.3f}", verdict

    def draw(self, **options: Any) -> Figure:
        """The curves of all runs in one picture; options as for `draw_curves`."""
        from colab_qlora.curves.draw import draw_curves

        return draw_curves(self.logs(), **options)

    def logs(self) -> dict[str, LossLog]:
        """Name of the run -> its log, for `draw_curves` and `describe_curves`."""
        return {name: run.log for name, run in zip(self.names(), self.runs, strict=True)}

    def advice(self) -> Advice:
        """The rate to go on with, why, and what the next curve shows.

        A rate that only the next sweep will have tried is not among `as_arguments()`.
        """
        then, now = self.chosen, self.learning_rate
        assert then is not None
        is_kept = _same(then, now)
        move = f"from {rate_text(now)} to {rate_text(then)}"
        do = f"{'lower' if then < now else 'raise'} learning_rate {move}"
        if is_kept:
            do = f"keep learning_rate at {rate_text(then)}"
        elif not self._is_settled:
            do = f"go on: sweep again around {rate_text(then)}"
        return Advice(
            setting="none" if is_kept else "learning_rate",
            now=now,
            then=then,
            do=do,
            why=self._why(),
            expect=self._expect(then),
            arguments={"learning_rate": then} if self._is_settled else {},
            headline=self._headline(),
            subject="This sweep",
            cannot_tell=_OVER_TIME,
        )

    @property
    def _is_settled(self) -> bool:
        return self.outcome in ("inside", "within noise")

    def _headline(self) -> str:
        count = len(self.runs)
        lowest = None if self.best is None else rate_text(self.best.learning_rate)
        words = {
            "all broken": f"all {count} rates broke",
            "none learnt": f"none of {count} rates is better than no training",
            "within noise": f"{count} rates end about equal",
            "edge low": f"the lowest rate, {lowest}, is the best of {count}",
            "edge high": f"the highest rate, {lowest}, is the best of {count}",
            "inside": f"{lowest} has the lowest eval loss of {count} rates",
        }
        return words[self.outcome]

    def _why(self) -> str:
        if self.best is None:
            return "every run had a loss that is nan or inf"
        rows, low = len(self.base.tokens), self.best.eval_loss
        name = rate_text(self.best.learning_rate)
        words = f"the eval loss of {name} after {self.steps} steps is {loss_text(low)}"
        words += f" on {rows} rows ({loss_text(self.base.mean)} before training)"
        others = [run for run in self.runs if run is not self.best]
        return "; ".join([words, *(self._against_best(run) for run in others)])

    def _against_best(self, run: SweepRun) -> str:
        name = rate_text(run.learning_rate)
        if run.is_broken or self.best is None:
            return f"{name} broke"
        difference, margin = paired_difference(run.rows, self.best.rows)
        noise = f", which is {tie}" if (tie := self._tie(run)) else ""
        return f"{name} ends {difference:.3f} +- {margin:.3f} higher{noise}"

    def _expect(self, then: float) -> str:
        if self.best is None:
            return "at least one of the lower rates keeps a finite loss"
        low = loss_text(self.best.eval_loss)
        if self.outcome == "none learnt":
            return f"the eval loss ends clearly below {loss_text(self.base.mean)}"
        if not self._is_settled:
            return (
                f"the eval loss after {self.steps} steps ends below {low}; if not, "
                f"{rate_text(self.best.learning_rate)} is the rate to take"
            )
        return f"the eval loss of a long run is near {low} after {self.steps} steps, then falls on"


def first_broken_step(log: LossLog) -> int | None:
    """The first step whose train or eval loss is nan or inf, or None."""
    keys = ("loss", "eval_loss")
    steps = [
        record["step"]
        for record in log.records
        if any(key in record and not math.isfinite(record[key]) for key in keys)
    ]
    return min(steps, default=None)


def _is_above(one: RowLosses, other: RowLosses) -> bool:
    difference, margin = paired_difference(one, other)
    return difference > max(margin, _LEAST_MOVE * abs(other.mean))


def _rounded(rate: float) -> float:
    return float(f"{rate:.2g}")


def _same(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=0.02)


def in_order(runs: Sequence[SweepRun]) -> tuple[SweepRun, ...]:
    """The runs by their rates, the lowest first."""
    return tuple(sorted(runs, key=lambda run: run.learning_rate))
