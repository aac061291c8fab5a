"""The comparison of the runs of a sweep: its interval, its outcomes and its words."""

from __future__ import annotations

import math

import numpy as np
import pytest

from colab_qlora.curves.log import LossLog
from colab_qlora.curves.paired import RowLosses, paired_difference
from colab_qlora.curves.sweep import SweepResult, SweepRun, first_broken_step, in_order

ROWS = 64
TOKENS = np.random.default_rng(0).integers(5, 80, ROWS)
EASE = np.random.default_rng(1).normal(0, 0.5, ROWS)


def rows_at(level: float, seed: int = 2, noise: float = 0.03) -> RowLosses:
    """Rows that differ far more from each other than from run to run."""
    losses = EASE + np.random.default_rng(seed).normal(0, noise, ROWS)
    # the mean of all tokens is the level, exactly
    return RowLosses(level + losses - (losses * TOKENS).sum() / TOKENS.sum(), TOKENS)


def run_at(rate: float, level: float, broken_step: int | None = None) -> SweepRun:
    log = LossLog([{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 3.0}], {})
    return SweepRun(rate, log, rows_at(level, seed=int(rate * 1e7)), broken_step)


def result_of(*runs: tuple[float, float] | tuple[float, float, int]) -> SweepResult:
    made = [run_at(rate, level, *rest) for rate, level, *rest in runs]
    return SweepResult(in_order(made), 2e-4, 40, rows_at(3.0, seed=9))


def test_the_interval_holds_95_percent_of_the_time() -> None:
    # 12 rows of unequal length out of a population whose true difference is known
    rng = np.random.default_rng(5)
    truth, inside, trials = 0.02, 0, 2000
    for _ in range(trials):
        tokens = rng.integers(5, 80, 12)
        easy = rng.normal(2.0, 0.5, 12)
        own = rng.normal(truth, 0.05, 12)
        difference, margin = paired_difference(
            RowLosses(easy + own, tokens), RowLosses(easy, tokens)
        )
        inside += abs(difference - truth) <= margin
    # three standard errors of a share of 0.95; the ratio's error is a little low for so few rows
    assert 0.92 <= inside / trials <= 0.965


@pytest.mark.parametrize(
    ("rows", "quantile"), [(2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (11, 2.228), (61, 2.0)]
)
def test_few_rows_widen_the_interval(rows: int, quantile: float) -> None:
    # the standard error of a mean of equal rows, and Student's table
    values = np.arange(rows, dtype=float)
    tokens = np.full(rows, 7)
    margin = paired_difference(RowLosses(values, tokens), RowLosses(0 * values, tokens))[1]
    error = values.std(ddof=1) / math.sqrt(rows)
    assert margin == pytest.approx(quantile * error, rel=0.011)


def test_pairing_sees_what_the_losses_alone_hide() -> None:
    one, other = rows_at(2.05, seed=3), rows_at(2.0, seed=4)
    difference, margin = paired_difference(one, other)
    assert difference == pytest.approx(0.05)
    assert margin < 0.02
    # unpaired, the rows' own spread is ten times that
    assert 1.96 * one.losses.std() / math.sqrt(ROWS) > 5 * margin


def test_a_single_row_decides_nothing() -> None:
    tokens = np.array([9])
    one, other = RowLosses(np.array([2.0]), tokens), RowLosses(np.array([1.0]), tokens)
    assert paired_difference(one, other) == (1.0, math.inf)


def test_inside() -> None:
    result = result_of((6.7e-5, 2.4), (2e-4, 2.2), (6e-4, 2.6))
    assert (result.outcome, result.chosen) == ("inside", 2e-4)
    advice = result.advice()
    assert (advice.setting, advice.then) == ("none", 2e-4)
    assert advice.as_arguments() == {"learning_rate": 2e-4}
    assert advice.text().startswith("This sweep: 2e-4 has the lowest eval loss of 3 rates")
    assert "64 rows" in advice.why
    assert "6.7e-5 ends 0.200 +- " in advice.why


@pytest.mark.parametrize(
    ("levels", "outcome", "chosen"),
    [((2.6, 2.4, 2.2), "edge high", 1.8e-3), ((2.2, 2.4, 2.6), "edge low", 2.2e-5)],
)
def test_the_edge_says_go_on(
    levels: tuple[float, float, float], outcome: str, chosen: float
) -> None:
    rates = (6.7e-5, 2e-4, 6e-4)
    result = result_of(*zip(rates, levels, strict=True))
    assert result.outcome == outcome
    assert result.chosen == pytest.approx(chosen, rel=0.02)
    advice = result.advice()
    assert advice.do.startswith("go on: sweep again around")
    assert "ends below 2.200; if not" in advice.expect
    # nobody has tried that rate yet
    assert advice.as_arguments() == {}


def test_within_noise_keeps_the_rate() -> None:
    result = result_of((6.7e-5, 2.203), (2e-4, 2.205), (6e-4, 2.2))
    assert (result.outcome, result.chosen) == ("within noise", 2e-4)
    assert result.table().count("within noise") == 2
    assert result.advice().setting == "none"
    assert "within noise" in result.advice().why


def test_a_tie_of_the_best_edge_with_the_centre_keeps_the_centre() -> None:
    result = result_of((6.7e-5, 2.6), (2e-4, 2.204), (6e-4, 2.2))
    assert result.best is result.runs[2]
    assert (result.outcome, result.chosen) == ("inside", 2e-4)


def test_small_gains_do_not_count_however_certain() -> None:
    exact = [SweepRun(rate, LossLog(), rows_at(level, seed=2)) for rate, level in
             ((1e-4, 2.2), (2e-4, 2.23), (4e-4, 2.25))]  # fmt: skip
    result = SweepResult(tuple(exact), 2e-4, 40, rows_at(3.0, seed=2))
    # of the 0.8 that were learnt, 0.03 are less than a twentieth and 0.05 more
    assert [result.is_tied(run) for run in exact] == [True, True, False]
    assert "2e-4 ends 0.030 +- 0.000 higher, which is too little to count" in result.advice().why


def test_nothing_learnt_goes_up_or_down() -> None:
    flat = result_of((6.7e-8, 2.999), (2e-7, 2.998), (6e-7, 2.997))
    assert flat.outcome == "none learnt"
    assert flat.chosen == pytest.approx(6e-6)
    worse = result_of((6.7e-3, 3.5), (2e-2, 7.0), (6e-2, 9.0))
    assert worse.outcome == "none learnt"
    assert worse.chosen == pytest.approx(6.7e-4)
    assert "clearly below 3.000" in worse.advice().expect


def test_rates_that_break() -> None:
    result = result_of((6.7e-5, 2.4), (2e-4, 2.2), (6e-4, math.nan, 12))
    assert (result.outcome, result.chosen) == ("inside", 2e-4)
    assert "broke at step 12" in result.table()
    assert "6e-4 broke" in result.advice().why
    # nan at the end alone is enough
    assert run_at(1e-3, math.nan).is_broken
    none = result_of((1.0, math.nan, 3), (3.0, math.nan, 2))
    assert (none.outcome, none.best, none.chosen) == ("all broken", None, 0.1)
    assert "nan or inf" in none.advice().why
    assert none.table().count("broke at step") == 2


def test_two_rates() -> None:
    result = result_of((2e-4, 2.4), (6e-4, 2.2))
    assert (result.outcome, result.chosen) == ("edge high", pytest.approx(1.8e-3))


def test_the_table_lines_up() -> None:
    lines = result_of((6.7e-5, 2.4), (2e-4, 2.2), (6e-4, 2.6)).table().splitlines()
    assert len(lines) == 6
    column = lines[0].index("eval loss")
    assert [line[column : column + 5] for line in lines[2:]] == ["3.000", "2.400", "2.200", "2.600"]
    assert lines[4].endswith("lowest")


def test_the_first_broken_step() -> None:
    records = [{"step": 3, "loss": math.inf}, {"step": 2, "eval_loss": math.nan}]
    assert first_broken_step(LossLog([{"step": 1, "loss": 2.0}, *records])) == 2
    assert first_broken_step(LossLog([{"step": 1, "loss": 2.0}])) is None
