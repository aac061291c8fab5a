"""The gradients of `glu_lora.py` in torch: the gated linear unit's own, then three products."""

from __future__ import annotations

import torch

from colab_qlora.kernels.swiglu import glu_backward
from colab_qlora.kernels.swiglu_reference import widened

# what belongs to down_proj, gate_proj and up_proj: a factor each, or a result each
Sums = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


@torch.no_grad()
def glu_lora_reference_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    dm: torch.Tensor,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
    ds: torch.Tensor | None,
    xg: torch.Tensor | None,
    xu: torch.Tensor | None,
    activation: str,
) -> Sums:
    """Write d_gate and d_up; return d_a, d_b_gate and d_b_up of what was written."""
    *_, m = glu_backward(
        dm, gate, up, activation=activation, d_gate=d_gate, d_up=d_up, rebuild=ds is not None
    )
    d_a = None if ds is None or m is None else widened(ds).t() @ widened(m)
    d_b_gate = None if xg is None else widened(d_gate).t() @ widened(xg)
    d_b_up = None if xu is None else widened(d_up).t() @ widened(xu)
    return d_a, d_b_gate, d_b_up
