"""What survives when a disk fills, numbers break or a cell is interrupted."""

from __future__ import annotations

import contextlib
import errno
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from live_helpers import fail_at, with_verdict  # noqa: E402
from trainer_helpers import ROWS  # noqa: E402

from colab_qlora import UserError, read_log  # noqa: E402
from colab_qlora.models.fuse import causal_model  # noqa: E402
from colab_qlora.models.host_embedding import is_on_host, move_to_host  # noqa: E402
from colab_qlora.training import trainer as trainer_module  # noqa: E402
from colab_qlora.training.adapter_state import adapter_tensors, is_finite  # noqa: E402
from colab_qlora.training.early_stopping import EarlyStopping  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]
EVALS: dict[str, Any] = {"eval_rows": ROWS[:4], "eval_strategy": "steps", "eval_steps": 2}
SAVES: dict[str, Any] = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}


def before_micro_batch(trainer: Any, change: Callable[[int, Any], None]) -> None:
    """Call `change(finished steps, model)` before each micro-batch."""
    stock = trainer.training_step

    def training_step(model: Any, *args: Any, **kwargs: Any) -> Any:
        change(trainer.state.global_step, model)
        return stock(model, *args, **kwargs)

    trainer.training_step = training_step


def test_an_interrupt_does_not_replace_a_good_checkpoint_with_nan(
    make_trainer: Make, tmp_path: Path
) -> None:
    options = {"max_steps": 40, "logging_steps": 10, **SAVES}
    trainer = make_trainer(**options)

    def change(step: int, model: Any) -> None:
        if step == 4:
            for tensor in adapter_tensors(model).values():
                tensor.data.fill_(math.nan)
        if step == 8:
            raise KeyboardInterrupt

    before_micro_batch(trainer, change)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert any("step 8 is not finite and was not saved" in note for note in trainer.notes)
    assert (tmp_path / "out" / "checkpoint-3").is_dir()
    again = make_trainer(**{**options, "max_steps": 5})
    again.args.max_steps = 40
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert is_finite(adapter_tensors(again.model))


@pytest.mark.parametrize("how", [KeyboardInterrupt(), None])
def test_a_table_on_the_host_is_back_however_a_run_ends(make_trainer: Make, how: Any) -> None:
    trainer = make_trainer(max_steps=3)
    causal = causal_model(trainer.model)

    def change(step: int, model: Any) -> None:
        move_to_host(causal)
        if step == 2 and how is not None:
            raise how

    before_micro_batch(trainer, change)
    with pytest.raises(KeyboardInterrupt) if how else contextlib.nullcontext():
        trainer.train()
    assert not is_on_host(causal.get_input_embeddings())


def test_a_table_without_room_ends_no_training(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(max_steps=1)

    def full(model: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(trainer_module, "bring_embedding_back", full)
    assert trainer.train().global_step == 1
    assert any("table stays on the host for want of GPU memory" in note for note in trainer.notes)


def test_a_best_adapter_that_cannot_be_saved_ends_no_training(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import safetensors.torch

    stopping = EarlyStopping(diagnose=with_verdict("healthy"))
    trainer = make_trainer(max_steps=6, trainer={"early_stopping": stopping}, **EVALS)
    stock = safetensors.torch.save_file

    def full(weights: Any, path: Any, **more: Any) -> None:
        if "best_adapter" in str(path) and trainer.state.global_step == 4:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        stock(weights, path, **more)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    trainer.train()
    assert trainer.state.global_step == 6
    said = [note for note in trainer.notes if "step 4 could not be saved" in note]
    assert len(said) == 1
    assert "Disk quota exceeded" in said[0]
    assert str(tmp_path / "out" / "best_adapter") in said[0]
    assert stopping.best is not None
    assert stopping.best.step in (2, 6)


def test_a_best_adapter_that_vanished_leaves_the_last_one(
    make_trainer: Make, tmp_path: Path
) -> None:
    stopping = EarlyStopping(diagnose=with_verdict("healthy"))
    options = {"max_steps": 6, "learning_rate": 1.0, "trainer": {"early_stopping": stopping}}
    trainer = make_trainer(**options, **EVALS)

    def change(step: int, model: Any) -> None:
        if step == 5:
            # what a cleaned-up Drive does; no later eval may write it again
            shutil.rmtree(tmp_path / "out" / "best_adapter", ignore_errors=True)
            stopping.best.eval_loss = -math.inf

    before_micro_batch(trainer, change)
    trainer.train()
    assert any("could not be read" in note for note in trainer.notes)


def test_eval_rows_without_labels_do_not_stop_a_sound_training(make_trainer: Make) -> None:
    trainer = make_trainer(max_steps=6, **EVALS)
    stock = trainer.prediction_step

    def broken(*args: Any, **kwargs: Any) -> Any:
        loss, *rest = stock(*args, **kwargs)
        return loss * math.nan, *rest

    trainer.prediction_step = broken
    trainer.train()
    assert trainer.state.global_step == 6
    said = [note for note in trainer.notes if "the eval loss is nan or inf" in note]
    assert len([note for note in said if "training goes on" in note]) == 1
    assert any("look for eval rows without labels" in note for note in said)


def test_a_log_on_a_full_disk_is_said_and_every_reader_is_told(
    make_trainer: Make, tmp_path: Path
) -> None:
    trainer = make_trainer(max_steps=4)

    def change(step: int, model: Any) -> None:
        if step == 2:
            log = trainer._loss_log.log
            log._file.close()
            log._file = open("/dev/full", "ab")  # noqa: SIM115

    before_micro_batch(trainer, change)
    with pytest.raises(UserError, match="the disk is full: something of step 3"):
        trainer.train()
    assert not any(reader.is_running for reader in trainer._readers())
    assert "is_end" not in read_log(tmp_path / "out" / "loss_log.jsonl").records[-1]


def test_several_eval_sets_are_refused_with_early_stopping(make_trainer: Make) -> None:
    sets = {"a": ROWS[:4], "b": ROWS[4:8]}
    with pytest.raises(UserError, match=r"follows one eval loss: got 2 eval sets \(a, b\)"):
        make_trainer(eval_rows=sets, eval_strategy="steps", trainer={"early_stopping": True})


def test_tokens_are_counted_once_when_the_same_trainer_goes_on(
    make_trainer: Make, tmp_path: Path
) -> None:
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    want = [r["tokens"] for r in read_log(tmp_path / "whole/loss_log.jsonl") if "loss" in r]
    broken = make_trainer(tmp_path / "broken", **options)
    stock = broken.training_step
    fail_at(broken, 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    broken.training_step = stock
    broken.train(resume_from_checkpoint=True)
    got = [r["tokens"] for r in read_log(tmp_path / "broken/loss_log.jsonl") if "loss" in r]
    assert got == want
