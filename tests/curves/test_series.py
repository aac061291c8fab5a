"""A series as the eye gets it: smoothed and thinned."""

from __future__ import annotations

import math

import numpy as np
import pytest

from colab_qlora.curves.picture.series import smooth_losses, thin


def test_smooth_losses_has_no_start_bias_and_skips_nan():
    assert smooth_losses(np.full(50, 2.0)) == pytest.approx(2.0)
    smoothed = smooth_losses(np.array([1.0, math.nan, 1.0]))
    np.testing.assert_allclose(smoothed, [1.0, math.nan, 1.0])
    # after one half-life (100 / 20 points) a step is half way, beside the weight of the start
    step = smooth_losses(np.r_[np.zeros(80), np.ones(20)])
    assert step[84] == pytest.approx(0.5, abs=1e-4)


def one_by_one(losses, half_life=0.05):
    """The definition: each loss takes its share, and what came before keeps the rest."""
    keep = 0.5 ** (1 / max(1.0, losses.size * half_life))
    smoothed = np.full(losses.size, math.nan)
    mean = weight = 0.0
    for index, value in enumerate(losses.tolist()):
        if not math.isnan(value):
            mean = keep * mean + (1 - keep) * value
            weight = keep * weight + (1 - keep)
            smoothed[index] = mean / weight
    return smoothed


@pytest.mark.parametrize("half_life", [0.0001, 0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("points", [0, 1, 2, 31, 32, 33, 507, 40_001])
def test_smoothing_in_blocks_agrees_with_the_definition(points, half_life):
    rng = np.random.default_rng(points)
    losses = rng.normal(2, 0.3, points) * np.geomspace(3, 0.01, points)
    losses[rng.random(points) < 0.1] = math.nan
    expected = one_by_one(losses, half_life)
    np.testing.assert_allclose(smooth_losses(losses, half_life), expected, rtol=1e-9, atol=0)


def test_a_huge_loss_is_forgotten_as_fast_as_by_the_definition():
    losses = np.r_[1e30, np.full(20_000, 1.5)]
    expected = one_by_one(losses, 0.002)
    np.testing.assert_allclose(smooth_losses(losses, 0.002), expected, rtol=1e-9, atol=0)
    assert expected[-1] == pytest.approx(1.5)


def test_only_nan_stays_nan():
    assert np.isnan(smooth_losses(np.full(5, math.nan))).all()


def test_thin_keeps_few_points_and_gaps():
    assert thin(np.arange(10.0), 5).tolist() == list(range(10))
    losses = np.ones(1000)
    losses[500] = math.nan
    chosen = thin(losses, 10)
    assert 500 in chosen
    assert chosen.size < 60
