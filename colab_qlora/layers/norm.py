"""The norms of a layer as its halves call them: the kernel with a norm's own weight and formula."""

from __future__ import annotations

import torch

from colab_qlora.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from colab_qlora.layers.gradients import Gradients
from colab_qlora.layers.layer_parts import Norm


def normed(
    x: torch.Tensor,
    norm: Norm,
    *,
    added: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """norm(x) (+ added), and 1 / rms; arguments as of `rms_norm_forward`."""
    y, rstd, _ = rms_norm_forward(
        x, norm.weight, norm.eps, added=added, adds_one=norm.adds_one, out=out
    )
    return y, rstd


def norm_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    norm: Norm,
    rstd: torch.Tensor,
    gradients: Gradients,
    *,
    residual_grad: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    written: torch.Tensor | None = None,
) -> torch.Tensor:
    """Gradient of x; the weight's goes into `gradients`, if it learns.

    Args:
        written: where norm(x) is written once more (`normed` of `rms_norm_backward`).
    """
    dx, dw = rms_norm_backward(
        dy,
        x,
        norm.weight,
        rstd,
        residual_grad=residual_grad,
        needs_weight_grad=norm.weight.requires_grad,
        adds_one=norm.adds_one,
        out=out,
        normed=written,
    )
    gradients.add(norm.weight, dw)
    return dx
