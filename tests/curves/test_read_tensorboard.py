"""Real event files, written by TensorBoard's own writer and by torch's."""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest

from colab_qlora.curves.log import eval_points, read_log, read_runs, train_points
from colab_qlora.errors import UserError

pytest.importorskip("tensorboard", reason="needs the tensorboard package")

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, types_pb2  # noqa: E402
from tensorboard.summary.writer.event_file_writer import EventFileWriter  # noqa: E402

BEGUN = 1_760_000_000.0


class Writer:
    """Writes scalars, one event each, half a second after the one before."""

    def __init__(self, folder, begun=BEGUN, suffix=""):
        self.now = begun
        self.file = EventFileWriter(str(folder), filename_suffix=suffix)

    def add(self, step, **values):
        for name, value in values.items():
            tag = name.replace("__", "/")
            summary = summary_pb2.Summary(
                value=[summary_pb2.Summary.Value(tag=tag, simple_value=value)]
            )
            self.put(event_pb2.Event(wall_time=self.now, step=step, summary=summary))
        self.now += 0.5

    def put(self, event):
        self.file.add_event(event)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()


def written_run(folder, steps, begun=BEGUN, base=2.5):
    with Writer(folder, begun) as writer:
        if base:
            writer.add(0, eval__loss=base)
        for step in steps:
            writer.add(step, train__loss=2 / step, train__learning_rate=0.25, train__epoch=step / 4)


def test_the_scalars_of_a_trainer(tmp_path):
    with Writer(tmp_path) as writer:
        writer.add(0, eval__loss=2.5, eval__runtime=1.0)
        writer.add(1, train__loss=2.25, train__grad_norm=math.inf, train__learning_rate=0.5)
        writer.add(2, train__loss=math.nan, train__grad_norm=0.75, train__epoch=0.5)
        writer.add(2, eval__loss=2.0)
        writer.add(2, train__train_loss=9.0, train__train_runtime=2.0)
    log = read_log(tmp_path)
    assert log.records[:2] == [
        {"step": 0, "seconds": 0.0, "eval_loss": 2.5},
        {"step": 1, "seconds": 0.5, "loss": 2.25, "grad_norm": math.inf, "learning_rate": 0.5},
    ]
    assert math.isnan(log.records[2].pop("loss"))
    # what was logged at one step, one after the other, is one record
    assert log.records[2:] == [
        {"step": 2, "seconds": 1.0, "grad_norm": 0.75, "epoch": 0.5, "eval_loss": 2.0}
    ]
    assert log.path.parent == tmp_path
    assert read_log(log.path).records[:2] == log.records[:2]


def test_what_torch_writes(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path)) as writer:
        writer.add_text("args", "{}")
        for step in (1, 2, 3):
            writer.add_scalar("train/loss", 2.0 / step, step)
            writer.add_scalar("Loss/val", 4.0 / step, step, new_style=True)
    log = read_log(tmp_path)
    assert train_points(log)[0].tolist() == eval_points(log)[0].tolist() == [1, 2, 3]
    np.testing.assert_allclose(eval_points(log)[1], [4.0, 2.0, 4 / 3], rtol=1e-6)


def test_what_the_callback_of_transformers_writes(tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    transformers = pytest.importorskip("transformers")
    from transformers.integrations import TensorBoardCallback

    callback = TensorBoardCallback()
    callback.logging_dir = str(tmp_path)
    args = transformers.TrainingArguments(output_dir=str(tmp_path / "out"), report_to="none")
    state = transformers.TrainerState(is_world_process_zero=True)
    control = transformers.TrainerControl()
    callback.on_train_begin(args, state, control)
    callback.on_log(args, state, control, logs={"eval_loss": 2.5, "epoch": 0.0})
    for step in (1, 2):
        state.global_step = step
        logs = {"loss": 2.0 / step, "grad_norm": 0.5, "learning_rate": 0.125, "epoch": step / 2}
        callback.on_log(args, state, control, logs=logs)
    callback.on_log(args, state, control, logs={"train_runtime": 1.0, "train_loss": 1.5})
    callback.on_train_end(args, state, control)
    records = [
        {key: value for key, value in record.items() if key != "seconds"}
        for record in read_log(tmp_path)
    ]
    assert records == [
        {"step": 0, "eval_loss": 2.5, "epoch": 0.0},
        {"step": 1, "loss": 2.0, "grad_norm": 0.5, "learning_rate": 0.125, "epoch": 0.5},
        {"step": 2, "loss": 1.0, "grad_norm": 0.5, "learning_rate": 0.125, "epoch": 1.0},
    ]


def test_scalars_that_were_written_as_tensors(tmp_path):
    metadata = summary_pb2.SummaryMetadata(
        plugin_data=summary_pb2.SummaryMetadata.PluginData(plugin_name="scalars")
    )
    with Writer(tmp_path) as writer:
        for step, loss in ((1, 2.5), (2, 2.25)):
            tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, float_val=[loss])
            value = summary_pb2.Summary.Value(tag="loss", tensor=tensor, metadata=metadata)
            summary = summary_pb2.Summary(value=[value])
            writer.put(event_pb2.Event(wall_time=BEGUN, step=step, summary=summary))
    assert train_points(read_log(tmp_path))[1].tolist() == [2.5, 2.25]


def test_no_point_is_left_out_by_sampling(tmp_path):
    count = 12_000  # TensorBoard itself keeps a sample of 10,000
    with Writer(tmp_path) as writer:
        for step in range(1, count + 1):
            writer.add(step, train__loss=step)
    steps, losses = train_points(read_log(tmp_path))
    assert steps.tolist() == losses.tolist() == list(range(1, count + 1))


def test_the_two_files_of_a_resumed_run_are_one_run(tmp_path):
    written_run(tmp_path, range(1, 9))
    with Writer(tmp_path, BEGUN + 3600, ".2") as writer:
        for step in range(6, 13):
            writer.add(step, train__loss=10.0 + step)
    log = read_log(tmp_path)
    assert log.path == tmp_path
    steps, losses = train_points(log)
    assert steps.tolist() == list(range(1, 13))
    assert losses[5:].tolist() == [10.0 + step for step in range(6, 13)]


def test_steps_that_a_restart_declared_void_are_left_out(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    for folder_suffix, first, last, purge in ((".1", 1, 9, None), (".2", 6, 7, 6)):
        with tensorboard.SummaryWriter(
            str(tmp_path), purge_step=purge, filename_suffix=folder_suffix
        ) as writer:
            for step in range(first, last):
                writer.add_scalar("train/loss", step + len(folder_suffix), step)
    assert train_points(read_log(tmp_path))[0].tolist() == [1, 2, 3, 4, 5, 6]


def test_two_runs_in_one_folder(tmp_path):
    written_run(tmp_path, range(1, 6))
    with Writer(tmp_path, BEGUN + 3600, ".2") as writer:
        writer.add(0, eval__loss=2.5)
        for step in range(1, 4):
            writer.add(step, train__loss=10.0 + step)
    with pytest.raises(UserError, match=r"holds 2 runs: got run 2, .* record 7 \(step 0\)"):
        read_log(tmp_path)
    first, second = read_runs(tmp_path)
    assert train_points(first)[0].tolist() == [1, 2, 3, 4, 5]
    assert train_points(second)[1].tolist() == [11.0, 12.0, 13.0]
    assert eval_points(first)[0].tolist() == eval_points(second)[0].tolist() == [0]


def test_a_file_that_a_kill_cut_off(tmp_path):
    written_run(tmp_path, range(1, 40))
    (path,) = tmp_path.iterdir()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    steps = train_points(read_log(tmp_path))[0].tolist()
    assert 10 < len(steps) < 39
    assert steps == list(range(1, len(steps) + 1))


def test_a_tag_that_counts_first(tmp_path):
    with Writer(tmp_path) as writer:
        writer.add(1, train_loss=9.0, train__loss=2.5, loss=2.0)
    assert train_points(read_log(tmp_path))[1].tolist() == [2.0]


def test_what_is_refused(tmp_path):
    empty = tmp_path / "events.out.tfevents.1.host.1.0"
    empty.touch()
    with pytest.raises(UserError, match="is empty"):
        read_log(empty)
    junk = tmp_path / "junk" / "events.out.tfevents.1.host.1.0"
    junk.parent.mkdir()
    junk.write_bytes(bytes(range(256)) * 20)
    with pytest.raises(UserError, match="has no loss values|cannot read the event files") as caught:
        read_log(junk)
    assert "\n" not in str(caught.value)
    other = tmp_path / "other"
    with Writer(other) as writer:
        writer.add(1, accuracy=0.5)
    with pytest.raises(UserError, match="has no loss values"):
        read_log(other)
    with Writer(tmp_path / "negative") as writer:
        writer.add(-1, loss=0.5)
    with pytest.raises(UserError, match="has a step that is no count: got -1"):
        read_log(tmp_path / "negative")


def test_without_the_package_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    written_run(tmp_path, [1, 2])
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UserError) as caught:
        read_log(tmp_path)
    message = str(caught.value)
    assert "needs the tensorboard package, which is not installed: got" in message
    assert message.endswith("Run pip install tensorboard, or export the curve as CSV.")


def test_an_error_of_the_parser_is_one_sentence(tmp_path, monkeypatch):
    written_run(tmp_path, [1])
    from tensorboard.backend.event_processing import event_accumulator

    def broken(self):
        raise RuntimeError("bad record\nat byte 7")

    monkeypatch.setattr(event_accumulator.EventAccumulator, "Reload", broken)
    with pytest.raises(UserError, match="cannot read the event files: .*RuntimeError") as caught:
        read_log(tmp_path)
    assert "\n" not in str(caught.value)
