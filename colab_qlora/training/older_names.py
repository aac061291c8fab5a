"""Names that tutorials pass to SFTConfig and SFTTrainer, and what they are called today.

Releases of transformers and TRL rename and drop arguments. Three tables say what becomes of each:
`RENAMED` ones get today's name, `DROPPED` ones had an effect that comes about by itself now, so
that their usual values are taken and any other is refused, and `VALUES` are values that have
another name. A name that the installed release still has is left alone unless it has today's name
too, so one table serves them all.

Sources: the fields of transformers.TrainingArguments (4.36 to 5.24) and of trl.SFTConfig (0.7 to
1.16), and the arguments of trl.SFTTrainer in the same releases.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from colab_qlora.data.row_formatting import row_formatting
from colab_qlora.errors import UserError


def _same(value: Any) -> Any:
    return value


def _if_true(today: Any) -> Callable[[Any], Any]:
    """A switch that became one value of a choice; off is today's default, so nothing is passed."""
    return lambda value: today if value else None


@dataclass(frozen=True)
class Renamed:
    """An argument with another name today.

    Attributes:
        today: the field of SFTConfig.
        convert: older value -> today's; None for one that is today's default.
        is_newer: the name is newer than the oldest supported release, and `today` the one there.
    """

    today: str
    convert: Callable[[Any], Any] = _same
    is_newer: bool = False


@dataclass(frozen=True)
class Dropped:
    """An argument that has no counterpart.

    Attributes:
        because: why it is not needed, or cannot be had, as a clause.
        harmless: values that ask for nothing; None: no value does any harm.
        do: the next step for any other value.
    """

    because: str
    harmless: tuple[Any, ...] | None = (None, False)
    do: str = "Leave it out"


def _share_of_steps(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise UserError(
            "warmup_ratio is not a share of the steps", got=value, allowed="0 or more, below 1"
        )
    return float(value)


RENAMED: dict[str, Renamed] = {
    "max_seq_length": Renamed("max_length"),
    "evaluation_strategy": Renamed("eval_strategy"),
    # a number below 1 is a share of all steps there
    "warmup_ratio": Renamed("warmup_steps", _share_of_steps),
    "group_by_length": Renamed("train_sampling_strategy", _if_true("group_by_length")),
    "no_cuda": Renamed("use_cpu", _if_true(True)),
    "per_gpu_train_batch_size": Renamed("per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Renamed("per_device_eval_batch_size"),
    "include_inputs_for_metrics": Renamed("include_for_metrics", _if_true(["inputs"])),
    "adafactor": Renamed("optim", _if_true("adafactor")),
    "use_liger": Renamed("use_liger_kernel"),
    "torchdynamo": Renamed("torch_compile_backend"),
    "xpu_backend": Renamed("ddp_backend"),
    "push_to_hub_token": Renamed("hub_token"),
    "push_to_hub_model_id": Renamed("hub_model_id"),
    "dispatch_batches": Renamed(
        "accelerator_config", lambda v: None if v is None else {"dispatch_batches": v}
    ),
    "split_batches": Renamed(
        "accelerator_config", lambda v: None if v is None else {"split_batches": v}
    ),
    "activation_checkpointing": Renamed("gradient_checkpointing", is_newer=True),
    "activation_checkpointing_kwargs": Renamed("gradient_checkpointing_kwargs", is_newer=True),
}

_BY_LENGTH = "rows are tokenised and packed by their own lengths"
DROPPED: dict[str, Dropped] = {
    "save_safetensors": Dropped(
        "weights are always saved as safetensors", (None, True), "Leave it out, or pass True"
    ),
    "overwrite_output_dir": Dropped("an earlier run in the folder is set aside, not lost", None),
    "use_mps_device": Dropped("training runs on a CUDA GPU or on the CPU"),
    "use_ipex": Dropped("training runs on a CUDA GPU or on the CPU"),
    "jit_mode_eval": Dropped("transformers no longer traces models for evaluation"),
    "fp16_backend": Dropped("half precision is torch's own", (None, "auto", "amp", "cuda_amp")),
    "half_precision_backend": Dropped(
        "half precision is torch's own", (None, "auto", "amp", "cuda_amp", "cpu_amp")
    ),
    "fp16_opt_level": Dropped("it was apex's; half precision is torch's own", None),
    "sharded_ddp": Dropped("one GPU holds the model", (None, False, "", [])),
    "fsdp_min_num_params": Dropped("one GPU holds the model", (None, 0)),
    "fsdp_transformer_layer_cls_to_wrap": Dropped("one GPU holds the model", (None, "")),
    "mp_parameters": Dropped("one GPU holds the model", (None, "")),
    "tpu_num_cores": Dropped("training runs on a CUDA GPU or on the CPU", (None, 0)),
    "tpu_metrics_debug": Dropped("training runs on a CUDA GPU or on the CPU"),
    "past_index": Dropped("a decoder trains without earlier states", (None, -1)),
    "use_legacy_prediction_loop": Dropped("transformers has one evaluation loop now"),
    "ray_scope": Dropped("nothing searches hyperparameters through ray here", None),
    "include_tokens_per_second": Dropped("the loss log holds tokens and seconds", None),
    "push_to_hub_organization": Dropped(
        "the name of the model holds it", (None,), "Pass hub_model_id='organization/name'"
    ),
    "dataset_batch_size": Dropped(_BY_LENGTH, None),
    "num_of_sequences": Dropped(_BY_LENGTH, None),
    "chars_per_token": Dropped(_BY_LENGTH, None),
    "infinite": Dropped(
        "the run ends after max_steps or num_train_epochs", (None, False), "Set max_steps"
    ),
    "unsloth_num_chunks": Dropped("the loss is chunked by the memory that there is", None),
    "unsloth_logit_chunk_multiplier": Dropped(
        "the loss is chunked by the memory that there is", None
    ),
    "vllm_sampling_params": Dropped("supervised training generates nothing", (None,)),
}

# field -> older value -> today's
VALUES: dict[str, dict[Any, Any]] = {
    "optim": {"adamw_hf": "adamw_torch", "adamw_apex_fused": "adamw_torch_fused"},
    "packing_strategy": {"ffd": "bfd"},
    # None once meant every logger that is installed
    "report_to": {None: "none"},
    # tutorials turn it off so, for a run of num_train_epochs
    "max_steps": {None: -1},
}

# keys of dataset_kwargs that today's releases do without
_DATASET_KEYS = {
    "add_special_tokens": "no row gets a second start token",
    "append_concat_token": "every row ends with one end token",
}


def todays_arguments(
    given: Mapping[str, Any], known: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Arguments under the names that the installed releases have.

    Args:
        given: name -> value, under whatever names.
        known: the fields that the installed SFTConfig has.

    Returns:
        (today's name -> value, one clause for each argument that is not passed as it came).

    Raises:
        UserError: a name that never was, a value without a counterpart, or two names of one field
            with different values.
    """
    fields: dict[str, Any] = {}
    older: dict[str, Any] = {}
    for name, value in given.items():
        renamed = RENAMED.get(name)
        has_both = renamed is not None and renamed.today in known and not renamed.is_newer
        (older if has_both or name not in known else fields)[name] = value
    said: list[str] = []
    for name, value in older.items():
        said += _take_over(name, value, fields, given, known)
    said += _rename_values(fields)
    said += _thin_dataset_kwargs(fields)
    return fields, said


def trainer_arguments(
    kwargs: dict[str, Any], trainer: Any, known: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """Take what belongs to SFTConfig out of the arguments of a trainer.

    Args:
        kwargs: the arguments; those that `trainer` does not take are removed, and a formatting_func
            for batches becomes one for rows.
        trainer: the class that takes the rest.
        known: the fields that the installed SFTConfig has.

    Returns:
        As `todays_arguments`; None stands for an argument that was not given.

    Raises:
        UserError: as `todays_arguments`, and for model_init.
    """
    if kwargs.get("model_init") is not None:
        raise UserError("model_init has no counterpart", do="Pass the loaded model as model=")
    if kwargs.get("formatting_func") is not None:
        kwargs["formatting_func"] = row_formatting(kwargs["formatting_func"])
    takes = inspect.signature(trainer.__init__).parameters
    moved = {name: kwargs.pop(name) for name in list(kwargs) if name not in takes}
    moved = {name: value for name, value in moved.items() if value is not None}
    fields, said = todays_arguments(moved, known)
    in_place = [name for name in moved if name in fields]
    if in_place:
        verb = "belongs" if len(in_place) == 1 else "belong"
        said.append(f"{', '.join(in_place)} {verb} to SFTConfig now")
    return fields, said


def _take_over(
    name: str,
    value: Any,
    fields: dict[str, Any],
    given: Mapping[str, Any],
    known: Collection[str],
) -> list[str]:
    """Put one older argument into `fields`, or refuse it; what to say of it."""
    renamed, dropped = RENAMED.get(name), DROPPED.get(name)
    if renamed is not None and renamed.today in known:
        converted = None if value is None else renamed.convert(value)
        if converted is None:
            return []
        return [_set(name, value, renamed.today, converted, fields, given)]
    if dropped is not None:
        if dropped.harmless is not None and not any(value == each for each in dropped.harmless):
            raise UserError(
                f"{name} has no counterpart: {dropped.because}", got=repr(value), do=dropped.do
            )
        return [] if value in (None, False) else [f"{name} is not needed ({dropped.because})"]
    close = difflib.get_close_matches(name, [*known, *RENAMED], n=3)
    raise UserError(
        f"there is no argument {name}",
        allowed=f"the fields of SFTConfig, such as {', '.join(close)}" if close else None,
        do="Check the spelling, or leave it out",
    )


def _set(
    name: str,
    value: Any,
    today: str,
    converted: Any,
    fields: dict[str, Any],
    given: Mapping[str, Any],
) -> str:
    have = fields.get(today)
    if isinstance(have, dict) and isinstance(converted, dict):
        fields[today] = {**have, **converted}
    elif name == "warmup_ratio" and have:
        # as transformers did while it had both
        return f"warmup_ratio is not used beside warmup_steps={have}"
    elif name == "warmup_ratio":
        fields[today] = converted
    elif today in given and have != converted:
        raise UserError(
            f"{today} and {name} are both set",
            got=f"{have} and {value}",
            allowed="one of them; they mean the same",
        )
    elif today in fields and today not in given and have != converted:
        raise UserError(
            f"two older names set {today}", got=f"{have} and {converted}", do="Drop one"
        )
    else:
        fields[today] = converted
    return f"{name} is {today} now" + ("" if converted == value else f" ({converted!r})")


def _rename_values(fields: dict[str, Any]) -> list[str]:
    said = []
    for field, values in VALUES.items():
        value = fields.get(field, "")
        if not isinstance(value, list | dict) and value in values:
            fields[field] = values[value]
            if value is not None:
                said.append(f"{field}={value!r} is {values[value]!r} now")
    return said


def _thin_dataset_kwargs(fields: dict[str, Any]) -> list[str]:
    given = fields.get("dataset_kwargs")
    if not isinstance(given, dict):
        return []
    said = [f"{key} is not needed ({why})" for key, why in _DATASET_KEYS.items() if key in given]
    fields["dataset_kwargs"] = {k: v for k, v in given.items() if k not in _DATASET_KEYS} or None
    return said
