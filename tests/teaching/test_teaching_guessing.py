"""The exercise of notebook 06: every run is what it is meant to be, and a guess is judged."""

from __future__ import annotations

import pytest

from colab_qlora.errors import UserError
from colab_qlora.teaching import GUESSES, check_guess, exercise_runs

MEANT = {
    "A": "overfitting",
    "B": "healthy",
    "C": "leaked eval rows",
    "D": "learning rate too high",
    "E": "not learning",
}


def test_every_guess_is_right_for_one_run_alone():
    assert sorted(MEANT.values()) == sorted(GUESSES)
    for letter, log in exercise_runs().items():
        agreed = [guess for guess in GUESSES if "Your guess agrees" in check_guess(log, guess)]
        assert agreed == [MEANT[letter]], letter


def test_no_guess_shows_the_reading():
    text = check_guess(exercise_runs()["A"])
    assert text.startswith("This run: overfitting since step 12")
    assert check_guess(exercise_runs()["A"], " Overfitting ").endswith(text)


def test_an_unknown_guess_is_refused():
    with pytest.raises(UserError, match="got 'fine'; allowed: healthy, overfitting"):
        check_guess(exercise_runs()["B"], "fine")
