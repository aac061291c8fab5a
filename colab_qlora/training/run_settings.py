"""The hyperparameters that a reader of the curve needs, for the head of the loss log."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from colab_qlora.models.settings import settings_of
from colab_qlora.quantization.dynamic import dynamic_state
from colab_qlora.training.dataset_checks import data_hash

_ARGUMENTS = (
    "learning_rate",
    "embedding_learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "warmup_steps",
    "weight_decay",
    "max_length",
    "max_grad_norm",
    "packing",
    "seed",
    "fp16",
    "bf16",
)
_LORA_SETTINGS = ("r", "lora_alpha", "lora_dropout", "use_rslora", "bias")


def run_settings(trainer: Any) -> dict[str, Any]:
    """What makes a trainer's run what it is, as values that JSON takes.

    Args:
        trainer: a trainer with its arguments, model and training rows.

    Returns:
        Field of `SFTConfig`, of the model or of its adapter -> value.
    """
    args, model, rows = trainer.args, trainer.model, trainer.train_dataset
    run = {name: getattr(args, name, None) for name in _ARGUMENTS}
    run["optim"] = str(getattr(args.optim, "value", args.optim))
    scheduler = args.lr_scheduler_type
    run["lr_scheduler_type"] = str(getattr(scheduler, "value", scheduler))
    settings = settings_of(model)
    if settings is not None:
        run |= {"model_name": settings.model_name, "compute_dtype": settings.compute_dtype}
    state = dynamic_state(model)
    is_nf4 = getattr(model, "is_loaded_in_4bit", False)
    run["quantization"] = "dynamic" if state is not None else "nf4" if is_nf4 else None
    run["quantization_budget"] = None if state is None else state.budget
    if isinstance(rows, Dataset):
        run |= {"train_rows": len(rows), "data_hash": data_hash(rows)}
    lora = getattr(model, "peft_config", {}).get("default")
    if lora is not None:
        run |= {name: getattr(lora, name) for name in _LORA_SETTINGS}
        targets = lora.target_modules
        run["target_modules"] = targets if isinstance(targets, str) else sorted(targets or [])
    return run
