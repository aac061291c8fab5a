"""LoftQ: adapters that start as what the base lost when it was quantised.

Li et al. 2023, arXiv 2310.08659: B A is the best rank-r fit of W - dequantised(W), from a singular
value decomposition. Over 16-bit weights PEFT quantises by itself; over a model that was loaded in
4 bits, the weights before are read from its checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from colab_qlora.models.loading import locate_checkpoint
from colab_qlora.models.settings import settings_of
from colab_qlora.quantization.weight_source import WeightSource


def is_quantised(model: Any) -> bool:
    """Whether bitsandbytes holds a model's linears in 4 or 8 bits."""
    return bool(
        getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
    )


def takes_loftq_later(model: Any, options: dict[str, Any]) -> bool:
    """Whether LoftQ starts from the checkpoint, as the model's own weights are in 4 bits."""
    return options.get("init_lora_weights") == "loftq" and is_quantised(model)


def start_from_quantisation_error(adapted: Any) -> None:
    """Start the adapters of a quantised model by one step of LoftQ, from its 16-bit checkpoint.

    The checkpoint is read a matrix at a time. The decomposition is a randomised one of r + 8
    columns and 4 power iterations (Halko et al. 2011, arXiv 0909.4061).

    Raises:
        UserError: the checkpoint is gone, or is quantised itself.
    """
    from peft.utils.integrations import dequantize_module_weight

    settings = settings_of(adapted)
    name = settings.model_name if settings else adapted.config._name_or_path
    source = WeightSource.of_checkpoint(locate_checkpoint(name))
    for full_name, module in adapted.named_modules():
        adapter = next(iter(getattr(module, "lora_A", {})), None)
        if adapter is None:
            continue
        base = module.get_base_layer()
        kept = dequantize_module_weight(base).float()
        weight = source(full_name.removeprefix("base_model.model.")).to(kept.device).float()
        lost = (weight - kept) / module.scaling[adapter]
        left, right = _factors(lost, module.r[adapter])
        module.lora_B[adapter].weight.data.copy_(left)
        module.lora_A[adapter].weight.data.copy_(right)


def _factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, rank) and (rank, in) whose product is the best fit of a float32 (out, in) matrix."""
    width = min(rank + 8, *matrix.shape)
    # it draws random numbers; the caller's stream stays where it was
    with torch.random.fork_rng():
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(matrix, q=width, niter=4)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, (v[:, :rank] * root).T
