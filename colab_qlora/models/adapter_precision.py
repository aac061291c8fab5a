"""Adapters of a quantised model stay in float32, whatever a trainer casts them to.

TRL's DPO, GRPO and KTO trainers cast the adapters of a 4-bit or 8-bit model to bfloat16. A T4 has
no bfloat16, and its loss scaling cannot unscale such gradients; elsewhere an update of less than
1/256 of a weight rounds to nothing. The parameters stay the same objects, so an optimiser that
holds them already follows.
"""

from __future__ import annotations

from typing import Any

import torch

_HALF = (torch.bfloat16, torch.float16)


def adapters_in_float32_(trunk: Any) -> bool:
    """Cast the trained adapters of a model's decoder layers back, if something cast them.

    Args:
        trunk: the decoder of a quantised model with adapters; another's weights are left alone.

    Returns:
        Whether there was anything to cast.
    """
    first = next((p for p in trunk.parameters() if p.requires_grad), None)
    # all or none: one is looked at in every batch, and the rest only if it was cast
    if first is None or first.dtype not in _HALF or not _is_quantised(trunk):
        return False
    for name, parameter in trunk.named_parameters():
        if parameter.requires_grad and ".lora_" in name and parameter.dtype in _HALF:
            parameter.data = parameter.data.float()
    return True


def _is_quantised(trunk: Any) -> bool:
    return any(
        hasattr(parameter, "quant_state") or hasattr(parameter, "SCB")
        for parameter in trunk.parameters()
        if not parameter.requires_grad
    )
