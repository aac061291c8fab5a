"""What the user asked for when the model was loaded, carried along on the model itself.

The trainer needs it later (the sequence length, whether to checkpoint) and gets the model only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

ATTRIBUTE = "colab_qlora_settings"
CHECKPOINTING_MODES = (False, True, "smart", "unsloth")


@dataclass
class ModelSettings:
    """Settings of one loaded model.

    Attributes:
        model_name: the name that was asked for ("embedded", a hub id, or a folder).
        max_seq_length: longest training sequence, in tokens.
        compute_dtype: "bfloat16", "float16" or "float32".
        use_gradient_checkpointing: False, True or "smart"; None until adapters are attached.
        memory_budget_gib, host_budget_gib: what "smart" may use, in GiB; None: what is free.
        full_finetuning: every weight is trained, without adapters.
        trained_steps: optimiser steps that the kit's trainer has trained the present weights for.
        notes: one line for each thing that was not done as asked, with the reason.
    """

    model_name: str
    max_seq_length: int
    compute_dtype: str
    use_gradient_checkpointing: bool | str | None = None
    memory_budget_gib: float | None = None
    host_budget_gib: float | None = None
    full_finetuning: bool = False
    trained_steps: int = 0
    notes: list[str] = field(default_factory=list)


def settings_of(model: Any) -> ModelSettings | None:
    """The settings of a model that we loaded, also through a PEFT wrapper; else None."""
    found = getattr(model, ATTRIBUTE, None)
    return found if isinstance(found, ModelSettings) else None
