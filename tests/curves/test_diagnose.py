"""The verdicts, one rule after the other: what calls them, what does not, and what they say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from colab_qlora.curves import LossLog, Thresholds, diagnose, read_log
from colab_qlora.errors import UserError
from colab_qlora.samples import sample_path

Records = list[dict[str, Any]]


def table(train: list[float], evals: list[float] | None = None) -> Records:
    records: Records = [{"step": i, "loss": loss} for i, loss in enumerate(train, 1)]
    return records + [{"step": i, "eval_loss": loss} for i, loss in enumerate(evals or [], 1)]


def run_of(levels: Any, noise: float = 0.1, seed: int = 0, **more: Any) -> Records:
    """Train losses around levels, one a step."""
    levels = np.asarray(levels, float)
    drawn = levels * np.exp(np.random.default_rng(seed).normal(0, noise, levels.size))
    return [{"step": i, "loss": loss, **more} for i, loss in enumerate(drawn.tolist(), 1)]


def evals_at(steps: list[int], losses: list[float]) -> Records:
    return [{"step": s, "eval_loss": e} for s, e in zip(steps, losses, strict=True)]


FALLING = 1.0 + 1.4 * np.exp(-np.arange(100) / 15)


# ---- the three cases of every textbook


def test_textbook_healthy():
    found = diagnose(table([2.0, 1.5, 1.2, 1.0, 0.9], [2.1, 1.6, 1.3, 1.1, 1.0]))
    assert found.main.name == "healthy"
    assert (found.best_step, found.best_eval_loss, found.divergence_step) == (5, 1.0, None)
    assert "healthy" in found.text()


def test_textbook_overfitting():
    found = diagnose(table([1.0, 0.8, 0.6, 0.5, 0.4], [1.1, 1.0, 1.1, 1.3, 1.5]))
    assert (found.main.name, found.main.confidence) == ("overfitting", "sure")
    assert (found.divergence_step, found.best_step, found.best_eval_loss) == (2, 2, 1.0)
    assert "keep the checkpoint of step 2 and stop early" in found.main.action
    assert "rose 50.0% from 1.000 at step 2 to 1.500 at step 5" in found.text()


def test_textbook_learning_rate_too_high():
    found = diagnose(table([2.0, 1.8, 2.1, 1.5, 2.3]))
    assert found.main.name == "unstable"
    assert "learning rate too high" in found.headline
    assert found.main.action == "halve the learning rate"
    given = diagnose(table([2.0, 1.8, 2.1, 1.5, 2.3]), run={"learning_rate": 2e-4})
    assert given.main.action == "halve the learning rate (to 1.0e-04)"
    # the first five steps of a run that goes on are no such table
    live = diagnose(table([2.0, 1.8, 2.1, 1.5, 2.3]), is_finished=False)
    assert live.names == ("not enough evidence",)


@pytest.mark.parametrize(
    ("name", "verdict"),
    [
        ("healthy", "healthy"),
        ("overfitting", "overfitting"),
        ("learning_rate_too_high", "worse than base"),
    ],
)
def test_the_recorded_runs(name, verdict):
    assert diagnose(read_log(sample_path(f"curves/{name}.jsonl"))).main.name == verdict


# ---- numbers that are no losses


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("key", ["loss", "eval_loss"])
def test_one_value_that_is_not_finite_is_enough(value, key):
    records = run_of(FALLING)
    records[60][key] = value
    found = diagnose(records)
    assert found.names == ("non-finite",)
    assert (found.main.step, found.main.confidence) == (61, "sure")
    assert ("train" if key == "loss" else "eval") in found.main.because


def test_broken_gradients_count_when_they_come_in_a_row():
    norms = np.ones(100)
    norms[[20, 40, 41, 70]] = math.nan
    records = [r | {"grad_norm": n} for r, n in zip(run_of(FALLING), norms.tolist(), strict=True)]
    found = diagnose(records)
    assert found.main.name == "healthy"
    assert found.get("skipped steps").steps == (21, 41, 42, 71)
    assert "loss scaler" not in found.text()
    by_scaler = diagnose(records, run={"compute_dtype": "float16"})
    assert ", steps skipped by the loss scaler" in by_scaler.text()
    assert by_scaler.get("skipped steps").because.startswith("4 of 100 logs have a gradient norm")
    without = diagnose(records, run={"compute_dtype": "bfloat16"})
    assert without.names == by_scaler.names
    assert ", single gradients that are nan or inf" in without.text()
    skipped = without.get("skipped steps")
    assert skipped.action == "look at the rows of steps 21, 41, 42 and 71"
    assert "without float16 there is no loss scaler" in skipped.because
    records[41 + 1]["grad_norm"] = math.inf
    found = diagnose(records)
    assert (found.main.name, found.main.step) == ("non-finite", 41)


def test_the_first_steps_of_float16_may_skip():
    records = [r | {"grad_norm": 1.0} for r in run_of(FALLING)]
    for record in records[:6]:
        record["grad_norm"] = math.nan
    assert diagnose(records, run={"compute_dtype": "float16"}).main.name == "healthy"
    assert diagnose(records, run={"compute_dtype": "bfloat16"}).main.name == "non-finite"
    # a log that does not name its precision: in float16 alone the first steps look like this
    assert diagnose(records).main.name == "healthy"
    assert diagnose([r | {"grad_norm": math.nan} for r in records]).main.name == "non-finite"


def test_zeros_beside_broken_gradients_are_filtered_nans():
    records = run_of(FALLING)
    for index in (50, 53):
        records[index] |= {"loss": 0.0, "grad_norm": math.nan}
    found = diagnose(records)
    assert (found.main.name, found.main.step) == ("non-finite", 51)


def test_a_loss_of_nothing_without_an_eval():
    levels = 2.0 * np.exp(-np.arange(60) / 4) + 0.001
    found = diagnose(run_of(levels))
    assert (found.main.name, found.main.confidence) == ("collapsed", "sure")
    # an eval that falls with it vouches for it: a task of copying can be learnt fully
    vouched = run_of(levels) + evals_at([0, 20, 40, 60], [2.1, 0.02, 0.002, 0.001])
    assert "collapsed" not in diagnose(vouched).names


def test_a_sum_over_the_accumulation_is_named():
    evals = evals_at([0, 25, 50, 75, 100], [2.4, 1.3, 1.1, 1.05, 1.02])
    found = diagnose(run_of(FALLING * 8) + evals, run={"gradient_accumulation_steps": 8})
    assert found.main.name == "scale mismatch"
    assert "gradient_accumulation_steps is 8" in found.main.because
    assert found.main.numbers["train_over_eval"] == pytest.approx(8, rel=0.1)
    other = diagnose(run_of(FALLING * 8) + evals, run={"gradient_accumulation_steps": 2})
    assert "check whether the trainer logs a sum" in other.main.action


# ---- against the loss before training


def test_worse_than_before_although_the_train_loss_falls():
    jumped = 3.0 - 0.005 * np.arange(100)
    evals = evals_at([0, 25, 50, 75, 100], [2.0, 3.0, 2.8, 2.7, 2.6])
    found = diagnose(run_of(jumped) + evals, run={"learning_rate": 1e-2})
    assert found.names == ("worse than base",)
    assert (found.main.confidence, found.base_eval_loss) == ("sure", 2.0)
    assert "divide the learning rate by 10 (to 1.0e-03)" in found.main.action
    first = diagnose((run_of(jumped) + evals)[:26] + evals[:2], is_finished=False)
    assert first.get("worse than base").confidence == "watch"


def test_the_base_is_no_best_checkpoint():
    evals = evals_at([0, 25, 50, 75, 100], [2.0, 2.05, 2.2, 2.4, 2.6])
    found = diagnose(run_of(FALLING) + evals)
    assert found.main.name == "worse than base"
    assert (found.best_step, found.divergence_step) == (25, None)


# ---- the train loss


def test_a_train_loss_that_leaves_its_level():
    levels = np.where(np.arange(100) < 60, FALLING, 2.6)
    found = diagnose(run_of(levels))
    assert (found.main.name, found.main.confidence) == ("unstable", "sure")
    assert 55 <= found.main.step <= 68
    assert found.main.numbers["highest_level"] == pytest.approx(2.6, rel=0.1)


def test_a_jump_in_the_first_steps_is_only_watched():
    levels = np.concatenate([[2.0] * 4, [4.5] * 8, FALLING[:88]])
    found = diagnose(run_of(levels))
    assert found.get("unstable").confidence == "watch"
    assert not any(verdict.is_alarm for verdict in found.verdicts)


def test_spikes_are_listed_and_nothing_more():
    records = run_of(FALLING)
    for index in (30, 80):
        records[index]["loss"] *= 6
    found = diagnose(records)
    assert found.main.name == "healthy"
    assert found.get("spikes").steps == (31, 81)
    assert diagnose(run_of(FALLING)).get("spikes") is None


def test_steps_at_epochs():
    levels = np.repeat([1.6, 1.1, 0.7], 40)
    records = run_of(levels)
    records = [r | {"epoch": r["step"] / 40} for r in records]
    found = diagnose(records)
    assert (found.main.name, found.main.confidence) == ("memorising", "sure")
    assert [abs(s - e) <= 1 for s, e in zip(found.main.steps, (40, 80), strict=True)] == [True] * 2
    assert "add an eval set" in found.main.action
    helped = records + evals_at([0, 40, 80, 120], [2.4, 1.9, 1.8, 1.75])
    found = diagnose(helped)
    assert found.main.name == "healthy"
    assert found.get("memorising").kind == "info"


def test_a_deep_fall_on_rows_seen_before_needs_an_eval():
    # six points an epoch are too few to see steps
    records = run_of(2.0 * np.exp(-np.arange(36) / 10))
    records = [r | {"epoch": r["step"] / 6} for r in records]
    found = diagnose(records)
    assert (found.main.name, found.main.step) == ("memorising", 6)
    assert "add an eval set" in found.main.action
    once = [r | {"epoch": r["step"] / 36} for r in records]
    assert diagnose(once).main.name == "healthy"
    seen = records + evals_at([0, 12, 24, 36], [2.2, 0.7, 0.25, 0.09])
    assert "memorising" not in diagnose(seen).names


# ---- the eval set


def test_overfitting_needs_two_evals_that_agree():
    records = run_of(FALLING)
    steps, losses = [0, 20, 40, 60, 80], [2.4, 1.5, 1.3, 1.36, 1.42]
    assert diagnose(records + evals_at(steps, losses)).main.name == "overfitting"
    one = diagnose(records + evals_at(steps[:4], losses[:4]))
    assert (one.get("overfitting").confidence, one.divergence_step) == ("watch", None)
    back = diagnose(records + evals_at(steps, [*losses[:4], 1.305]))
    assert "overfitting" not in back.names
    little = diagnose(records + evals_at(steps, [2.4, 1.5, 1.3, 1.325, 1.33]))
    assert "overfitting" not in little.names


def test_a_rising_eval_loss_beside_a_flat_train_loss_is_no_overfitting():
    flat = 1.0 + 1.4 * np.exp(-np.minimum(np.arange(100), 40) / 4)
    found = diagnose(
        run_of(flat) + evals_at([0, 20, 40, 60, 80, 100], [2.4, 1.2, 1.1, 1.2, 1.3, 1.4])
    )
    assert (found.main.name, found.divergence_step) == ("eval rising", 40)
    assert "did not fall either" in found.main.because


def leaked_run(gap: float) -> Records:
    levels = np.repeat([1.8, 1.2, 0.7, 0.4], 30)
    records = [r | {"epoch": r["step"] / 30} for r in run_of(levels)]
    steps = [0, 15, 45, 75, 105, 120]
    losses = [2.2, *(levels[s - 1] * (1 + gap) for s in steps[1:])]
    return records + evals_at(steps, losses)


def test_eval_rows_that_are_learnt_by_heart_too():
    found = diagnose(leaked_run(-0.02))
    assert (found.main.name, found.main.confidence) == ("suspected leakage", "sure")
    # the rows were there from the first step on; only the evidence begins later
    seen = f"This run: the eval rows look like training rows, seen from step {found.main.step} on"
    assert found.text().startswith(f"{seen} (sure)")
    assert diagnose(leaked_run(0.25)).get("suspected leakage") is None


def test_an_eval_loss_below_the_train_loss():
    evals = evals_at([0, 40, 60, 80, 100], [1.8, 1.0, 0.85, 0.82, 0.8])
    found = diagnose(run_of(FALLING, 0.05) + evals)
    assert found.main.name == "eval below train"
    explained = diagnose(run_of(FALLING, 0.05) + evals, run={"lora_dropout": 0.1})
    assert explained.main.name == "healthy"
    assert "lora_dropout=0.1" in explained.get("eval below train").action


# ---- too little


def test_nothing_is_learnt():
    flat = run_of(np.full(60, 2.0))
    evals = evals_at([0, 20, 40, 60], [2.1, 2.099, 2.101, 2.098])
    found = diagnose(flat + evals, run={"learning_rate": 1e-7})
    assert (found.main.name, found.main.confidence) == ("not learning", "sure")
    assert "tenfold (to 1.0e-06)" in found.main.action
    frozen = diagnose([r | {"grad_norm": 0.0} for r in flat] + evals)
    assert "trainable parameters" in frozen.main.action
    # without an eval it may be a model that knows the data
    assert diagnose(flat).get("not learning").confidence == "watch"


def test_an_even_fall_is_slow_and_a_deep_one_goes_on():
    slow = diagnose(run_of(np.linspace(2.0, 1.55, 600)))
    assert slow.main.name == "slow"
    assert diagnose(run_of(np.linspace(2.0, 0.8, 600))).names == ("healthy", "still improving")
    level = np.concatenate([FALLING, np.full(100, FALLING[-1])])
    assert diagnose(run_of(level)).names == ("healthy", "plateau")


# ---- thin evidence and bad input


@pytest.mark.parametrize(
    "records",
    [
        [{"step": 1, "loss": 2.0}],
        [{"step": 0, "eval_loss": 2.0}],
        table([2.0, 1.9, 1.8]),
        run_of(FALLING[:19]),
        run_of(FALLING[:5]) + evals_at([0, 3, 5], [2.4, 2.0, 1.8]),
    ],
)
def test_thin_evidence_is_said_to_be_thin(records):
    found = diagnose(records)
    assert found.names == ("not enough evidence",)
    assert "are needed" in found.main.because


def test_order_and_repeats_do_not_matter():
    records = run_of(FALLING) + evals_at([0, 50, 100], [2.4, 1.2, 1.1])
    shuffled = [records[i] for i in np.random.default_rng(0).permutation(len(records))]
    assert diagnose(shuffled) == diagnose(records)
    # a resumed run writes its last steps again: the later record counts
    repeated = records[:60] + [{"step": s, "loss": 99.0} for s in range(61, 71)] + records[60:]
    assert diagnose(repeated) == diagnose(records)


@pytest.mark.parametrize(
    ("log", "problem"),
    [
        ("work/loss.jsonl", "that is not a loss log: got str"),
        ({"step": 1, "loss": 2.0}, "that is not a loss log: got dict"),
        ([], "the log has no loss values: got 0 records"),
        ([{"step": 1, "learning_rate": 1e-4}], "the log has no loss values: got 1 records"),
    ],
)
def test_what_is_no_log_is_refused(log, problem):
    with pytest.raises(UserError, match=problem):
        diagnose(log)


def test_two_runs_in_one_log_are_refused():
    with pytest.raises(UserError, match="2 runs; the second begins at record 101; allowed: one ru"):
        diagnose(run_of(FALLING) + run_of(FALLING))


def test_the_hyperparameters_come_from_the_log():
    log = LossLog(table([2.0, 1.8, 2.1, 1.5, 2.3]), run={"learning_rate": 1e-3})
    assert "to 5.0e-04" in diagnose(log).main.action


def test_thresholds_move_the_lines():
    records = run_of(FALLING) + evals_at([0, 20, 40, 60, 80], [2.4, 1.5, 1.3, 1.325, 1.33])
    assert diagnose(records).main.name == "healthy"
    strict = Thresholds(generalisation_loss=0.01)
    assert diagnose(records, thresholds=strict).main.name == "overfitting"
    with pytest.raises(UserError, match=r"threshold stair_fall is not positive: got 0; .*0\.08"):
        Thresholds(stair_fall=0)


def test_a_million_points_are_read_in_seconds():
    import time

    levels = 1.0 + 1.4 * np.exp(-np.arange(1_000_000) / 150_000)
    records = run_of(levels, 0.2)
    began = time.perf_counter()
    found = diagnose(records)
    assert time.perf_counter() - began < 10
    assert found.main.name == "healthy"


# ---- what a review found


def test_one_eval_far_above_the_base_is_no_slow_run():
    found = diagnose(run_of(FALLING) + evals_at([0, 90], [2.0, 8.0]))
    assert (found.names[0], found.main.confidence) == ("worse than base", "likely")
    near = diagnose(run_of(FALLING) + evals_at([0, 90], [2.0, 2.03]))
    assert near.main.confidence == "watch"
    assert not {"slow", "healthy"} & set(near.names)


@pytest.mark.parametrize("losses", [[2.5, 1.5, 1.2, 1.9], [2.5, 1.5, 3.5]])
def test_a_risen_eval_loss_at_the_end_is_not_healthy(losses):
    steps = [0, 30, 60, 90][: len(losses)]
    found = diagnose(run_of(FALLING) + evals_at(steps, losses))
    assert found.main.name in ("overfitting", "eval rising")
    assert "healthy" not in found.names
    assert found.main.confidence == "watch"


@pytest.mark.parametrize("run", [{"max_steps": 1000}, {"max_steps": -1, "num_train_epochs": 10}])
def test_a_jump_while_the_rate_warms_up_stops_nothing(run):
    bump = [r | {"epoch": r["step"] / 100} for r in run_of(2.0 * np.ones(30))]
    evals = evals_at([0, 10, 20, 30], [2.0, 2.6, 2.5, 2.4])
    early = diagnose(bump + evals, run=run, is_finished=False)
    assert early.get("worse than base").confidence == "watch"
    assert not any(v.is_alarm for v in early.verdicts)
    late = diagnose(bump + evals, run={"max_steps": 100}, is_finished=False)
    assert late.main.confidence == "sure"


def test_evals_alone_are_read():
    falling = evals_at(list(range(0, 100, 10)), [2 - s / 100 for s in range(0, 100, 10)])
    assert diagnose(falling).main.name == "healthy"
    turned = evals_at([0, 10, 20, 30, 40], [2.0, 1.5, 1.2, 1.4, 1.6])
    found = diagnose(turned)
    assert (found.main.name, found.divergence_step) == ("eval rising", 20)
    assert "no train loss was logged" in found.main.because


def test_an_eval_loss_of_nothing_is_no_crash():
    levels = np.exp(-np.arange(30) / 5)
    found = diagnose(run_of(levels) + evals_at([0, 10, 20, 30], [2.0, 0.5, 0.1, 0.0]))
    assert found.main.name == "healthy"
    assert "its lowest" in found.main.because


@pytest.mark.parametrize("shift", [2.0, 5.0])
def test_losses_below_0_are_not_judged_by_shares(shift):
    records = [r | {"loss": r["loss"] - shift} for r in run_of(FALLING)]
    for evals in ([], evals_at([0, 50, 100], [2.4 - shift, 1.2 - shift, 1.1 - shift])):
        found = diagnose(records + evals)
        assert not any(v.kind in ("fault", "warning") for v in found.verdicts)
        assert "no cross-entropies" in found.text()


def test_zeros_are_no_instability():
    assert diagnose([{"step": s, "loss": 0.0} for s in range(1, 31)]).get("unstable") is None


def test_a_constant_loss_is_not_learning():
    constant = [{"step": s, "loss": 2.0} for s in range(1, 31)]
    assert diagnose(constant).get("not learning").confidence == "watch"
    found = diagnose(constant + evals_at([0, 10, 20, 30], [2.0] * 4))
    assert (found.main.name, found.main.confidence) == ("not learning", "sure")


def test_an_eval_set_that_is_easier_from_the_start_is_no_leak():
    levels = np.repeat([1.8, 1.6, 1.45, 1.35], 30)
    records = [r | {"epoch": r["step"] / 30} for r in run_of(levels, 0.05)]
    steps = [0, 15, 45, 75, 105, 120]
    honest = [1.9, 1.8, 1.68, 1.6, 1.56, 1.54]
    easier = evals_at(steps, [0.85 * loss for loss in honest])
    assert diagnose(records + easier).get("suspected leakage") is None


def test_half_the_loss_without_accumulation_ends_no_reading():
    evals = evals_at([0, 25, 50, 75, 100], [1.2, 0.65, 0.55, 0.52, 0.51])
    found = diagnose(run_of(FALLING) + evals)
    assert found.get("scale mismatch").kind == "warning"
    assert len(found.verdicts) > 1


def test_other_rows_are_no_instability():
    levels = np.where(np.arange(200) < 100, 1.0, 1.6)
    evals = evals_at([0, 50, 100, 150, 200], [2.0, 1.8, 1.6, 1.4, 1.25])
    found = diagnose(run_of(levels, 0.05) + evals)
    assert found.get("unstable").confidence == "watch"
    assert "look at the rows from step" in found.get("unstable").action
    assert diagnose(run_of(levels, 0.05)).get("unstable").confidence != "watch"


def test_a_spike_of_a_long_run_is_found_at_its_step():
    levels = np.full(10_000, 2.0)
    records = run_of(levels)
    records[5_002]["loss"] = 60.0
    found = diagnose(records).get("spikes")
    assert (found.steps, found.numbers["highest"]) == ((5_003,), 60.0)
    assert "1 of 10000 losses" in found.because


def test_an_eval_loss_that_broke_points_at_the_eval_rows():
    records = run_of(FALLING) + evals_at([0, 50], [2.0, math.nan])
    assert diagnose(records).main.action == "look for eval rows without labels"


def test_whether_the_run_is_over_is_what_caller_or_log_says():
    records = run_of(FALLING)
    end = {"step": records[-1]["step"], "is_end": True}
    assert diagnose(records).is_finished is None
    assert diagnose([*records, end]).is_finished is True
    for known in (True, False):
        assert diagnose([*records, end], is_finished=known).is_finished is known
    # a log that says nothing is read as a whole run, as before
    assert diagnose(records).verdicts == diagnose(records, is_finished=True).verdicts


def test_a_diagnosis_goes_through_the_records_once_for_each_key(monkeypatch):
    from colab_qlora.curves.rules import train_readings

    asked = []
    stock = train_readings.points_of
    monkeypatch.setattr(
        train_readings, "points_of", lambda rows, key: asked.append(key) or stock(rows, key)
    )
    diagnose([r | {"grad_norm": 1.0, "epoch": r["step"] / 50} for r in run_of(FALLING)])
    assert {"grad_norm", "learning_rate", "epoch"} <= set(asked)
    assert len(asked) == len(set(asked))
