"""Gemma's norm, with 1 + weight and added to a residual stream, against transformers' own."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import BACKENDS, DEVICE, DTYPES, assert_as_exact_as_stock, relative_error

from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward

EPS = 1e-6
# several rows a program; one row a program, odd; heads; nothing
SHAPES = [(33, 507), (3, 1030), (9, 3, 80), (0, 16)]

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _backend(backend):
    with use_backend(backend):
        yield


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal values in every second row of a tensor whose other rows are NaN."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    memory = torch.full((2 * shape[0], *shape[1:]), float("nan"), dtype=dtype, device=DEVICE)
    return memory[::2].copy_(values)


def weights(width: int, dtype: torch.dtype) -> torch.Tensor:
    """Around zero, as Gemma has them; some take 1 + weight below zero."""
    return torch.randn(width, generator=torch.Generator().manual_seed(9)).to(DEVICE, dtype)


def stock_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    norm = Gemma3RMSNorm(x.shape[-1], eps=EPS)
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * (1 + weight)


def gradients(norm, x, weight, dy, dtype):
    """[dx, dweight] by autograd of `norm` in `dtype`."""
    x, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight))
    return torch.autograd.grad(norm(x, weight), (x, weight), dy.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_one_more_than_the_weight(shape, dtype):
    x, dy, weight = normal(shape, dtype, 1), normal(shape, dtype, 2), weights(shape[-1], dtype)
    y, rstd, _ = rms_norm_forward(x, weight, EPS, adds_one=True)
    truth = exact_norm(x.double(), weight.double())
    assert_as_exact_as_stock(y, stock_norm(x, weight), truth, "y")
    again = torch.empty_like(y)
    options = {"needs_weight_grad": True, "adds_one": True, "normed": again}
    got = rms_norm_backward(dy, x, weight, rstd, **options)
    assert torch.equal(again, y)
    stock = gradients(stock_norm, x, weight, dy, dtype)
    exact = gradients(exact_norm, x, weight, dy, torch.float64)
    for name, *three in zip(("dx", "dweight"), got, stock, exact, strict=True):
        assert_as_exact_as_stock(*three, name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adds_one", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_added_is_rounded_with_the_norm(shape, adds_one, dtype):
    x, stream, weight = normal(shape, dtype, 1), normal(shape, dtype, 2), weights(shape[-1], dtype)
    gain = weight.double() + adds_one
    out = normal(shape, dtype, 3)
    y, rstd, h = rms_norm_forward(x, weight, EPS, added=stream, adds_one=adds_one, out=out)
    assert y is out and h is x
    plain = rms_norm_forward(x, weight, EPS, adds_one=adds_one)
    assert torch.equal(rstd, plain[1])
    truth = stream.double() + exact_norm(x.double(), gain - 1)
    assert_as_exact_as_stock(y, stream + plain[0], truth, "y")
    assert torch.equal(stream, normal(shape, dtype, 2))


@pytest.mark.parametrize("shape", [(5, 70), (4, 3, 33)])
def test_float64_is_exact(shape):
    x, dy, stream = (normal(shape, torch.float64, seed) for seed in range(3))
    weight = weights(shape[-1], torch.float64)
    y, rstd, _ = rms_norm_forward(x, weight, EPS, added=stream, adds_one=True)
    got = rms_norm_backward(dy, x, weight, rstd, needs_weight_grad=True, adds_one=True)
    exact = gradients(exact_norm, x, weight, dy, torch.float64)
    truth = (stream + exact_norm(x, weight), *exact)
    for ours, expected in zip((y, *got), truth, strict=True):
        assert relative_error(ours, expected) < 1e-14


def test_autograd():
    base, results = torch.randn(2, 5, 36, generator=torch.Generator().manual_seed(4)), {}
    for name, norm, dtype in (
        ("truth", exact_norm, torch.float64),
        ("stock", stock_norm, torch.float32),
        ("ours", lambda x, w: rms_norm(x, w, EPS, adds_one=True), torch.float32),
    ):
        x = base.to(DEVICE, dtype).requires_grad_()
        weight = weights(36, torch.float32).to(dtype).requires_grad_()
        y = norm(x, weight)
        (y * y * y).sum().backward()
        results[name] = (y, x.grad, weight.grad)
    for name, *three in zip(
        ("y", "dx", "dweight"), results["ours"], results["stock"], results["truth"], strict=True
    ):
        assert_as_exact_as_stock(*three, name)


def test_added_stands_for_the_residual_or_fits_it():
    x, weight = torch.zeros(4, 6, device=DEVICE), torch.ones(6, device=DEVICE)
    with pytest.raises(ValueError, match="added and residual are both given"):
        rms_norm_forward(x, weight, EPS, residual=x, added=x)
    with pytest.raises(ValueError, match="added does not fit x"):
        rms_norm_forward(x, weight, EPS, added=x[:3])
