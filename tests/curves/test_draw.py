"""The picture and its words, checked on artists and numbers; nobody looks at pixels here."""

from __future__ import annotations

import base64
import gc
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from loss_runs import (
    HEALTHY,
    HEALTHY_READ,
    OVERFITTING,
    OVERFITTING_READ,
    RATE_READ,
    RATE_TOO_HIGH,
    SPIKED,
    SPIKED_READ,
    add_events,
    artists,
    check_all_text,
    diagnosis,
    make_run,
    replace_losses,
    texts,
    verdict,
)

from colab_qlora.curves import describe_curves, draw_curves, figure_bundle, save_png
from colab_qlora.curves.picture.curve import as_curves
from colab_qlora.curves.picture.theme import LIGHT
from colab_qlora.errors import UserError

REPO = Path(__file__).resolve().parents[2]


NAN_RUN = replace_losses(make_run(), range(150, 201), math.nan)
MANY = {f"learning rate 2e-{k}": make_run(points=200 - 20 * k, low=1 + k / 20) for k in range(6)}
PICTURES = {
    "healthy": make_run(),
    "overfit": make_run(rise=2.0),
    "three": {name: MANY[name] for name in list(MANY)[:3]},
    "six": MANY,
    "six, own base": {n: make_run(low=1 + i / 4, evals=0) for i, n in enumerate(MANY)},
    "one point": [{"step": 1, "loss": 2.3}],
    "one eval": [{"step": 7, "eval_loss": 2.3}],
    "two points": [{"step": 1, "loss": 2.3}, {"step": 2, "loss": 2.1}],
    "evals only": [r for r in make_run() if "eval_loss" in r],
    "base only": [{"step": 0, "eval_loss": 2.0}, {"step": 1, "loss": 2.0}],
    "nan run": NAN_RUN,
    "only nan": [{"step": s, "loss": math.nan} for s in range(5)],
    "spikes": replace_losses(make_run(), {90, 91, 160}, 50.0) + [{"step": 120, "loss": math.inf}],
    "constant": [{"step": s, "loss": 1.5} for s in range(50)],
    "zero": [{"step": s, "loss": 0.0} for s in range(50)],
    "late steps": [{"step": 10**6 + s, "loss": 1e-4 * (s + 1)} for s in range(20)],
}


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [(800, 450), (480, 300), (1200, 600)])
@pytest.mark.parametrize("name", PICTURES)
def test_text_is_large_inside_the_figure_and_apart(name, size, dark):
    width, height = size
    fig = draw_curves(PICTURES[name], title="A title", dark=dark, width_px=width, height_px=height)
    check_all_text(fig, width, height)


EVENTFUL = add_events(SPIKED, (0, 10, 14, 17, 80, 150, 199))
THREE_READ = {
    name: diagnosis(
        verdict("overfitting", 40 + 20 * k),
        verdict("memorising", 90 + k),
        last_step=200 - 20 * k,
        divergence_step=40 + 20 * k,
    )
    for k, name in enumerate(list(MANY)[:3])
}
MARKED = {
    "textbook healthy": (HEALTHY, HEALTHY_READ, {}),
    "textbook overfitting": (OVERFITTING, OVERFITTING_READ, {}),
    "textbook rate": (RATE_TOO_HIGH, RATE_READ, {"learning_rate": True}),
    "marks": (SPIKED, SPIKED_READ, {}),
    "marks and rate": (SPIKED, SPIKED_READ, {"learning_rate": True}),
    "everything": (EVENTFUL, SPIKED_READ, {"learning_rate": True, "stop_at": 150}),
    "events in a zoom": (EVENTFUL, None, {"y_range": (0.9, 1.4), "stop_at": 150}),
    "many events": (add_events(make_run(), range(0, 200, 3)), None, {}),
    "three": (PICTURES["three"], THREE_READ, {"learning_rate": True, "stop_at": 100}),
    "six": (MANY, THREE_READ, {"learning_rate": True}),
}


@pytest.mark.parametrize("size", [(800, 450), (480, 300), (480, 360), (1200, 600)])
@pytest.mark.parametrize("name", MARKED)
def test_marked_text_is_large_inside_the_figure_and_apart(name, size):
    runs, read, settings = MARKED[name]
    width, height = size
    fig = draw_curves(
        runs, diagnosis=read, title="A title", width_px=width, height_px=height, **settings
    )
    check_all_text(fig, width, height)
    bottom = fig.axes[0].get_window_extent().y0
    for panel in fig.axes[1:]:
        assert panel.get_window_extent().y1 < bottom


def test_labels_of_one_run():
    fig = draw_curves(make_run(rise=2.0), title="Three epochs")
    assert sorted(texts(fig, "end-label")) == ["before training", "eval", "train, smoothed"]
    assert texts(fig, "note") == ["best eval 1.227 at step 80"]
    assert texts(fig, "title") == ["Three epochs"]
    (best,) = artists(fig, "best")
    assert list(best.get_xdata()) == [80, 80]
    (base,) = artists(fig, "base")
    assert base.get_ydata()[0] == pytest.approx(2.5)
    assert base.get_linestyle() == "--"
    (ring,) = artists(fig, "best-ring")
    assert ring.get_xdata()[0] == 80
    assert fig.axes[0].get_legend() is None


def test_labels_stand_at_the_line_ends():
    fig = draw_curves(make_run(low=1.0, rise=3.0))
    ax = fig.axes[0]
    for gid, word in (("eval", "eval"), ("train", "train, smoothed")):
        (line,) = artists(fig, gid)
        end_px = ax.transData.transform((line.get_xdata()[-1], line.get_ydata()[-1]))
        (label,) = [t for t in artists(fig, "end-label") if t.get_text() == word]
        label_px = fig.transFigure.transform(label.get_position())
        assert abs(label_px[1] - end_px[1]) < 2
        assert label_px[0] > end_px[0]


def test_labels_of_a_comparison():
    fig = draw_curves(PICTURES["three"])
    names = list(PICTURES["three"])
    wanted = [f"{name}: {part}" for name in names for part in ("train", "eval")]
    assert sorted(texts(fig, "end-label")) == sorted([*wanted, "before training"])
    assert len(artists(fig, "best")) == 1
    assert texts(fig, "note") == [f"best eval 1.103 at step 200 ({names[0]})"]
    assert len(artists(fig, "best-ring")) == 3


def test_bases_that_differ_have_their_own_lines():
    runs = {"small": make_run(), "large": [r | {"eval_loss": 0.8} for r in make_run()]}
    fig = draw_curves(runs)
    assert {"small: before training", "large: before training"} < set(texts(fig, "end-label"))
    assert len(artists(fig, "base")) == 2


def test_labels_go_by_rank_where_room_is_short():
    fig = draw_curves(MANY, width_px=480, height_px=300)
    assert texts(fig, "end-label"), "train labels stay"
    assert all(text.endswith("train") for text in texts(fig, "end-label"))
    assert len(texts(fig, "end-label")) == 6


def test_non_finite_values_are_marked_on_the_top_edge():
    fig = draw_curves(NAN_RUN)
    (crosses,) = artists(fig, "non-finite")
    assert crosses.get_marker() == "x"
    assert set(crosses.get_ydata()) == {1}
    assert min(crosses.get_xdata()) == 150
    assert "\u00d7 51 values nan or inf, first at step 150" in texts(fig, "note")
    (train,) = artists(fig, "train")
    assert np.isfinite(train.get_ydata()[:149]).all()


def test_one_spike_does_not_flatten_the_picture():
    calm = draw_curves(make_run()).axes[0].get_ylim()
    fig = draw_curves(replace_losses(make_run(), {120}, 50.0))
    low, high = fig.axes[0].get_ylim()
    assert (low, high) == pytest.approx(calm, abs=0.3)
    (triangle,) = artists(fig, "clipped")
    assert list(triangle.get_xdata()) == [120]
    assert "\u25b2 1 value above, 50.000 at step 120" in texts(fig, "note")
    (train,) = artists(fig, "train")
    assert train.get_ydata().max() < 2.6, "the smoothed line follows the spike"


@pytest.mark.parametrize("points", [2, 5, 10, 12, 20, 100])
def test_a_steep_start_is_no_spike(points):
    losses = [2.5, 1.6, 1.3, 1.2] + [1.1] * points
    fig = draw_curves([{"step": s, "loss": loss} for s, loss in enumerate(losses[: points + 1])])
    assert fig.axes[0].get_ylim()[1] > 2.5
    assert not artists(fig, "clipped")


def test_a_short_run_is_not_smoothed():
    fig = draw_curves([{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
    assert texts(fig, "end-label") == ["train"]
    assert artists(fig, "train")[0].get_ydata().tolist() == [3.0, 2.0]
    assert not artists(fig, "train-raw")


def test_smooth_false_draws_the_logged_loss():
    fig = draw_curves(make_run(), smooth=False)
    assert not artists(fig, "train-raw")
    assert "train" in texts(fig, "end-label")


def test_a_share_sets_the_smoothing():
    def line(smooth):
        return artists(draw_curves(make_run(), smooth=smooth), "train")[0].get_ydata()

    np.testing.assert_array_equal(line(0.05), line(True))
    np.testing.assert_array_equal(line(0), line(False))
    roughness = [np.abs(np.diff(line(smooth))).mean() for smooth in (0.0, 0.01, 0.05, 0.3)]
    assert roughness == sorted(roughness, reverse=True)


def test_lone_points_are_visible():
    values = [1.0, math.nan, 2.0, math.nan, math.nan, 1.0, 1.0, *([1.0] * 40)]
    fig = draw_curves([{"step": s, "loss": v} for s, v in enumerate(values)], smooth=False)
    (dots,) = artists(fig, "lone")
    assert dots.get_xdata().tolist() == [0, 2]


def test_few_points_are_shown_as_points():
    fig = draw_curves(HEALTHY)
    (train,), (evaluation,) = artists(fig, "train"), artists(fig, "eval")
    assert train.get_marker() not in ("None", evaluation.get_marker())
    # in grey a hollow marker differs from a full one
    assert train.get_markerfacecolor() == LIGHT.paper
    assert evaluation.get_markerfacecolor() == evaluation.get_color()
    assert artists(draw_curves(make_run(points=300)), "train-raw")[0].get_marker() == "None"
    assert artists(draw_curves(make_run(points=60)), "train-raw")[0].get_marker() == "o"


def test_y_range_is_kept_and_what_lies_beyond_is_said():
    run = [{"step": s, "loss": loss} for s, loss in enumerate([5.0, 3.0, 2.0, 1.5, 0.5, 0.2])]
    fig = draw_curves(run, y_range=(1, 4))
    assert fig.axes[0].get_ylim() == (1, 4)
    assert "\u25b2 1 value above, 5.000 at step 0" in texts(fig, "note")
    assert "\u25bc 2 values below, lowest 0.200 at step 5" in texts(fig, "note")
    (below,) = artists(fig, "clipped-below")
    assert below.get_xdata().tolist() == [4, 5] and set(below.get_ydata()) == {0}


def test_a_base_outside_the_range_has_no_label():
    fig = draw_curves(make_run(), y_range=(1, 2))
    assert "before training" not in texts(fig, "end-label")
    assert not artists(fig, "base")


def test_the_learning_rate_has_a_panel_with_its_peak():
    run = [{"step": s, "loss": 2.0, "learning_rate": r} for s, r in ((1, 1e-4), (2, 3e-4), (3, 0))]
    fig = draw_curves(run, learning_rate=True)
    ax, panel = fig.axes
    assert ax.get_xlim() == panel.get_xlim()
    assert ax.get_window_extent().x0 == pytest.approx(panel.get_window_extent().x0)
    assert ax.get_window_extent().x1 == pytest.approx(panel.get_window_extent().x1)
    assert texts(fig, "panel-label") == ["learning rate", "peak 0.0003"]
    (line,), (peak,) = artists(fig, "learning-rate"), artists(fig, "peak")
    assert line.get_ydata().tolist() == [1e-4, 3e-4, 0]
    assert (peak.get_xdata()[0], peak.get_ydata()[0]) == (2, 3e-4)
    assert len(draw_curves(run).axes) == 1


def test_learning_rates_of_a_comparison():
    rates = {"a": 1e-4, "b": 1e-3}
    runs = {n: [r | {"learning_rate": rate} for r in make_run()] for n, rate in rates.items()}
    fig = draw_curves(runs, learning_rate=True)
    assert texts(fig, "panel-label") == ["peak learning rate", "0.0001 to 0.001"]
    lines = artists(fig, "learning-rate")
    assert len({str(line._dash_pattern) for line in lines}) == 2


def test_a_log_without_learning_rate_says_so():
    fig = draw_curves(HEALTHY, learning_rate=True)
    assert len(fig.axes) == 1
    assert "the log has no learning rate" in texts(fig, "note")


def test_a_curve_made_once_gives_the_same_picture():
    run = add_events(make_run(), (20,))
    (curve,) = as_curves(run)
    settings = {"learning_rate": True, "diagnosis": SPIKED_READ}
    first = figure_bundle(draw_curves(run, **settings), "")
    assert figure_bundle(draw_curves(curve, **settings), "") == first
    named = draw_curves({"a": curve, "b": make_run(low=1.2)})
    assert "a: train" in texts(named, "end-label")


def test_a_million_points_take_less_than_a_second():
    losses = np.random.default_rng(0).normal(1, 0.1, 10**6).tolist()
    records = [{"step": step, "loss": loss} for step, loss in enumerate(losses)]
    draw_curves(records[:10])  # loads matplotlib
    # processor time: what else runs on the machine is not counted; nor is what earlier tests left
    # for Python to search through for garbage
    gc.collect()
    gc.disable()
    try:
        began = time.process_time()
        figure_bundle(draw_curves(records), "")
        assert time.process_time() - began < 1
    finally:
        gc.enable()


def test_notes_go_by_importance_where_the_height_is_short():
    tall = draw_curves(EVENTFUL, diagnosis=SPIKED_READ, height_px=600)
    low = draw_curves(EVENTFUL, diagnosis=SPIKED_READ, width_px=480, height_px=300, title="Title")
    assert len(texts(low, "note")) < len(texts(tall, "note"))
    assert "overfitting since step 100" in texts(low, "note")


def test_a_long_run_is_thinned_and_keeps_its_extremes():
    losses = np.random.default_rng(0).normal(1, 0.1, 100_000)
    losses[54_321], losses[76_543] = 0.2, 1.8
    fig = draw_curves([{"step": s, "loss": loss} for s, loss in enumerate(losses.tolist())])
    (raw,) = artists(fig, "train-raw")
    assert len(raw.get_xdata()) <= 5 * 800
    assert raw.get_ydata().min() == 0.2
    assert raw.get_ydata().max() == 1.8


def test_a_dollar_sign_is_no_formula_and_a_line_break_no_line():
    fig = draw_curves({"a $x_1$\nb": make_run(), "c": make_run()}, title="50 $\nper $x")
    assert "a $x_1$ b: eval" in texts(fig, "end-label")
    assert texts(fig, "title") == ["50 $ per $x"]
    figure_bundle(fig, "text")


def test_pyplot_and_the_settings_are_left_alone():
    code = (
        "import sys\n"
        "import colab_qlora.curves as curves\n"
        "assert not {'matplotlib', 'torch', 'transformers'} & set(sys.modules), 'import is heavy'\n"
        "import matplotlib\n"
        "before = dict(matplotlib.rcParams)\n"
        "fig = curves.draw_curves([{'step': 1, 'loss': 2.0}])\n"
        "curves.figure_bundle(fig, 'text')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert dict(matplotlib.rcParams) == before\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO), "MPLBACKEND": "agg"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_save_png(tmp_path):
    fig = draw_curves(make_run())
    path = save_png(fig, tmp_path / "new" / "loss.png")
    size = path.read_bytes()[16:24]
    assert (int.from_bytes(size[:4], "big"), int.from_bytes(size[4:], "big")) == (800, 450)
    first = path.read_bytes()
    assert save_png(draw_curves(make_run()), path).read_bytes() == first
    size = save_png(fig, path, dpi=200).read_bytes()[16:24]
    assert (int.from_bytes(size[:4], "big"), int.from_bytes(size[4:], "big")) == (1600, 900)
    assert os.listdir(path.parent) == ["loss.png"]
    with pytest.raises(UserError, match="saved as PNG"):
        save_png(fig, tmp_path / "loss.svg")


def test_figure_bundle():
    bundle = figure_bundle(draw_curves(make_run()), "Train loss goes down.")
    assert set(bundle) == {"image/png", "text/plain"}
    assert base64.b64decode(bundle["image/png"], validate=True).startswith(b"\x89PNG")
    assert bundle["text/plain"] == "Train loss goes down."


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "the log has no loss values"),
        ({}, "there is no run to show"),
        ({"a": make_run(), "b": []}, "run 'b' has no loss values"),
        ([{"step": 1, "learning_rate": 1.0}], "the log has no loss values"),
        ({"step": 1, "loss": 2.0}, "that is one record"),
        ("work/loss.jsonl", "that is a path"),
        (Path("work/loss.jsonl"), "that is a path"),
        ({"a": "work/loss.jsonl"}, "that is a path"),
        ([1.0, 2.0], "that is not a loss log"),
        (3, "that is not a loss log"),
        ([{"loss": 2.0}], "the record has no step"),
    ],
)
def test_wrong_runs(runs, message):
    for function in (draw_curves, describe_curves):
        with pytest.raises(UserError, match=message):
            function(runs)


def test_wrong_pictures():
    with pytest.raises(UserError, match="too many runs .* got 7; allowed: 1 to 6"):
        draw_curves({str(k): make_run() for k in range(7)})
    with pytest.raises(UserError, match="too small .* got 300 x 450 px"):
        draw_curves(make_run(), width_px=300)


@pytest.mark.parametrize("y_range", [(2, 1), (1, 1), (0, math.inf), (math.nan, 1), 3, (1, 2, 3)])
def test_wrong_y_range(y_range):
    with pytest.raises(UserError, match="y_range is no range"):
        draw_curves(HEALTHY, y_range=y_range)


@pytest.mark.parametrize("smooth", [-0.1, 1.5, math.nan, "much"])
def test_wrong_smooth(smooth):
    with pytest.raises(UserError, match="smooth is no share .* allowed: True, False, or 0 to 1"):
        draw_curves(HEALTHY, smooth=smooth)


@pytest.mark.parametrize("stop_at", [-1, 2.5, True, "3"])
def test_wrong_stop_at(stop_at):
    with pytest.raises(UserError, match="stop_at is no step"):
        draw_curves(HEALTHY, stop_at=stop_at)


def test_equal_losses_of_runs_of_different_length_are_one_smoothed_line():
    whole = make_run(points=200, evals=0)
    part = [record for record in whole if record["step"] <= 80]
    lines = artists(draw_curves({"whole": whole, "part": part}), "train")
    smoothed = [line.get_ydata() for line in lines]
    assert sorted(len(line) for line in smoothed) == [80, 200]
    short, long = sorted(smoothed, key=len)
    assert short == pytest.approx(long[:80])
