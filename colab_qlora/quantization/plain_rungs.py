"""Which rungs a weight may stand on, and what it is there by plain rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from colab_qlora.quantization.activation_statistics import WeightItem
from colab_qlora.quantization.budget import BLOCK_SIZES, INT8, RUNGS, SIXTEEN_BIT
from colab_qlora.quantization.int8_modules import Int8Embedding
from colab_qlora.quantization.int8_weight import decode_int8, encode_int8

# (weight, rung, E[x_j^2] or None) -> the weight as that rung would have it
Quantize = Callable[[torch.Tensor, str, "torch.Tensor | None"], torch.Tensor]


def plain_quantize(
    weight: torch.Tensor, rung: str, column_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The weight as a rung has it, by bitsandbytes' own rounding; `column_weights` go unused."""
    if rung == SIXTEEN_BIT:
        return weight
    if rung == INT8:
        return decode_int8(*encode_int8(weight), weight.dtype)
    from colab_qlora.models.quiet_import import import_bitsandbytes

    functional = import_bitsandbytes().functional
    # bitsandbytes has no float64
    plain = weight.float() if weight.dtype == torch.float64 else weight
    codes, state = functional.quantize_4bit(
        plain.contiguous(),
        blocksize=BLOCK_SIZES[rung],
        compress_statistics=True,
        quant_type="nf4",
    )
    return functional.dequantize_4bit(codes, state).to(weight.dtype)


def rungs_of(model: Any, item: WeightItem) -> tuple[str, ...]:
    """The rungs that a weight may stand on: embedding and head int8 and 16 bit, others all."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    # PEFT's `modules_to_save` wraps it
    head = getattr(head, "original_module", head)
    if any(_is_special(module) for module in item.modules):
        return (SIXTEEN_BIT,)
    if item.is_table or any(module is head for module in item.modules):
        return (INT8, SIXTEEN_BIT)
    return RUNGS


def _is_special(module: torch.nn.Module) -> bool:
    """An embedding that does more than look rows up (Gemma's scales them) keeps its own code."""
    is_table = isinstance(module, torch.nn.Embedding)
    return is_table and type(module).forward not in _PLAIN_TABLES


_PLAIN_TABLES = (torch.nn.Embedding.forward, Int8Embedding.forward)
