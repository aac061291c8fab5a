"""The diagnosis over curves of known cause: generated ones and real runs of the kit."""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.generated_curves import Curve, corpus  # noqa: E402
from colab_qlora.curves import diagnose, read_log  # noqa: E402
from colab_qlora.curves.verdicts import NAMES  # noqa: E402

CURVES = corpus()
HEALTHY = [curve for curve in CURVES if curve.cause == "healthy"]
SOUND = ("healthy", "still improving", "plateau", "spikes")
REAL = sorted((Path(__file__).parent / "corpus").glob("*.jsonl"))


def alarms(records: Any, **options: Any) -> set[str]:
    return {v.name for v in diagnose(records, **options).verdicts if v.is_alarm}


def test_the_corpus_has_every_verdict_and_at_least_60_curves():
    assert len(CURVES) >= 60
    unmade = {"not enough evidence", "skipped steps"}
    assert {curve.cause for curve in CURVES} == set(NAMES) - unmade


def test_at_least_95_in_100_causes_are_found():
    found = defaultdict(list)
    for curve in CURVES:
        found[curve.cause].append(curve.cause in diagnose(curve.records, run=curve.run).names)
    share = np.mean([hit for hits in found.values() for hit in hits])
    assert share >= 0.95
    # and no verdict is bought with another: at most one of each is missed
    assert {cause: hits for cause, hits in found.items() if hits.count(False) > 1} == {}


@pytest.mark.parametrize("curve", [c for c in CURVES if c.cause in SOUND], ids=lambda c: c.name)
def test_no_false_alarm(curve: Curve):
    assert alarms(curve.records, run=curve.run) == set()


@pytest.mark.parametrize("curve", HEALTHY, ids=lambda c: c.name)
def test_a_prefix_of_a_healthy_run_never_says_overfitting(curve: Curve):
    ends = np.unique(np.linspace(1, len(curve.records), 40).round().astype(int))
    for end in ends.tolist():
        found = diagnose(curve.records[:end], run=curve.run, is_finished=False)
        assert "overfitting" not in found.names
        assert not {v.name for v in found.verdicts if v.is_alarm}


@pytest.mark.parametrize("factor", [1e-3, 0.5, 3.0, 1e4])
def test_the_unit_of_the_loss_does_not_matter(factor: float):
    for curve in CURVES:
        names = diagnose(curve.records, run=curve.run).names
        # what is nearly 0 is the one thing that has a unit
        if "collapsed" not in names:
            scaled = diagnose(changed(curve.records, lambda x: factor * x), run=curve.run)
            assert set(scaled.names) - {"collapsed"} == set(names), curve.name


def changed(records: Any, change: Any) -> list[dict[str, Any]]:
    keys = ("loss", "eval_loss")
    return [{k: change(v) if k in keys else v for k, v in record.items()} for record in records]


@pytest.mark.parametrize("constant", [-5.0, -2.0, 0.1, 1.0, 10.0])
def test_a_constant_on_top_creates_no_alarm(constant: float):
    for curve in HEALTHY:
        assert alarms(changed(curve.records, lambda x: x + constant), run=curve.run) == set()


@pytest.mark.parametrize("keep", [2, 3, 7])
def test_a_thinner_log_creates_no_alarm(keep: int):
    for curve in HEALTHY:
        train = [r for r in curve.records if "loss" in r]
        evals = [r for r in curve.records if "eval_loss" in r]
        assert alarms(train[::keep] + evals, run=curve.run) == set(), curve.name
        assert alarms(train[::keep] + evals[::2], run=curve.run) == set(), curve.name


def test_noise_in_another_order_creates_no_alarm():
    for curve in HEALTHY:
        other = replace(curve, records=[dict(r) for r in curve.records])
        train = [r for r in other.records if "loss" in r]
        losses = np.array([r["loss"] for r in train])
        level = np.array([np.median(losses[max(0, i - 4) : i + 5]) for i in range(losses.size)])
        drawn = level * np.random.default_rng(8).permutation(losses / level)
        for record, loss in zip(train, drawn.tolist(), strict=True):
            record["loss"] = loss
        assert alarms(other.records, run=curve.run) == set(), curve.name


def knowable_at(curve: Curve) -> int:
    """The number of evals, step 0 included, after which overfitting can be known."""
    evals = curve.true_evals
    for count in range(3, len(evals) + 1):
        best = int(np.argmin(evals[1:count])) + 1
        after = evals[best + 1 : count]
        if len(after) >= 2 and after[-1] >= 1.03 * evals[best]:
            return count
    raise AssertionError(f"{curve.name} never overfits")


@pytest.mark.parametrize(
    "curve", [c for c in CURVES if c.cause == "overfitting"], ids=lambda c: c.name
)
def test_overfitting_is_named_two_evals_after_it_can_be_known(curve: Curve):
    at = [r["step"] for r in curve.records if "eval_loss" in r]
    known = knowable_at(curve)
    until = at[min(known + 2, len(at)) - 1]
    prefix = [record for record in curve.records if record["step"] <= until]
    found = diagnose(prefix, run=curve.run, is_finished=False).get("overfitting")
    assert found is not None and found.confidence != "watch"


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_runs(path: Path):
    log = read_log(path)
    found = diagnose(log)
    assert log.run["cause"] in found.names, found.text()
    if log.run["cause"] == "healthy":
        assert alarms(log) == set()
        assert all("overfitting" not in prefix.names for prefix in prefixes(log))


def prefixes(log: Any) -> list[Any]:
    return [
        diagnose(log.records[:end], run=log.run, is_finished=False)
        for end in range(1, len(log.records) + 1)
    ]
