"""Levels, scatter and trend, each against its definition."""

from __future__ import annotations

import itertools
import math
import statistics

import numpy as np
import pytest

from colab_qlora.curves.rules.statistics import (
    centred_medians,
    in_blocks,
    level_error,
    scatter,
    trailing_medians,
    trend,
)


def test_scatter_is_that_of_the_noise_whatever_the_trend_and_the_outliers():
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.3, 20_000)
    assert scatter(noise) == pytest.approx(0.3, rel=0.03)
    assert scatter(noise + np.linspace(9, 2, noise.size)) == pytest.approx(0.3, rel=0.03)
    noise[::100] += 50
    assert scatter(noise) == pytest.approx(0.3, rel=0.06)
    assert scatter(np.array([1.0, 2.0])) == 0.0


def test_the_error_of_a_level_is_the_spread_of_medians():
    draws = np.random.default_rng(1).normal(0, 1, (20_000, 101))
    assert level_error(1.0, 101) == pytest.approx(np.median(draws, axis=1).std(), rel=0.03)


@pytest.mark.parametrize("points", [0, 1, 2, 7, 30])
@pytest.mark.parametrize("window", [1, 2, 5, 40])
def test_trailing_medians(points, window):
    values = np.random.default_rng(points).normal(size=points)
    want = [statistics.median(values[max(0, i - window + 1) : i + 1]) for i in range(points)]
    assert trailing_medians(values, window) == pytest.approx(want)


@pytest.mark.parametrize(("window", "half"), [(1, 0), (4, 2), (5, 2)])
def test_centred_medians(window, half):
    values = np.random.default_rng(3).normal(size=23)
    got = centred_medians(values, window)
    assert got.shape == values.shape
    for i in range(half, 23 - half):
        assert got[i] == statistics.median(values[i - half : i + half + 1])


def test_the_trend_is_the_median_of_all_pairwise_slopes():
    rng = np.random.default_rng(2)
    steps = np.array([1.0, 2, 4, 7, 8, 11, 15, 16, 20, 30])
    values = rng.normal(size=10)
    pairs = itertools.combinations(range(10), 2)
    slopes = [(values[j] - values[i]) / (steps[j] - steps[i]) for i, j in pairs]
    assert trend(steps, values).slope == pytest.approx(statistics.median(slopes))
    assert trend(steps[:2], values[:2]) == (0.0, -math.inf, math.inf)


def test_the_interval_of_the_trend_holds_the_true_slope_19_times_in_20():
    rng = np.random.default_rng(4)
    steps = np.arange(40.0)
    held = 0
    for _ in range(1000):
        found = trend(steps, -0.02 * steps + rng.standard_t(4, 40))
        held += found.low <= -0.02 <= found.high
    # three standard errors of a share of 95 % in 1,000 draws
    assert held / 1000 == pytest.approx(0.95, abs=3 * math.sqrt(0.95 * 0.05 / 1000))


def test_blocks_are_means_of_equal_stretches():
    assert in_blocks(np.arange(5), 10).tolist() == [0, 1, 2, 3, 4]
    assert in_blocks(np.arange(10), 4).tolist() == [1, 4, 7, 9]
    assert in_blocks(np.arange(1_000_003.0), 2000).size <= 2000
