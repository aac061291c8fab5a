"""How a loss curve of a known cause is made: a level from a formula, and realistic noise.

Logged losses of fine-tuning scatter by 10 to 24 % from one step to the next; a log that averages
several steps scatters less. Eval losses of a fixed eval set scatter by half a percent. Some losses
are outliers. Everything follows from the seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Record = dict[str, Any]
PEAK_RATE = 2e-4
Level = Callable[[np.ndarray], np.ndarray]


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
    at, logged = _logged(shape, train, rng)
    if "losses" in overrides:
        logged = overrides["losses"](at, logged)
    norms = np.exp(rng.normal(0, 0.3, at.size))
    if "norms" in overrides:
        norms = overrides["norms"](at, norms)
    records: list[Record] = []
    for step, loss, norm in zip(at.tolist(), logged.tolist(), norms.tolist(), strict=True):
        rate = PEAK_RATE * min(1, step / 5) * 0.5 * (1 + math.cos(math.pi * step / shape.steps))
        epoch = epochs * step / shape.steps
        records.append(
            {"step": step, "loss": loss, "grad_norm": norm, "learning_rate": rate, "epoch": epoch}
        )
    true_evals: list[float] = []
    if evals is not None:
        at_evals, true_evals, drawn = _evaluated(shape, evals, base, rng)
        for step, loss in zip(at_evals, drawn, strict=True):
            records.append({"step": step, "eval_loss": loss, "epoch": epochs * step / shape.steps})
    records.sort(key=lambda record: (record["step"], "eval_loss" in record))
    settings = {"learning_rate": PEAK_RATE, "gradient_accumulation_steps": 1} | (run or {})
    return Curve(cause, name or f"{cause}-{shape.seed}", records, settings, true_evals)


def _logged(shape: Shape, train: Level, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Steps at which was logged, and the mean noisy losses up to there."""
    steps = np.arange(1, shape.steps + 1)
    noise = np.exp(rng.normal(0, shape.noise, shape.steps) - shape.noise**2 / 2)
    outliers = rng.random(shape.steps) < 0.01
    noise = np.where(outliers, noise * (1 + 2 * shape.noise), noise)
    losses = train(steps / shape.steps) * noise
    whole = shape.steps // shape.every * shape.every
    logged = losses[:whole].reshape(-1, shape.every).mean(axis=1)
    return steps[shape.every - 1 : whole : shape.every], logged


def _evaluated(
    shape: Shape, evals: Level, base: float | None, rng: np.random.Generator
) -> tuple[list[int], list[float], list[float]]:
    """Steps of the evals, their losses without noise, and those with it."""
    at = np.unique(np.linspace(0, shape.steps, shape.evals + 1).round().astype(int))
    true = evals(at / shape.steps).tolist()
    if base is not None:
        true[0] = base
    drawn = np.array(true) * (1 + rng.normal(0, 0.005, at.size))
    return at.tolist(), true, drawn.tolist()


def stepped(level: Level, epochs: int, fall: float) -> Level:
    """A level that falls by a share at once where each epoch after the first begins."""
    return lambda t: level(t) * (1 - fall) ** np.floor(np.minimum(t * epochs, epochs - 1e-9))
