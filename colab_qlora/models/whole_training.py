"""Full fine-tuning: every weight of an unquantised model is trained, without adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from colab_qlora.errors import UserError
from colab_qlora.models.adapters import set_gradient_checkpointing
from colab_qlora.models.loading import default_model_name, locate_checkpoint
from colab_qlora.models.readable_errors import readable_errors
from colab_qlora.models.settings import settings_of
from colab_qlora.quantization.own_source import name_of_16_bits


def refuse_quantised_checkpoint(model_name: str | None, **hub: Any) -> None:
    """Raise UserError if a checkpoint is quantised; asked before its weights are fetched.

    Args:
        model_name: as of `load_model_and_tokenizer`.
        **hub: token, revision, trust_remote_code.
    """
    from transformers import AutoConfig

    name = model_name or default_model_name()
    place = locate_checkpoint(name)
    with readable_errors(name):
        config = AutoConfig.from_pretrained(place, **hub)
    if getattr(config, "quantization_config", None) is None:
        return
    # of a folder nobody knows whether there is one of that name without the ending
    plain = None if Path(place).is_dir() else name_of_16_bits(name)
    raise UserError(
        "full_finetuning=True trains every weight, and those of this checkpoint are quantised",
        got=name,
        allowed="a checkpoint in 16 or 32 bits",
        do=f"Load {plain or 'the checkpoint that it was made from'}, or leave full_finetuning out "
        "to train adapters",
    )


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
