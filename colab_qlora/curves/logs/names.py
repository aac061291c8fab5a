"""What other tools call the fields of a loss log: columns of a CSV and tags of TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["FIELDS", "field_of", "is_bound", "run_and_name"]

# field -> its names elsewhere, in lower case and with "_" for a space; where a file has several of
# them the first counts. "train_loss" comes last: beside "loss" it is the mean of a finished run
FIELDS: Mapping[str, tuple[str, ...]] = {
    "step": (
        "global_step",
        "train/global_step",
        "trainer/global_step",
        "step",
        "steps",
        "iteration",
        "iterations",
        "iter",
        "_step",
    ),
    "epoch": ("epoch", "train/epoch", "epochs"),
    "loss": ("loss", "train/loss", "loss/train", "training_loss", "train_loss"),
    "eval_loss": (
        "eval_loss",
        "eval/loss",
        "loss/eval",
        "validation_loss",
        "val_loss",
        "valid_loss",
        "validation/loss",
        "val/loss",
        "valid/loss",
        "loss/validation",
        "loss/val",
        "loss/valid",
    ),
    "learning_rate": ("learning_rate", "train/learning_rate", "lr", "train/lr"),
    "grad_norm": ("grad_norm", "train/grad_norm", "gradient_norm"),
    "tokens": ("tokens", "num_tokens", "train/num_tokens", "num_input_tokens_seen"),
    "seconds": ("seconds", "wall_time", "_runtime", "_timestamp", "relative_time"),
    "peak_memory_gib": ("peak_memory_gib",),
    "event": ("event",),
}
_FIELD_AND_RANK = {
    name: (field, rank) for field, names in FIELDS.items() for rank, name in enumerate(names)
}


def field_of(name: str) -> tuple[str, int] | None:
    """The field that a column or tag stands for.

    Args:
        name: as the file has it, in any case: "Training Loss", "train/loss".

    Returns:
        The field of a record and the name's rank in `FIELDS` (0 counts first), or None.
    """
    return _FIELD_AND_RANK.get(re.sub(r"[\s_-]+", "_", name.strip().lower()))


def run_and_name(column: str) -> tuple[str, str]:
    """Takes apart a column of a chart that wandb exported, "run name - train/loss".

    Args:
        column: the column's name.

    Returns:
        The run ("" for a column of any run) and the name without it.
    """
    run, separator, name = column.rpartition(" - ")
    return (run.strip(), name) if separator and field_of(name) else ("", column)


def is_bound(column: str) -> bool:
    """Whether a column holds what wandb writes beside a value: its range in a stretch of steps."""
    return column.strip().lower().endswith(("__min", "__max"))
