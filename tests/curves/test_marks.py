"""What a diagnosis marks, and in which words."""

from __future__ import annotations

import pytest
from loss_runs import (
    HEALTHY,
    HEALTHY_READ,
    OVERFITTING,
    OVERFITTING_READ,
    SPIKED,
    SPIKED_READ,
    diagnosis,
    verdict,
)

from colab_qlora.curves.picture.curve import as_curves
from colab_qlora.curves.picture.marks import Marks, as_marks, count_words, steps_words
from colab_qlora.errors import UserError

RUN = as_curves(OVERFITTING)
TWO = as_curves({"a": OVERFITTING, "b": HEALTHY})


def test_marks_of_a_diagnosis():
    (marks,) = as_marks(SPIKED_READ, as_curves(SPIKED))
    assert (marks.divergence, marks.zone_end, marks.zone) == (100, 200, "overfitting")
    assert marks.spikes == (50, 120)
    assert [turn.text for turn in marks.turns] == [
        "maybe unstable since step 60",
        "memorising since step 140",
    ]
    assert marks.turns[1].further_steps == (160,)


@pytest.mark.parametrize(
    ("verdicts", "words"),
    [
        ([verdict("overfitting", 40)], "overfitting since step 40"),
        ([verdict("eval rising", 40)], "eval loss rising since step 40"),
        ([verdict("overfitting", 40, confidence="watch")], "maybe overfitting since step 40"),
        ([verdict("not learning")], "eval loss rising since step 40"),
    ],
)
def test_the_zone_in_words(verdicts, words):
    (marks,) = as_marks(diagnosis(*verdicts, last_step=60, divergence_step=40), RUN)
    assert marks.zone_text == words
    assert marks.has_zone


def test_nothing_lies_behind_the_last_step():
    read = diagnosis(verdict("overfitting", 5), last_step=5, divergence_step=5)
    (marks,) = as_marks(read, RUN)
    assert not marks.has_zone
    assert marks.texts() == ["overfitting since step 5"]


def test_verdicts_of_the_whole_run_have_no_place():
    read = diagnosis(
        verdict("unstable"), verdict("healthy", 3, kind="good"), verdict("plateau", 4), last_step=5
    )
    assert as_marks(read, RUN) == [Marks(zone_end=5)]


def test_runs_and_their_diagnoses():
    assert as_marks(None, TWO) == [Marks(), Marks()]
    assert as_marks({"b": OVERFITTING_READ}, TWO)[0] == Marks()
    assert as_marks({"b": OVERFITTING_READ}, TWO)[1].divergence == 2
    assert as_marks({}, RUN) == [Marks()]
    # names are compared as they are shown
    curves = as_curves({"a\nrun": OVERFITTING})
    assert as_marks({"a\nrun": OVERFITTING_READ}, curves)[0].divergence == 2


@pytest.mark.parametrize(
    ("read", "curves", "message"),
    [
        (OVERFITTING_READ, TWO, "one diagnosis cannot be that of several runs: got 2 runs"),
        ({"c": HEALTHY_READ}, TWO, "a run that is not shown: got 'c'; allowed: 'a', 'b'"),
        ({"a": HEALTHY_READ}, RUN, "a run that is not shown: got 'a'"),
        ("overfitting", RUN, "that is no diagnosis: got str"),
        ({"a": "overfitting"}, TWO, "that is no diagnosis"),
    ],
)
def test_wrong_diagnoses(read, curves, message):
    with pytest.raises(UserError, match=message):
        as_marks(read, curves)


def test_counts_and_lists():
    assert count_words(1, "spike") == "1 spike"
    assert count_words(1200, "spike") == "1,200 spikes"
    assert steps_words([3]) == "step 3"
    assert steps_words([3, 1500]) == "steps 3 and 1,500"
    assert steps_words(range(12), 3) == "steps 0, 1, 2 and 9 more"
