"""The sentences that say what a picture shows."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from loss_runs import (
    HEALTHY,
    HEALTHY_READ,
    OVERFITTING,
    OVERFITTING_READ,
    SPIKED,
    SPIKED_READ,
    add_events,
    make_run,
)

from colab_qlora.curves.words import describe_curves


def test_words_for_one_run():
    losses = np.random.default_rng(0).normal(2, 0.1, 200).tolist()
    run = [{"step": step, "loss": loss} for step, loss in enumerate(losses, 1)]
    evals = {0: 2.5, 80: 1.227, 200: 2.303}
    run += [{"step": step, "eval_loss": loss} for step, loss in evals.items()]
    start, end = statistics.median(losses[:10]), statistics.median(losses[-20:])
    text = (
        f"Train loss goes from {start:.3f} to {end:.3f} over steps 1 to 200 (medians of the first "
        "10 and last 20 of 200 points). Eval loss goes from 2.500 before training to 2.303 at step "
        "200, lowest 1.227 at step 80."
    )
    assert describe_curves(run) == text
    named = text.replace("loss goes", "loss: mine goes")
    assert describe_curves({"mine": run}) == named


@pytest.mark.parametrize(
    ("records", "text"),
    [
        ([{"step": 3, "loss": 2}], "Train loss is 2.000 at step 3. Eval loss was not logged."),
        (
            [{"step": 0, "eval_loss": 2.5}],
            "Train loss was not logged. Eval loss is 2.500 at step 0, before training.",
        ),
        (
            [{"step": 5, "eval_loss": 2.5}, {"step": 9, "eval_loss": 1e-3}],
            "Train loss was not logged. "
            "Eval loss goes from 2.500 at step 5 to 0.001 at step 9, lowest 0.001 at step 9.",
        ),
        (
            [{"step": 1, "loss": 12345.0}, {"step": 2, "loss": math.nan}],
            "Train loss is 1.23e+04 at step 1. Eval loss was not logged. "
            "The log has 1 value that is nan or inf, the first at step 2.",
        ),
        (
            [{"step": 4, "loss": math.inf}, {"step": 4, "eval_loss": math.nan}],
            "Train loss has no finite value. Eval loss has no finite value. "
            "The log has 2 values that are nan or inf, the first at step 4.",
        ),
    ],
)
def test_words_for_short_runs(records, text):
    assert describe_curves(records) == text


def test_words_for_a_comparison():
    runs = {
        "a": [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}],
        "b": [{"step": 0, "eval_loss": 2.0}, {"step": 2, "eval_loss": math.nan}],
    }
    assert describe_curves(runs) == (
        "Train loss: a goes from 2.000 to 1.000 over steps 1 to 2; b was not logged. "
        "Eval loss: a was not logged; b is 2.000 at step 0, before training. "
        "Values that are nan or inf: b 1, the first at step 2."
    )


def test_words_for_marks():
    text = describe_curves(OVERFITTING, OVERFITTING_READ)
    assert text.endswith("Marked: overfitting since step 2, a zone up to step 5.")
    assert "Marked" not in describe_curves(HEALTHY, HEALTHY_READ)
    assert describe_curves(SPIKED, SPIKED_READ).endswith(
        "Marked: overfitting since step 100, a zone up to step 200; maybe unstable since step 60; "
        "memorising since step 140; 2 spikes at steps 50 and 120."
    )
    compared = describe_curves({"a": OVERFITTING, "b": HEALTHY}, {"a": OVERFITTING_READ})
    assert compared.endswith("Marked in a: overfitting since step 2, a zone up to step 5.")


def test_words_for_events():
    text = describe_curves(add_events(HEALTHY, (2, 4)))
    assert text.endswith(
        "2 events: step 2 layer 2 down_proj: NF4 -> int8; step 4 layer 4 down_proj: NF4 -> int8."
    )
    assert "; 38 more." in describe_curves(add_events(make_run(), range(50)))
    assert describe_curves({"a": add_events(HEALTHY, (3,)), "b": HEALTHY}).endswith(
        "1 event in a: step 3 layer 3 down_proj: NF4 -> int8."
    )


def test_words_for_the_learning_rate():
    run = [{"step": s, "loss": 2.0, "learning_rate": r} for s, r in ((1, 1e-4), (2, 3e-4), (3, 0))]
    assert "Learning rate" not in describe_curves(run)
    text = describe_curves(run, learning_rate=True)
    assert text.endswith("Learning rate peaks at 0.0003 at step 2 and ends at 0.")
    text = describe_curves({"a": run, "b": HEALTHY}, learning_rate=True)
    assert text.endswith(
        "Learning rate: a peaks at 0.0003 at step 2 and ends at 0; b was not logged."
    )


@pytest.mark.parametrize(
    ("stop_at", "words"),
    [
        (0, "Stop at step 0: no eval loss by then."),
        (3, "Stop at step 3: eval 1.100."),
        (9, "Stop at step 9: last eval 1.500, at step 5."),
    ],
)
def test_words_for_a_step_to_stop_at(stop_at, words):
    assert describe_curves(OVERFITTING, stop_at=stop_at).endswith(words)
