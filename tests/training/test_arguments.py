"""Arguments: the machine's precision whatever was asked for, and older names understood."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")
from transformers import TrainingArguments  # noqa: E402

from colab_qlora import FastLanguageModel, SFTConfig, UserError  # noqa: E402
from colab_qlora.training.arguments import compute_dtype_of, fit_arguments, rebuild  # noqa: E402

pytestmark = pytest.mark.model
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Any:
    base, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 96, dtype="float32")
    return FastLanguageModel.get_peft_model(base, r=2, use_gradient_checkpointing=False)


def _fit(args: Any, model: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    options = {"has_eval_dataset": False, "overrides": {}, **kwargs}
    return fit_arguments(args, model, say=said.append, **options), said


@on_cpu
def test_fp16_on_a_cpu_becomes_what_the_model_computes_in(model: Any, tmp_path: Path) -> None:
    args, said = _fit(TrainingArguments(str(tmp_path), fp16=True), model)
    assert (args.fp16, args.bf16, args.use_cpu) == (False, False, True)
    assert len(said) == 1 and "fp16=True was asked for" in said[0] and "float32" in said[0]


@on_cpu
def test_bfloat16_model_trains_in_bfloat16(tiny_model_folder: Path, tmp_path: Path) -> None:
    base, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 96, dtype="bfloat16")
    assert compute_dtype_of(base) == torch.bfloat16
    args, said = _fit(SFTConfig(str(tmp_path)), FastLanguageModel.get_peft_model(base, r=2))
    assert (args.fp16, args.bf16) == (False, True)
    assert said == []


def test_config_constructs_here_without_being_told_the_precision(tmp_path: Path) -> None:
    config = SFTConfig(str(tmp_path))
    assert isinstance(config, trl.SFTConfig)
    assert not (config.bf16 and config.fp16)
    assert config.use_cpu is not torch.cuda.is_available()
    assert config.report_to in ([], "none", ["none"])


@pytest.mark.parametrize("name", ["max_length", "max_seq_length"])
def test_length_given_in_the_config_holds(model: Any, tmp_path: Path, name: str) -> None:
    args, said = _fit(SFTConfig(str(tmp_path), **{name: 50}), model)
    assert (args.max_length, said) == (50, [])
    args, _ = _fit(SFTConfig(str(tmp_path), **{name: 1024}), model)
    assert args.max_length == 1024


def test_length_not_given_is_the_models_and_not_a_silent_1024(model: Any, tmp_path: Path) -> None:
    for args in (SFTConfig(str(tmp_path)), TrainingArguments(str(tmp_path)), None):
        fitted, said = _fit(args, model)
        assert (fitted.max_length, said) == (96, [])
    on_gpu = torch.cuda.is_available()
    stock = trl.SFTConfig(str(tmp_path), use_cpu=not on_gpu, bf16=False)
    fitted, said = _fit(stock, model)
    assert fitted.max_length == 96
    assert len(said) == 1 and "96 tokens" in said[0]


def test_trainers_older_arguments_win(model: Any, tmp_path: Path) -> None:
    overrides = {"max_length": 33, "dataset_text_field": "words", "packing": False}
    args, _ = _fit(TrainingArguments(str(tmp_path)), model, overrides=overrides)
    assert (args.max_length, args.dataset_text_field, args.packing) == (33, "words", False)


def test_both_names_of_the_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="both set: got 5 and 6"):
        SFTConfig(str(tmp_path), max_length=5, max_seq_length=6)


def test_everything_else_is_carried_over(model: Any, tmp_path: Path) -> None:
    given = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=5,
        learning_rate=7e-5,
        lr_scheduler_type="cosine",
        warmup_steps=11,
        optim="adamw_8bit",
        weight_decay=0.013,
        save_steps=77,
        seed=99,
        num_train_epochs=2.5,
    )
    args, _ = _fit(given, model)
    assert isinstance(args, trl.SFTConfig)
    for name in (
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "lr_scheduler_type",
        "warmup_steps",
        "optim",
        "weight_decay",
        "save_steps",
        "seed",
        "num_train_epochs",
    ):
        assert getattr(args, name) == getattr(given, name), name
    assert args.logging_nan_inf_filter is False


def test_no_limit_of_steps_as_notebooks_write_it(model: Any, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), max_steps=None)
    assert rebuild(args).max_steps == -1


def test_rebuilding_twice_changes_nothing(model: Any, tmp_path: Path) -> None:
    once, _ = _fit(SFTConfig(str(tmp_path), max_length=50), model)
    assert rebuild(once).to_dict() == once.to_dict()


@pytest.mark.parametrize(("mode", "on"), [(False, False), (True, True), ("smart", True)])
def test_checkpointing_is_the_models_choice(
    tiny_model_folder: Path, tmp_path: Path, mode: object, on: bool
) -> None:
    base, _ = FastLanguageModel.from_pretrained(str(tiny_model_folder), 96)
    adapted = FastLanguageModel.get_peft_model(base, r=2, use_gradient_checkpointing=mode)
    for asked in (True, False):
        args, _ = _fit(SFTConfig(str(tmp_path), gradient_checkpointing=asked), adapted)
        assert args.gradient_checkpointing is on
        if on:
            assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
        newer = getattr(args, "activation_checkpointing", on)
        assert newer is on


def test_first_evaluation_is_before_the_first_step(model: Any, tmp_path: Path) -> None:
    assert not _fit(SFTConfig(str(tmp_path)), model)[0].eval_on_start
    assert _fit(SFTConfig(str(tmp_path)), model, has_eval_dataset=True)[0].eval_on_start


def test_other_types_are_refused(model: Any) -> None:
    with pytest.raises(UserError, match="got dict; allowed: SFTConfig or TrainingArguments"):
        _fit({"output_dir": "x"}, model)


@on_cpu
def test_t4_trains_in_float16(monkeypatch: pytest.MonkeyPatch, model: Any, tmp_path: Path) -> None:
    # a T4 in all that fit_arguments asks: a float16 model on a CUDA device
    from colab_qlora.training import arguments

    class Parameter:
        device = torch.device("cuda")

    class OnT4:
        def parameters(self) -> Any:
            return iter([Parameter()])

        def modules(self) -> Any:
            return iter([self])

    monkeypatch.setattr(arguments, "compute_dtype_of", lambda m: torch.float16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *a: "Tesla T4")
    said: list[str] = []
    asked = TrainingArguments(str(tmp_path), bf16=True, use_cpu=True)
    assert arguments._precision(asked, OnT4(), said.append) == {"bf16": False, "fp16": True}
    assert said == [
        "bf16=True was asked for; the model computes in float16 on Tesla T4, "
        "and so does the training"
    ]


def test_fixture_is_used(make_trainer: Callable[..., Any]) -> None:
    assert make_trainer().args.max_length == 64
