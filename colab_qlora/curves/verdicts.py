"""What a diagnosis is made of: verdicts with numbers, step, confidence and one next action."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["ALARMS", "CONFIDENCES", "KINDS", "NAMES", "Diagnosis", "Verdict"]

# name -> how it is said; the order is that of importance
NAMES: Mapping[str, str] = {
    "non-finite": "numbers broke",
    "collapsed": "the loss collapsed",
    "scale mismatch": "train and eval loss are on different scales",
    "worse than base": "worse than before training",
    "unstable": "unstable: learning rate too high",
    "overfitting": "overfitting",
    "eval rising": "the eval loss rises",
    "suspected leakage": "the eval rows look like training rows",
    "memorising": "learning rows by heart",
    "eval below train": "the eval loss is below the train loss",
    "not learning": "not learning",
    "slow": "learning slowly",
    "healthy": "healthy",
    "still improving": "still improving",
    "plateau": "levelled off",
    "spikes": "single spikes",
    "skipped steps": "steps skipped by the loss scaler",
    "not enough evidence": "not enough evidence yet",
}
# sure: the numbers leave no other reading; likely: one would bet on it; watch: look again later
CONFIDENCES = ("sure", "likely", "watch")
KINDS = ("fault", "warning", "good", "info")
# what holds of the whole run, and shows from a step on
_SHOWS_LATE = ("suspected leakage", "eval below train")
# what would make a user stop a run that is sound: never said of a healthy one
ALARMS = ("non-finite", "unstable", "overfitting", "suspected leakage")


@dataclass(frozen=True)
class Verdict:
    """One thing that a curve shows.

    Attributes:
        name: a key of `NAMES`.
        kind: "fault" (act now), "warning" (act soon), "good", or "info".
        confidence: "sure", "likely" or "watch".
        step: the step at which it shows, or None where it is a matter of the whole run.
        because: the evidence with its numbers, as a clause without a full stop.
        action: the one thing to do next, an imperative clause without a full stop.
        numbers: what was compared, by name; a share is a fraction of 1, a loss is in nat.
        steps: further steps to mark, for instance those of spikes.
        said: the title where that of `NAMES` does not fit this run, else "".
    """

    name: str
    kind: str
    confidence: str
    step: int | None
    because: str
    action: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    said: str = ""

    def __post_init__(self) -> None:
        assert self.name in NAMES and self.kind in KINDS and self.confidence in CONFIDENCES, self

    @property
    def title(self) -> str:
        """The verdict in a few words, as said to a user."""
        return self.said or NAMES[self.name]

    @property
    def is_alarm(self) -> bool:
        """Whether it claims one of `ALARMS`; a "watch" claims nothing yet."""
        return self.name in ALARMS and self.confidence != "watch"


@dataclass(frozen=True)
class Diagnosis:
    """The reading of one run, most important verdict first; there is at least one.

    Attributes:
        verdicts: at least one.
        last_step: the last step that the log has.
        best_step: step of the lowest eval loss after step 0 (the checkpoint to keep), or None.
        best_eval_loss: that loss in nat, or None.
        base_eval_loss: eval loss before training in nat, or None.
        divergence_step: where the eval loss turned for good, if it did; the zone from here to
            `last_step` is what overfitting, or a rising eval loss, cost.
        noise: scatter of a single logged train loss as a share of its level, or None.
        notes: what the reader should know about the log itself, as sentences.
        is_finished: whether the run was over by then; None where neither the caller nor the log
            says so.
    """

    verdicts: tuple[Verdict, ...]
    last_step: int
    best_step: int | None = None
    best_eval_loss: float | None = None
    base_eval_loss: float | None = None
    divergence_step: int | None = None
    noise: float | None = None
    notes: tuple[str, ...] = ()
    is_finished: bool | None = None

    @property
    def main(self) -> Verdict:
        """The most important verdict."""
        return self.verdicts[0]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all verdicts, most important first."""
        return tuple(verdict.name for verdict in self.verdicts)

    def get(self, name: str) -> Verdict | None:
        """The verdict of that name, or None."""
        return next((verdict for verdict in self.verdicts if verdict.name == name), None)

    @property
    def headline(self) -> str:
        """All titles in one line: "healthy; still improving", "maybe overfitting"."""
        return "; ".join(_said(verdict) for verdict in self.verdicts)

    def text(self) -> str:
        """The main verdict in three lines: what, because of what, what next; then the notes."""
        verdict, *others = self.verdicts
        since = ""
        if verdict.step is not None:
            since = f" since step {verdict.step:,}"
            if verdict.name in _SHOWS_LATE:
                since = f", seen from step {verdict.step:,} on"
        how = "" if verdict.name == "not enough evidence" else f" ({verdict.confidence})"
        also = f"; also {', '.join(_said(other) for other in others)}" if others else ""
        lines = [
            f"This run: {_said(verdict)}{since}{how}{also}.",
            f"Because {verdict.because}.",
            f"Next: {verdict.action}.",
        ]
        return "\n".join([*lines, *self.notes])

    def __str__(self) -> str:
        return self.text()


def _said(verdict: Verdict) -> str:
    is_doubtful = verdict.confidence == "watch" and verdict.name != "not enough evidence"
    return ("maybe " if is_doubtful else "") + verdict.title
