"""The gradients of a gated linear unit with their LoRA products, against float64 and the parts."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from kernel_helpers import (
    BACKENDS,
    CAN_RUN_TRITON,
    DEVICE,
    DTYPES,
    HALF_DTYPES,
    ON_GPU,
    assert_as_exact_as_stock,
    relative_error,
)
from torch.nn import functional

from colab_qlora.kernels import glu_lora
from colab_qlora.kernels.backend import use_backend
from colab_qlora.kernels.glu_lora import can_fuse_glu_lora, glu_lora_backward, share_of_tokens
from colab_qlora.kernels.launch import ReadyLaunches
from colab_qlora.kernels.swiglu import ACTIVATIONS, glu_backward

ACTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
}
NAMES = ("d_a", "d_b_gate", "d_b_up")

needs_triton = pytest.mark.skipif(not CAN_RUN_TRITON, reason="needs Triton")


def inside(values: torch.Tensor, left: int, right: int) -> torch.Tensor:
    """The same values as columns of a wider buffer that is NaN beside them."""
    rows, width = values.shape
    wide = torch.full(
        (rows, left + width + right), torch.nan, dtype=values.dtype, device=values.device
    )
    return wide[:, left : left + width].copy_(values)


def inputs(tokens: int, width: int, ranks: tuple[int, ...], dtype: torch.dtype) -> list:
    """[dm, gate, up, ds, xg, xu] amid NaN, the factors at odd addresses; rank 0 is None."""
    source = torch.Generator().manual_seed(tokens + width)
    widths = (width, width, width, *ranks)
    values = [torch.randn(tokens, size, generator=source).to(DEVICE, dtype) for size in widths]
    wide = [inside(x, 8, 8) for x in values[:3]]
    factors = [inside(x, 1 + i, 3) if x.shape[1] else None for i, x in enumerate(values[3:])]
    return [*wide, *factors]


def columns_of_nan(like: torch.Tensor) -> torch.Tensor:
    return inside(torch.full_like(like, torch.nan), 8, 16)


def assert_nan_beside(columns: torch.Tensor) -> None:
    wide, left = columns._base, columns.storage_offset()
    assert wide is not None
    assert wide[:, :left].isnan().all() and wide[:, left + columns.shape[1] :].isnan().all()


def product(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return None if a is None or b is None else a.t() @ b


def truth_of(dm, gate, up, ds, xg, xu, activation) -> list:
    """[d_gate, d_up, d_a, d_b_gate, d_b_up] in float64, by autograd."""
    dm, gate, up, ds, xg, xu = (
        None if x is None else x.detach().double().clone() for x in (dm, gate, up, ds, xg, xu)
    )
    gate.requires_grad_()
    up.requires_grad_()
    m = ACTS[activation](gate) * up
    m.backward(dm)
    sums = (product(ds, m.detach()), product(gate.grad, xg), product(up.grad, xu))
    return [gate.grad, up.grad, *sums]


def stock_of(dm, gate, up, ds, xg, xu, activation) -> list:
    """The same by `glu_backward`, and float32 products of what it rounded."""
    d_gate, d_up, m = glu_backward(dm, gate, up, activation=activation)
    m, wide_gate, wide_up, ds, xg, xu = (
        None if x is None else x.float() for x in (m, d_gate, d_up, ds, xg, xu)
    )
    return [d_gate, d_up, product(ds, m), product(wide_gate, xg), product(wide_up, xu)]


def assert_right(tensors: list, activation: str = "silu") -> None:
    """Every result as exact as stock's, in columns of wider buffers; no input is written."""
    before = [None if x is None else x.clone() for x in tensors]
    d_gate, d_up = columns_of_nan(tensors[1]), columns_of_nan(tensors[1])
    sums = glu_lora_backward(*tensors, activation=activation, d_gate=d_gate, d_up=d_up)
    stock, truth = stock_of(*tensors, activation), truth_of(*tensors, activation)
    for name, ours, theirs, exact in zip(
        ("d_gate", "d_up", *NAMES), (d_gate, d_up, *sums), stock, truth, strict=True
    ):
        if exact is None:
            assert ours is None, name
            continue
        # a dot on tensor cores adds in another order, and cuts off what does not line up
        roundings = 8 if name in NAMES else None
        assert_as_exact_as_stock(ours, theirs, exact, name, roundings=roundings)
        if name in NAMES:
            assert ours.dtype == torch.float32 and ours.is_contiguous()
    assert_nan_beside(d_gate)
    assert_nan_beside(d_up)
    for now, then in zip(tensors, before, strict=True):
        assert now is None or torch.equal(now, then)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_everything_is_as_exact_as_stock(backend, activation, dtype):
    assert_right(inputs(63, 80, (16, 3, 17), dtype), activation)


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("tokens", [1, 63, 130, 300])
@pytest.mark.parametrize("width", [80, 200])
def test_odd_sizes_and_several_shares(backend, tokens, width, dtype):
    assert_right(inputs(tokens, width, (3, 16, 1), dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 16, 17, 48, 64, 65])
def test_any_rank(backend, rank, dtype):
    assert_right(inputs(33, 80, (rank, rank, rank), dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize(
    "ranks", [(16, 0, 0), (0, 16, 0), (0, 0, 16), (0, 4, 16), (4, 0, 16), (4, 16, 0), (0, 0, 0)]
)
def test_a_factor_that_is_missing_leaves_out_its_product(backend, ranks, dtype):
    assert_right(inputs(40, 80, ranks, dtype))


@pytest.mark.parametrize("dtype", HALF_DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("ranks", [(16, 8, 4), (0, 0, 3)])
def test_in_place_gives_the_same_bits_as_alone(backend, ranks, activation, dtype):
    dm, gate, up, *factors = inputs(150, 200, ranks, dtype)
    expected = glu_backward(dm, gate, up, activation=activation, rebuild=False)
    apart = torch.empty_like(gate), torch.empty_like(up)
    options = {"activation": activation}
    sums = glu_lora_backward(dm, gate, up, *factors, **options, d_gate=apart[0], d_up=apart[1])
    again = glu_lora_backward(dm, gate, up, *factors, **options, d_gate=gate, d_up=up)
    for ours, alone, theirs in zip((gate, up), apart, expected, strict=False):
        assert torch.equal(ours, theirs) and torch.equal(alone, theirs)
    for one, two in zip(sums, again, strict=True):
        assert one is two is None or torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 80), (5, 0)])
def test_of_nothing_the_sums_are_zero(backend, shape, dtype):
    tensors = inputs(*shape, (16, 3, 1), dtype)
    sums = glu_lora_backward(
        *tensors, d_gate=torch.empty_like(tensors[1]), d_up=torch.empty_like(tensors[1])
    )
    width = shape[1]
    assert [tuple(x.shape) for x in sums] == [(16, width), (width, 3), (width, 1)]
    assert all(x.dtype == torch.float32 and not x.any() for x in sums)


def test_the_reference_is_exact_in_float64():
    for ranks in ((16, 3, 70), (0, 2, 0)):
        tensors = inputs(21, 50, ranks, torch.float64)
        d_gate, d_up = (torch.empty_like(tensors[1]) for _ in range(2))
        sums = glu_lora_backward(*tensors, d_gate=d_gate, d_up=d_up)
        for ours, exact in zip((d_gate, d_up, *sums), truth_of(*tensors, "silu"), strict=True):
            if exact is None:
                assert ours is None
            else:
                assert ours.dtype == torch.float64 and relative_error(ours, exact) < 1e-14


@needs_triton
def test_a_layout_is_launched_again_without_a_look(monkeypatch):
    launches, calls = ReadyLaunches(), []
    start = launches.start
    monkeypatch.setattr(launches, "start", lambda *a, **k: (calls.append(a), start(*a, **k)))
    monkeypatch.setattr(glu_lora, "_launches", launches)
    tensors = inputs(300, 200, (16, 3, 17), torch.float16)
    with use_backend("triton"):
        results = []
        for _ in range(2):
            outs = [torch.empty_like(tensors[1]) for _ in range(2)]
            sums = glu_lora_backward(*tensors, d_gate=outs[0], d_up=outs[1])
            results.append((*outs, *sums))
    # two shares at least, or their sum is not tested
    assert calls[0][2][1] > 1
    assert len(calls) == (1 if ON_GPU else 2)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@needs_triton
def test_the_kernel_is_for_half_types_and_ranks_up_to_64(monkeypatch):
    gate = torch.empty(4, 80, dtype=torch.float16, device=DEVICE)
    small, large = gate.new_empty(4, 64), gate.new_empty(4, 65)
    with use_backend("triton"):
        assert can_fuse_glu_lora(gate, small, None, small)
        assert not can_fuse_glu_lora(gate, small, large, None)
        assert not can_fuse_glu_lora(gate, None, None, None)
        assert not can_fuse_glu_lora(gate.float(), small.float())
        with monkeypatch.context() as patch:
            patch.setattr(glu_lora, "has_tensor_core_dot", lambda tensor: False)
            assert not can_fuse_glu_lora(gate, small)
    with use_backend("torch"):
        assert not can_fuse_glu_lora(gate, small)


@pytest.mark.parametrize("processors", [1, 58, 108, 132])
@pytest.mark.parametrize("tokens", [1, 16, 130, 512, 4096, 16384])
@pytest.mark.parametrize("width", [80, 8960, 14336, 28672, 100_000])
@pytest.mark.parametrize("form", [glu_lora.LARGE, glu_lora.SMALL])
def test_the_programs_of_several_shares_run_at_once(tokens, width, processors, form):
    share = share_of_tokens(tokens, width, processors, form)
    shares = -(-tokens // share)
    assert share % form.tokens == 0
    programs = -(-width // form.columns) * shares
    assert shares == 1 or programs <= processors * form.programs
    assert shares == 1 or share >= glu_lora.MIN_SHARE_TOKENS
    assert share < tokens + form.tokens


def test_large_ranks_take_small_tiles():
    assert glu_lora.form_for([16, 16, 16]) == glu_lora.form_for([48, 0, 0]) == glu_lora.LARGE
    assert glu_lora.form_for([32, 16, 16]) == glu_lora.form_for([64, 64, 64]) == glu_lora.SMALL


def test_mistakes_name_the_tensor(backend):
    dm, gate, up, ds, xg, xu = inputs(6, 80, (4, 4, 4), torch.float16)
    outs = {"d_gate": torch.empty_like(gate), "d_up": torch.empty_like(up)}

    def call(**other):
        names = {"dm": dm, "gate": gate, "up": up, "ds": ds, "xg": xg, "xu": xu}
        return glu_lora_backward(**(names | outs | other))

    with pytest.raises(ValueError, match="'relu'; allowed: silu, gelu_tanh, gelu"):
        call(activation="relu")
    with pytest.raises(ValueError, match=r"d_up has another shape: got \(6, 79\)"):
        call(d_up=outs["d_up"][:, 1:])
    with pytest.raises(ValueError, match=r"ds has another shape: got \(5, 4\); allowed: \(6, rank"):
        call(ds=ds[:5])
    with pytest.raises(ValueError, match=r"xg has another shape: got \(6, 0\)"):
        call(xg=xg[:, :0])
    with pytest.raises(ValueError, match="xu has another dtype or device: got torch.float32"):
        call(xu=xu.float())
    with pytest.raises(ValueError, match="xg has gaps inside its rows: got strides"):
        call(xg=xg[:, ::2])
