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


def relative_error(
    got: torch.Tensor, truth: torch.Tensor, terms: torch.Tensor | None = None
) -> float:
    """||got - truth|| / ||truth|| in float64.

    Args:
        got: the result.
        truth: what it should be, in float64.
        terms: what cancels in the sum that `truth` is. Where nothing is left of it, the truth is
            zero, but each term still has its rounding: the error is relative to their norm then.
            Without terms it is the norm of `got` itself.
    """
    got, truth = got.detach().double().cpu(), truth.detach().double().cpu()
    assert got.shape == truth.shape, (got.shape, truth.shape)
    size = truth.norm().item()
    if not size and terms is not None:
        size = terms.detach().double().norm().item()
    return (got - truth).norm().item() / (size if size else 1.0)


def assert_as_exact_as_stock(
    got: torch.Tensor,
    stock: torch.Tensor,
    truth: torch.Tensor,
    name: str = "result",
    *,
    terms: torch.Tensor | None = None,
    roundings: float | None = None,
) -> None:
    """Require that `got` is no further from the float64 `truth` than `stock`, plus a rounding.

    A rounding is half a unit in the last place of `got`'s dtype, eps / 2, relative to the norm of
    the truth; 10 % more than stock's own error is the luck of the roundings. In half precision the
    last rounding alone counts, since what is inside is float32. In float32 two count, the last and
    one inside: what is rounded inside differs between two ways to compute the same (a factor that
    is multiplied in first or last, a multiplication that is fused with a sum or not), and stock's
    error may happen to be next to nothing.

    Args:
        got, stock, truth: our result, the stock op's in the same dtype, and the float64 one.
        name: for the message.
        terms: what cancels where the truth is zero, as in `relative_error`.
        roundings: how many more than stock are allowed, if not these. Those of a long sum go up as
            often as down, so n of them count as sqrt(n).
    """
    assert torch.isfinite(got).all(), f"{name} is not finite"
    if roundings is None:
        roundings = 2 if got.dtype == torch.float32 else 1
    ours, theirs = relative_error(got, truth, terms), relative_error(stock, truth, terms)
    allowed = 1.1 * theirs + roundings * torch.finfo(got.dtype).eps / 2
    assert ours <= allowed, f"{name}: ours {ours:.2e}, stock {theirs:.2e}, allowed {allowed:.2e}"
