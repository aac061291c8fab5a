"""The rule that every kernel is judged by: no further from the float64 truth than the stock op."""

from __future__ import annotations

import pytest
import torch

from colab_qlora.kernels.backend import HAS_TRITON, is_interpreting

# the implementations and dtypes that this machine can run: the interpreter's bf16 is wrong
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
CAN_RUN_TRITON = HAS_TRITON and (ON_GPU or is_interpreting())
BACKENDS = [
    "torch",
    pytest.param(
        "triton",
        marks=pytest.mark.skipif(
            not CAN_RUN_TRITON, reason="needs Triton with a GPU or interpreter"
        ),
    ),
]
HALF_DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
DTYPES = [torch.float32, *HALF_DTYPES]


def relative_error(got: torch.Tensor, truth: torch.Tensor) -> float:
    """||got - truth|| / ||truth|| in float64; the norm of `got` itself where the truth is zero."""
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    assert got.shape == truth.shape, (got.shape, truth.shape)
    size = truth.norm().item()
    return (got - truth).norm().item() / (size if size else 1.0)


def assert_as_exact_as_stock(
    got: torch.Tensor, stock: torch.Tensor, truth: torch.Tensor, name: str = "result"
) -> None:
    """Require that `got` is no further from the float64 `truth` than `stock`, plus one rounding.

    The allowance is half a unit in the last place of `got`'s dtype (its eps / 2), relative to the
    norm of the truth; 10 % more than stock's own error is the luck of the roundings.
    """
    assert torch.isfinite(got).all(), f"{name} is not finite"
    ours, theirs = relative_error(got, truth), relative_error(stock, truth)
    allowed = 1.1 * theirs + torch.finfo(got.dtype).eps / 2
    assert ours <= allowed, f"{name}: ours {ours:.2e}, stock {theirs:.2e}, allowed {allowed:.2e}"
