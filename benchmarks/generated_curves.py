"""Loss curves with a known cause, made from a formula and realistic noise.

Logged losses of fine-tuning scatter by 10 to 24 % from one step to the next; a log that averages
several steps scatters less. Eval losses of a fixed eval set scatter by half a percent. Some losses
are outliers. Everything follows from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Record = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """How long and how noisy a curve is, and how often it was logged and evaluated."""

    steps: int
    noise: float
    every: int = 1
    evals: int = 10
    seed: int = 0

    def random(self) -> np.random.Generator:
        """The noise of this curve alone."""
        return np.random.default_rng([self.seed, self.steps, round(100 * self.noise), self.every])


@dataclass
class Curve:
    """A curve: what a trainer would have written, and why it looks so."""

    cause: str
    name: str
    records: list[Record]
    run: Record = field(default_factory=dict)
    # eval loss without noise at each eval, for what can be known when
    true_evals: list[float] = field(default_factory=list)


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
Level = Callable[[np.ndarray], np.ndarray]


def falling(start: float, end: float, speed: float = 6.0) -> Level:
    """A fall that is fast at first, from `start` to about `end`."""
    return lambda t: (
        end
        + (start - end) * (0.7 * np.exp(-speed * t) + 0.3 * (1 + 8 * t) ** -1.0 - 0.3 * 9**-1.0 * t)
    )


def build(
    cause: str,
    shape: Shape,
    train: Level,
    evals: Level | None = None,
    *,
    base: float | None = None,
    epochs: float = 1.0,
    run: Record | None = None,
    name: str = "",
    **overrides: Any,
) -> Curve:
    """Draws the points of a curve; levels are functions of the share of the run, 0 to 1.

    Overrides: `losses` (steps, losses) -> losses, and `norms` likewise.
    """
    rng = shape.random()
    steps = np.arange(1, shape.steps + 1)
    noise = np.exp(rng.normal(0, shape.noise, shape.steps) - shape.noise**2 / 2)
    outliers = rng.random(shape.steps) < 0.01
    noise = np.where(outliers, noise * (1 + 2 * shape.noise), noise)
    losses = train(steps / shape.steps) * noise
    whole = shape.steps // shape.every * shape.every
    logged = losses[:whole].reshape(-1, shape.every).mean(axis=1)
    at = steps[shape.every - 1 : whole : shape.every]
    if "losses" in overrides:
        logged = overrides["losses"](at, logged)
    norms = np.exp(rng.normal(0, 0.3, at.size))
    if "norms" in overrides:
        norms = overrides["norms"](at, norms)
    peak = 2e-4
    records: list[Record] = []
    for step, loss, norm in zip(at.tolist(), logged.tolist(), norms.tolist(), strict=True):
        rate = peak * min(1, step / 5) * 0.5 * (1 + math.cos(math.pi * step / shape.steps))
        epoch = epochs * step / shape.steps
        records.append(
            {"step": step, "loss": loss, "grad_norm": norm, "learning_rate": rate, "epoch": epoch}
        )
    true_evals: list[float] = []
    if evals is not None:
        at_evals = np.unique(np.linspace(0, shape.steps, shape.evals + 1).round().astype(int))
        true_evals = evals(at_evals / shape.steps).tolist()
        if base is not None:
            true_evals[0] = base
        drawn = np.array(true_evals) * (1 + rng.normal(0, 0.005, at_evals.size))
        for step, loss in zip(at_evals.tolist(), drawn.tolist(), strict=True):
            records.append({"step": step, "eval_loss": loss, "epoch": epochs * step / shape.steps})
    records.sort(key=lambda record: (record["step"], "eval_loss" in record))
    settings = {"learning_rate": peak, "gradient_accumulation_steps": 1} | (run or {})
    return Curve(cause, name or f"{cause}-{shape.seed}", records, settings, true_evals)


def stepped(level: Level, epochs: int, fall: float) -> Level:
    """A level that falls by a share at once where each epoch after the first begins."""
    return lambda t: level(t) * (1 - fall) ** np.floor(np.minimum(t * epochs, epochs - 1e-9))


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
