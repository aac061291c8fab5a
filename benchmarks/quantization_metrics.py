"""How far one model's predictions are from another's, on the same rows, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

BOOTSTRAPS, CONFIDENCE = 2000, 0.95


@dataclass(frozen=True)
class Predictions:
    """Log-probabilities of a model, row by row, float32, (tokens, vocabulary), on the CPU."""

    rows: list[torch.Tensor]
    losses: list[float]


@torch.no_grad()
def predictions_of(model: Any, batches: Sequence[dict[str, torch.Tensor]]) -> Predictions:
    """Next-token log-probabilities at every token but a row's last, and each row's label loss."""
    was_training = model.training
    model.eval()
    rows, losses = [], []
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, mask, labels in zip(logits, batch["attention_mask"], batch["labels"], strict=True):
            count = int(mask.sum())
            logs = row[: count - 1].float().log_softmax(-1)
            targets = labels[1:count]
            seen = targets != -100
            picked = logs[seen].gather(1, targets[seen][:, None])
            losses.append(float(-picked.mean()))
            rows.append(logs.cpu())
    model.train(was_training)
    return Predictions(rows, losses)


def divergence(reference: Predictions, other: Predictions) -> tuple[list[float], list[float]]:
    """KL(reference || other), nat a token, and the share of changed top tokens, by row."""
    kls, flips = [], []
    for p, q in zip(reference.rows, other.rows, strict=True):
        kls.append(float((p.exp() * (p - q)).sum(-1).mean()))
        flips.append(float((p.argmax(-1) != q.argmax(-1)).float().mean()))
    return kls, flips


def interval(values: Sequence[Sequence[float]]) -> tuple[float, float, float]:
    """Mean over seeds and rows, with a 95 % interval by bootstrap over both.

    Few seeds give intervals that are somewhat too narrow in what differs between them.

    Args:
        values: by seed, then by row.
    """
    return ratio_interval(values, None)


def paired_difference(first: Sequence[Sequence[float]], then: Sequence[Sequence[float]]) -> str:
    """By how much the second is lower, with its interval, and in how many rows of each seed.

    Args:
        first, then: by seed, then by row, of the same seeds and rows.
    """
    differences = np.asarray(first) - np.asarray(then)
    mean, low, high = interval(differences.tolist())
    counts = ", ".join(str(int(count)) for count in (differences > 0).sum(1))
    rows = differences.shape[1]
    return f"lower by {mean:.4f} ({low:.4f} to {high:.4f}), in {counts} of {rows} rows by seed"


def ratio_interval(
    values: Sequence[Sequence[float]], against: Sequence[Sequence[float]] | None
) -> tuple[float, float, float]:
    """1 - mean(values) / mean(against), paired by seed and row; without `against` the mean."""
    table = np.asarray(values)
    other = None if against is None else np.asarray(against)
    draw = np.random.default_rng(0)
    seeds, rows = table.shape
    found = []
    for _ in range(BOOTSTRAPS):
        some = np.ix_(draw.integers(seeds, size=seeds), draw.integers(rows, size=rows))
        found.append(_statistic(table[some], None if other is None else other[some]))
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return _statistic(table, other), float(low), float(high)


def gap_interval(
    values: Sequence[Sequence[float]],
    worst: Sequence[Sequence[float]],
    best: Sequence[Sequence[float]],
) -> tuple[float, float, float] | None:
    """Share of the gap from `worst` to `best` that `values` closes, paired by seed and row.

    Returns:
        Share and interval; None where the gap itself is not above 0 with 97.5 %: a share of
        nothing, or of a gap the other way, says nothing.
    """
    tables = [np.asarray(v) for v in (values, worst, best)]
    draw = np.random.default_rng(0)
    seeds, rows = tables[0].shape
    found, gaps = [], []
    for _ in range(BOOTSTRAPS):
        some = np.ix_(draw.integers(seeds, size=seeds), draw.integers(rows, size=rows))
        value, high, low = (table[some].mean() for table in tables)
        gaps.append(high - low)
        found.append(_share(value, high, low))
    if np.quantile(gaps, (1 - CONFIDENCE) / 2) <= 0:
        return None
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return _share(*(table.mean() for table in tables)), float(low), float(high)


def _share(value: float, worst: float, best: float) -> float:
    return float((worst - value) / (worst - best)) if worst != best else float("nan")


def _statistic(table: Any, other: Any) -> float:
    return float(table.mean() if other is None else 1 - table.mean() / other.mean())
