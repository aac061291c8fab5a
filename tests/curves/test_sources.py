"""Which file of a folder is read, and what a file that is no log says."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from colab_qlora.curves.log import LossLog, read_log, train_points
from colab_qlora.errors import UserError


def put_log(folder: Path, loss: float) -> Path:
    path = folder / "loss_log.jsonl"
    with LossLog.open(path, {"r": 8}) as log:
        log.append({"step": 1, "loss": loss})
    return path


def put_state(folder: Path, loss: float) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"log_history": [{"step": 1, "loss": loss}]}))
    return path


def put_events(folder: Path, loss: float) -> Path:
    pytest.importorskip("tensorboard", reason="needs the tensorboard package")
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    summary = Summary(value=[Summary.Value(tag="train/loss", simple_value=loss)])
    writer.add_event(Event(wall_time=1.0, step=1, summary=summary))
    writer.close()
    return next(folder.glob("*tfevents*"))


def loss_of(path) -> float:
    return train_points(read_log(path))[1].item()


def test_the_order_of_preference(tmp_path):
    run = put_events(tmp_path / "runs" / "Aug29_12-00-00_host", 1.0)
    log = read_log(tmp_path)
    assert (log.path, log.notes) == (run.parent, ())
    assert loss_of(tmp_path) == 1.0
    # the newest checkpoint, by number and not by name
    for step in (500, 1000, 90):
        put_state(tmp_path / f"checkpoint-{step}", float(step))
    (tmp_path / "checkpoint-2000").mkdir()
    log = read_log(tmp_path)
    assert log.path == tmp_path / "checkpoint-1000" / "trainer_state.json"
    assert loss_of(tmp_path) == 1000.0
    events = put_events(tmp_path, 2.0)
    assert read_log(tmp_path).path == events
    assert loss_of(tmp_path) == 2.0
    state = put_state(tmp_path, 3.0)
    assert read_log(tmp_path).path == state
    assert loss_of(tmp_path) == 3.0
    own = put_log(tmp_path, 4.0)
    log = read_log(tmp_path)
    assert log.path == own
    assert loss_of(str(tmp_path) + "/") == 4.0
    (note,) = log.notes
    assert note == (
        f"Of the folder, loss_log.jsonl was read and not trainer_state.json, {events.name}, "
        f"{Path('checkpoint-1000') / 'trainer_state.json'}."
    )


def test_a_folder_with_one_log_needs_no_note(tmp_path):
    put_state(tmp_path / "checkpoint-10", 3.0)
    assert read_log(tmp_path).notes == ()
    assert read_log(tmp_path / "checkpoint-10").notes == ()


def test_a_folder_without_a_log(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-x").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "loss_log.jsonl").mkdir()
    with pytest.raises(UserError, match="that is a folder without a loss log: got .* train first"):
        read_log(tmp_path)


def test_a_folder_with_the_events_of_several_runs(tmp_path):
    for name in ("a", "b"):
        put_events(tmp_path / "runs" / name, 1.0)
    with pytest.raises(UserError, match="events of several runs: got runs.a, runs.b; .*one of"):
        read_log(tmp_path)
    assert loss_of(tmp_path / "runs" / "a") == 1.0


def test_an_empty_log_is_not_passed_over(tmp_path):
    put_state(tmp_path, 3.0)
    (tmp_path / "loss_log.jsonl").touch()
    with pytest.raises(UserError, match=r"is empty: got .*loss_log\.jsonl"):
        read_log(tmp_path)


BINARY = {
    "noise": bytes(range(256)) * 8,
    "an archive": gzip.compress(b'{"step": 1, "loss": 2.5}\n'),
    "a picture": b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\3 \0\0\1\xc2\b\6",
    "weights": (100).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"}}',
    "numbers": b"\x93NUMPY\1\0v\0{'descr': '<f8', 'fortran_order': False, 'shape': (3,), }\n",
}


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_binary_data(tmp_path, name, suffix):
    path = tmp_path / f"log{suffix}"
    path.write_bytes(BINARY[name])
    with pytest.raises(UserError, match="is not a loss log: got .*binary data; allowed") as caught:
        read_log(path)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == BINARY[name]


@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n\t", b"\xef\xbb\xbf", b"\xff\xfe", b"\0" * 99])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".json"])
def test_nothing_in_it(tmp_path, data, suffix):
    path = tmp_path / f"log{suffix}"
    path.write_bytes(data)
    with pytest.raises(UserError, match="the loss log is empty: got"):
        read_log(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_json_of_a_shell_that_writes_unicode(tmp_path, encoding):
    path = tmp_path / "log.jsonl"
    text = '{"step": 1, "loss": 2.5, "note": "gr\u00fc\u00df"}\r\n{"step": 2, "loss": 2.25}\r\n'
    path.write_bytes(text.encode(encoding))
    assert read_log(path).records[0] == {"step": 1, "loss": 2.5, "note": "gr\u00fc\u00df"}
    assert len(read_log(path)) == 2


def test_half_a_character(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes("step,loss\n1,2\n".encode("utf-16") + b"\0")
    with pytest.raises(UserError, match="begins like utf-16 text and is none") as caught:
        read_log(path)
    assert "\n" not in str(caught.value)


def test_a_trainer_state_with_two_runs(tmp_path):
    path = tmp_path / "trainer_state.json"
    history = [{"step": step, "loss": 2.0} for step in (1, 2, 3, 1, 2)]
    path.write_text(json.dumps({"log_history": history}))
    with pytest.raises(UserError, match=r"holds 2 runs: got run 2, .* record 4 \(step 1\)"):
        read_log(path)
    assert len(read_log(path, which_run=-1)) == 2


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    path = put_log(tmp_path, 1.0)

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=r"cannot be opened: got .*\(Permission denied\)"):
        read_log(path)
