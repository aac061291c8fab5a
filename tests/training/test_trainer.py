"""The trainer: what it accepts, what it computes, and what it leaves when something goes wrong."""

from __future__ import annotations

import dataclasses
import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

from trainer_helpers import ROWS, losses_of  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

from colab_qlora import FastLanguageModel, SFTTrainer, UserError, read_log  # noqa: E402
from colab_qlora.curves import diagnose  # noqa: E402
from colab_qlora.training.resume import last_complete_checkpoint, what_is_missing  # noqa: E402

pytestmark = pytest.mark.model
Make = Callable[..., Any]


def test_it_learns_and_adapters_stay_float32(make_trainer: Make) -> None:
    trainer = make_trainer(max_steps=20, dtype="bfloat16")
    dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5


def test_a_model_that_is_trained_again_is_said_to_go_on(make_trainer: Make, tmp_path: Path) -> None:
    first = make_trainer(tmp_path / "first")
    first.train()
    model = first.model
    last = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    args = dataclasses.replace(first.args, output_dir=str(tmp_path / "second"), max_steps=1)
    args.learning_rate = 0.0
    again = SFTTrainer(
        model=model, args=args, train_dataset=ROWS, processing_class=first.processing_class
    )
    again.train()
    assert all(torch.equal(p, last[n]) for n, p in model.named_parameters() if p.requires_grad)
    said = [
        [note for note in trainer.notes if "steps of an earlier run" in note]
        for trainer in (first, again)
    ]
    assert said == [
        [],
        [
            "this model has 4 steps of an earlier run behind it and is trained on from there; to "
            "begin anew, load it again"
        ],
    ]
    assert model.colab_qlora_settings.trained_steps == 5


def test_adapters_start_as_peft_made_them(make_trainer: Make, tiny_model_folder: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4, random_state=1)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer = make_trainer()
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter, start[name]), name


def test_accumulated_step_equals_the_whole_batch(make_trainer: Make, tmp_path: Path) -> None:
    # rows of very different length: averaging the means of the parts would give another loss
    rows = [{"prompt": "Count:\n", "completion": " one two three" * n} for n in (1, 2, 5, 9)]
    results = []
    for batch, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = make_trainer(
            tmp_path / f"{batch}x{accumulation}",
            rows=rows,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
            # Adam divides by the gradient's size, so a gradient of rounding errors alone moves it
            optim="sgd",
            learning_rate=1.0,
        )
        start = _trained(trainer)
        trainer.train()
        results.append((losses_of(trainer), _trained(trainer) - start))
    for losses, update in results[1:]:
        # float32 sums in another order: 1e-7 of a loss near 11, and 2e-7 of the update
        assert losses == pytest.approx(results[0][0], rel=1e-6)
        assert (update - results[0][1]).norm() <= 1e-6 * results[0][1].norm()


def _trained(trainer: Any) -> Any:
    """All trainable weights in one vector."""
    parameters = (p for p in trainer.model.parameters() if p.requires_grad)
    return torch.cat([p.detach().flatten() for p in parameters])


def test_evaluation_comes_first_and_does_not_disturb(make_trainer: Make, tmp_path: Path) -> None:
    plain = make_trainer(tmp_path / "a")
    plain.train()
    evaluated = make_trainer(
        tmp_path / "b", eval_rows=ROWS[:4], eval_strategy="steps", eval_steps=2
    )
    evaluated.train()
    history = evaluated.state.log_history
    assert [e["step"] for e in history if "eval_loss" in e] == [0, 2, 4]
    assert losses_of(evaluated) == losses_of(plain)


def test_older_arguments(tiny_model_folder: Path, tmp_path: Path) -> None:
    from transformers import TrainingArguments

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64)
    model = FastLanguageModel.get_peft_model(model, r=2)
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=[{"words": f"text number {i}"} for i in range(4)],
        dataset_text_field="words",
        max_seq_length=16,
        packing=False,
        dataset_num_proc=None,
        args=TrainingArguments(str(tmp_path), fp16=True, max_steps=1),
    )
    assert trainer.args.max_length == 16
    assert trainer.processing_class is tokenizer
    assert trainer.train().global_step == 1


def test_loss_log_is_on_disk(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(eval_rows=ROWS[:4])
    trainer.train()
    log = read_log(tmp_path / "out" / "loss_log.jsonl")
    trained = [r for r in log.records if "loss" in r]
    assert [r["step"] for r in trained] == [1, 2, 3, 4]
    assert [r["loss"] for r in trained] == losses_of(trainer)
    assert all(r["learning_rate"] > 0 and r["grad_norm"] > 0 for r in trained)
    assert trained[-1]["tokens"] > trained[0]["tokens"] > 0
    assert trained[-1]["seconds"] >= trained[0]["seconds"] > 0
    assert log.run["learning_rate"] == 1e-2
    assert log.run["r"] == 4
    # a whole run is over without a mark in the picture
    assert {name: log.records[-1].get(name) for name in ("step", "is_end", "event")} == {
        "step": 4,
        "is_end": True,
        "event": None,
    }


def test_second_run_in_the_same_folder_sets_the_first_aside(
    make_trainer: Make, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    make_trainer(max_steps=4, save_strategy="steps", save_steps=4).train()
    make_trainer(max_steps=3, save_strategy="steps", save_steps=3).train()
    assert [r["step"] for r in read_log(out / "loss_log.jsonl") if "loss" in r] == [1, 2, 3]
    assert last_complete_checkpoint(out) == out / "checkpoint-3"
    earlier = read_log(out / "earlier-1" / "loss_log.jsonl")
    assert [r["step"] for r in earlier if "loss" in r] == [1, 2, 3, 4]
    assert last_complete_checkpoint(out / "earlier-1") == out / "earlier-1" / "checkpoint-4"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 5e-3}, "learning_rate 0.005 instead of 0.01"),
        ({"max_steps": 2}, "max_steps 2 instead of 4"),
        ({"lora": {"r": 8}}, "r 8 instead of 4"),
        ({"rows": ROWS[4:]}, "train_rows 20 instead of 24, data_hash"),
    ],
)
def test_other_settings_are_another_run(
    make_trainer: Make, tmp_path: Path, change: dict, words: str
) -> None:
    make_trainer(save_strategy="steps", save_steps=2).train()
    trainer = make_trainer(save_strategy="steps", save_steps=2, **change)
    trainer.train(resume_from_checkpoint=True)
    assert words in trainer.notes[0]
    assert len(losses_of(trainer)) == change.get("max_steps", 4)
    assert (tmp_path / "out" / "earlier-1" / "checkpoint-4").is_dir()


def test_checkpoint_of_a_shorter_run_can_be_trained_further(
    make_trainer: Make, tmp_path: Path
) -> None:
    make_trainer(save_strategy="steps", save_steps=2, lr_scheduler_type="constant").train()
    longer = make_trainer(max_steps=6, lr_scheduler_type="constant")
    result = longer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert result.global_step == 6


def test_finished_run_is_not_trained_again(make_trainer: Make, tmp_path: Path) -> None:
    make_trainer(save_strategy="steps", save_steps=2).train()
    log = (tmp_path / "out" / "loss_log.jsonl").read_bytes()
    again = make_trainer(save_strategy="steps", save_steps=2)
    result = again.train(resume_from_checkpoint=True)
    assert result.global_step == 4
    assert result.metrics["train_loss"] > 0
    trained = [p.detach().clone() for p in again.model.parameters() if p.requires_grad]
    first = make_trainer(tmp_path / "whole")
    first.train()
    expected = [p for p in first.model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(trained, expected, strict=True))
    assert (tmp_path / "out" / "loss_log.jsonl").read_bytes() == log


def test_progress_is_one_kind_of_line(
    make_trainer: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    make_trainer(max_steps=3).train()
    printed = capsys.readouterr().out
    assert "step 1/3 | loss " in printed
    assert "step 3/3 | loss " in printed
    assert "{'loss'" not in printed


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "train_dataset is not a dataset: got NoneType"),
        ([], "train_dataset is not a dataset: got list"),
        ("rows.jsonl", "train_dataset is not a dataset: got str"),
        ([{"question": "a", "answer": "b"}], "no column to train on: got question, answer"),
    ],
)
def test_bad_datasets(make_trainer: Make, rows: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(rows=rows)


def test_empty_dataset(make_trainer: Make) -> None:
    from datasets import Dataset

    with pytest.raises(UserError, match="train_dataset has no rows"):
        make_trainer(rows=Dataset.from_dict({"text": []}))


def test_rows_without_labels_are_refused(make_trainer: Make) -> None:
    rows = [*ROWS[:3], {"prompt": "word " * 100, "completion": "end"}]
    with pytest.raises(UserError, match=r"1 of 4 rows .* no labelled token left"):
        make_trainer(rows=rows)


def test_cut_rows_are_counted(make_trainer: Make, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*ROWS[:3], {"prompt": "Count:\n", "completion": "word " * 100}]
    trainer = make_trainer(rows=rows)
    assert "1 of 4 train rows (25%) are longer than 64 tokens" in capsys.readouterr().out
    assert len([note for note in trainer.notes if "lose their end" in note]) == 1


def test_output_folder_that_cannot_be_written(make_trainer: Make) -> None:
    with pytest.raises(UserError, match="cannot be written to: got Not a directory"):
        make_trainer(Path("/dev/null/out"))


def test_model_name_instead_of_a_model() -> None:
    with pytest.raises(UserError, match="needs a loaded model: got 'embedded'"):
        SFTTrainer(model="embedded")


def test_tokenizer_given_twice(tiny_model_folder: Path) -> None:
    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64)
    with pytest.raises(UserError, match="tokenizer and processing_class differ"):
        SFTTrainer(model=model, tokenizer=tokenizer, processing_class=object())


def _fail_at(trainer: Any, step: int, error: BaseException) -> None:
    """Make the trainer's next training step after `step` finished ones raise `error`."""
    stock = trainer.training_step

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if trainer.state.global_step == step:
            raise error
        return stock(*args, **kwargs)

    trainer.training_step = training_step


def test_out_of_memory_saves_the_last_step_and_says_what_to_change(
    make_trainer: Make, tmp_path: Path
) -> None:
    whole = make_trainer(tmp_path / "whole", max_steps=6)
    whole.train()
    trainer = make_trainer(max_steps=6)
    _fail_at(trainer, 3, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. x"))
    with pytest.raises(UserError) as caught:
        trainer.train()
    message = str(caught.value)
    assert "out of memory at 2 rows x 64 tokens" in message
    assert "step 3 is saved in" in message
    assert "per_device_train_batch_size=1 and gradient_accumulation_steps=4" in message
    resumed = make_trainer(max_steps=6)
    resumed.train(resume_from_checkpoint=True)
    assert f"going on from {tmp_path}/out/checkpoint-3" in resumed.notes
    assert losses_of(resumed) == losses_of(whole)


def test_interrupt_saves_the_last_step(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer()
    _fail_at(trainer, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert last_complete_checkpoint(tmp_path / "out") == tmp_path / "out" / "checkpoint-2"
    *_, end = records = read_log(tmp_path / "out" / "loss_log.jsonl").records
    assert [r["step"] for r in records if "loss" in r] == [1, 2]
    assert (end["step"], end["is_end"], end["event"]) == (2, True, "interrupted")


@pytest.mark.parametrize(
    ("error", "said"),
    [(KeyboardInterrupt(), "interrupted"), (RuntimeError("x"), "stopped by RuntimeError")],
)
def test_a_resumed_run_takes_back_that_it_was_over(
    make_trainer: Make, tmp_path: Path, error: BaseException, said: str
) -> None:
    path = tmp_path / "out" / "loss_log.jsonl"
    trainer = make_trainer(max_steps=4, save_strategy="steps", save_steps=2)
    _fail_at(trainer, 2, error)
    with pytest.raises(type(error)):
        trainer.train()
    stopped = read_log(path)
    assert stopped.records[-1]["event"] == said
    assert diagnose(stopped).is_finished is True
    make_trainer(max_steps=4).train(resume_from_checkpoint=True)
    records = read_log(path).records
    assert [r["step"] for r in records if r.get("is_end")] == [4]
    assert not [r for r in records if "event" in r]
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds)


def test_a_run_that_a_callback_stops_says_where(make_trainer: Make, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 3

    make_trainer(max_steps=8, trainer={"callbacks": [Stop()]}).train()
    end = read_log(tmp_path / "out" / "loss_log.jsonl").records[-1]
    assert (end["step"], end["event"]) == (3, "stopped at step 3 of 8")


def test_full_disk_leaves_earlier_checkpoints_whole(
    make_trainer: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(save_strategy="steps", save_steps=1)
    stock = torch.save

    def full(content: Any, target: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.state.global_step == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        stock(content, target, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="full: something of step 3 could not be written"):
        trainer.train()
    assert not (tmp_path / "out" / "checkpoint-3").exists()
    assert what_is_missing(tmp_path / "out" / "checkpoint-2") is None
    lines = (tmp_path / "out" / "loss_log.jsonl").read_text().splitlines()
    assert [json.loads(line).get("step") for line in lines[1:]] == [1, 2, 3, 3]
    assert json.loads(lines[-1])["event"] == "stopped by OSError"


def test_full_disk_under_the_weights(make_trainer: Make) -> None:
    from safetensors import SafetensorError

    trainer = make_trainer(save_strategy="steps", save_steps=2)

    def full(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: (os error 28)")

    trainer.save_model = full
    with pytest.raises(UserError, match="full: something of step 2 could not be written"):
        trainer.train()


def test_interrupt_right_after_a_save_keeps_it(make_trainer: Make, tmp_path: Path) -> None:
    trainer = make_trainer(save_strategy="steps", save_steps=2)
    _fail_at(trainer, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    state = tmp_path / "out" / "checkpoint-2" / "rng_state.pth"
    saved_at = state.stat().st_mtime_ns
    assert trainer._rescue() == f"step 2 is saved in {tmp_path}/out/checkpoint-2"
    assert state.stat().st_mtime_ns == saved_at


def test_adapters_that_the_trainer_attaches_are_float32(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    from colab_qlora import SFTConfig

    model, tokenizer = FastLanguageModel.from_pretrained(str(tiny_model_folder), 64)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"),
        train_dataset=ROWS,
        args=SFTConfig(str(tmp_path / "out"), max_steps=1),
    )
    assert {p.dtype for p in trainer.model.parameters() if p.requires_grad} == {torch.float32}


def test_other_errors_come_through(make_trainer: Make) -> None:
    trainer = make_trainer()
    _fail_at(trainer, 1, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        trainer.train()
