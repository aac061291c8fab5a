"""Events on the bottom edge: ticks, numbers, one note."""

from __future__ import annotations

import pytest
from loss_runs import HEALTHY, add_events, artists, make_run, texts

from colab_qlora.curves import draw_curves


def test_events_are_numbered_ticks_with_one_note():
    fig = draw_curves(add_events(make_run(), (20, 100, 180)))
    ticks = artists(fig, "event-tick")
    assert [tick.get_xdata()[0] for tick in ticks] == [20, 100, 180]
    assert texts(fig, "event-number") == ["1", "2", "3"]
    assert "3 events, numbered 1 to 3, first at step 20" in texts(fig, "note")


def test_one_event_is_named():
    fig = draw_curves(add_events(make_run(), (20,)))
    assert "event at step 20: layer 20 down_proj: NF4 -> int8" in texts(fig, "note")


def test_close_events_share_a_text():
    fig = draw_curves(add_events(make_run(), (100, 101, 102, 180)))
    assert texts(fig, "event-number") == ["1-3", "4"]
    assert len(artists(fig, "event-tick")) == 4


def test_events_of_a_comparison_are_counted_through():
    runs = {"a": add_events(make_run(), (20, 150)), "b": add_events(make_run(low=1.3), (80,))}
    fig = draw_curves(runs)
    assert texts(fig, "event-number") == ["1", "3", "2"]
    assert len({tick.get_color() for tick in artists(fig, "event-tick")}) == 2
    assert "3 events, numbered 1 to 3, first at step 20 (a)" in texts(fig, "note")


@pytest.mark.parametrize("size", [(800, 450), (480, 360)])
def test_losses_stay_above_the_numbers(size):
    fig = draw_curves(add_events(make_run(), (20, 100)), width_px=size[0], height_px=size[1])
    fig.canvas.draw()
    (raw,) = artists(fig, "train-raw")
    lowest = fig.axes[0].transData.transform((0, raw.get_ydata().min()))[1]
    for number in artists(fig, "event-number"):
        assert number.get_window_extent().y1 < lowest


def test_an_event_before_the_first_loss_is_in_the_picture():
    fig = draw_curves(add_events(HEALTHY, (0,)))
    low, _ = fig.axes[0].get_xlim()
    assert low < 0
    assert not artists(draw_curves(HEALTHY), "event-tick")
