"""What is a second run in a file, and what is the same run, resumed or out of order."""

from __future__ import annotations

import time

import numpy as np
import pytest

from colab_qlora.curves.log import LossLog, read_log, read_runs, train_points
from colab_qlora.curves.logs.runs import split_runs
from colab_qlora.errors import UserError


def train(*steps):
    return [{"step": step, "loss": 2.0 / (step + 1)} for step in steps]


def evals(*steps):
    return [{"step": step, "eval_loss": 2.5 / (step + 1)} for step in steps]


ONE_RUN = {
    "no record": [],
    "one point": train(1),
    "a plain run": evals(0) + train(1, 2, 3) + evals(3),
    "resumed in the middle": train(1, 2, 3, 4) + train(3, 4, 5, 6),
    "resumed twice": train(1, 2, 3, 4) + train(3, 4, 5) + train(2, 3, 4, 5, 6),
    "resumed at the same step": train(1, 2, 3) + train(3, 4),
    "evaluated again at the step it resumed from": train(1, 2) + evals(2) + evals(2) + train(3),
    "only the eval at step 0 repeated": evals(0) + train(1, 2, 3) + evals(0) + train(4, 5),
    "only the eval at step 0 repeated, then the middle": evals(0)
    + train(1, 2, 3, 4)
    + evals(0)
    + train(3, 4, 5),
    "the eval at step 0 repeated at the end": evals(0) + train(1, 2, 3) + evals(0),
    "the first step twice in a row": train(1, 1, 2, 3),
    "killed after the first step": evals(0) + train(1) + evals(0) + train(1, 2, 3),
    "two neighbours exchanged": train(1, 3, 2, 4),
    "backwards": train(5, 4, 3, 2, 1),
    "shuffled": train(3, 5, 1, 4, 2),
    "first the second half": train(4, 5, 6, 1, 2, 3),
    "first the second half, and a step twice": train(4, 5, 6, 1, 1, 2, 3),
    "evals after the train loss": train(1, 2, 3) + evals(0, 1, 2, 3),
    "evals only": evals(0, 10, 20),
    "evals only, resumed": evals(0, 10, 20, 30, 20, 30, 40),
    "evals only, step 0 repeated": evals(0, 10, 20, 0, 30),
    "no loss at all": [{"step": 1, "learning_rate": 1.0}, {"step": 1, "learning_rate": 1.0}],
}


@pytest.mark.parametrize("name", ONE_RUN)
def test_one_run_stays_one(name):
    records = ONE_RUN[name]
    assert split_runs(records) == ([records] if records else [])


SEVERAL_RUNS = {
    "the same steps again": [train(1, 2, 3), train(1, 2, 3)],
    "with evals before training": [
        evals(0) + train(1, 2, 3) + evals(3),
        evals(0) + train(1, 2) + evals(2),
    ],
    "the second one shorter": [train(1, 2, 3, 4), train(1)],
    "the second one logged more often": [train(10, 20, 30), train(5, 10, 15, 20)],
    "three runs": [train(1, 2), train(1, 2, 3), evals(0) + train(1, 2)],
    "counted from 0": [train(0, 1, 2), train(0, 1)],
    "the second one resumed": [train(1, 2, 3), train(1, 2, 3) + train(2, 3, 4)],
    "the first one resumed": [train(1, 2, 3) + train(2, 3, 4), train(1, 2, 3)],
    "evals only": [evals(0, 10, 20), evals(0, 10, 20)],
    "an event between them": [
        train(1, 2),
        [{"step": 0, "event": "again"}, *evals(0), *train(1, 2)],
    ],
}


@pytest.mark.parametrize("name", SEVERAL_RUNS)
def test_several_runs_are_told_apart(name):
    runs = SEVERAL_RUNS[name]
    records = [record for run in runs for record in run]
    assert split_runs(records) == runs
    assert split_runs(LossLog(records)) == runs


def random_run(rng, first):
    """A run that logs every few steps, evaluates sometimes, and was perhaps killed and resumed."""
    every = int(rng.integers(1, 8)) if first is None else first
    steps = list(range(every, every * int(rng.integers(3, 40)), every))
    records = evals(0) if rng.random() < 0.5 else []
    while True:
        for step in steps:
            records += train(step)
            records += evals(step) if rng.random() < 0.2 else []
        if len(steps) < 3 or rng.random() < 0.6:
            return records, every
        # from a checkpoint after the first logged step
        steps = steps[int(rng.integers(1, len(steps))) :]
        records += evals(0) if rng.random() < 0.2 else []


@pytest.mark.parametrize("seed", range(60))
def test_random_runs_put_together_come_apart_where_they_were_joined(seed):
    rng = np.random.default_rng(seed)
    runs, first = [], None
    for _ in range(rng.integers(1, 5)):
        records, first = random_run(rng, first)
        runs.append(records)
    found = split_runs([record for run in runs for record in run])
    # an eval at step 0 that ends a run could as well begin the next
    assert [train_points(run)[0].tolist() for run in found] == [
        train_points(run)[0].tolist() for run in runs
    ]
    assert sum(map(len, found)) == sum(map(len, runs))


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_one_run_makes_it_two(seed):
    rng = np.random.default_rng(seed)
    records = evals(0) + train(*range(1, 50)) + evals(*range(5, 50, 5))
    shuffled = [records[index] for index in rng.permutation(len(records))]
    assert split_runs(shuffled) == [shuffled]


@pytest.mark.parametrize("order", ["backwards", "shuffled", "pairs"])
def test_a_disorder_of_many_records_is_no_work_of_hours(order):
    steps = np.arange(10**5)
    if order == "backwards":
        steps = steps[::-1]
    elif order == "shuffled":
        steps = np.random.default_rng(0).permutation(steps)
    else:
        steps = steps % 2
    records = [{"step": step, "loss": 1.0} for step in steps.tolist()]
    begun = time.process_time()
    found = split_runs(records)
    # a search that looks back over all records would take minutes
    assert time.process_time() - begun < 10
    assert len(found) == (50_000 if order == "pairs" else 1)


def test_a_file_with_two_runs_asks_which(tmp_path):
    path = tmp_path / "loss.jsonl"
    with LossLog.open(path, {"r": 8}) as log:
        for record in evals(0) + train(1, 2, 3) + evals(0) + train(1, 2):
            log.append(record)
    with pytest.raises(UserError) as caught:
        read_log(path)
    message = str(caught.value)
    # line 1 is the header
    assert "holds 2 runs: got run 2, which begins at line 6 (step 0)" in message
    assert "which_run=0 to 1, or -1 for the last" in message
    assert "read_log(path, which_run=-1)" in message
    assert "\n" not in message
    assert read_log(path, which_run=0).records == evals(0) + train(1, 2, 3)
    assert read_log(path, which_run=-1).records == evals(0) + train(1, 2)
    assert read_log(path, which_run=1).records == read_log(path, which_run=-1).records
    assert [log.records for log in read_runs(path)] == [
        read_log(path, which_run=index).records for index in (0, 1)
    ]
    assert [len(log.notes) for log in read_runs(path)] == [1, 1], "whose header is it?"


def test_a_second_header_begins_a_run(tmp_path):
    first, second, both = (tmp_path / name for name in ("a", "b", "both"))
    for path, run, records in (
        (first, {"r": 8}, train(1, 2)),
        # the steps alone would look like one run that goes on
        (second, {"r": 16}, train(3, 4)),
    ):
        with LossLog.open(path, run) as log:
            for record in records:
                log.append(record)
    both.write_bytes(first.read_bytes() + second.read_bytes())
    with pytest.raises(UserError, match=r"holds 2 runs: got run 2, .* line 5 \(step 3\)"):
        read_log(both)
    logs = read_runs(both)
    assert [(log.run, log.records, log.notes) for log in logs] == [
        ({"r": 8}, train(1, 2), ()),
        ({"r": 16}, train(3, 4), ()),
    ]
    before = both.read_bytes()
    with pytest.raises(UserError, match="holds 2 runs, so none can go on in it"):
        LossLog.open(both)
    assert both.read_bytes() == before


def test_a_second_header_without_records_is_no_run_and_is_cleared_away(tmp_path):
    path = tmp_path / "loss.jsonl"
    with LossLog.open(path, {"r": 8}) as log:
        log.append(train(1)[0])
    header = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(path.read_bytes() + header)
    assert read_log(path).records == train(1)
    with LossLog.open(path) as log:
        log.append(train(2)[0])
    assert read_log(path).records == train(1, 2)
    path.write_bytes(header + path.read_bytes())
    assert read_log(path).records == train(1, 2)


@pytest.mark.parametrize("which", [2, -3, True, "last", 1.0])
def test_which_run_is_a_run_of_the_file(tmp_path, which):
    path = tmp_path / "loss.jsonl"
    with LossLog.open(path) as log:
        for record in train(1, 2, 1, 2):
            log.append(record)
    with pytest.raises(UserError, match="there is no such run .* allowed: 0 to 1, or -1"):
        read_log(path, which_run=which)


def test_the_only_run_may_be_named(tmp_path):
    path = tmp_path / "loss.jsonl"
    with LossLog.open(path) as log:
        log.append(train(1)[0])
    for which in (0, -1, None):
        assert read_log(path, which_run=which).records == train(1)


def test_a_resumed_run_is_read_without_a_question_and_its_later_records_count(tmp_path):
    path = tmp_path / "loss.jsonl"
    with LossLog.open(path) as log:
        for record in [*train(1, 2, 3, 4), {"step": 3, "loss": 9.0}, {"step": 4, "loss": 8.0}]:
            log.append(record)
    steps, losses = train_points(read_log(path))
    assert steps.tolist() == [1, 2, 3, 4]
    assert losses.tolist()[2:] == [9.0, 8.0]
