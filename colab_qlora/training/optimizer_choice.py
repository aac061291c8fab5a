"""When the trainer takes `FlatAdamW` in place of the optimiser that transformers would build."""

from __future__ import annotations

from typing import Any

from colab_qlora.training.embedding_rate import embedding_tables
from colab_qlora.training.optimizer import FlatAdamW

_BITS = {"adamw_8bit": 8, "adamw_bnb_8bit": 8, "adamw_torch": 32, "adamw_torch_fused": 32}


def flat_adamw_for(args: Any, model: Any) -> tuple[type[FlatAdamW], dict[str, Any]] | None:
    """`FlatAdamW` and its arguments where `args.optim` means AdamW over LoRA weights alone.

    Args:
        args: transformers' TrainingArguments.
        model: the model to be trained.

    Returns:
        What transformers' `get_optimizer_cls_and_kwargs` returns, or None where its own choice
        stands: another `optim`, other weights than LoRA's (a trained embedding without a rate of
        its own, say), or training that spreads over processes.
    """
    bits = _BITS.get(str(getattr(args.optim, "value", args.optim)))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    has_rate = getattr(args, "embedding_learning_rate", None) is not None
    tables = embedding_tables(model) if has_rate else {}
    only_lora = hasattr(model, "peft_config") and all(
        "lora_" in name or name in tables for name in trained
    )
    is_spread = args.world_size > 1 or args.deepspeed or args.fsdp
    if bits is None or not trained or not only_lora or is_spread:
        return None
    betas = (args.adam_beta1, args.adam_beta2)
    arguments = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon, "bits": bits}
    return FlatAdamW, arguments
