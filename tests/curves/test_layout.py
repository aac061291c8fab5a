"""Where labels and notes go: pure arithmetic on pixels."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from colab_qlora.curves.picture.layout import pack_rows, shorten, spread


@pytest.mark.parametrize("seed", range(20))
def test_spread_keeps_order_gap_and_limits(seed):
    rng = np.random.default_rng(seed)
    targets = rng.uniform(0, 100, rng.integers(1, 6)).tolist()
    placed = spread(targets, 20, 0, 100)
    ordered = sorted(placed)
    assert all(b - a >= 20 - 1e-9 for a, b in itertools.pairwise(ordered))
    assert ordered[0] >= 0 and ordered[-1] <= 100 + 1e-9
    assert np.argsort(targets).tolist() == np.argsort(placed).tolist()


def test_spread_moves_only_what_it_must():
    assert spread([10, 50, 90], 20, 0, 100) == [10, 50, 90]
    assert spread([50, 50, 0], 20, 0, 100) == [40, 60, 0]
    assert spread([], 20, 0, 100) == []


def test_pack_rows():
    assert pack_rows([50, 300, 60], [80, 80, 80], 0, 400) == [(10, 0), (260, 0), (20, 1)]
    assert pack_rows([0, 400], [80, 80], 0, 400) == [(0, 0), (320, 0)]
    assert pack_rows([0], [500], 10, 400) == [(10, 0)]


def test_shorten():
    assert shorten("short", 5) == "short"
    assert shorten("learning rate 2e-4", 11) == "lear...2e-4"
    assert len(shorten("learning rate 2e-4", 10)) == 10
