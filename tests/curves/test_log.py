"""The loss log: what survives a kill, what comes back, and what a broken file says."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from colab_qlora.curves.log import LossLog, eval_points, read_log, train_points, write_atomically
from colab_qlora.curves.logs.runs import has_ended
from colab_qlora.errors import UserError

REPO = Path(__file__).resolve().parents[2]


def write_log(path: Path, records, run=None) -> Path:
    with LossLog.open(path, run) as log:
        for record in records:
            log.append(record)
    return path


def test_round_trip_with_header_and_unknown_keys(tmp_path):
    path = tmp_path / "deep" / "folder" / "loss.jsonl"
    records = [
        {"step": 0, "eval_loss": 2.5},
        {"step": 1, "loss": 2.25, "learning_rate": 2e-4, "note": "first", "tags": [1, 2]},
        {"step": 1, "eval_loss": 2.0, "peak_memory_gib": 5.5, "best": None},
    ]
    write_log(path, records, {"r": 16, "path": Path("x"), "warm": (1, 2)})
    log = read_log(path)
    assert log.records == records == list(log)
    assert log.run == {"r": 16, "path": "x", "warm": [1, 2]}
    first = json.loads(path.read_text().splitlines()[0])
    assert first["format"] == "colab_qlora.loss_log/1"


def test_records_in_memory_equal_those_read_back(tmp_path):
    path = tmp_path / "loss.jsonl"
    with LossLog.open(path) as log:
        log.append({"step": np.int64(3), "loss": np.float32(0.5), "array": np.arange(2), "t": (1,)})
        log.append({"step": 4.0, "loss": 1, "path": Path("a")})
        assert log.records == read_log(path).records
    assert log.records[0] == {"step": 3, "loss": 0.5, "array": [0, 1], "t": [1]}
    assert log.records[1] == {"step": 4, "loss": 1, "path": "a"}


def test_torch_scalars(tmp_path):
    torch = pytest.importorskip("torch")
    log = LossLog.open(tmp_path / "loss.jsonl")
    log.append({"step": 1, "loss": torch.tensor(0.5), "grad_norm": torch.tensor(math.inf)})
    assert log.records == [{"step": 1, "loss": 0.5, "grad_norm": math.inf}]


def test_nan_and_inf_are_strict_json_and_come_back_as_floats(tmp_path):
    path = tmp_path / "loss.jsonl"
    values = [math.nan, math.inf, -math.inf, np.float32("nan")]
    write_log(path, [{"step": i, "loss": v, "deep": [v]} for i, v in enumerate(values)])

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    lines = path.read_text().splitlines()
    written = [json.loads(line, parse_constant=refuse)["loss"] for line in lines]
    assert written == ["nan", "inf", "-inf", "nan"]
    steps, losses = train_points(read_log(path))
    assert steps.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(losses, [math.nan, math.inf, -math.inf, math.nan])
    assert math.isnan(read_log(path).records[0]["deep"][0])


def test_every_line_survives_sigkill(tmp_path):
    path = tmp_path / "loss.jsonl"
    writer = (
        "import sys\n"
        "from colab_qlora.curves.log import LossLog\n"
        "log = LossLog.open(sys.argv[1], {'r': 16})\n"
        "for step in range(10**9):\n"
        "    log.append({'step': step, 'loss': 1.0 / (step + 1)})\n"
        "    print(step, flush=True)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(REPO)}
    process = subprocess.Popen(
        [sys.executable, "-c", writer, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    acknowledged = -1
    while acknowledged < 200:
        acknowledged = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest = process.stdout.read().splitlines()
    process.wait()
    # the very last print may itself be cut off
    acknowledged = max([acknowledged, *(int(line) for line in rest[:-1])])
    steps, _ = train_points(read_log(path))
    assert steps.tolist() == list(range(len(steps)))
    assert len(steps) > acknowledged
    with LossLog.open(path) as log:
        log.append({"step": len(steps), "loss": 0.0})
    assert read_log(path).run == {"r": 16}
    assert len(read_log(path)) == len(steps) + 1


# appends for ever, and now and then drops the last two records as a run that resumes does; says the
# number of records after each
APPENDER = """
import itertools, sys
from colab_qlora.curves.log import LossLog
log = LossLog.open(sys.argv[1], {"r": 16})
for count in itertools.count(1):
    step = len(log)
    # up to 14 pages, between which the system may stop a write that is under way
    log.append({"step": step, "loss": 1.0 / (step + 1), "note": "x" * (step % 7 * 9000)})
    print(len(log), flush=True)
    if count % 4 == 0:
        log.truncate_after(len(log) - 3)
        print(len(log), flush=True)
"""


def test_a_log_survives_being_killed_again_and_again(tmp_path):
    path = tmp_path / "loss.jsonl"
    rng = np.random.default_rng(0)
    records = []
    for _ in range(8):
        said = kill_after(path, lines=int(rng.integers(1, 40)))
        records = read_log(path).records
        # all that was there when it last spoke, but for what it did between that and the kill
        assert said - 2 <= len(records) <= said + 2
        assert [record["step"] for record in records] == list(range(len(records)))
        assert all(len(record["note"]) == record["step"] % 7 * 9000 for record in records)
        assert read_log(path).run == {"r": 16}
        others = set(os.listdir(tmp_path)) - {"loss.jsonl"}
        # a new file that was not yet renamed is left over, under a name that nobody reads
        assert all(name.startswith(".loss.jsonl.") for name in others)
    with LossLog.open(path) as log:
        log.append({"step": len(records), "loss": 0.5})
    assert len(read_log(path)) == len(records) + 1


def kill_after(path: Path, lines: int) -> int:
    """Runs the appender until it said so many lines, kills it and gives the last it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", APPENDER, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPO)},
    )
    assert process.stdout is not None
    said = [process.stdout.readline() for _ in range(lines)]
    process.send_signal(signal.SIGKILL)
    said += process.stdout.readlines()
    process.wait()
    # the last word may be cut off
    return int([line for line in said if line.endswith("\n")][-1])


def test_any_cut_loses_at_most_the_last_line(tmp_path):
    path = write_log(tmp_path / "whole", [{"step": s, "loss": s + 0.5} for s in range(3)], {"r": 8})
    data = path.read_bytes()
    cut = tmp_path / "cut.jsonl"
    for length in range(len(data) + 1):
        cut.write_bytes(data[:length])
        # a line is whole with its brace; the line end may be missing
        whole = sum(end - 1 <= length for end in line_ends(data))
        with LossLog.open(cut) as log:
            assert len(log) == max(0, whole - 1)
            assert log.run == ({"r": 8} if whole else {})
            log.append({"step": 9, "loss": 0.25})
        records = read_log(cut).records
        assert records[-1] == {"step": 9, "loss": 0.25}
        assert len(records) == max(0, whole - 1) + 1


def line_ends(data: bytes) -> list[int]:
    return [index + 1 for index, byte in enumerate(data) if byte == ord("\n")]


@pytest.mark.parametrize(
    "tail", [b'{"step": 2, "lo', b"\0\0\0\0", b"\0\0\n", b"\xff\xfe", b'{"st\n']
)
def test_a_broken_tail_is_left_out_and_dropped_on_opening(tmp_path, tail):
    path = tmp_path / "loss.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.5}\n' + tail)
    assert read_log(path).records == [{"step": 1, "loss": 2.5}]
    assert path.read_bytes().endswith(tail), "reading changed the file"
    write_log(path, [{"step": 2, "loss": 2.0}])
    assert [record["step"] for record in read_log(path)] == [1, 2]


def test_opening_an_existing_log_keeps_it_and_updates_the_header(tmp_path):
    path = write_log(tmp_path / "loss.jsonl", [{"step": 1, "loss": 2.0}])
    assert read_log(path).run == {}
    write_log(path, [{"step": 2, "loss": 1.5}], {"epochs": 1})
    write_log(path, [{"step": 3, "loss": 1.0}])
    assert read_log(path).run == {"epochs": 1}
    write_log(path, [], {"epochs": 2})
    log = read_log(path)
    assert log.run == {"epochs": 2}
    assert [record["step"] for record in log] == [1, 2, 3]
    assert os.listdir(tmp_path) == ["loss.jsonl"], "a temporary file stayed"


def test_a_resumed_run_is_not_over(tmp_path):
    path = tmp_path / "loss.jsonl"
    with LossLog.open(path) as log:
        log.append({"step": 1, "loss": 2.0})
        log.append({"step": 1, "event": "interrupted", "is_end": True})
    assert has_ended(read_log(path).records)
    with LossLog.open(path) as log:
        # at the step at which it ended, so that no step is after that
        assert log.truncate_after(1) == 1
    assert read_log(path).records == [{"step": 1, "loss": 2.0}]
    assert not has_ended(read_log(path).records)
    assert not has_ended([])


def test_truncate_after(tmp_path):
    path = tmp_path / "loss.jsonl"
    with LossLog.open(path, {"r": 4}) as log:
        for step in range(1, 7):
            log.append({"step": step, "loss": float(step)})
        log.append({"step": 4, "eval_loss": 3.0})
        assert log.truncate_after(4) == 2
        assert log.truncate_after(4) == 0
        log.append({"step": 5, "loss": 0.5})
        assert [r["step"] for r in log.records] == [1, 2, 3, 4, 4, 5]
        assert read_log(path).records == log.records
        assert read_log(path).run == {"r": 4}
        assert log.truncate_after(-1) == 6
    assert LossLog.open(path).run == {"r": 4}
    assert os.listdir(tmp_path) == ["loss.jsonl"]


def test_a_failed_rewrite_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        write_atomically(path, b"new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_write_atomically_follows_a_link(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_repeated_steps_last_one_wins_and_order_is_by_step():
    records = [
        {"step": 2, "loss": 9.0},
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 2, "eval_loss": 2.5},
        {"step": 2, "eval_loss": 2.25},
        {"step": 3, "loss": None},
        {"step": 3, "learning_rate": 1e-4},
    ]
    steps, losses = train_points(records)
    assert (steps.tolist(), losses.tolist()) == ([1, 2], [3.0, 2.0])
    steps, losses = eval_points(records)
    assert (steps.tolist(), losses.tolist()) == ([2], [2.25])
    assert steps.dtype == np.int64
    assert losses.dtype == np.float64


def test_no_points_are_empty_arrays():
    steps, losses = eval_points([{"step": 1, "loss": 1.0}])
    assert steps.shape == losses.shape == (0,)


TRAINER_STATE = {
    "max_steps": 20,
    "num_train_epochs": 1,
    "best_metric": None,
    "log_history": [
        {"epoch": 0, "eval_loss": 2.5, "eval_runtime": 1.0, "step": 0},
        {"loss": 2.0, "grad_norm": math.nan, "learning_rate": 2e-4, "epoch": 0.5, "step": 10},
        {"loss": 1.5, "grad_norm": 0.5, "learning_rate": 0.0, "epoch": 1.0, "step": 20},
        {"eval_loss": 1.75, "eval_runtime": 1.0, "epoch": 1.0, "step": 20},
        {"train_runtime": 60.0, "train_loss": 1.7, "total_flos": 1e12, "epoch": 1.0, "step": 20},
    ],
}


@pytest.mark.parametrize("indent", [None, 2])
def test_trainer_state(tmp_path, indent):
    path = tmp_path / "trainer_state.json"
    # transformers writes the literal NaN here, which Python reads
    path.write_text(json.dumps(TRAINER_STATE, indent=indent) + "\n")
    log = read_log(path)
    assert len(log) == 4
    assert log.run == {"max_steps": 20, "num_train_epochs": 1}
    assert train_points(log)[1].tolist() == [2.0, 1.5]
    assert eval_points(log)[0].tolist() == [0, 20]
    assert math.isnan(log.records[1]["grad_norm"])
    with pytest.raises(UserError):
        LossLog.open(path)
    assert json.loads(path.read_text())["max_steps"] == 20, "opening changed a foreign file"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such loss log"),
        ("", "is empty"),
        (" \n\n", "is empty"),
        ('{"step": 1, "loss": 2}\noops\n{"step": 2, "loss": 1}\n', r"loss\.jsonl:2 is not JSON"),
        ("hello", r"loss\.jsonl:1 is not JSON"),
        (
            '{"step": 1, "loss": 2}, {"step": 2, "loss": 2}\n{"step": 3, "loss": 2}\n',
            r"loss\.jsonl:1 is not JSON",
        ),
        ('{"step": 1\n"loss": 2}\n', r"loss\.jsonl:1 is not JSON"),
        ("[" * 100_000 + "\n\n\n{}", r"loss\.jsonl:1 is not JSON"),
        ('{"step": 1e30, "loss": 2}\n', "has a step that is no count: got 1e.30"),
        ("[1, 2]\n", r"loss\.jsonl:1 is not a JSON object"),
        ('{"step": 1, "loss": 2}\n{"loss": 1}\n', r"loss\.jsonl:2 has no step: got keys loss"),
        ('{"step": 1.5, "loss": 2}\n', "has a step that is no count: got 1.5"),
        ('{"step": -1, "loss": 2}\n', "has a step that is no count"),
        ('{"step": true, "loss": 2}\n', "has a step that is no count"),
        ('{"step": 1, "learning_rate": 2}\n', "has no loss values"),
        ('{"run": {"r": 1}, "format": "colab_qlora.loss_log/1"}\n', "has no loss values"),
        ('{"run": {}, "format": "colab_qlora.loss_log/2"}\n', "of another format"),
        ('{"log_history": []}', "has no loss values"),
        ('{"log_history": [{"loss": 1}]}', r"log_history\[0\] has no step"),
        ('{"log_history": [3]}', r"log_history\[0\] is not an object"),
    ],
)
def test_reading_errors_are_one_line(tmp_path, content, message):
    path = tmp_path / "loss.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_log(path)
    assert "\n" not in str(caught.value)


def test_opening_what_cannot_be_a_log(tmp_path):
    (tmp_path / "notes").write_text("hello")
    with pytest.raises(UserError, match="notes:1 is not JSON"):
        LossLog.open(tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "hello"
    with pytest.raises(UserError, match="cannot be opened"):
        LossLog.open(tmp_path)
    with pytest.raises(UserError, match="cannot be opened"):
        LossLog.open(tmp_path / "notes" / "loss.jsonl")


def test_appending_errors(tmp_path):
    path = tmp_path / "loss.jsonl"
    log = LossLog.open(path)
    with pytest.raises(UserError, match="the record has no step"):
        log.append({"loss": 1.0})
    assert path.read_bytes() == b""
    log.append({"step": 1, "loss": 1.0})
    log.close()
    log.close()
    for closed in (log, read_log(path)):
        with pytest.raises(UserError, match="closed or read-only"):
            closed.append({"step": 2, "loss": 1.0})
        with pytest.raises(UserError, match="closed or read-only"):
            closed.truncate_after(0)
    assert len(read_log(path)) == 1
