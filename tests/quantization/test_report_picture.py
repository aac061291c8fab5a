"""The picture of a quantisation report: readable, complete, and the same in grey."""

from __future__ import annotations

import itertools
import sys

import pytest
from report_states import (
    FUSED,
    SHAPES,
    assert_readable,
    gids,
    llama_report,
    model_of,
    placed,
    small_report,
)

from colab_qlora.quantization.budget import INT8, NF4_64, RUNGS
from colab_qlora.quantization.dynamic import MapChange
from colab_qlora.quantization.report import QuantizationReport, WeightRow, quantization_report
from colab_qlora.quantization.report_bars import price_scale
from colab_qlora.quantization.report_style import ON_DARK, ON_LIGHT
from colab_qlora.quantization.report_words import labels


@pytest.fixture
def small():
    return small_report()


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize(
    ("layers", "shapes"),
    [
        (1, SHAPES),
        (2, FUSED),
        (8, SHAPES),
        (30, SHAPES),
        (32, SHAPES),
        (80, SHAPES),
        (126, FUSED),
        (4, {f"block.a_projection_of_a_very_long_name_{i}": (64, 64) for i in range(20)}),
    ],
    ids=["one", "fused", "eight", "SmolLM2", "8B", "70B", "many", "unknown names"],
)
def test_picture_is_readable(layers, shapes, dark):
    report = llama_report(layers, shapes, changes=9)
    fig = report.draw(dark=dark)
    assert_readable(fig)
    assert len(gids(fig, "cell ")) == layers * min(len(shapes), 16)
    assert fig.get_facecolor() == pytest.approx(
        (1, 1, 1, 1) if not dark else (0.086, 0.094, 0.114, 1), abs=1e-2
    )


def test_picture_shows_rungs_changes_and_bytes(small):
    fig = small.draw()
    assert gids(fig, "cell ") == [f"cell up_proj 0 {INT8}", f"cell down_proj 1 {NF4_64}"]
    # each kind is in one of the two layers only
    assert gids(fig, "none ") == ["none up_proj 1", "none down_proj 0"]
    # one in the grid, one in its legend
    assert gids(fig, "change ") == ["change ^"] * 2
    bars = {
        a.get_gid(): a.get_width()
        for a in fig.get_children()
        if a.get_gid() and a.get_gid().startswith("bytes ")
    }
    now = sum(width for gid, width in bars.items() if gid.startswith("bytes now"))
    plain = sum(width for gid, width in bars.items() if gid.startswith("bytes plain"))
    # 2 px of each embedding are a gap
    assert (now + 2 / 800) / (plain + 2 / 800) == pytest.approx(small.bytes / small.plain_bytes)
    # the embedding has no price in plain NF4
    assert "price embed_tokens plain" not in gids(fig, "price ")
    assert {"price up_proj plain", "price up_proj now"} <= set(gids(fig, "price "))


def test_the_last_change_of_a_weight_is_marked():
    name = "model.layers.0.mlp.up_proj"
    steps = [
        MapChange(1, name, NF4_64, INT8, 10, "up"),
        MapChange(2, name, INT8, NF4_64, -10, "down"),
    ]
    report = quantization_report(model_of({name: placed((64, 64), NF4_64, 1.0)}, steps))
    assert set(gids(report.draw(), "change ")) == {"change v"}


def test_experts_share_a_cell():
    rows = tuple(
        WeightRow(f"layers.0.experts.{i}.up", 0, "up", rung, NF4_64, 4.1, 100, 100)
        for i, rung in enumerate((NF4_64, NF4_64, INT8, "fp4_64"))
    )
    report = QuantizationReport(rows)
    fig = report.draw()
    assert_readable(fig)
    cells = {
        a.get_gid(): a.get_height()
        for a in fig.get_children()
        if a.get_gid() and a.get_gid().startswith("cell")
    }
    assert list(cells) == [f"cell up 0 {NF4_64}", f"cell up 0 {INT8}", "cell up 0 fp4_64"]
    assert cells[f"cell up 0 {NF4_64}"] == pytest.approx(2 * cells[f"cell up 0 {INT8}"])
    # one short name would stand for all of them, so that they keep their own
    assert labels(report)["layers.0.experts.1.up"] == "layers.0.experts.1.up"


def test_picture_is_pure_and_repeats_itself(tmp_path):
    from colab_qlora.curves.draw import figure_bundle, save_png

    report = llama_report(3)
    pyplot = sys.modules.get("matplotlib.pyplot")
    known = pyplot and pyplot.get_fignums()
    first = save_png(report.draw(), tmp_path / "a.png").read_bytes()
    assert first == save_png(report.draw(), tmp_path / "b.png").read_bytes()
    assert sys.modules.get("matplotlib.pyplot") is pyplot
    assert (pyplot and pyplot.get_fignums()) == known
    bundle = figure_bundle(report.draw(), report.describe())
    assert "The dearest kinds: " in bundle["text/plain"]
    assert report.describe().startswith("a/model: ")


def test_a_cell_of_a_wide_grid_has_its_bits_in_words(small):
    words = [text.get_text() for text in small.draw().texts]
    assert "8.50" in words
    assert not any(word == "8.50" for word in (t.get_text() for t in llama_report(30).draw().texts))


def _lightness(colour):
    """CIE L*, 0 to 100."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.0089 else 903.3 * luminance, luminance


@pytest.mark.parametrize("style", [ON_LIGHT, ON_DARK], ids=["light", "dark"])
def test_rungs_differ_in_grey_and_their_words_in_contrast(style):
    steps = [_lightness(style.of(rung).face)[0] for rung in RUNGS]
    direction = 1 if style is ON_DARK else -1
    assert all(direction * (b - a) >= 15 for a, b in itertools.pairwise(steps)), steps
    for rung in (*RUNGS, "fp4_64"):
        look = style.of(rung)
        dark, light = sorted((_lightness(look.face)[1], _lightness(look.ink)[1]))
        assert (light + 0.05) / (dark + 0.05) >= 4.5, rung


def test_bars_are_logarithmic_only_where_they_have_to_be():
    linear = price_scale([1.0, 10.0, None, 0.0])
    assert not linear.is_log and linear(5.0) == 0.5 and linear(0.0) == 0.0
    log = price_scale([1e-6, 1e-2])
    assert log.is_log and log(1e-2) == pytest.approx(1.0)
    assert log(1e-6) > 0.05
    assert log(1e-4) - log(1e-5) == pytest.approx(log(1e-3) - log(1e-4))
    # what is very far below the rest has no length
    assert price_scale([1e-30, 1.0])(1e-30) == 0.0
    assert price_scale([0.0])(0.0) == 0.0
