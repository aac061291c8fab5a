"""The GEMMs of a linear group, each into memory that the caller owns."""

from __future__ import annotations

import torch


def multiply_into(
    x: torch.Tensor,
    weight: torch.Tensor,
    out: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
) -> None:
    """out = x weight + bias + residual."""
    if residual is not None:
        torch.addmm(residual, x, weight, out=out)
        if bias is not None:
            out += bias
    elif bias is not None:
        torch.addmm(bias, x, weight, out=out)
    else:
        torch.mm(x, weight, out=out)


def accumulate(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, is_first: bool) -> None:
    """out = a b, or out += a b."""
    if is_first:
        torch.mm(a, b, out=out)
    else:
        out.addmm_(a, b)


def parameter_gradient(
    left: torch.Tensor, right: torch.Tensor, parameter: torch.nn.Parameter
) -> torch.Tensor:
    """left^T right in the parameter's dtype."""
    if left.is_cuda and left.dtype != parameter.dtype == torch.float32:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return torch.mm(left.t(), right).to(parameter.dtype)
