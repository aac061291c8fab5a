"""Which weights are quantised, and what they are worth in full."""

from __future__ import annotations

from typing import Any

import torch


def is_quantised_weight(weight: Any) -> bool:
    """Whether a weight is held as codes: bitsandbytes' 4 bits, or integers of 8."""
    return getattr(weight, "quant_state", None) is not None or not weight.is_floating_point()


def is_quantised(model: torch.nn.Module) -> bool:
    """Whether a model, or the part of one that is given, was loaded in 4 or 8 bits."""
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        return True
    return any(is_quantised_weight(parameter) for parameter in model.parameters())


@torch.no_grad()
def decoded_weight(module: Any) -> torch.Tensor:
    """The weight that a module computes with, (rows, columns), float32, on its device.

    Args:
        module: a linear or an embedding in 4, 8, 16 or 32 bits.
    """
    from peft.utils.integrations import dequantize_module_weight

    # PEFT knows the formats of bitsandbytes, and takes int8 codes of ours for weights
    if hasattr(module, "int8_weight"):
        return module.decoded(torch.float32)
    return dequantize_module_weight(module).detach().float()
