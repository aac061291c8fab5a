"""Colours, checked with the colour vision of others: in grey, and without red, green or blue."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from loss_runs import OVERFITTING, OVERFITTING_READ, artists, make_run
from matplotlib.colors import to_rgb, to_rgba

from colab_qlora.curves import draw_curves
from colab_qlora.curves.picture.theme import DARK, DASHES, HATCHES, LIGHT, MARKERS, MOST_RUNS

# Machado, Oliveira and Fernandes 2009, severity 1, for linear RGB
EYES = {
    "normal": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanope": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranope": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanope": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
RGB_TO_XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]
WHITE = np.array([0.95047, 1.0, 1.08883])


def linear(colour):
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(colour, eyes="normal"):
    seen = np.clip(np.array(EYES[eyes]) @ linear(colour), 0, 1)
    t = np.array(RGB_TO_XYZ) @ seen / WHITE
    f = np.where(t > 216 / 24389, np.cbrt(t), (24389 / 27 * t + 16) / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def luminance(colour):
    return float(np.dot([0.2126, 0.7152, 0.0722], linear(colour)))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_palette_in_grey_and_against_the_paper(theme):
    for colour in (*theme.colours, theme.muted):
        assert contrast(colour, theme.paper) >= 3
    assert contrast(theme.ink, theme.paper) >= 7
    lightness = [lab(colour)[0] for colour in theme.colours]
    assert min(abs(a - b) for a, b in itertools.combinations(lightness, 2)) >= 7
    assert min(abs(a - b) for a, b in itertools.combinations(lightness[:3], 2)) >= 15


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_palette_with_other_eyes(theme, eyes):
    places = [lab(colour, eyes) for colour in theme.colours]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(places, 2)) >= 27


def test_styles_are_all_different():
    for styles in (DASHES, MARKERS, HATCHES):
        assert len(set(styles)) == len(styles) == MOST_RUNS


def test_series_differ_by_more_than_colour():
    fig = draw_curves({str(k): make_run(low=1 + k / 10) for k in range(6)})
    trains, evals = artists(fig, "train"), artists(fig, "eval")
    assert len({str(line._dash_pattern) for line in trains}) == 6
    assert len({line.get_marker() for line in evals}) == 6
    assert len({line.get_color() for line in trains}) == 6
    single = draw_curves(make_run())
    (train,), (evaluation,) = artists(single, "train"), artists(single, "eval")
    assert contrast(train.get_color(), evaluation.get_color()) > 2
    assert (train.get_marker(), evaluation.get_marker()) == ("None", "o")


def grey_of(fig):
    """The picture in luminance, `(rows, columns)`, 0 to 1."""
    fig.canvas.draw()
    return np.asarray(fig.canvas.buffer_rgba())[..., :3] @ [0.2126, 0.7152, 0.0722] / 255


@pytest.mark.parametrize("dark", [False, True])
def test_the_zone_is_told_apart_in_grey(dark):
    fig = draw_curves(OVERFITTING, diagnosis=OVERFITTING_READ, dark=dark)
    ax, grey = fig.axes[0], grey_of(fig)

    def patch(step, loss):
        x, y = ax.transData.transform((step, loss))
        row = grey.shape[0] - int(y)
        return grey[row - 14 : row + 14, int(x) - 14 : int(x) + 14]

    outside, inside = patch(1.5, 1.37), patch(4.5, 0.9)
    # shaded: the field is another grey than the paper; hatched: strokes stand out from the field
    paper, field = np.median(outside), np.median(inside)
    assert outside.std() < 1e-3
    assert abs(field - paper) > 0.03
    assert np.abs(inside - field).max() > 0.1
    (zone,) = artists(fig, "zone")
    assert zone.get_hatch() and to_rgba(zone.get_facecolor())[3] > 0


@pytest.mark.parametrize("dark", [False, True])
def test_the_veil_makes_lines_fainter_in_grey(dark):
    full = draw_curves(OVERFITTING, dark=dark)
    cut = draw_curves(OVERFITTING, dark=dark, stop_at=3)

    def strength(fig):
        ax, grey = fig.axes[0], grey_of(fig)
        x, y = ax.transData.transform((4.5, 1.4))  # on the eval line
        row = grey.shape[0] - int(y)
        column = grey[row - 20 : row + 20, int(x)]
        return np.abs(column - np.median(column)).max()

    assert 0.05 < strength(cut) < 0.5 * strength(full)
