"""Write linears' weights, however they are stored, into rows of a 16-bit buffer."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from colab_qlora.kernels.nf4_many import nf4_dequantize_many
from colab_qlora.layers.linear import LinearPart


def decode_weights(parts: Sequence[LinearPart], outs: Sequence[torch.Tensor]) -> None:
    """Fill each of `outs` (out_features, in_features; any row stride) with a part's base weight.

    Weights in NF4 are decoded together where they can be: see `kernels/nf4_many.py`.
    """
    nf4 = [(part, out) for part, out in zip(parts, outs, strict=True) if part.kind == "nf4"]
    nf4_dequantize_many([part.weight for part, _ in nf4], [out for _, out in nf4])
    for part, out in zip(parts, outs, strict=True):
        if part.kind == "fp4":
            bitsandbytes = sys.modules["bitsandbytes"]
            state = part.weight.quant_state
            out.copy_(bitsandbytes.functional.dequantize_4bit(part.weight.data, state))
        elif part.kind == "dense":
            out.copy_(part.weight.detach())
