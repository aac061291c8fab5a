"""RMSNorm: no further from the float64 truth than transformers', in strided buffers and by head."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import BACKENDS, DEVICE, DTYPES, assert_as_exact_as_stock, relative_error

from colab_qlora.kernels import rms_norm as module
from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.launch import ReadyLaunches
from colab_qlora.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_forward

EPS = 1e-5
NAN = float("nan")
# several rows a program with a last one that is not full; one row; one row a program, odd; nothing;
# heads. No narrower ones with many rows: the interpreter adds a tile's rows one after the other
SHAPES = [(63, 507), (1, 63), (3, 4099), (0, 16), (33, 3, 80), (1, 2, 128), (0, 2, 64)]
SPARE = 8

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _backend(backend):
    with use_backend(backend):
        yield


def columns_of_wider(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(wide buffer full of NaN, its inner columns seen as `shape`)."""
    columns = torch.Size(shape[1:]).numel()
    wide = torch.full((shape[0], columns + 2 * SPARE), NAN, dtype=dtype, device=DEVICE)
    return wide, wide[:, SPARE : SPARE + columns].unflatten(1, shape[1:])


def heads_first(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Full of NaN, seen as `shape`, with heads before rows in memory and a gap after each."""
    *outer, width = shape
    memory = torch.full((*outer[::-1], width + 1), NAN, dtype=dtype, device=DEVICE)
    rows = memory[..., :width]
    return rows.transpose(0, 1) if len(shape) == 3 else rows


def normal(shape: tuple[int, ...], dtype: torch.dtype, seed: int, size: float = 1.0):
    """Normal values amid NaN, so that a read beside them shows."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    return columns_of_wider(shape, dtype)[1].copy_(values)


def gains(width: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.rand(width, generator=torch.Generator().manual_seed(9)) + 0.5
    return values.to(DEVICE, dtype)


def stock_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """transformers' LlamaRMSNorm."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    norm = LlamaRMSNorm(x.shape[-1], eps=EPS)
    norm.weight = torch.nn.Parameter(weight)
    return torch.func.functional_call(norm, {"weight": weight}, (x,))


def exact_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight


def gradients(norm, x, weight, dy, residual_grad, dtype):
    """[dx + residual_grad, dweight] by autograd of `norm` in `dtype`."""
    x, weight = (tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight))
    dx, dweight = torch.autograd.grad(norm(x, weight), (x, weight), dy.to(dtype))
    return [dx if residual_grad is None else dx + residual_grad.to(dtype), dweight]


def assert_rounded_once(got: torch.Tensor, truth: torch.Tensor) -> None:
    """Require that a half result is the nearest one to the truth, save for a few near ties."""
    if got.dtype != torch.float32:
        assert relative_error(got, truth) <= 1.01 * relative_error(truth.to(got.dtype), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_is_as_exact_as_stock_in_strided_buffers(shape, has_residual, dtype):
    x, weight = normal(shape, dtype, 1, 3.0), gains(shape[-1], dtype)
    residual = heads_first(shape, dtype).copy_(normal(shape, dtype, 2)) if has_residual else None
    wide, out = columns_of_wider(shape, dtype)
    y, rstd, h = rms_norm_forward(x, weight, EPS, residual=residual, out=out)
    exact_sum, stock_sum = x.double(), x
    if residual is None:
        assert h is x
    else:
        exact_sum, stock_sum = x.double() + residual.double(), x + residual
        assert torch.equal(h, stock_sum) and h.is_contiguous()
    assert y is out
    truth = exact_norm(exact_sum, weight.double())
    assert_as_exact_as_stock(y, stock_norm(stock_sum, weight), truth, "y")
    assert_rounded_once(y, exact_norm(h.double(), weight.double()))
    assert (rstd.dtype, rstd.shape) == (torch.float32, shape[:-1]) and rstd.is_contiguous()
    exact_rstd = (h.double().square().mean(-1) + EPS).rsqrt()
    assert relative_error(rstd, exact_rstd) < 2 * torch.finfo(torch.float32).eps
    assert wide[:, :SPARE].isnan().all() and wide[:, -SPARE:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_is_as_exact_as_stock_in_strided_buffers(shape, has_residual, dtype):
    h, dy, weight = normal(shape, dtype, 1, 3.0), normal(shape, dtype, 2), gains(shape[-1], dtype)
    dy = dy.contiguous()
    residual_grad = heads_first(shape, dtype).copy_(normal(shape, dtype, 3))
    residual_grad = residual_grad if has_residual else None
    rstd = rms_norm_forward(h, weight, EPS)[1]
    wide, out = columns_of_wider(shape, dtype)
    options = {"residual_grad": residual_grad, "out": out}
    dx, dweight = rms_norm_backward(dy, h, weight, rstd, needs_weight_grad=True, **options)
    assert dx is out and (dweight.dtype, dweight.shape) == (dtype, weight.shape)
    stock = gradients(stock_norm, h, weight, dy, residual_grad, dtype)
    truth = gradients(exact_norm, h, weight, dy, residual_grad, torch.float64)
    assert_as_exact_as_stock(dx, stock[0], truth[0], "dx")
    assert_as_exact_as_stock(dweight, stock[1], truth[1], "dweight")
    assert_rounded_once(dx, truth[0])
    assert_rounded_once(dweight, truth[1])
    assert wide[:, :SPARE].isnan().all() and wide[:, -SPARE:].isnan().all()
    other = heads_first(shape, dtype)
    options["out"] = other
    assert rms_norm_backward(dy, h, weight, rstd, **options)[1] is None
    assert torch.equal(other, dx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", ["columns", "heads first", "x", "residual"])
@pytest.mark.parametrize("shape", [(37, 123), (9, 3, 64), (3, 1030), (0, 16)])
def test_forward_writes_the_sum_where_it_is_told(shape, target, dtype):
    x, weight = normal(shape, dtype, 1), gains(shape[-1], dtype)
    residual = heads_first(shape, dtype).copy_(normal(shape, dtype, 2))
    expected = rms_norm_forward(x, weight, EPS, residual=residual)
    wide, columns = columns_of_wider(shape, dtype)
    places = {"columns": columns, "heads first": heads_first(shape, dtype)}
    h_out = (places | {"x": x, "residual": residual})[target]
    got = rms_norm_forward(x, weight, EPS, residual=residual, h_out=h_out)
    assert got[2] is h_out
    for ours, same in zip(got, expected, strict=True):
        assert torch.equal(ours, same)
    assert wide[:, :SPARE].isnan().all() and wide[:, -SPARE:].isnan().all()
    others = {"x": x, "residual": residual}
    others.pop(target, None)
    for seed, name in ((1, "x"), (2, "residual")):
        if name in others:
            assert torch.equal(others[name], normal(shape, dtype, seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_backward_writes_the_bits_of_the_forward_pass_once_more(shape, has_residual, dtype):
    h, dy, weight = normal(shape, dtype, 1, 3.0), normal(shape, dtype, 2), gains(shape[-1], dtype)
    y, rstd, _ = rms_norm_forward(h, weight, EPS)
    residual_grad = normal(shape, dtype, 3) if has_residual else None
    options = {"residual_grad": residual_grad, "needs_weight_grad": has_residual}
    expected = rms_norm_backward(dy, h, weight, rstd, **options)
    wide, columns = columns_of_wider(shape, dtype)
    for normed in (columns, heads_first(shape, dtype)):
        dx, dweight = rms_norm_backward(dy, h, weight, rstd, normed=normed, **options)
        assert torch.equal(normed, y) and torch.equal(dx, expected[0])
        assert torch.equal(dweight, expected[1]) if has_residual else dweight is None
    assert wide[:, :SPARE].isnan().all() and wide[:, -SPARE:].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(37, 123), (9, 3, 64)])
@pytest.mark.parametrize("needs_weight_grad", [False, True])
def test_backward_may_overwrite_the_gradient_it_adds_or_the_one_it_takes(
    shape, needs_weight_grad, dtype
):
    h, weight = normal(shape, dtype, 1), gains(shape[-1], dtype)
    rstd = rms_norm_forward(h, weight, EPS)[1]
    for target in range(2):
        dy, residual_grad = normal(shape, dtype, 2), normal(shape, dtype, 3)
        options = {"residual_grad": residual_grad, "needs_weight_grad": needs_weight_grad}
        expected = rms_norm_backward(dy, h, weight, rstd, **options)
        out = (residual_grad, dy)[target]
        got = rms_norm_backward(dy, h, weight, rstd, out=out, **options)
        assert got[0] is out and torch.equal(out, expected[0])
        assert not needs_weight_grad or torch.equal(got[1], expected[1])


@pytest.mark.parametrize("shape", [(123, 123), (11, 1030), (61, 3, 128)])
def test_programs_of_several_tiles_sum_dweight_over_every_row_once(shape, monkeypatch):
    monkeypatch.setattr(module, "WEIGHT_GRAD_PROGRAMS", 2)
    monkeypatch.setattr(module, "_backward_launches", ReadyLaunches())
    h, dy, weight = (normal(shape, torch.float32, seed) for seed in range(3))
    weight = gains(shape[-1], torch.float32)
    y, rstd, _ = rms_norm_forward(h, weight, EPS)
    normed = torch.full_like(y, NAN)
    got = rms_norm_backward(dy, h, weight, rstd, needs_weight_grad=True, normed=normed)
    assert torch.equal(normed, y)
    stock = gradients(stock_norm, h, weight, dy, None, torch.float32)
    truth = gradients(exact_norm, h, weight, dy, None, torch.float64)
    for name, *three in zip(("dx", "dweight"), got, stock, truth, strict=True):
        assert_as_exact_as_stock(*three, name)


@pytest.mark.parametrize("width", [1, 2, 3, 1023, 1024, 1025, 2048, 16384, 16385])
def test_every_width(width):
    # of the size of sqrt(EPS), or the dx of very few values would be nothing but cancellation
    h, dy = normal((2, width), torch.float32, 1, 3e-3), normal((2, width), torch.float32, 2)
    weight = gains(width, torch.float32)
    y, rstd, _ = rms_norm_forward(h, weight, EPS)
    got = [y, *rms_norm_backward(dy, h, weight, rstd, needs_weight_grad=True)]
    stock = [stock_norm(h, weight), *gradients(stock_norm, h, weight, dy, None, torch.float32)]
    h, weight, dy = h.double(), weight.double(), dy.double()
    truth = [exact_norm(h, weight), *gradients(exact_norm, h, weight, dy, None, torch.float64)]
    for name, *three in zip(("y", "dx", "dweight"), got, stock, truth, strict=True):
        assert_as_exact_as_stock(*three, name)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_float32_weight_beside_half_rows(dtype):
    h, dy, weight = normal((5, 70), dtype, 1), normal((5, 70), dtype, 2), gains(70, torch.float32)
    y, rstd, _ = rms_norm_forward(h, weight, EPS)
    dx, dweight = rms_norm_backward(dy, h, weight, rstd, needs_weight_grad=True)
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, torch.float32)
    truth = gradients(exact_norm, h, weight, dy, None, torch.float64)
    rounding = torch.finfo(dtype).eps / 2
    assert relative_error(y, exact_norm(h.double(), weight.double())) < rounding
    assert relative_error(dx, truth[0]) < rounding
    assert relative_error(dweight, truth[1]) < 1e-6


def test_squares_that_overflow_float16_do_not_matter():
    h = torch.tensor([[60000.0, -60000.0, 50000.0], [1e-7, 0.0, -1e-7]], device=DEVICE).half()
    dy, weight = torch.ones_like(h), torch.ones(3, device=DEVICE).half()
    y, rstd, _ = rms_norm_forward(h, weight, EPS)
    dx, _ = rms_norm_backward(dy, h, weight, rstd)
    truth = gradients(exact_norm, h, weight, dy, None, torch.float64)[0]
    exact_y = exact_norm(h.double(), weight.double())
    torch.testing.assert_close(y.double(), exact_y, rtol=1e-3, atol=6e-8)
    torch.testing.assert_close(dx.double(), truth, rtol=1e-3, atol=6e-8)


@pytest.mark.parametrize("shape", [(5, 70), (4, 3, 33)])
def test_float64_is_exact(shape):
    x, residual, dy, dh = (normal(shape, torch.float64, seed) for seed in range(4))
    weight = gains(shape[-1], torch.float64)
    y, rstd, h = rms_norm_forward(x, weight, EPS, residual=residual)
    normed = torch.empty_like(y)
    options = {"residual_grad": dh, "needs_weight_grad": True, "normed": normed}
    got = rms_norm_backward(dy, h, weight, rstd, **options)
    assert torch.equal(normed, y) and rstd.dtype == torch.float64
    truth = gradients(exact_norm, x + residual, weight, dy, dh, torch.float64)
    truth.append(exact_norm(x + residual, weight))
    for ours, exact in zip((*got, y), truth, strict=True):
        assert relative_error(ours, exact) < 1e-14


def inputs_of_every_layout() -> dict[str, torch.Tensor]:
    rows = torch.randn(4, 5, 264, generator=torch.Generator().manual_seed(4)).to(DEVICE)
    return {
        "one row": rows[0, 0],
        "batch of sequences": rows,
        "columns": rows[0, :, 3:40],
        "heads of a batch": rows[..., 3:259].unflatten(2, (2, 128)),
        "last dimension strided": rows.unflatten(2, (132, 2))[..., 0],
        "five dimensions": rows.unflatten(0, (2, 2)).unflatten(3, (2, 132)),
        "no rows": rows[:0],
    }


@pytest.mark.parametrize("needs", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("layout", inputs_of_every_layout())
def test_autograd_of_every_layout(layout, needs):
    base = inputs_of_every_layout()[layout]
    results = {}
    for name, norm, dtype in (
        ("truth", exact_norm, torch.float64),
        ("stock", stock_norm, torch.float32),
        ("ours", lambda x, weight: rms_norm(x, weight, EPS), torch.float32),
    ):
        x = base.detach().to(dtype).requires_grad_(needs[0])
        weight = gains(x.shape[-1], torch.float32).to(dtype).requires_grad_(needs[1])
        y = norm(x, weight)
        # the gradient of a sum has stride 0 in every dimension
        (y.sum() + (y * y * y).sum()).backward()
        results[name] = (y, x.grad, weight.grad)
    for part, needed in enumerate((True, *needs)):
        ours, stock, truth = (results[name][part] for name in ("ours", "stock", "truth"))
        if needed:
            assert_as_exact_as_stock(ours, stock, truth, ("y", "dx", "dweight")[part])
        else:
            assert ours is None


def test_autograd_refuses_a_second_derivative():
    x = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    y = rms_norm(x, torch.ones(6, device=DEVICE), EPS)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_autograd_notices_a_change_of_what_it_kept():
    x = torch.randn(4, 6, device=DEVICE)
    weight = torch.ones(6, device=DEVICE, requires_grad=True)
    y = rms_norm(x, weight, EPS)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_what_does_not_fit_is_refused_by_name():
    x, weight = torch.zeros(4, 6, device=DEVICE), torch.ones(6, device=DEVICE)
    rstd = torch.ones(4, device=DEVICE)
    for changes, message in (
        ({"x": x.long()}, "x has no rows"),
        ({"x": x[0]}, "x has no rows"),
        ({"x": x.t().contiguous().t()}, "x has no rows"),
        ({"x": x[:, :0]}, "x has no rows"),
        ({"weight": weight[:5]}, "weight does not fit x"),
        ({"weight": weight.long()}, "weight does not fit x"),
        ({"residual": x.half()}, "residual does not fit x"),
        ({"residual": x[:3]}, "residual does not fit x"),
        ({"out": x.t().contiguous().t()}, "out does not fit x"),
        ({"residual": x, "h_out": x[:, :5]}, "h_out does not fit x"),
        ({"h_out": x}, "h_out is given although there is no residual"),
    ):
        with pytest.raises(ValueError, match=message):
            rms_norm_forward(**({"x": x, "weight": weight, "eps": EPS} | changes))
    for changes, message in (
        ({"dy": x.half()}, "dy does not fit h"),
        ({"residual_grad": x[:3]}, "residual_grad does not fit h"),
        ({"out": x[:, :5]}, "out does not fit h"),
        ({"normed": x.half()}, "normed does not fit h"),
        ({"rstd": rstd.double()}, "rstd does not fit h"),
        ({"rstd": rstd[:3]}, "rstd does not fit h"),
        ({"rstd": rstd.repeat(2)[::2]}, "rstd does not fit h"),
    ):
        with pytest.raises(ValueError, match=message):
            rms_norm_backward(**({"dy": x, "h": x, "weight": weight, "rstd": rstd} | changes))
    with pytest.raises(ValueError, match="x has no rows"):
        rms_norm(x[0, 0], weight, EPS)


@pytest.mark.parametrize("width", [1, 64, 123, 576, 1024, 4096, 14336, 16384])
def test_a_thread_has_16_elements(width):
    rows, block, warps = module.tile_of(width)
    assert block // 2 < width <= block
    assert rows * block == warps * 512 and warps <= 32
    assert rows * block == 4096 or width > 1024
