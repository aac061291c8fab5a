"""y = x W^T + b with an int8 weight, which is decoded for the product and let go.

Forward and backward decode the weight each for itself: kept for the backward pass, the decoded
weights of all layers would be the 16-bit model. A weight of more than `MOST_DECODED_BYTES` is
decoded a tile at a time (`weight_products.py`).

Bytes moved a weight of half precision: 3 a pass for decoding, beside the GEMM's 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from colab_qlora.kernels.int8_decode import Int8Weight, int8_decode_
from colab_qlora.kernels.weight_products import Int8Products

# every linear of an 8B model stands as a whole, its head in a few tiles
MOST_DECODED_BYTES = 256 * 2**20


def int8_decoded(weight: Int8Weight, dtype: torch.dtype) -> torch.Tensor:
    """The weight as a new tensor (rows, columns) of a floating dtype, on its device."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    with torch.cuda.device_of(out):
        int8_decode_(weight, out)
    return out


def _fits(weight: Int8Weight, dtype: torch.dtype) -> bool:
    return weight.codes.numel() * dtype.itemsize <= MOST_DECODED_BYTES


class _Int8Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Int8Weight,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.weight, ctx.dtypes = weight, (x.dtype, None if bias is None else bias.dtype)
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        if _fits(weight, dtype):
            return torch.nn.functional.linear(x, int8_decoded(weight, dtype), bias)
        rows = x.reshape(-1, x.shape[-1])
        out = rows.new_empty(rows.shape[0], weight.shape[0])
        Int8Products(weight, dtype, MOST_DECODED_BYTES).products_(rows, bias, out)
        return out.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dx = dbias = None
        with torch.cuda.device_of(dy):
            if ctx.needs_input_grad[0]:
                dx = _input_gradient(dy, ctx.weight).to(ctx.dtypes[0])
            if ctx.needs_input_grad[2]:
                dbias = dy.reshape(-1, dy.shape[-1]).sum(0).to(ctx.dtypes[1])
        return dx, None, dbias, None


def _input_gradient(dy: torch.Tensor, weight: Int8Weight) -> torch.Tensor:
    if _fits(weight, dy.dtype):
        return dy @ int8_decoded(weight, dy.dtype)
    flat = dy.reshape(-1, dy.shape[-1])
    dx = flat.new_empty(flat.shape[0], weight.shape[1])
    Int8Products(weight, dy.dtype, MOST_DECODED_BYTES).input_gradient_(flat, dx)
    return dx.view(*dy.shape[:-1], weight.shape[1])


def int8_linear(x: torch.Tensor, weight: Int8Weight, bias: torch.Tensor | None) -> torch.Tensor:
    """x W^T + bias, differentiable once with respect to x and bias.

    Args:
        x: any floating dtype, shape (..., in_features).
        weight: (out_features, in_features).
        bias: any floating dtype, shape (out_features,), or None.

    Returns:
        (..., out_features), in x's dtype, or under autocast in autocast's (float64 stays).
    """
    kind, dtype = x.device.type, x.dtype
    if torch.is_autocast_enabled(kind) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(kind)
    with torch.cuda.device_of(x):
        y: torch.Tensor = _Int8Product.apply(x, weight, bias, dtype)
    return y
