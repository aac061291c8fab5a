"""Loss curves with a known cause, one function for each kind of cause; see `curve_model.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from benchmarks.curve_model import Curve, Level, Shape, build, falling, stepped

# what falls slowly shows only in many points, or in points that average many steps
SLOW_SHAPES = [
    Shape(300, 0.10, 5, 8, 0),
    Shape(600, 0.10, 1, 8, 1),
    Shape(1000, 0.17, 10, 8, 2),
    Shape(1500, 0.17, 1, 8, 3),
    Shape(1500, 0.24, 1, 8, 4),
    Shape(2000, 0.24, 10, 8, 5),
    Shape(3000, 0.24, 5, 8, 6),
]
SHAPES = [
    Shape(steps, noise, every, evals, seed)
    for seed, (steps, noise, every, evals) in enumerate(
        [
            (60, 0.10, 1, 8),
            (60, 0.17, 1, 6),
            (120, 0.24, 1, 10),
            (300, 0.24, 1, 12),
            (300, 0.10, 5, 10),
            (1000, 0.17, 10, 15),
            (1500, 0.24, 1, 20),
        ]
    )
]


def healthy_curves() -> Iterator[Curve]:
    for shape in SHAPES:
        rng = np.random.default_rng(1000 + shape.seed)
        start, end = rng.uniform(1.5, 4.0), rng.uniform(0.6, 1.2)
        train = falling(start, end)
        gap = rng.uniform(0.02, 0.08)
        after: Level = lambda t, train=train, gap=gap: train(t) * (1 + gap)
        yield build("healthy", shape, train, after)
        yield build("healthy", shape, train, None, name=f"healthy-no-eval-{shape.seed}")
        # three epochs: the train loss falls a little where one begins, the eval loss falls on
        epochs = stepped(falling(start, end), 3, 0.04)
        above: Level = lambda t, train=train: train(t) * (1.03 + 0.05 * t)
        yield build("healthy", shape, epochs, above, epochs=3, name=f"healthy-epochs-{shape.seed}")
        # a jump while the rate warms up, gone after a twentieth of the run
        bump: Level = lambda t, train=train: train(t) * (1 + 0.4 * np.exp(-40 * t))
        calm: Level = lambda t, train=train: train(t) * 1.05
        yield build("healthy", shape, bump, calm, name=f"healthy-bump-{shape.seed}")


def broken_curves() -> Iterator[Curve]:
    for shape in SHAPES:
        rng = np.random.default_rng(2000 + shape.seed)
        train = falling(2.4, 1.1)
        near: Level = lambda t, train=train: train(t) * 1.04
        when = int(rng.uniform(0.3, 0.7) * shape.steps)

        def nans(at, losses, when=when):
            return np.where(at >= when, math.nan, losses)

        def zeros(at, losses, when=when):
            return np.where(at >= when, 0.0, losses)

        kind = shape.seed % 3
        if kind == 0:
            yield build("non-finite", shape, train, near, losses=nans)
        elif kind == 1:
            yield build("non-finite", shape, train, near, norms=nans)
        else:
            yield build("non-finite", shape, train, near, losses=zeros, norms=nans)
        speed = 30.0 if shape.steps // shape.every < 100 else 15.0
        yield build(
            "collapsed", shape, lambda t, speed=speed: 2.0 * np.exp(-speed * t) + 0.002, None
        )
        sums = int(rng.choice([2, 4, 8]))
        summed: Level = lambda t, train=train, sums=sums: sums * train(t)
        settings = {"gradient_accumulation_steps": sums}
        yield build("scale mismatch", shape, summed, near, base=train(0.0) * 1.04, run=settings)


def diverging_curves() -> Iterator[Curve]:
    for shape in SHAPES:
        rng = np.random.default_rng(3000 + shape.seed)
        jump = rng.uniform(1.6, 4.0)
        bad: Level = lambda t, jump=jump: 2.2 * (1 + (jump - 1) * (0.3 + 0.7 * np.exp(-5 * t)))
        yield build("worse than base", shape, bad, bad, base=2.2)
        # what scatters more has to rise further before anybody could know it
        worst = max(2.0, 1 + 9 * shape.noise / math.sqrt(shape.every))
        height, when = rng.uniform(worst, 2 * worst), rng.uniform(0.35, 0.6)
        train = falling(2.2, 1.0)
        stays = shape.seed % 2

        def leaves(t, train=train, height=height, when=when, stays=stays):
            back = np.exp(-(t - when) / 0.8) if not stays else 1.0
            return train(t) * np.where(t > when, 1 + (height - 1) * back, 1.0)

        yield build("unstable", shape, leaves, None if shape.seed % 3 else leaves)


def turning_curves() -> Iterator[Curve]:
    for shape in SHAPES:
        rng = np.random.default_rng(4000 + shape.seed)
        when, rise = rng.uniform(0.3, 0.55), rng.uniform(0.2, 0.6)
        bend: Level = lambda t, when=when, rise=rise: (
            falling(2.2, 1.2)(t) * 1.03
            + 1.2 * rise * np.clip((t - when) / (1 - when), 0, None) ** 1.2
        )
        epochs = int(rng.integers(4, 8))
        heart = stepped(falling(2.2, 1.2), epochs, rng.uniform(0.18, 0.3))
        yield build("overfitting", shape, heart, bend, epochs=epochs)
        flat: Level = lambda t, when=when: falling(2.2, 1.2)(np.minimum(t, when))
        yield build("eval rising", shape, flat, bend)
        # a fall that the scatter of half an epoch does not hide
        fall = min(0.6, max(0.2, 22 * shape.noise / math.sqrt(shape.steps / 3)))
        three = stepped(lambda t: 1.8 - 0.5 * np.minimum(1, 8 * t), 3, fall)
        yield build("memorising", shape, three, None, epochs=3)


def eval_set_curves() -> Iterator[Curve]:
    for shape in SHAPES:
        rng = np.random.default_rng(5000 + shape.seed)
        epochs = int(rng.integers(4, 7))
        heart = stepped(falling(2.2, 1.3), epochs, rng.uniform(0.2, 0.3))
        same = rng.uniform(-0.03, 0.005)
        leaked: Level = lambda t, heart=heart, same=same: (
            heart(np.minimum(t + 0.05, 1)) * (1 + same)
        )
        yield build("suspected leakage", shape, heart, leaked, base=2.2, epochs=epochs)
        points = shape.steps / shape.every
        error = 1.253 * shape.noise / math.sqrt(shape.every * max(5, 0.1 * points))
        # a gap that the scatter hides cannot be known, and one of nearly a half is another scale
        below = min(0.38, max(0.15, 6 * error))
        if below < 5 * error:
            continue
        train = falling(2.2, 1.1)
        under: Level = lambda t, train=train, below=below: train(t) * (1 - below)
        yield build("eval below train", shape, train, under)


def slow_curves() -> Iterator[Curve]:
    for shape in SHAPES:
        flat: Level = lambda t: np.full_like(t, 2.2)
        barely: Level = lambda t: 2.25 * (1 - 0.004 * t)
        if shape.seed % 2:
            zero = {"norms": lambda at, norms: np.zeros_like(norms)}
            yield build("not learning", shape, flat, flat, **zero)
        else:
            yield build("not learning", shape, flat, barely)
        scatter = shape.noise / math.sqrt(shape.every)
        needed = 14 * scatter / math.sqrt(shape.steps / shape.every / 3)
        far = max(0.5, min(0.75, 3 * needed))
        deep: Level = lambda t, far=far: 2.4 * (1 - far * t**0.9)
        yield build(
            "still improving",
            shape,
            deep,
            lambda t, deep=deep: deep(t) * 1.03,
            name=f"still improving-{shape.seed}",
        )
        level: Level = lambda t: 1.1 + 1.2 * np.exp(-14 * t)
        yield build("plateau", shape, level, lambda t, level=level: level(t) * 1.05)
        tall = 1 + 12 * max(scatter, 0.05)

        def spiky(at, losses, tall=tall, shape=shape):
            chosen = at.size * np.array([0.4, 0.72])
            losses = losses.copy()
            losses[chosen.astype(int)] *= tall * 1.3
            return losses

        yield build("spikes", shape, level, lambda t, level=level: level(t) * 1.05, losses=spiky)


def low_rate_curves() -> Iterator[Curve]:
    for shape in SLOW_SHAPES:
        fall = np.random.default_rng(7000 + shape.seed).uniform(0.2, 0.24)
        line: Level = lambda t, fall=fall: 2.2 * (1 - fall * t)
        yield build("slow", shape, line, lambda t, line=line: line(t) * 1.02)


def corpus() -> list[Curve]:
    """All generated curves, healthy ones included."""
    makers = (
        healthy_curves,
        broken_curves,
        diverging_curves,
        turning_curves,
        eval_set_curves,
        slow_curves,
        low_rate_curves,
    )
    return [curve for maker in makers for curve in maker()]
