"""Marks of a diagnosis on the picture: lines, zones, diamonds, the veil."""

from __future__ import annotations

import math

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
    artists,
    diagnosis,
    make_run,
    replace_losses,
    texts,
    verdict,
)

from colab_qlora.curves import draw_curves


def steps_of(fig, gid):
    return sorted(float(line.get_xdata()[0]) for line in artists(fig, gid))


def test_the_healthy_textbook_case_has_the_best_line_alone():
    fig = draw_curves(HEALTHY, diagnosis=HEALTHY_READ)
    assert texts(fig, "note") == ["best eval 1.000 at step 5"]
    assert steps_of(fig, "best") == [5]
    assert not artists(fig, "divergence") and not artists(fig, "zone")


def test_the_overfitting_textbook_case_has_one_line_and_one_note():
    fig = draw_curves(OVERFITTING, diagnosis=OVERFITTING_READ)
    assert texts(fig, "note") == ["best eval 1.000 at step 2; overfitting from here"]
    assert steps_of(fig, "divergence") == [2]
    assert not artists(fig, "best")
    (zone,) = artists(fig, "zone")
    assert zone.get_hatch() == "//"
    assert (zone.get_x(), zone.get_x() + zone.get_width()) == (2, 5)


def test_the_textbook_case_of_a_high_rate_marks_where_it_turns():
    fig = draw_curves(RATE_TOO_HIGH, diagnosis=RATE_READ)
    assert texts(fig, "note") == ["unstable since step 4"]
    assert steps_of(fig, "turn") == [4]
    assert not artists(fig, "best")


def test_lines_differ_by_their_dashes_and_have_notes_of_their_own():
    fig = draw_curves(SPIKED, diagnosis=SPIKED_READ, stop_at=150)
    assert (steps_of(fig, "best"), steps_of(fig, "divergence")) == ([80], [100])
    assert (steps_of(fig, "turn"), steps_of(fig, "stop")) == ([60, 140, 160], [150])
    lines = [artists(fig, gid)[0] for gid in ("best", "divergence", "turn", "stop")]
    assert len({str(line._dash_pattern) for line in lines}) == 4
    assert set(texts(fig, "note")) == {
        "best eval 1.227 at step 80",
        "overfitting since step 100",
        "maybe unstable since step 60",
        "memorising since step 140",
        "\u25c7 2 spikes, first at step 50",
        "stop at step 150: last eval 1.721, at step 140",
    }


def test_the_joint_note_becomes_two_where_a_row_is_too_short():
    name = "a run with a name"
    runs = {name: OVERFITTING, "b": [{"step": 1, "loss": 1.0}]}
    fig = draw_curves(runs, diagnosis={name: OVERFITTING_READ}, width_px=480)
    assert texts(fig, "note") == [
        f"best eval 1.000 at step 2 ({name})",
        "overfitting from here",
    ]


def test_two_marks_at_one_step_share_a_line():
    read = diagnosis(
        verdict("overfitting", 2), verdict("memorising", 2), last_step=5, divergence_step=2
    )
    fig = draw_curves(OVERFITTING, diagnosis=read)
    assert not artists(fig, "turn")
    assert "memorising since step 2" in texts(fig, "note")


def test_marks_outside_the_picture_are_left_out():
    read = diagnosis(
        verdict("overfitting", 900), verdict("unstable", 950), last_step=999, divergence_step=900
    )
    fig = draw_curves(OVERFITTING, diagnosis=read)
    assert texts(fig, "note") == ["best eval 1.000 at step 2"]
    assert not artists(fig, "zone") and not artists(fig, "turn")


def test_spikes_have_diamonds_on_their_points():
    fig = draw_curves(SPIKED, diagnosis=SPIKED_READ)
    (diamonds,) = artists(fig, "spike")
    assert diamonds.get_marker() == "D" and diamonds.get_markerfacecolor() == "none"
    assert diamonds.get_xdata().tolist() == [50, 120]
    assert diamonds.get_ydata().tolist() == [2.3, 2.3]


def test_spikes_above_the_picture_are_called_spikes():
    read = diagnosis(verdict("spikes", kind="info", steps=(90, 160)), last_step=200)
    run = replace_losses(make_run(), {90, 160}, 50.0)
    fig = draw_curves(run, diagnosis=read)
    assert not artists(fig, "spike")
    assert "\u25b2 2 spikes above, highest 50.000 at step 90" in texts(fig, "note")
    fig = draw_curves(replace_losses(run, {120}, 40.0), diagnosis=read)
    assert "\u25b2 3 values above, highest 50.000 at step 90" in texts(fig, "note")


def test_zones_of_a_comparison_belong_to_their_runs():
    runs = {"a": make_run(rise=2.0), "b": make_run(low=1.3, rise=3.0), "c": make_run(low=1.6)}
    reads = {
        name: diagnosis(verdict("overfitting", step), last_step=200, divergence_step=step)
        for name, step in (("a", 80), ("b", 100))
    }
    fig = draw_curves(runs, diagnosis=reads)
    zones = artists(fig, "zone")
    assert len(zones) == 2
    assert len({zone.get_hatch() for zone in zones}) == 2
    assert len({tuple(zone.get_facecolor()[0]) for zone in zones}) == 2
    assert steps_of(fig, "divergence") == [80, 100]
    lowest = [zone.get_paths()[0].vertices[:, 1].min() for zone in zones]
    evals = {name: {r["step"]: r.get("eval_loss") for r in run} for name, run in runs.items()}
    # an eval record comes after the train record of its step
    assert lowest == pytest.approx([evals["a"][80], evals["b"][100]], abs=1e-9)
    assert texts(fig, "note") == [
        "best eval 1.227 at step 80 (a); overfitting from here",
        "overfitting since step 100 (b)",
    ]


def test_many_diverging_runs_are_counted():
    runs = {str(k): make_run(rise=2.0, low=1 + k / 10) for k in range(4)}
    read = diagnosis(verdict("overfitting", 80), last_step=200, divergence_step=80)
    fig = draw_curves(runs, diagnosis=dict.fromkeys(runs, read))
    assert texts(fig, "note") == [
        "best eval 1.227 at step 80 (0)",
        "overfitting since step 80, and 3 more",
    ]
    assert len(artists(fig, "divergence")) == 4


def test_stop_draws_a_veil_over_what_lies_behind():
    fig = draw_curves(SPIKED, stop_at=120, learning_rate=True)
    veils = artists(fig, "veil")
    assert len(veils) == len(fig.axes) == 2
    for veil, ax in zip(veils, fig.axes, strict=True):
        assert veil.get_x() == 120
        assert veil.get_x() + veil.get_width() == pytest.approx(ax.get_xlim()[1])
        drawn = [line.get_zorder() for line in ax.lines if line.get_gid() != "stop"]
        assert veil.get_zorder() > max(drawn)
        assert veil.get_facecolor()[:3] == (1.0, 1.0, 1.0)
    assert "stop at step 120: eval 1.538" in texts(fig, "note")


@pytest.mark.parametrize("stop_at", [200, 201, 10**9, np.int64(300)])
def test_nothing_lies_behind_the_end(stop_at):
    fig = draw_curves(make_run(), stop_at=stop_at)
    assert not artists(fig, "veil") and not artists(fig, "stop")


def test_stop_in_a_comparison_says_the_lowest():
    fig = draw_curves({"a": HEALTHY, "b": OVERFITTING, "c": RATE_TOO_HIGH}, stop_at=3)
    assert "stop at step 3: lowest last eval 1.100 (b)" in texts(fig, "note")
    fig = draw_curves({"a": RATE_TOO_HIGH, "b": RATE_TOO_HIGH}, stop_at=3)
    assert "stop at step 3: no eval loss by then" in texts(fig, "note")


def test_the_eval_before_training_is_said_to_be_that():
    run = [{"step": 0, "eval_loss": 1.0}, {"step": 5, "eval_loss": math.pi}]
    assert texts(draw_curves(run), "note") == ["best eval 1.000 at step 0, before training"]
