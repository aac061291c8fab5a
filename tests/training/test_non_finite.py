"""Numbers that break end the run at once, and the adapter is one from before."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from live_helpers import with_verdict  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from trainer_helpers import ROWS, losses_of  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from colab_qlora import read_log  # noqa: E402
from colab_qlora.training.adapter_state import adapter_tensors, is_finite  # noqa: E402
from colab_qlora.training.best_adapter import BestAdapter  # noqa: E402
from colab_qlora.training.early_stopping import EarlyStopping  # noqa: E402
from colab_qlora.training.non_finite import StopOnNonFinite  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]


@pytest.fixture(autouse=True)
def copies_at_every_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no test depends on how long a copy takes."""
    monkeypatch.setattr("colab_qlora.training.non_finite._SECONDS_BETWEEN", 0)


def break_from(trainer: Any, step: int) -> None:
    """Make the loss nan in the training step after `step` finished ones, and from then on."""
    stock = trainer.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        loss = stock(*args, **kwargs)
        if trainer.model.training and trainer.state.global_step >= step:
            return loss * math.nan
        return loss

    trainer.compute_loss = compute_loss


def stopping_trainer(make_trainer: Make, *more: Any, **options: Any) -> tuple[Any, Any]:
    """A trainer and its callback, with the rules themselves."""
    stop = StopOnNonFinite(*more)
    given = [stop, *([more[0]] if more else [])]
    return make_trainer(trainer={"callbacks": given}, **{"max_steps": 8, **options}), stop


def weights(trainer: Any) -> dict[str, Any]:
    return {name: t.clone() for name, t in adapter_tensors(trainer.model).items()}


def equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_without_it_the_weights_are_lost(make_trainer: Make) -> None:
    trainer = make_trainer(max_steps=5, trainer={"stop_on_non_finite": False})
    break_from(trainer, 3)
    assert trainer.train().global_step == 5
    assert not is_finite(adapter_tensors(trainer.model))


def test_it_stops_within_one_log_and_the_adapter_is_that_before(
    make_trainer: Make, tmp_path: Path
) -> None:
    plain = make_trainer(tmp_path / "plain", max_steps=3, lr_scheduler_type="constant")
    plain.train()
    trainer, stop = stopping_trainer(
        make_trainer, save_strategy="steps", save_steps=2, lr_scheduler_type="constant"
    )
    break_from(trainer, 3)
    assert trainer.train().global_step == 4
    assert [math.isfinite(loss) for loss in losses_of(trainer)] == [True, True, True, False]
    assert equal(weights(trainer), weights(plain))
    assert stop.stopped_by.name == "non-finite"
    assert trainer.notes[-1] == (
        "stopped at step 4, because the train loss is nan or inf; the adapter is that of step 3, "
        f"the last finite one kept. Next: {stop.stopped_by.action}"
    )
    # the broken step is in the log, and in no checkpoint
    *_, broken, end = read_log(tmp_path / "out" / "loss_log.jsonl").records
    assert math.isnan(broken["loss"])
    assert (end["step"], end["is_end"], end["event"]) == (4, True, "stopped: numbers broke")
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_weights_that_broke_after_a_sound_loss_are_not_copied(make_trainer: Make) -> None:
    trainer, _ = stopping_trainer(make_trainer)

    class Overflow(TrainerCallback):
        """The update of step 3 is too large; its loss was still finite."""

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                next(iter(adapter_tensors(kwargs["model"]).values())).fill_(math.inf)

    trainer.add_callback(Overflow())
    trainer.train()
    assert [math.isfinite(loss) for loss in losses_of(trainer)] == [True, True, True, False]
    assert is_finite(adapter_tensors(trainer.model))
    assert "the adapter is that of step 2," in trainer.notes[-1]


def test_a_loss_that_is_logged_rarely(make_trainer: Make, tmp_path: Path) -> None:
    trainer, _ = stopping_trainer(
        make_trainer, logging_steps=4, save_strategy="steps", save_steps=1, max_steps=12
    )
    break_from(trainer, 5)
    assert trainer.train().global_step == 8
    assert is_finite(adapter_tensors(trainer.model))
    assert "the adapter is that of step 4" in trainer.notes[-1]
    # steps 6 and 7 were to be saved before anybody had read their loss
    saved = sorted(int(p.name[11:]) for p in (tmp_path / "out").glob("checkpoint-*"))
    assert saved == [1, 2, 3, 4, 5]


def test_an_epoch_that_ends_with_it_is_neither_saved_nor_evaluated(
    make_trainer: Make, tmp_path: Path
) -> None:
    trainer, _ = stopping_trainer(
        make_trainer,
        rows=ROWS[:8],
        eval_rows=ROWS[8:10],
        eval_strategy="epoch",
        save_strategy="epoch",
        max_steps=-1,
        num_train_epochs=3,
    )
    break_from(trainer, 3)
    assert trainer.train().global_step == 4
    evaluated = [
        r["step"] for r in read_log(tmp_path / "out" / "loss_log.jsonl") if "eval_loss" in r
    ]
    assert evaluated == [0, 2]
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_broken_from_the_first_step(make_trainer: Make) -> None:
    trainer, _ = stopping_trainer(make_trainer)
    before = weights(trainer)
    break_from(trainer, 0)
    assert trainer.train().global_step == 1
    assert equal(weights(trainer), before)
    assert "the adapter is as it was before training" in trainer.notes[-1]


def test_the_best_adapter_comes_first(make_trainer: Make, tmp_path: Path) -> None:
    stopping = EarlyStopping(diagnose=with_verdict("healthy"))
    trainer, _ = stopping_trainer(
        make_trainer, stopping, eval_rows=ROWS[:4], eval_strategy="steps", eval_steps=2
    )
    break_from(trainer, 5)
    trainer.train()
    assert stopping.best is not None and stopping.best.step in (2, 4)
    assert f"the adapter is the best so far, of step {stopping.best.step} (" in trainer.notes[-1]
    records = read_log(tmp_path / "out" / "loss_log.jsonl").records
    evals = [r["eval_loss"] for r in records if "eval_loss" in r]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(evals[1:]), abs=1e-6)


def test_a_best_adapter_that_cannot_be_read_is_not_the_end(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: Any) -> None:
        raise SafetensorError("header too small")

    monkeypatch.setattr(BestAdapter, "put_back_", unreadable)
    stopping = EarlyStopping(diagnose=with_verdict("healthy"))
    trainer, _ = stopping_trainer(
        make_trainer, stopping, eval_rows=ROWS[:4], eval_strategy="steps", eval_steps=2
    )
    break_from(trainer, 5)
    trainer.train()
    assert any("the best adapter cannot be read: header too small" in n for n in trainer.notes)
    assert any("the last finite one kept" in note for note in trainer.notes)
    assert is_finite(adapter_tensors(trainer.model))


def test_weights_that_stayed_finite_stay(make_trainer: Make) -> None:
    # as the loss scaler of fp16 does, which skips the steps of broken gradients
    trainer, _ = stopping_trainer(make_trainer, max_grad_norm=0.0)
    before: dict[str, Any] = {}
    break_from(trainer, 2)
    stock = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        loss = stock(*args, **kwargs)
        if trainer.state.global_step >= 2:
            before.update(weights(trainer))
            trainer.model.zero_grad()
        return loss

    trainer.training_step = training_step
    trainer.train()
    assert equal(weights(trainer), before)
    assert "the adapter is finite and stays as it is" in trainer.notes[-1]


def test_what_the_diagnosis_forgives_does_not_stop(make_trainer: Make) -> None:
    # an isolated gradient that is not finite, as a loss scaler's skip looks in the log
    stop = StopOnNonFinite()
    trainer = make_trainer(trainer={"callbacks": [stop]})
    stock = trainer.log

    def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 2 and "grad_norm" in logs:
            logs["grad_norm"] = math.nan
        stock(logs, *args, **kwargs)

    trainer.log = log
    assert trainer.train().global_step == 4
    assert stop.stopped_by is None


def test_a_sound_log_is_not_diagnosed(make_trainer: Make) -> None:
    def unwanted(log: Any, **options: Any) -> Any:
        raise AssertionError("asked without need")

    trainer = make_trainer(trainer={"callbacks": [StopOnNonFinite(diagnose=unwanted)]})
    trainer.train()
    assert not [note for note in trainer.notes if "could not read" in note]


def test_full_fine_tuning_says_that_there_is_nothing_to_give_back(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    from colab_qlora import FastLanguageModel, SFTConfig, SFTTrainer

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(tiny_model_folder), 64, "float32", load_in_4bit=False
    )
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=ROWS,
        args=SFTConfig(str(tmp_path / "out"), max_steps=4, logging_steps=1, save_strategy="no"),
        callbacks=[StopOnNonFinite()],
    )
    break_from(trainer, 1)
    assert trainer.train().global_step == 2
    assert "load the model, or its last checkpoint, again" in trainer.notes[-1]


def test_copies_are_made_no_oftener_than_time_allows(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("colab_qlora.training.non_finite._SECONDS_BETWEEN", 200)
    clock = iter(range(0, 100_000, 1000))  # every look at the clock is 1,000 s later
    stop = StopOnNonFinite()
    trainer = make_trainer(max_steps=6, trainer={"callbacks": [stop]})
    monkeypatch.setattr(
        "colab_qlora.training.non_finite.time", type("Time", (), {"monotonic": lambda: next(clock)})
    )
    break_from(trainer, 5)
    trainer.train()
    # a copy took 1,000 s, so that the one of step 1 is the only one
    assert "the adapter is that of step 1," in trainer.notes[-1]
