"""Gated linear units in torch, a chunk of rows at a time: it runs where Triton does not."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# float32 copies of one chunk of rows, 1 MB each, stay in a CPU's cache
CHUNK_ELEMENTS = 1 << 18


def _row_chunks(tensor: torch.Tensor) -> Iterator[slice]:
    tokens, width = tensor.shape
    rows = max(1, CHUNK_ELEMENTS // width)
    return (slice(start, start + rows) for start in range(0, tokens, rows))


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """In the dtype that the reference computes in: float64 as it is, all others as float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _act(gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.nn.functional.silu(gate)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.nn.functional.gelu(gate, approximate=approximate)


def _act_backward(grad: torch.Tensor, gate: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "silu":
        return torch.ops.aten.silu_backward(grad, gate)
    approximate = "tanh" if activation == "gelu_tanh" else "none"
    return torch.ops.aten.gelu_backward(grad, gate, approximate=approximate)


@torch.no_grad()
def glu_reference_forward(
    gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor, activation: str
) -> None:
    """out = act(gate) * up."""
    for rows in _row_chunks(gate):
        out[rows] = _act(widened(gate[rows]), activation).mul_(up[rows])


@torch.no_grad()
def glu_reference_backward(
    gate: torch.Tensor,
    up: torch.Tensor,
    dm: torch.Tensor,
    d_gate: torch.Tensor,
    d_up: torch.Tensor,
    m: torch.Tensor | None,
    activation: str,
) -> None:
    """Both gradients, and the product once more if there is a place for it."""
    for rows in _row_chunks(gate):
        d, g, u = widened(dm[rows]), widened(gate[rows]), widened(up[rows])
        act = _act(g, activation)
        # all three are computed before the first is written: outputs may be the inputs
        gate_grad, up_grad = _act_backward(d * u, g, activation), d * act
        if m is not None:
            m[rows] = act.mul_(u)
        d_gate[rows], d_up[rows] = gate_grad, up_grad
