"""The numbers behind a picture, and the sentences that say them."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from colab_qlora.curves.series import describe_curves, smooth_losses, thin


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


def test_smooth_losses_has_no_start_bias_and_skips_nan():
    assert smooth_losses(np.full(50, 2.0)) == pytest.approx(2.0)
    smoothed = smooth_losses(np.array([1.0, math.nan, 1.0]))
    np.testing.assert_allclose(smoothed, [1.0, math.nan, 1.0])
    # after one half-life (100 / 20 points) a step is half way, beside the weight of the start
    step = smooth_losses(np.r_[np.zeros(80), np.ones(20)])
    assert step[84] == pytest.approx(0.5, abs=1e-4)


def test_thin_keeps_few_points_and_gaps():
    assert thin(np.arange(10.0), 5).tolist() == list(range(10))
    losses = np.ones(1000)
    losses[500] = math.nan
    chosen = thin(losses, 10)
    assert 500 in chosen
    assert chosen.size < 60
