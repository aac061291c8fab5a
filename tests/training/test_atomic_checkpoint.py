"""A checkpoint has its name when it is whole; a kill at any moment leaves whole ones alone."""

from __future__ import annotations

import json
import os
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
    new_staging,
    put_in_place,
)
from colab_qlora.training.resume import last_complete_checkpoint, what_is_missing  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
ROOT = Path(__file__).resolve().parent.parent.parent
SAVES = {"save_strategy": "steps", "save_steps": 2}

RUN = """
import os, signal, sys
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
else:
    stock = rescue.rotate_checkpoints
    def dies(**kwargs):
        if trainer.state.global_step == 4:
            die()
        stock(**kwargs)
    rescue.rotate_checkpoints = dies
trainer.train()
"""


@pytest.mark.parametrize(("moment", "left"), [("weights", 2), ("rename", 2), ("rotate", 4)])
def test_a_kill_in_a_save_leaves_whole_checkpoints(
    tiny_model_folder: Path, tmp_path: Path, moment: str, left: int
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", RUN, str(tiny_model_folder), str(out), moment]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folders = list(out.glob("checkpoint-*"))
    assert folders and all(what_is_missing(folder) is None for folder in folders)
    assert last_complete_checkpoint(out) == out / f"checkpoint-{left}"


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
