"""A checkpoint has its name when it is whole; a kill at any moment leaves whole ones alone."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trainer_helpers import ROWS, losses_of  # noqa: E402

from colab_qlora.training.atomic_checkpoint import (  # noqa: E402
    SAVING,
    finish_killed_save,
    new_staging,
    put_in_place,
)
from colab_qlora.training.resume import last_complete_checkpoint, what_is_missing  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
ROOT = Path(__file__).resolve().parent.parent.parent
SAVES = {"save_strategy": "steps", "save_steps": 2}

RUN = """
import os, shutil, signal, sys
from pathlib import Path
from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer
from colab_qlora.training import rescue

folder, out, moment = sys.argv[1:]
rows = [{"prompt": f"Say {i}:\\n", "completion": f"{i} and {i}"} for i in range(12)]
model, tokenizer = FastLanguageModel.from_pretrained(folder, 64, dtype="float32")
model = FastLanguageModel.get_peft_model(model, r=4, random_state=1)
trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=rows,
    args=SFTConfig(out, per_device_train_batch_size=2, max_steps=6, learning_rate=1e-2,
        logging_steps=1, save_steps=2, save_total_limit=1, seed=5))

def die():
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "weights":
    stock = trainer.save_model
    def half(folder, **kwargs):
        stock(folder, **kwargs)
        if trainer.state.global_step == 4:
            path = Path(folder) / "adapter_model.safetensors"
            os.truncate(path, path.stat().st_size // 2)
            die()
    trainer.save_model = half
elif moment == "rename":
    stock = rescue.put_in_place
    def dies(written, final):
        if trainer.state.global_step == 4:
            die()
        stock(written, final)
    rescue.put_in_place = dies
elif moment == "between":
    stock, rename = rescue.put_in_place, Path.rename
    def stops(path, target):
        if Path(target).name == "checkpoint-4":
            die()
        return rename(path, target)
    def replaces(written, final):
        if trainer.state.global_step == 4:
            shutil.copytree(final.parent / "checkpoint-2", final)
            Path.rename = stops
        stock(written, final)
    rescue.put_in_place = replaces
elif moment == "rotate":
    stock = rescue.rotate_checkpoints
    def dies(**kwargs):
        if trainer.state.global_step == 4:
            die()
        stock(**kwargs)
    rescue.rotate_checkpoints = dies
trainer.train(resume_from_checkpoint=moment == "resume")
"""


def _run(folder: Path, out: Path, moment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", RUN, str(folder), str(out), moment]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("moment", "left"), [("weights", 2), ("rename", 2), ("between", 2), ("rotate", 4)]
)
def test_a_kill_in_a_save_leaves_whole_checkpoints(
    tiny_model_folder: Path, tmp_path: Path, moment: str, left: int
) -> None:
    out = tmp_path / "out"
    done = _run(tiny_model_folder, out, moment)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folders = list(out.glob("checkpoint-*"))
    assert folders and all(what_is_missing(folder) is None for folder in folders)
    assert last_complete_checkpoint(out) == out / f"checkpoint-{left}"
    if moment == "between":
        assert {path.name for path in (out / SAVING).iterdir()} == {"replaced", "checkpoint-4"}
        done = _run(tiny_model_folder, out, "resume")
        assert done.returncode == 0, done.stderr
        assert f"going on from {out / 'checkpoint-4'}" in done.stdout
        assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-6"]
        assert not (out / SAVING).exists()


def test_no_half_checkpoint_ever_has_its_name(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out", []
    stock = torch.save

    def watched(content: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        stock(content, target, *args, **kwargs)
        named = sorted(out.glob("checkpoint-*"))
        assert all(what_is_missing(folder) is None for folder in named)
        seen.append([folder.name for folder in named])

    monkeypatch.setattr(torch, "save", watched)
    make_trainer(**SAVES).train()
    # during the first save none is there, during the second the first
    assert [] in seen and ["checkpoint-2"] in seen and ["checkpoint-2", "checkpoint-4"] not in seen
    assert sorted(path.name for path in out.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert not (out / SAVING).exists()


def test_limit_and_best_checkpoint_hold(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(
        eval_rows=ROWS[:4],
        eval_strategy="steps",
        eval_steps=2,
        max_steps=6,
        save_total_limit=1,
        load_best_model_at_end=True,
        **SAVES,
    )
    trainer.train()
    kept = sorted((tmp_path / "out").glob("checkpoint-*"))
    best = Path(trainer.state.best_model_checkpoint)
    assert best in kept and len(kept) <= 2
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


def test_what_a_killed_save_left_is_cleared_away(make_trainer: Make, tmp_path: Path) -> None:
    half = tmp_path / "out" / SAVING / "checkpoint-2"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_bytes(b"half")
    trainer = make_trainer(**SAVES)
    trainer.train(resume_from_checkpoint=True)
    assert len(losses_of(trainer)) == 4
    assert what_is_missing(tmp_path / "out" / "checkpoint-2") is None
    assert not (tmp_path / "out" / SAVING).exists()


def test_a_folder_that_is_there_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-8"
    final.mkdir()
    (final / "old").write_text("old")
    written = new_staging(tmp_path) / "checkpoint-8"
    written.mkdir()
    (written / "new").write_text("new")
    put_in_place(written, final)
    assert [path.name for path in final.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def test_a_second_staging_is_empty(tmp_path: Path) -> None:
    (new_staging(tmp_path) / "left").write_text("over")
    assert list(new_staging(tmp_path).iterdir()) == []


def _whole(folder: Path, **state: Any) -> Path:
    """A folder that passes for a whole checkpoint."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, folder / "adapter_model.safetensors")
    for name in ("optimizer.pt", "scheduler.pt"):
        torch.save({}, folder / name)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 8, **state}))
    assert what_is_missing(folder) is None
    return folder


def test_a_save_that_was_killed_between_two_renames_is_finished(tmp_path: Path) -> None:
    final = tmp_path / "checkpoint-8"
    written = _whole(tmp_path / SAVING / "checkpoint-8", best_model_checkpoint="elsewhere")
    _whole(tmp_path / SAVING / "replaced")
    before = {path.name: path.read_bytes() for path in written.iterdir()}
    assert list(new_staging(tmp_path).iterdir()) == []
    assert {path.name: path.read_bytes() for path in final.iterdir()} == before


def test_the_best_checkpoint_is_named_by_its_place(tmp_path: Path) -> None:
    staged, final = tmp_path / SAVING / "checkpoint-8", tmp_path / "checkpoint-8"
    _whole(staged, best_model_checkpoint=str(staged), best_metric=0.25)
    assert finish_killed_save(tmp_path) == final
    state = json.loads((final / "trainer_state.json").read_text())
    assert state == {"global_step": 8, "best_model_checkpoint": str(final), "best_metric": 0.25}
    assert what_is_missing(final) is None and not (tmp_path / SAVING).exists()


def test_what_is_no_whole_checkpoint_or_has_its_name_taken_is_cleared(tmp_path: Path) -> None:
    assert finish_killed_save(tmp_path / "none") is None
    half = _whole(tmp_path / SAVING / "checkpoint-8")
    os.truncate(half / "adapter_model.safetensors", 70)
    assert finish_killed_save(tmp_path) is None and list(tmp_path.iterdir()) == []
    there = _whole(tmp_path / "checkpoint-8", here=True)
    _whole(tmp_path / SAVING / "checkpoint-8")
    assert finish_killed_save(tmp_path) is None
    assert json.loads((there / "trainer_state.json").read_text())["here"]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def test_the_old_checkpoint_is_back_if_the_new_one_cannot_be_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = _whole(tmp_path / "checkpoint-8", old=True)
    written = _whole(new_staging(tmp_path) / "checkpoint-8")
    stock = Path.rename

    def fails(path: Path, target: Path) -> Path:
        if path == written:
            raise OSError(errno.EIO, "Input/output error")
        return stock(path, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="Input/output"):
        put_in_place(written, final)
    assert json.loads((final / "trainer_state.json").read_text())["old"]


def test_files_and_folders_are_flushed_before_the_old_one_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    final = _whole(tmp_path / "checkpoint-8")
    written = _whole(new_staging(tmp_path) / "checkpoint-8")
    (written / "inner").mkdir()
    (written / "inner" / "file").write_text("1")
    done: list[str] = []
    fsync, rename, rmtree = os.fsync, Path.rename, shutil.rmtree

    def flushed(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        done.append(f"rename {Path(target).name}")
        return rename(path, target)

    def removed(path: Path, **options: Any) -> None:
        done.append("remove")
        rmtree(path, **options)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(shutil, "rmtree", removed)
    inside = {str(path) for path in written.rglob("*")}
    put_in_place(written, final)
    assert set(done[: len(inside)]) == inside
    assert done[len(inside) :] == [
        str(written),
        str(written.parent),
        "rename replaced",
        "rename checkpoint-8",
        str(tmp_path),
        "remove",
    ]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_fsync_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: _raise(number))
    put_in_place(_whole(new_staging(tmp_path) / "checkpoint-8"), tmp_path / "checkpoint-8")
    assert what_is_missing(tmp_path / "checkpoint-8") is None


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_cannot_keep_the_bytes_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: _raise(number))
    with pytest.raises(OSError) as caught:
        put_in_place(_whole(new_staging(tmp_path) / "checkpoint-8"), tmp_path / "checkpoint-8")
    assert caught.value.errno == number and not (tmp_path / "checkpoint-8").exists()


def _raise(number: int) -> None:
    raise OSError(number, os.strerror(number))
