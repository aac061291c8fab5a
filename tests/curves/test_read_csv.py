"""Curves that other tools wrote as CSV, and tables that are none."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from colab_qlora.curves.log import eval_points, read_log, read_runs, train_points
from colab_qlora.errors import UserError


def written(folder: Path, text: str, name: str = "curve.csv", encoding: str = "utf-8") -> Path:
    path = folder / name
    path.write_bytes(text.encode(encoding))
    return path


def points(log):
    return [array.tolist() for pair in (train_points(log), eval_points(log)) for array in pair]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_every_field_between_any_separator(tmp_path, separator, line_end):
    rows = [
        "step,epoch,loss,eval_loss,learning_rate,grad_norm,tokens,seconds,peak_memory_gib,event",
        "0,0.0,,2.5,,,0,0.5,1.5,",
        "10,0.5,2.25,,2e-4,1.5,6600,8.25,2.0,resumed",
        "20,1.0,2.0,2.125,1E-4,nan,13200,16.5,2.0,",
    ]
    text = line_end.join(rows).replace(",", separator) + line_end
    records = read_log(written(tmp_path, text)).records
    assert records[0] == {
        "step": 0,
        "epoch": 0.0,
        "eval_loss": 2.5,
        "tokens": 0,
        "seconds": 0.5,
        "peak_memory_gib": 1.5,
    }
    assert records[1]["event"] == "resumed"
    assert records[1]["learning_rate"] == 2e-4
    assert math.isnan(records[2].pop("grad_norm"))
    assert records[2] == {
        "step": 20,
        "epoch": 1.0,
        "loss": 2.0,
        "eval_loss": 2.125,
        "learning_rate": 1e-4,
        "tokens": 13200,
        "seconds": 16.5,
        "peak_memory_gib": 2.0,
    }
    assert all(type(record["step"]) is int for record in records)


@pytest.mark.parametrize(
    "header",
    [
        "step,loss,eval_loss",
        "Step,Training Loss,Validation Loss",
        "global_step,train_loss,val_loss",
        "GLOBAL STEP,Train Loss,Eval Loss",
        "iteration,train/loss,eval/loss",
        "Iteration,Loss/train,Loss/val",
        "_step,train/loss,validation/loss",
        ' "step" ,"Loss"," eval-loss "',
    ],
)
def test_usual_names(tmp_path, header):
    log = read_log(written(tmp_path, f"{header}\n1,2.5,2.25\n2,,2.0\n"))
    assert points(log) == [[1], [2.5], [1, 2], [2.25, 2.0]]


def test_a_table_of_the_notebook_progress_of_transformers(tmp_path):
    # as pandas.read_html and to_csv give it, index column included
    text = (
        ",Step,Training Loss,Validation Loss\n"
        "0,0,No log,2.731000\n1,50,2.104500,1.984000\n2,100,1.883200,1.900000\n"
    )
    log = read_log(written(tmp_path, text))
    assert points(log) == [[50, 100], [2.1045, 1.8832], [0, 50, 100], [2.731, 1.984, 1.9]]
    assert log.notes == ()


def test_a_table_that_counts_epochs_says_so(tmp_path):
    log = read_log(written(tmp_path, "Epoch,Training Loss,Validation Loss\n1,2.0,2.1\n2,1.5,1.8\n"))
    assert points(log) == [[1, 2], [2.0, 1.5], [1, 2], [2.1, 1.8]]
    assert log.notes == ("The table has no steps, so its epochs stand in their place.",)
    with pytest.raises(
        UserError, match=r"has no step column: got epoch, loss; allowed: global_step"
    ):
        read_log(written(tmp_path, "epoch,loss\n0.5,2.0\n1.0,1.5\n"))


def test_the_log_history_of_a_trainer_saved_with_pandas(tmp_path):
    pandas = pytest.importorskip("pandas")
    history = [
        {"eval_loss": 2.5, "eval_runtime": 1.0, "epoch": 0.0, "step": 0},
        {"loss": 2.0, "grad_norm": 0.5, "learning_rate": 2e-4, "epoch": 0.5, "step": 10},
        {"loss": 1.5, "grad_norm": 0.25, "learning_rate": 1e-4, "epoch": 1.0, "step": 20},
        {"eval_loss": 1.75, "eval_runtime": 1.0, "epoch": 1.0, "step": 20},
        {"train_runtime": 60.0, "train_loss": 1.7, "total_flos": 1e12, "epoch": 1.0, "step": 20},
    ]
    path = tmp_path / "history.csv"
    pandas.DataFrame(history).to_csv(path)
    state = tmp_path / "trainer_state.json"
    state.write_text(json.dumps({"log_history": history}))
    # the mean of the whole run, train_loss, is no train loss of step 20 in either
    assert read_log(path).records == read_log(state).records


def test_an_export_of_wandb(tmp_path):
    text = (
        '"train/global_step","brave-sun-7 - train/loss","brave-sun-7 - train/loss__MIN",'
        '"brave-sun-7 - train/loss__MAX","brave-sun-7 - _step","brave-sun-7 - _step__MIN"\n'
        '"5","2.5","2.25","2.75","0","0"\n"10","1.5","1.5","1.5","1","1"\n'
    )
    log = read_log(written(tmp_path, text))
    assert log.records == [{"step": 5, "loss": 2.5}, {"step": 10, "loss": 1.5}]
    assert log.name == "brave-sun-7"


def test_an_export_of_wandb_with_several_runs(tmp_path):
    text = (
        '"Step","high rate - train/loss","low - rate - train/loss","low - rate - eval/loss"\n'
        '"1","2.5","2.75",""\n"2","","2.5","2.6"\n"3","2.0","",""\n'
    )
    path = written(tmp_path, text)
    with pytest.raises(
        UserError, match=r"holds 2 runs: got run 2, which begins at line 2 \(step 1\)"
    ):
        read_log(path)
    assert {log.name: points(log) for log in read_runs(path)} == {
        "high rate": [[1, 3], [2.5, 2.0], [], []],
        "low - rate": [[1, 2], [2.75, 2.5], [2], [2.6]],
    }


def test_the_history_of_wandb_counts_optimiser_steps_and_not_its_own(tmp_path):
    text = (
        "_step,_runtime,_timestamp,train/loss,train/global_step,train/learning_rate,eval/loss\n"
        "0,1.5,1760000001.5,2.5,10,2e-4,\n1,2.5,1760000002.5,,10,,2.25\n2,3.5,1760000003.5,2.0,20,,\n"
    )
    log = read_log(written(tmp_path, text))
    assert points(log) == [[10, 20], [2.5, 2.0], [10], [2.25]]
    assert [record["seconds"] for record in log] == [1.5, 2.5, 3.5]


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("export.csv", "loss"),
        ("run-train-tag-train_loss.csv", "loss"),
        ("run-.-tag-train_loss (1).csv", "loss"),
        ("run-eval_run-tag-train_loss.csv", "loss"),
        ("run-a-tag-eval_loss.csv", "eval_loss"),
        ("run-a-tag-Loss_val.csv", "eval_loss"),
        ("my eval loss.csv", "eval_loss"),
        ("evaluation of retrieval.csv", "loss"),
    ],
)
def test_an_export_of_tensorboard(tmp_path, name, key):
    text = "Wall time,Step,Value\n1760000000.25,1,2.5\n1760000002.75,2,2.0\n"
    assert read_log(written(tmp_path, text, name)).records == [
        {"step": 1, key: 2.5, "seconds": 0.0},
        {"step": 2, key: 2.0, "seconds": 2.5},
    ]


def test_an_export_of_tensorboard_of_something_else(tmp_path):
    text = "Wall time,Step,Value\n1760000000.25,1,2.5\n"
    path = written(tmp_path, text, "run-a-tag-train_learning_rate.csv")
    with pytest.raises(UserError, match="has no loss column: got Wall time, Step, Value"):
        read_log(path)


def test_decimal_commas_between_semicolons(tmp_path):
    text = "Step;Loss;Eval_Loss;lr\n1;2,5;;2,0E-04\n2;1.250,75;2,25;0\n3;1.5;nan;\n"
    records = read_log(written(tmp_path, text)).records
    assert records[0] == {"step": 1, "loss": 2.5, "learning_rate": 2e-4}
    assert records[1] == {"step": 2, "loss": 1250.75, "eval_loss": 2.25, "learning_rate": 0.0}
    assert records[2]["loss"] == 1.5
    assert math.isnan(records[2]["eval_loss"])


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-8-sig", "utf-32"])
def test_a_spreadsheet_in_unicode_is_decoded_by_its_mark(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith(("le", "be")) else ""
    text = f"{mark}Step\tLoss\tnote\r\n1\t2,5\tgr\u00fc\u00df\r\n2\t2,25\t\r\n"
    records = read_log(written(tmp_path, text, encoding=encoding)).records
    assert records == [
        {"step": 1, "loss": 2.5, "note": "gr\u00fc\u00df"},
        {"step": 2, "loss": 2.25},
    ]


def test_what_a_spreadsheet_adds(tmp_path):
    # its separator in a line of its own, thousands, empty columns and rows, no last line end
    text = 'sep=,\r\n\r\nStep,Loss,,\r\n"1,000",2.5,,\r\n,,,\r\n"12,000",2.25,,'
    assert points(read_log(written(tmp_path, text)))[:2] == [[1000, 12000], [2.5, 2.25]]
    with pytest.raises(UserError, match="curve.csv:4 has a loss that is no number"):
        read_log(written(tmp_path, "sep=;\r\nstep;loss\r\n1;2\r\n2;x\r\n"))


def test_words_for_no_value(tmp_path):
    text = "step,loss,eval_loss\n1,-,None\n2,n/a,No log\n3,2.0,null\n4,NaN,inf\n5,-inf,Infinity\n"
    log = read_log(written(tmp_path, text))
    np.testing.assert_array_equal(train_points(log)[1], [2.0, math.nan, -math.inf])
    np.testing.assert_array_equal(eval_points(log)[1], [math.inf, math.inf])


def test_all_nan_is_a_log(tmp_path):
    steps, losses = train_points(read_log(written(tmp_path, "step,loss\n1,nan\n2,NaN\n")))
    assert steps.tolist() == [1, 2]
    assert np.isnan(losses).all()


def test_a_second_header_row_begins_a_run(tmp_path):
    path = written(tmp_path, "step,loss\n1,2.5\n2,2.0\nstep,loss\n3,1.5\n")
    with pytest.raises(
        UserError, match=r"holds 2 runs: got run 2, which begins at line 5 \(step 3\)"
    ):
        read_log(path)
    assert [points(log)[0] for log in read_runs(path)] == [[1, 2], [3]]
    # and so does one that names other columns, in another order
    path = written(tmp_path, "step,loss\n1,2.5\nloss,eval_loss,step\n2.0,2.25,1\n")
    assert points(read_log(path, which_run=-1)) == [[1], [2.0], [1], [2.25]]


def test_steps_that_begin_again_are_a_second_run(tmp_path):
    path = written(tmp_path, "step,loss\n1,2.5\n2,2.0\n\n1,1.5\n")
    with pytest.raises(UserError, match=r"begins at line 5 \(step 1\)"):
        read_log(path)


def test_a_row_that_a_kill_cut_off_is_left_out(tmp_path):
    text = "step,learning_rate,loss\n1,2e-4,2.5\n2,1e-4,2.0\n"
    second = text.rindex("2,1e-4")
    for length in range(second, len(text)):
        records = read_log(written(tmp_path, text[:length])).records
        assert records[0] == {"step": 1, "learning_rate": 2e-4, "loss": 2.5}
        # all separators there: that the last number lost digits cannot be told
        assert len(records) == 1 + (length >= text.rindex("2.0"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,2.5\n2,2.25\n", r"has no header: got '1,2\.5'; allowed: a first row that names a step"),
        (",,,\n,,\n", "has no header"),
        ("a,b\n1,2\n", "has no header: got 'a,b'"),
        ("hello", "has no header: got 'hello'"),
        ("step,accuracy\n1,2\n", "has no loss column: got step, accuracy; allowed: a first row"),
        ("loss,note\n1,2\n", "has no step column: got loss, note"),
        ("step,loss\n", "has no loss values"),
        ("step,loss\n1,\n2,\n", "has no loss values"),
        (
            "step,loss\n1,2.5\n2,abc\n",
            r":3 has a loss that is no number: got 'abc'; allowed: a num",
        ),
        ("step,loss\none,2.5\n", ":2 has a step that is no number: got 'one'"),
        ("step,loss\n1.5,2.5\n", r":2 has a step that is no count: got 1\.5"),
        ("step,loss\n-1,2.5\n", ":2 has a step that is no count: got -1"),
        ("step,loss\nnan,2.5\n", ":2 has a step that is no count: got nan"),
        ("step,loss\n,2.5\n", ":2 has no step"),
        ("step,loss\n1,2,5\n", ":2 has more cells than the header has names: got 3 and 2"),
        ("step,loss,Loss\n1,2,5\n", "has two columns for loss: got loss and Loss"),
        ('step,loss\n1,"' + "2" * 200_000 + '"\n', "is not CSV: got field larger"),
    ],
)
def test_what_is_refused(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_log(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert "curve.csv" in str(caught.value)


def test_a_csv_needs_no_suffix(tmp_path):
    log = read_log(written(tmp_path, "step;loss\n1;2,5\n", "curve.txt"))
    assert points(log)[:2] == [[1], [2.5]]


@pytest.mark.parametrize("seed", range(25))
def test_random_records_come_back(tmp_path, seed):
    rng = np.random.default_rng(seed)
    keys = ["loss", "eval_loss", "learning_rate", "grad_norm", "epoch", "tokens"]
    keys = [keys[index] for index in rng.permutation(len(keys))]
    keys.insert(int(rng.integers(0, len(keys))), "step")
    separator = ",;\t"[seed % 3]
    decimal = "," if separator != "," and seed % 2 else "."
    records = []
    for step in sorted(rng.integers(0, 10**6, rng.integers(1, 30)).tolist()):
        record = {"step": step, "loss": float(rng.lognormal(0, 3))}
        for key in ("eval_loss", "learning_rate", "grad_norm", "epoch"):
            if rng.random() < 0.5:
                record[key] = float(rng.choice([rng.normal(), math.inf, -math.inf, 1e-300, 0.0]))
        records.append(record)
    file = io.StringIO()
    writer = csv.DictWriter(file, keys, delimiter=separator)
    writer.writeheader()
    for record in records:
        writer.writerow({key: repr(value).replace(".", decimal) for key, value in record.items()})
    found = read_log(written(tmp_path, file.getvalue())).records
    assert found == records
