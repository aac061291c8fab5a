"""act(gate) * up: no further from the float64 truth than the stock expression, in place and not."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from kernel_helpers import BACKENDS, DEVICE, DTYPES, assert_as_exact_as_stock, relative_error
from torch.nn import functional

from colab_qlora.kernels import swiglu, swiglu_reference
from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.swiglu import (
    ACTIVATIONS,
    activation_name,
    glu,
    glu_backward,
    glu_forward,
)

ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
}
# several rows a program with a last one that is not full; one row; several programs a row; nothing
SHAPES = [(507, 63), (1, 1), (3, 2 * swiglu.TILE_ELEMENTS + 123), (0, 16)]
SPARE = 8

pytestmark = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _backend(backend):
    with use_backend(backend):
        yield


def columns_of_wider(shape: tuple[int, int], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """(wide buffer full of NaN, its inner columns, which have `shape`)."""
    tokens, width = shape
    wide = torch.full((tokens, width + 2 * SPARE), float("nan"), dtype=dtype, device=DEVICE)
    return wide, wide[:, SPARE : SPARE + width]


def random_columns(shape: tuple[int, int], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal values amid NaN, so that a read beside them shows."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2
    return columns_of_wider(shape, dtype)[1].copy_(values)


def assert_spare_is_untouched(wide: torch.Tensor) -> None:
    assert wide[:, :SPARE].isnan().all() and wide[:, -SPARE:].isnan().all()


def plain(gate, up, dm, activation, dtype=None):
    """[m, d_gate, d_up] by autograd of act(gate) * up in `dtype`."""
    gate, up = (x.detach().clone().to(dtype).requires_grad_() for x in (gate, up))
    m = ACTS[activation](gate) * up
    m.backward(dm.to(dtype or dm.dtype))
    return [m.detach(), gate.grad, up.grad]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_output_is_as_exact_as_stock_in_strided_buffers(shape, activation, dtype):
    gate, up, dm = (random_columns(shape, dtype, seed) for seed in range(3))
    stock = plain(gate, up, dm, activation)
    truth = plain(gate, up, dm, activation, torch.float64)
    buffers = [columns_of_wider(shape, dtype) for _ in range(4)]
    out, d_gate, d_up, m = (inner for _, inner in buffers)
    assert glu_forward(gate, up, activation=activation, out=out) is out
    got = glu_backward(dm, gate, up, activation=activation, d_gate=d_gate, d_up=d_up, m=m)
    assert got[0] is d_gate and got[1] is d_up and got[2] is m
    for name, ours, theirs, exact in zip(
        ("m", "d_gate", "d_up", "rebuilt m"),
        (out, d_gate, d_up, m),
        (*stock, stock[0]),
        (*truth, truth[0]),
        strict=True,
    ):
        assert_as_exact_as_stock(ours, theirs, exact, name)
    assert torch.equal(m, out)
    for wide, _ in buffers:
        assert_spare_is_untouched(wide)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_place_gives_the_same_bits(activation, dtype):
    shape = (37, 123)
    dm = random_columns(shape, dtype, 2)
    both = torch.randn(37, 246, device=DEVICE).to(dtype)
    gate, up = both.chunk(2, dim=1)
    expected = glu_backward(dm, gate, up, activation=activation)
    got = glu_backward(dm, gate, up, activation=activation, d_gate=gate, d_up=up, m=dm)
    assert got[0] is gate and got[1] is up and got[2] is dm
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_without_rebuild_there_is_no_m_and_the_gradients_are_the_same(backend):
    gate, up, dm = (random_columns((5, 70), torch.float32, seed) for seed in range(3))
    d_gate, d_up, m = glu_backward(dm, gate, up, rebuild=False)
    expected = glu_backward(dm, gate, up)
    assert m is None and expected[2] is not None
    assert torch.equal(d_gate, expected[0]) and torch.equal(d_up, expected[1])
    with pytest.raises(ValueError, match="rebuild=False"):
        glu_backward(dm, gate, up, m=dm, rebuild=False)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_large_gates_stay_finite(activation):
    gate = torch.tensor([[-65504.0, -300.0, -20.0, -0.0, 20.0, 300.0, 65504.0]], device=DEVICE)
    up, dm = torch.full_like(gate, 0.5), torch.full_like(gate, 0.25)
    exact = plain(gate, up, dm, activation, torch.float64)
    gate, up, dm = gate.half(), up.half(), dm.half()
    d_gate, d_up, m = glu_backward(dm, gate, up, activation=activation)
    for ours, truth in zip((m, d_gate, d_up), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("wanted", ["both", "gate", "up"])
def test_autograd_of_a_fused_projection(activation, wanted):
    both = torch.randn(2, 9, 126, device=DEVICE)
    results = {}
    for dtype, name in (
        (torch.float64, "truth"),
        (torch.float32, "stock"),
        (torch.float32, "ours"),
    ):
        leaf = both.to(dtype).requires_grad_()
        gate, up = leaf.chunk(2, dim=-1)
        gate = gate if wanted != "up" else gate.detach()
        up = up if wanted != "gate" else up.detach()
        m = glu(gate, up, activation) if name == "ours" else ACTS[activation](gate) * up
        # the gradient of a sum has stride 0 in every dimension
        (m.sum() + (m * m).sum()).backward()
        results[name] = (m.detach(), leaf.grad)
    for part, what in enumerate(("m", "gradient")):
        ours, stock, truth = (results[name][part] for name in ("ours", "stock", "truth"))
        assert_as_exact_as_stock(ours, stock, truth, what)


def test_autograd_keeps_gate_and_up_alone_and_refuses_a_second_derivative():
    gate, up = (torch.randn(4, 6, device=DEVICE, requires_grad=True) for _ in range(2))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        m = glu(gate, up)
    assert sorted(x.data_ptr() for x in kept) == sorted(x.data_ptr() for x in (gate, up))
    (grad,) = torch.autograd.grad(m.square().sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("shape", [(0, 5, 8), (7,), (2, 1), (3, 0)])
def test_autograd_takes_any_leading_dimensions(shape):
    gate, up = (torch.randn(shape, device=DEVICE, requires_grad=True) for _ in range(2))
    m = glu(gate, up)
    m.backward(torch.ones_like(m))
    torch.testing.assert_close(m, functional.silu(gate) * up)
    assert gate.grad is not None and gate.grad.shape == shape


def test_autograd_copies_a_transposed_input():
    gate, up = (torch.randn(6, 4, device=DEVICE, requires_grad=True) for _ in range(2))
    (glu(gate.t(), up.t()) * torch.arange(6, device=DEVICE)).sum().backward()
    ours = gate.grad
    gate.grad = None
    (functional.silu(gate) * up * torch.arange(6, device=DEVICE)[:, None]).sum().backward()
    torch.testing.assert_close(ours, gate.grad)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_exact_in_float64_and_in_chunks(activation, backend, monkeypatch):
    if backend == "triton":
        pytest.skip("the kernels compute in float32")
    monkeypatch.setattr(
        swiglu_reference, "CHUNK_ELEMENTS", 100
    )  # 3 rows of 31, and a last chunk of 2
    gate, up, dm = (random_columns((11, 31), torch.float64, seed) for seed in range(3))
    m, d_gate, d_up = plain(gate, up, dm, activation)
    got = (
        glu_forward(gate, up, activation=activation),
        *glu_backward(dm, gate, up, activation=activation),
    )
    for ours, truth in zip(got, (m, d_gate, d_up, m), strict=True):
        assert ours.dtype == torch.float64 and relative_error(ours, truth) < 1e-14


@pytest.mark.gpu
def test_offsets_pass_two_to_the_31(backend):
    stride = 1 << 30
    buffer = torch.empty(2 * stride + 64, dtype=torch.float16, device=DEVICE)
    out = buffer.as_strided((3, 64), (stride, 1))
    gate, up = (torch.randn(3, 64, dtype=torch.float16, device=DEVICE) for _ in range(2))
    glu_forward(gate, up, out=out)
    assert torch.equal(out, glu_forward(gate, up))


def test_mistakes_name_the_tensor(backend):
    gate, up = torch.randn(4, 6, device=DEVICE), torch.randn(4, 6, device=DEVICE)
    with pytest.raises(ValueError, match="'relu'; allowed: silu, gelu_tanh, gelu"):
        glu_forward(gate, up, activation="relu")
    with pytest.raises(ValueError, match=r"up has another shape: got \(4, 5\)"):
        glu_forward(gate, up[:, :5])
    with pytest.raises(ValueError, match=r"gate has another shape: got \(4,\)"):
        glu_forward(gate[:, 0], up[:, 0])
    with pytest.raises(ValueError, match="gate has gaps inside its rows: got strides"):
        glu_forward(gate[:, ::2], up[:, ::2])
    with pytest.raises(ValueError, match="up has another dtype or device: got torch.int64"):
        glu_forward(gate, up.long())
    with pytest.raises(ValueError, match="d_up has another shape"):
        glu_backward(gate, gate, up, d_up=up[:3])
    with pytest.raises(ValueError, match="gate and up differ"):
        glu(gate, up.double())


def test_names_of_transformers_are_mapped_just_where_the_function_is_the_same(backend):
    if backend == "triton":
        pytest.skip("a mapping has no backend")
    activations = pytest.importorskip("transformers.activations")
    x = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    ours = {name: act(x) for name, act in ACTS.items()}
    same = {}
    for name in activations.ACT2CLS:
        if name == "xielu":
            continue  # has parameters of its own
        act = activations.ACT2FN[name].double()
        theirs = act(x).detach()
        equal = [key for key in ours if (theirs - ours[key]).abs().max() < 1e-13]
        same[name] = equal[0] if equal else None
    assert {name: activation_name(name) for name in same} == same
    assert same["gelu_fast"] is None and set(same.values()) == {None, *ACTIVATIONS}
    assert activation_name("xielu") is None
