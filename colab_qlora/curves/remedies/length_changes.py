"""Changes of a run's length: shorter, longer, or the rest of what was planned."""

from __future__ import annotations

import math

from colab_qlora.curves.picture.marks import count_words
from colab_qlora.curves.remedies.changes import Change, keep
from colab_qlora.curves.remedies.run_facts import RunFacts

__all__ = ["go_on", "lengthen", "run_steps", "shorten_to_best"]


def shorten_to_best(facts: RunFacts, best_step: int | None, why: str, expect: str) -> Change | None:
    """Ends the run where its eval loss was lowest; one epoch earlier where there was no eval."""
    per_epoch, epochs = facts.steps_per_epoch, facts.epochs
    if best_step is None:
        if facts.max_steps is not None or epochs is None or epochs < 2:
            return None
        return _set_epochs(epochs, math.ceil(epochs) - 1, why, expect)
    if best_step >= facts.last_step:
        return None
    if facts.max_steps is None and per_epoch is not None and epochs is not None:
        # an eval is a sample of the curve, so the nearest whole epoch is as good as its step
        nearest = max(1, math.floor(best_step / per_epoch + 0.5))
        if nearest < epochs:
            return _set_epochs(epochs, nearest, why, expect)
    return _set_steps(facts.max_steps, best_step, facts, why, expect)


def lengthen(facts: RunFacts, why: str, expect: str) -> Change:
    """Adds a third to the length, and at least an epoch where epochs decide it."""
    if facts.max_steps is None and facts.epochs is not None:
        then = math.floor(facts.epochs) + max(1, math.ceil(facts.epochs / 3))
        return _set_epochs(facts.epochs, then, why, expect)
    steps = math.ceil(facts.steps * 4 / 3)
    return _set_steps(facts.max_steps, steps, facts, why, expect)


def go_on(facts: RunFacts, why: str, expect: str) -> Change | None:
    """Does the rest of what was planned; None where the run is over as planned, or may be."""
    if facts.is_finished is False:
        return keep("let the run go on", why, expect)
    if not facts.was_stopped:
        return None
    stopped = f"it was stopped at step {facts.last_step:,} of {facts.planned_steps:,}"
    do = "go on to the planned end: trainer.train(resume_from_checkpoint=True)"
    return keep(do, f"{stopped}, and {why}", expect)


def run_steps(facts: RunFacts, steps: int, why: str, expect: str) -> Change:
    """Sets the number of steps."""
    return _set_steps(facts.max_steps, steps, facts, why, expect)


def _set_epochs(now: float, then: int, why: str, expect: str) -> Change:
    verb = "lower" if then < now else "raise"
    do = f"{verb} num_train_epochs from {now:g} to {then}"
    shown = int(now) if float(now).is_integer() else now
    return Change("num_train_epochs", shown, then, do, why, expect, {"num_train_epochs": then})


def _set_steps(now: int | None, then: int, facts: RunFacts, why: str, expect: str) -> Change:
    ran = f"this run had {count_words(facts.last_step, 'step')}" if now is None else f"now {now:,}"
    do = f"set max_steps={then} ({ran})"
    return Change("max_steps", now, then, do, why, expect, {"max_steps": then})
