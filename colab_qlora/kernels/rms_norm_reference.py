"""What RMSNorm takes, and the norm in torch: it runs where Triton does not."""

from __future__ import annotations

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.misfit import misfit

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    residual: torch.Tensor | None,
    added: torch.Tensor | None,
    out: torch.Tensor | None,
    h_out: torch.Tensor | None,
) -> None:
    """Raise `UserError` unless the tensors of a forward pass fit."""
    _check_rows("x", x, weight)
    _check_like("x", x, residual=residual, added=added, out=out, h_out=h_out)
    if h_out is not None and residual is None:
        problem = "h_out is given although there is no residual"
        raise UserError(problem, got="residual=None", allowed="h_out=None")
    if added is not None and residual is not None:
        raise UserError("added and residual are both given", allowed="one of them")


def check_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    residual_grad: torch.Tensor | None,
    out: torch.Tensor | None,
    normed: torch.Tensor | None,
) -> None:
    """Raise `UserError` unless the tensors of a backward pass fit."""
    _check_rows("h", h, weight)
    _check_like("h", h, dy=dy, residual_grad=residual_grad, out=out, normed=normed)
    expected = (h.shape[:-1], _inner_dtype(h), h.device)
    if (rstd.shape, rstd.dtype, rstd.device) != expected or not rstd.is_contiguous():
        allowed = f"contiguous {_inner_dtype(h)}, shape {tuple(h.shape[:-1])} on {h.device}"
        raise misfit("rstd does not fit h", rstd, allowed)


def has_dense_rows(x: torch.Tensor) -> bool:
    """True if the values of a row are neighbours in memory."""
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def new_like(x: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of x's shape and dtype, not filled."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _inner_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check_rows(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if not (x.dim() in (2, 3) and x.shape[-1] > 0 and x.dtype in _DTYPES and has_dense_rows(x)):
        shapes = "shape (rows, width) or (rows, heads, width), last stride 1"
        raise misfit(f"{name} has no rows to normalise", x, f"a float dtype, {shapes}")
    if weight.shape != x.shape[-1:] or weight.dtype not in _DTYPES or weight.device != x.device:
        allowed = f"a float dtype, shape {tuple(x.shape[-1:])} on {x.device}"
        raise misfit(f"weight does not fit {name}", weight, allowed)


def _check_like(like: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, other in others.items():
        if other is None:
            continue
        same = (other.shape, other.dtype, other.device) == (x.shape, x.dtype, x.device)
        if not (same and has_dense_rows(other)):
            allowed = f"{x.dtype}, shape {tuple(x.shape)}, last stride 1 on {x.device}"
            raise misfit(f"{name} does not fit {like}", other, allowed)


@torch.no_grad()
def rms_norm_forward_reference(
    x, weight, eps, *, residual=None, added=None, adds_one=False, out=None, h_out=None
):
    """`rms_norm_forward` in torch."""
    y = new_like(x) if out is None else out
    h = x
    if residual is not None:
        h = torch.add(x, residual, out=new_like(x) if h_out is None else h_out)
    wide = h.to(_inner_dtype(h))
    scratch = wide.square()
    rstd = scratch.mean(-1).add_(eps).rsqrt_().contiguous()
    torch.mul(wide, rstd[..., None], out=scratch)
    gain = weight.to(wide.dtype)
    gain = gain + 1.0 if adds_one else gain
    if added is None:
        torch.mul(scratch, gain, out=y)
    else:
        y.copy_(scratch.mul_(gain).add_(added))
    return y, rstd, h


@torch.no_grad()
def rms_norm_backward_reference(
    dy, h, weight, rstd, *,
    residual_grad=None, needs_weight_grad=False, adds_one=False, out=None, normed=None,
):  # fmt: skip
    """`rms_norm_backward` in torch."""
    dx = new_like(h) if out is None else out
    dtype, scale = _inner_dtype(h), rstd[..., None]
    gain = weight.to(dtype)
    gain = gain + 1.0 if adds_one else gain
    scaled = h.to(dtype) * scale
    if normed is not None:
        torch.mul(scaled, gain, out=normed)
    grad = dy.to(dtype) * gain
    shared = (grad * scaled).mean(-1, keepdim=True)
    grad.addcmul_(scaled, shared, value=-1)
    weight_grad = None
    if needs_weight_grad:
        weight_grad = scaled.mul_(dy).flatten(0, -2).sum(0).to(weight.dtype)
    if residual_grad is None:
        torch.mul(grad, scale, out=dx)
    else:
        torch.addcmul(residual_grad.to(dtype), grad, scale, out=dx)
    return dx, weight_grad
