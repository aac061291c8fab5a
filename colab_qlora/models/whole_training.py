"""Full fine-tuning: every weight of an unquantised model is trained, without adapters."""

from __future__ import annotations

from typing import Any

from colab_qlora.models.adapters import set_gradient_checkpointing
from colab_qlora.models.settings import settings_of


def train_every_weight(model: Any, use_gradient_checkpointing: bool | str) -> None:
    """Make all of a loaded model's weights trainable, and put it into training mode.

    Args:
        model: what `load_model_and_tokenizer` gave, unquantised.
        use_gradient_checkpointing: False, or anything else to recompute every layer: the planner
            knows the costs of adapters, not those of a whole model's gradients.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    set_gradient_checkpointing(model, bool(use_gradient_checkpointing))
    settings = settings_of(model)
    assert settings is not None, "set_gradient_checkpointing has seen to that"
    settings.full_finetuning = True
    model.train()


def is_trained_whole(model: Any) -> bool:
    """Whether a model was loaded for full fine-tuning."""
    settings = settings_of(model)
    return settings is not None and settings.full_finetuning
