"""What is read from a log besides its losses."""

from __future__ import annotations

import math

import pytest
from loss_runs import HEALTHY, OVERFITTING

from colab_qlora.curves.picture.curve import as_curves
from colab_qlora.errors import UserError


def test_rates_rise_by_step_and_the_last_of_a_step_counts():
    rates = [(3, 3e-4), (1, 1e-4), (3, 2e-4), (2, math.nan), (4, None), (5, "high"), (6, 1)]
    run = [{"step": step, "loss": 2.0, "learning_rate": rate} for step, rate in rates]
    (curve,) = as_curves(run)
    assert curve.rate_steps.tolist() == [1, 3, 6]
    assert curve.rates.tolist() == [1e-4, 2e-4, 1.0]
    (curve,) = as_curves(run, with_rates=False)
    assert curve.rates.size == 0


def test_events_are_sorted_and_said_once():
    events = [(9, "second"), (4, " first\nof all "), (9, "second"), (9, "third"), (5, None)]
    (curve,) = as_curves(HEALTHY + [{"step": step, "event": event} for step, event in events])
    assert curve.events == ((4, "first of all"), (9, "second"), (9, "third"))
    assert curve.step_range == (1, 9)
    with pytest.raises(UserError, match="the record has no step"):
        as_curves([*HEALTHY, {"event": "when?"}])


def test_eval_at_is_the_last_known_one():
    (curve,) = as_curves([*OVERFITTING, {"step": 6, "eval_loss": math.nan}])
    assert curve.eval_at(0) is None
    assert curve.eval_at(2) == (2, 1.0)
    assert curve.eval_at(100) == (5, 1.5)


def test_one_eval_is_not_the_best_of_several():
    (curve,) = as_curves([{"step": 3, "eval_loss": 2.0}])
    assert curve.best == (3, 2.0)
    assert curve.chosen_best is None


def test_a_curve_stands_for_its_log():
    (curve,) = as_curves(OVERFITTING)
    assert as_curves(curve) == [curve]
    named = as_curves({"mine": curve, "other": HEALTHY})
    assert [each.name for each in named] == ["mine", "other"]
    assert named[0].losses is curve.losses
