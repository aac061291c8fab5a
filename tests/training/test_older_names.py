"""Names that newer releases dropped or renamed: each is taken over, or refused in one sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
trl = pytest.importorskip("trl")

from trainer_helpers import ROWS  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

from colab_qlora import SFTConfig, UserError  # noqa: E402
from colab_qlora.training.arguments import config_fields  # noqa: E402
from colab_qlora.training.older_names import (  # noqa: E402
    DROPPED,
    RENAMED,
    VALUES,
    todays_arguments,
)

# what transformers 4.36 to 4.57 and TRL 0.7 to 0.15 had as defaults, and today's releases lack
OLDER_DEFAULTS = {
    "overwrite_output_dir": False,
    "evaluation_strategy": "no",
    "per_gpu_train_batch_size": None,
    "per_gpu_eval_batch_size": None,
    "warmup_ratio": 0.0,
    "logging_dir": None,
    "save_safetensors": True,
    "no_cuda": False,
    "use_mps_device": False,
    "jit_mode_eval": False,
    "use_ipex": False,
    "fp16_opt_level": "O1",
    "half_precision_backend": "auto",
    "fp16_backend": "auto",
    "tpu_num_cores": None,
    "tpu_metrics_debug": False,
    "past_index": -1,
    "fsdp_min_num_params": 0,
    "fsdp_transformer_layer_cls_to_wrap": None,
    "adafactor": False,
    "group_by_length": False,
    "include_inputs_for_metrics": False,
    "push_to_hub_model_id": None,
    "push_to_hub_organization": None,
    "push_to_hub_token": None,
    "mp_parameters": "",
    "torchdynamo": None,
    "ray_scope": "last",
    "dispatch_batches": None,
    "split_batches": None,
    "include_tokens_per_second": False,
    "use_legacy_prediction_loop": False,
    "max_seq_length": None,
    "dataset_batch_size": 1000,
    "num_of_sequences": 1024,
    "chars_per_token": 3.6,
}
# older argument -> (value, today's field, today's value)
TAKEN_OVER: dict[str, tuple[Any, str, Any]] = {
    "max_seq_length": (77, "max_length", 77),
    "evaluation_strategy": ("steps", "eval_strategy", "steps"),
    "warmup_ratio": (0.03, "warmup_steps", 0.03),
    "group_by_length": (True, "train_sampling_strategy", "group_by_length"),
    "no_cuda": (True, "use_cpu", True),
    "per_gpu_train_batch_size": (3, "per_device_train_batch_size", 3),
    "per_gpu_eval_batch_size": (5, "per_device_eval_batch_size", 5),
    "include_inputs_for_metrics": (True, "include_for_metrics", ["inputs"]),
    "adafactor": (True, "optim", "adafactor"),
    "push_to_hub_token": ("secret", "hub_token", "secret"),
    "push_to_hub_model_id": ("me/model", "hub_model_id", "me/model"),
}


def test_all_older_defaults_construct_and_change_nothing(tmp_path: Path) -> None:
    plain, older = SFTConfig(str(tmp_path)), SFTConfig(str(tmp_path), **OLDER_DEFAULTS)
    for name in config_fields() - {"accelerator_config"}:
        assert getattr(older, name) == getattr(plain, name), name


@pytest.mark.parametrize("name", TAKEN_OVER)
def test_older_name_sets_todays_field_and_says_so_in_one_line(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, field, expected = TAKEN_OVER[name]
    config = SFTConfig(str(tmp_path), **{name: value})
    assert getattr(config, field) == expected
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"colab_qlora: {name} is {field} now")


def test_several_names_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SFTConfig(str(tmp_path), max_seq_length=8, evaluation_strategy="no", overwrite_output_dir=True)
    assert capsys.readouterr().out == (
        "colab_qlora: max_seq_length is max_length now; evaluation_strategy is eval_strategy now; "
        "overwrite_output_dir is not needed (an earlier run in the folder is set aside, not lost)\n"
    )
    SFTConfig(str(tmp_path), max_length=8, report_to="none")
    assert capsys.readouterr().out == ""


def test_every_name_of_the_tables_leads_somewhere() -> None:
    known = config_fields()
    for name, renamed in RENAMED.items():
        assert renamed.today in known, name
    assert not set(RENAMED) & set(DROPPED)
    for name, dropped in DROPPED.items():
        if dropped.harmless is None:
            assert todays_arguments({name: object()}, known)[0] == {}
            continue
        for value in dropped.harmless:
            assert todays_arguments({name: value}, known)[0] == {}
        with pytest.raises(UserError, match=f"{name} has no counterpart: .*[.] [A-Z].*[.]$"):
            todays_arguments({name: "something else"}, known)
    assert all(field in known for field in VALUES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"save_safetensors": False}, "save_safetensors has no counterpart: weights are always"),
        ({"use_mps_device": True}, "use_mps_device has no counterpart: training runs on a CUDA"),
        ({"learning_rte": 1e-4}, "no argument learning_rte: allowed: .* such as learning_rate"),
        (
            {"warmup_ratio": 10},
            "warmup_ratio is not a share of the steps: got 10; allowed: 0 or more, below 1",
        ),
        ({"eval_strategy": "no", "evaluation_strategy": "steps"}, "both set: got no and steps"),
        ({"per_gpu_train_batch_size": 1, "per_device_train_batch_size": 2}, "got 2 and 1"),
    ],
)
def test_what_cannot_be_had_is_refused(given: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        SFTConfig(str(tmp_path), **given)


def test_a_name_that_the_release_still_has_is_left_alone() -> None:
    # a release that has the older name only, one that has both, and one with the newer only
    assert todays_arguments({"warmup_ratio": 0.1}, {"warmup_ratio"}) == ({"warmup_ratio": 0.1}, [])
    both = {"warmup_ratio", "warmup_steps"}
    assert todays_arguments({"warmup_ratio": 0.1}, both)[0] == {"warmup_steps": 0.1}
    newer = {"activation_checkpointing": True}
    assert todays_arguments(newer, {"gradient_checkpointing", *newer}) == (newer, [])
    fields, said = todays_arguments(newer, {"gradient_checkpointing"})
    assert fields == {"gradient_checkpointing": True} and len(said) == 1


def test_warmup_steps_win_over_the_ratio_as_they_did(tmp_path: Path) -> None:
    assert SFTConfig(str(tmp_path), warmup_steps=5, warmup_ratio=0.1).warmup_steps == 5
    assert SFTConfig(str(tmp_path), warmup_steps=0, warmup_ratio=0.1).warmup_steps == 0.1


def test_values_with_another_name(tmp_path: Path) -> None:
    config = SFTConfig(str(tmp_path), optim="adamw_hf", packing_strategy="ffd", report_to=None)
    assert (config.optim, config.packing_strategy, config.report_to) == ("adamw_torch", "bfd", [])
    assert SFTConfig(str(tmp_path), max_steps=None, num_train_epochs=2).max_steps == -1
    keys = {"add_special_tokens": False, "append_concat_token": False}
    assert SFTConfig(str(tmp_path), dataset_kwargs=keys).dataset_kwargs is None
    kept = SFTConfig(str(tmp_path), dataset_kwargs={**keys, "skip_prepare_dataset": True})
    assert kept.dataset_kwargs == {"skip_prepare_dataset": True}


def test_two_older_names_of_one_setting_are_merged(tmp_path: Path) -> None:
    config = SFTConfig(str(tmp_path), split_batches=True, dispatch_batches=False)
    assert config.accelerator_config.split_batches is True
    assert config.accelerator_config.dispatch_batches is False


@pytest.mark.model
def test_trainer_takes_what_belongs_to_the_config(make_trainer: Callable[..., Any]) -> None:
    older = {
        "max_seq_length": 40,
        "dataset_num_proc": None,
        "packing": False,
        "neftune_noise_alpha": 5,
        "dataset_batch_size": 100,
    }
    trainer = make_trainer(max_steps=1, group_by_length=True, warmup_ratio=0.5, trainer=older)
    assert (trainer.args.max_length, trainer.args.neftune_noise_alpha) == (40, 5)
    assert trainer.args.get_warmup_steps(10) == 5
    assert trainer.notes[0] == (
        "max_seq_length is max_length now; dataset_batch_size is not needed (rows are tokenised "
        "and packed by their own lengths); packing, neftune_noise_alpha belong to SFTConfig now"
    )
    assert type(trainer._get_train_sampler()).__name__ == "LengthGroupedSampler"
    assert trainer.train().global_step == 1


@pytest.mark.model
@pytest.mark.parametrize(
    ("older", "message"),
    [
        ({"model_init": lambda: None}, "model_init has no counterpart. Pass the loaded model"),
        ({"infinite": True}, "infinite has no counterpart: .* Set max_steps"),
        ({"comput_metrics": len}, "there is no argument comput_metrics"),
    ],
)
def test_trainer_refuses_what_has_no_counterpart(
    make_trainer: Callable[..., Any], older: dict, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        make_trainer(rows=ROWS, trainer=older)


@pytest.mark.model
def test_a_formatting_function_for_batches(make_trainer: Callable[..., Any]) -> None:
    rows = [{"ask": f"after {i}?", "say": str(i + 1)} for i in range(4)]

    def formatting(examples: Any) -> list[str]:
        return [f"{a} {s}" for a, s in zip(examples["ask"], examples["say"], strict=False)]

    trainer = make_trainer(rows=rows, max_steps=1, trainer={"formatting_func": formatting})
    ids = [row["input_ids"] for row in trainer.train_dataset]
    texts = trainer.processing_class.batch_decode(ids, skip_special_tokens=True)
    assert [text.strip() for text in texts] == [f"after {i}? {i + 1}" for i in range(4)]


def test_report_to_none_of_plain_arguments_is_no_logger(tmp_path: Path) -> None:
    from colab_qlora.training.arguments import rebuild

    args = TrainingArguments(str(tmp_path), report_to=None, use_cpu=not torch.cuda.is_available())
    assert rebuild(args, bf16=False).report_to == []
