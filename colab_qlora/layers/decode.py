"""Write a linear's weight, however it is stored, into rows of a 16-bit buffer."""

from __future__ import annotations

import sys

import torch

from colab_qlora.kernels.nf4 import nf4_dequantize
from colab_qlora.layers.linear import LinearPart


def decode_weight(part: LinearPart, out: torch.Tensor) -> None:
    """Fill `out` (out_features, in_features; any row stride) with the part's base weight."""
    if part.kind == "nf4":
        nf4_dequantize(part.weight, out=out)
    elif part.kind == "fp4":
        bitsandbytes = sys.modules["bitsandbytes"]
        state = part.weight.quant_state
        out.copy_(bitsandbytes.functional.dequantize_4bit(part.weight.data, state))
    else:
        out.copy_(part.weight.detach())
