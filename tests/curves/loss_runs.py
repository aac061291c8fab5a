"""Runs and diagnoses for the tests of pictures, and what they ask a figure."""

from __future__ import annotations

import itertools
import math

import numpy as np

from colab_qlora.curves.verdicts import Diagnosis, Verdict


def make_run(points=200, evals=10, low=1.0, rise=0.0, seed=0):
    """A run that falls from 2.4 to `low`; with `rise` its eval loss turns at 40 %."""
    rng = np.random.default_rng(seed)
    records = []
    for step in range(points + 1):
        t = step / points
        loss = low + (2.4 - low) * math.exp(-6 * t)
        if step:
            rate = 2e-4 * (1 - t)
            noisy = loss + rng.normal(0, 0.1)
            records.append({"step": step, "loss": noisy, "learning_rate": rate})
        if evals and step % (points // evals) == 0:
            records.append({"step": step, "eval_loss": loss + 0.1 + rise * max(0.0, t - 0.4)})
    return records


def replace_losses(records, steps, value):
    return [r | {"loss": value} if "loss" in r and r["step"] in steps else r for r in records]


def add_events(records, steps):
    return records + [{"step": s, "event": f"layer {s} down_proj: NF4 -> int8"} for s in steps]


def textbook(train, evals=()):
    records = [{"step": step, "loss": loss} for step, loss in enumerate(train, 1)]
    return records + [{"step": step, "eval_loss": loss} for step, loss in enumerate(evals, 1)]


HEALTHY = textbook([2.0, 1.5, 1.2, 1.0, 0.9], [2.1, 1.6, 1.3, 1.1, 1.0])
OVERFITTING = textbook([1.0, 0.8, 0.6, 0.5, 0.4], [1.1, 1.0, 1.1, 1.3, 1.5])
RATE_TOO_HIGH = textbook([2.0, 1.8, 2.1, 1.5, 2.3])


def verdict(name, step=None, *, kind="fault", confidence="likely", steps=()):
    return Verdict(name, kind, confidence, step, "the numbers say so", "act", {}, steps)


def diagnosis(*verdicts, last_step, divergence_step=None):
    return Diagnosis(verdicts, last_step, divergence_step=divergence_step)


OVERFITTING_READ = diagnosis(verdict("overfitting", 2), last_step=5, divergence_step=2)
RATE_READ = diagnosis(verdict("unstable", 4), last_step=5)
HEALTHY_READ = diagnosis(verdict("healthy", kind="good"), last_step=5)
SPIKED = replace_losses(make_run(rise=2.0), {50, 120}, 2.3)
SPIKED_READ = diagnosis(
    verdict("overfitting", 100),
    verdict("unstable", 60, confidence="watch"),
    verdict("memorising", 140, steps=(160,)),
    verdict("spikes", kind="info", steps=(50, 120)),
    last_step=200,
    divergence_step=100,
)


def artists(fig, gid):
    return [artist for artist in fig.findobj() if artist.get_gid() == gid]


def texts(fig, gid):
    return [artist.get_text() for artist in artists(fig, gid)]


def boxes_of_all_text(fig):
    """Words, box in px and size in pt of all text that is seen."""
    renderer = fig.canvas.get_renderer()
    fig.draw(renderer)
    gids = ("end-label", "note", "title", "panel-label", "event-number")
    named = [t for gid in gids for t in artists(fig, gid)]
    for ax in fig.axes:
        for axis, limits in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
            named += [
                tick.label1
                for tick in axis.get_major_ticks()
                if limits[0] <= tick.get_loc() <= limits[1] and tick.label1.get_visible()
            ]
            named.append(axis.label)
    named = [text for text in named if text.get_text()]
    return [(t.get_text(), t.get_window_extent(renderer), t.get_fontsize()) for t in named]


def check_all_text(fig, width, height):
    """Asserts that all text is large, inside the figure and apart; and that the plot has room."""
    boxes = boxes_of_all_text(fig)
    for text, box, points in boxes:
        assert points >= 11, text
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (text, box, _), (other, other_box, _) in itertools.combinations(boxes, 2):
        assert not box.overlaps(other_box), f"{text!r} overlaps {other!r}"
    plot = fig.axes[0].get_window_extent()
    assert plot.width > 0.3 * width and plot.height > 0.3 * height
