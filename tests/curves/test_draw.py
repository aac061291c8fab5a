"""The picture and its words, checked on artists and numbers; nobody looks at pixels here."""

from __future__ import annotations

import base64
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from colab_qlora.curves import describe_curves, draw_curves, figure_bundle, save_png
from colab_qlora.curves.artists import DARK, LIGHT
from colab_qlora.errors import UserError

REPO = Path(__file__).resolve().parents[2]


def make_run(points=200, evals=10, low=1.0, rise=0.0, seed=0):
    """A run that falls from 2.4 to `low`; with `rise` its eval loss turns at 40 %."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(points + 1):
        t = step / points
        loss = low + (2.4 - low) * math.exp(-6 * t)
        if step:
            records.append({"step": step, "loss": loss + rng.normal(0, 0.1)})
        if evals and step % (points // evals) == 0:
            records.append({"step": step, "eval_loss": loss + 0.1 + rise * max(0.0, t - 0.4)})
    return records


def replace_losses(records, steps, value):
    return [r | {"loss": value} if "loss" in r and r["step"] in steps else r for r in records]


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


def artists(fig, gid):
    return [artist for artist in fig.findobj() if artist.get_gid() == gid]


def texts(fig, gid):
    return [artist.get_text() for artist in artists(fig, gid)]


def boxes_of_all_text(fig):
    renderer = fig.canvas.get_renderer()
    fig.draw(renderer)
    ax = fig.axes[0]
    placed = [t for gid in ("end-label", "note", "title") for t in artists(fig, gid)]
    in_view = [
        tick
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim()))
        for tick, at in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=True)
        if limits[0] <= at <= limits[1]
    ]
    named = [*placed, *in_view, ax.xaxis.label, ax.yaxis.label]
    return [(t.get_text(), t.get_window_extent(renderer), t.get_fontsize()) for t in named]


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("size", [(800, 450), (480, 300), (1200, 600)])
@pytest.mark.parametrize("name", PICTURES)
def test_text_is_large_inside_the_figure_and_apart(name, size, dark):
    width, height = size
    fig = draw_curves(PICTURES[name], title="A title", dark=dark, width_px=width, height_px=height)
    boxes = boxes_of_all_text(fig)
    for text, box, points in boxes:
        assert points >= 11, text
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (text, box, _), (other, other_box, _) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), f"{text!r} overlaps {other!r}"
    plot = fig.axes[0].get_window_extent()
    assert plot.width > 0.3 * width and plot.height > 0.3 * height


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


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_palette_in_grey_and_against_the_paper(theme):
    for colour in (*theme.colours, theme.muted):
        assert contrast(colour, theme.paper) >= 3
    assert contrast(theme.ink, theme.paper) >= 7
    # lightness in CIE L*, 0 to 100
    lightness = [116 * luminance(colour) ** (1 / 3) - 16 for colour in theme.colours]
    assert min(abs(a - b) for a, b in itertools.combinations(lightness, 2)) >= 7
    assert min(abs(a - b) for a, b in itertools.combinations(lightness[:3], 2)) >= 15


def test_series_differ_by_more_than_colour():
    fig = draw_curves(MANY)
    trains, evals = artists(fig, "train"), artists(fig, "eval")
    assert len({str(line._dash_pattern) for line in trains}) == 6
    assert len({line.get_marker() for line in evals}) == 6
    assert len({line.get_color() for line in trains}) == 6
    single = draw_curves(make_run())
    (train,), (evaluation,) = artists(single, "train"), artists(single, "eval")
    assert contrast(train.get_color(), evaluation.get_color()) > 2
    assert (train.get_marker(), evaluation.get_marker()) == ("None", "o")


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


def test_lone_points_are_visible():
    values = [1.0, math.nan, 2.0, math.nan, math.nan, 1.0, 1.0]
    fig = draw_curves([{"step": s, "loss": v} for s, v in enumerate(values)])
    (dots,) = artists(fig, "lone")
    assert dots.get_xdata().tolist() == [0, 2]


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
