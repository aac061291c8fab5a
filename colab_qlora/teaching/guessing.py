"""Guess first, then see: recorded runs without their names, and what the diagnosis says of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from colab_qlora.curves.diagnose import diagnose
from colab_qlora.curves.log import LossLog, read_log
from colab_qlora.errors import UserError
from colab_qlora.samples import sample_path

__all__ = ["GUESSES", "check_guess", "exercise_runs"]

# what a reader may guess -> the verdicts that mean it
GUESSES: Mapping[str, tuple[str, ...]] = {
    "healthy": ("healthy",),
    "overfitting": ("overfitting",),
    "learning rate too high": ("unstable", "worse than base"),
    "leaked eval rows": ("suspected leakage",),
    "not learning": ("not learning",),
}
_RUNS = {
    "A": "overfitting",
    "B": "healthy",
    "C": "leaked_eval_rows",
    "D": "learning_rate_too_high",
    "E": "learning_rate_too_low",
}


def exercise_runs() -> dict[str, LossLog]:
    """The recorded runs to guess at, by letter; each is one of `GUESSES`.

    Returns:
        Real runs of the kit, in a mixed order.
    """
    return {letter: read_log(sample_path(f"curves/{name}.jsonl")) for letter, name in _RUNS.items()}


def check_guess(log: Iterable[Mapping[str, Any]], guess: str = "") -> str:
    """Compares a guess with the diagnosis.

    Args:
        log: a run.
        guess: one of `GUESSES`, in any case; empty to see the diagnosis alone.

    Returns:
        Whether it agrees, if there is a guess, and the diagnosis in words.

    Raises:
        UserError: the guess is none of them.
    """
    words = " ".join(guess.lower().split())
    if words and words not in GUESSES:
        raise UserError(
            "that guess is not among the possible ones",
            got=repr(guess),
            allowed=", ".join(GUESSES),
        )
    found = diagnose(log)
    if not words:
        return found.text()
    is_right = found.main.name in GUESSES[words]
    verb = "agrees" if is_right else "disagrees"
    return f"Your guess {verb} with the numbers.\n{found.text()}"
