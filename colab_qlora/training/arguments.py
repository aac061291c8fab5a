"""Training arguments: today's names and the older ones, made to fit the machine and the model.

`SFTConfig` here is TRL's with three defaults that follow the machine: the precision (never one
that the hardware lacks), `use_cpu` where there is no GPU, and no silent truncation at 1,024 tokens.
`fit_arguments` turns whatever the user passed to the trainer into a TRL SFTConfig and says, one
line each, what it did differently from what was asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
import trl

from colab_qlora.dtypes import pick_compute_dtype
from colab_qlora.errors import UserError
from colab_qlora.models.host_embedding import compute_device
from colab_qlora.models.quiet_import import without_rename_warnings
from colab_qlora.training.older_names import todays_arguments
from colab_qlora.training.packing import packing_fields

# not fields of TRL's SFTConfig, and kept beside them: for the trainer, and for TensorBoard
KEPT_BESIDE = ("logging_dir", "embedding_learning_rate")
_TRL_DEFAULT_MAX_LENGTH = 1024


class SFTConfig(trl.SFTConfig):
    """TRL's SFTConfig that also constructs on a CPU and on a T4 without being told the precision.

    Takes every field of `trl.SFTConfig`, and the names that newer releases dropped or renamed
    (`max_seq_length`, `evaluation_strategy`, `warmup_ratio`, ...; see `older_names.py`), of which
    it says in one line what they are now. Fields not given follow the machine: bf16 or fp16 as
    `pick_compute_dtype` says, `use_cpu` without a GPU, `report_to="none"`; `max_length` not given
    means the model's max_seq_length.

    Attributes:
        logging_dir: where TensorBoard's files go, if it was given.
        embedding_learning_rate: of embedding and head that are trained whole (modules_to_save of
            get_peft_model); None: learning_rate.

    Raises:
        UserError: a name that never was, or a value that has no counterpart today.
    """

    def __init__(self, output_dir: str | None = None, **fields: Any) -> None:
        known = config_fields()
        beside = {n: fields.pop(n, None) for n in KEPT_BESIDE if n not in known}
        fields, said = todays_arguments(fields, known)
        has_gpu = torch.cuda.is_available()
        precision_was_given = bool(fields.get("bf16") or fields.get("fp16"))
        if fields.get("bf16") is None and fields.get("fp16") is None:
            dtype = pick_compute_dtype()
            fields["bf16"] = dtype == torch.bfloat16
            fields["fp16"] = dtype == torch.float16
        if not has_gpu:
            fields.setdefault("use_cpu", True)
            fields.setdefault("dataloader_pin_memory", False)
        fields.setdefault("report_to", "none")
        with without_rename_warnings():
            super().__init__(output_dir=output_dir, **fields)
        vars(self).update(beside)
        self.max_length_was_given = "max_length" in fields
        self.precision_was_given = precision_was_given
        if said:
            print(f"colab_qlora: {'; '.join(said)}", flush=True)


# the name that tutorials know; the same class
UnslothTrainingArguments = SFTConfig


def config_fields() -> set[str]:
    """Names of the fields that the installed TRL's SFTConfig takes."""
    return {field.name for field in dataclasses.fields(trl.SFTConfig) if field.init}


def fit_arguments(
    args: Any,
    model: Any,
    *,
    has_eval_dataset: bool,
    overrides: dict[str, Any],
    say: Callable[[str], None],
) -> trl.SFTConfig:
    """Return an SFTConfig that this machine can run and that agrees with the model.

    Args:
        args: None, a transformers TrainingArguments, or TRL's or our SFTConfig.
        model: the model to be trained; its settings decide precision, length and checkpointing.
        has_eval_dataset: whether an eval set was passed; then the first evaluation is before step
            1.
        overrides: fields of SFTConfig that were given to the trainer, under today's names.
        say: called with one line for each thing that is not done as asked.

    Raises:
        UserError: `args` is of another type.
    """
    if args is None:
        args = SFTConfig("outputs")
    if not isinstance(args, transformers.TrainingArguments):
        raise UserError(
            "args is not a set of training arguments",
            got=type(args).__name__,
            allowed="SFTConfig or TrainingArguments",
        )
    changes: dict[str, Any] = {"logging_nan_inf_filter": False}
    changes.update(_precision(args, model, say))
    changes.update(_checkpointing(model))
    changes.update(_length(args, model, overrides, say))
    changes.update({k: v for k, v in overrides.items() if k != "max_length"})
    changes.update(packing_fields(rebuild(args, **changes), say))
    if has_eval_dataset:
        changes["eval_on_start"] = True
    fitted = rebuild(args, **changes)
    for name in KEPT_BESIDE:
        if getattr(args, name, None) is not None:
            setattr(fitted, name, getattr(args, name))
    if fitted.n_gpu > 1:
        # the model is on one GPU; transformers would still multiply the batch by their number
        fitted._n_gpu = 1
        say(f"{torch.cuda.device_count()} GPUs are visible; training uses the one with the model")
    return fitted


def rebuild(args: transformers.TrainingArguments, **changes: Any) -> trl.SFTConfig:
    """A TRL SFTConfig with the fields of `args` and some of them changed.

    Built through the constructor, so that all that derives from the fields (precision, device)
    is derived again.
    """
    allowed = config_fields()
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(args) if f.init}
    if given["report_to"] == [None]:
        # what TrainingArguments makes of report_to=None, which no logger answers to
        given["report_to"] = []
    if given["max_steps"] is None:
        # notebooks write it beside num_train_epochs, for "no limit"
        given["max_steps"] = -1
    with without_rename_warnings():
        return trl.SFTConfig(**{k: v for k, v in {**given, **changes}.items() if k in allowed})


def _precision(args: Any, model: Any, say: Callable[[str], None]) -> dict[str, Any]:
    """bf16, fp16, use_cpu from the dtype that the model computes in, which the hardware has."""
    on_gpu = compute_device(model).type == "cuda"
    dtype = compute_dtype_of(model)
    possible = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if not on_gpu and possible == "fp16":
        possible = None
    asked = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    was_given = getattr(args, "precision_was_given", True)
    if asked is not None and asked != possible and was_given:
        instead = {"bf16": "bfloat16", "fp16": "float16", None: "float32"}[possible]
        where = torch.cuda.get_device_name() if on_gpu else "the CPU"
        say(
            f"{asked}=True was asked for; the model computes in {instead} on {where}, "
            "and so does the training"
        )
    precision: dict[str, Any] = {"bf16": possible == "bf16", "fp16": possible == "fp16"}
    if not on_gpu:
        precision |= {"use_cpu": True, "dataloader_pin_memory": False}
        if getattr(args, "tf32", None):
            precision["tf32"] = None
    return precision


def compute_dtype_of(model: Any) -> torch.dtype:
    """The dtype in which the frozen base model computes."""
    for module in model.modules():
        dtype = getattr(module, "compute_dtype", None)
        if isinstance(dtype, torch.dtype) and hasattr(module, "quant_type"):
            return dtype
    for parameter in model.parameters():
        if parameter.is_floating_point() and not parameter.requires_grad:
            return parameter.dtype
    return next(model.parameters()).dtype


def _checkpointing(model: Any) -> dict[str, Any]:
    """The choice made in get_peft_model holds; the arguments cannot switch it behind its back."""
    from colab_qlora.models.settings import settings_of

    settings = settings_of(model)
    if settings is None or settings.use_gradient_checkpointing is None:
        return {}
    on = settings.use_gradient_checkpointing is not False
    kwargs = {"use_reentrant": False} if on else None
    # newer transformers renamed both and lets the new name win; rebuild() drops what a release
    # lacks
    return {
        "gradient_checkpointing": on,
        "gradient_checkpointing_kwargs": kwargs,
        "activation_checkpointing": on,
        "activation_checkpointing_kwargs": kwargs,
    }


def _length(
    args: Any, model: Any, overrides: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    from colab_qlora.models.settings import settings_of

    if overrides.get("max_length") is not None:
        return {"max_length": overrides["max_length"]}
    settings = settings_of(model)
    if settings is None:
        return {}
    given = getattr(args, "max_length", None)
    if getattr(args, "max_length_was_given", False):
        return {}
    if given is not None and given != _TRL_DEFAULT_MAX_LENGTH:
        return {}
    if (
        given == _TRL_DEFAULT_MAX_LENGTH
        and given != settings.max_seq_length
        and type(args) is trl.SFTConfig
    ):
        say(
            f"max_length is the model's max_seq_length, {settings.max_seq_length} tokens "
            "(TRL's default is 1024)"
        )
    return {"max_length": settings.max_seq_length}
