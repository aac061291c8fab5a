"""Copies of rows: every bit of every value, nothing beside them, and no second look at a layout."""

from __future__ import annotations

import pytest
import torch
from kernel_helpers import BACKENDS, CAN_RUN_TRITON, DEVICE, DTYPES

from colab_qlora.errors import UserError
from colab_qlora.kernels import copy_rows as module
from colab_qlora.kernels.backend import HAS_TRITON, use_backend
from colab_qlora.kernels.copy_rows import copy_rows

NAN = float("nan")
# several tiles a row, and an odd rest; several rows a tile; one value; no row; no column
SHAPES = [(3, 2500), (7, 1024), (123, 63), (61, 64), (1, 507), (1, 1), (0, 64), (5, 0)]


def columns(rows, width, dtype, spare, fill=NAN):
    """(wide buffer, its columns between `spare` ones on the left and 3 on the right)."""
    wide = torch.full((rows, spare + width + 3), fill, dtype=dtype, device=DEVICE)
    return wide, wide[:, spare : spare + width]


def draw(rows, width, dtype, spare=0):
    """Normal values, with the special ones among them, in rows with gaps between them."""
    _, x = columns(rows, width, dtype, spare)
    values = torch.randn(rows, width, generator=torch.Generator().manual_seed(rows + width))
    for place, value in enumerate((NAN, -0.0, float("inf"), -float("inf"))):
        values.view(-1)[5 * place : 5 * place + 1] = value
    return x.copy_(values)


def bits(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_bit_is_copied_and_nothing_else_is_touched(backend, shape, dtype):
    x = draw(*shape, dtype, spare=8)
    wide, out = columns(*shape, dtype, spare=5, fill=7.0)
    kept = bits(x).clone()
    with use_backend(backend):
        assert copy_rows(x, out) is None
    assert torch.equal(bits(out), kept) and torch.equal(bits(x), kept)
    assert (wide[:, :5] == 7).all() and (wide[:, -3:] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_from_one_row_and_in_another_order(backend):
    x = draw(1, 70, torch.float16).nan_to_num()
    out = torch.full((9, 70), NAN, dtype=torch.float16, device=DEVICE)
    with use_backend(backend):
        copy_rows(x.expand(9, 70), out)
        assert torch.equal(out, x.repeat(9, 1))
        order = torch.randn(9, 2, 70, device=DEVICE).half()
        copy_rows(order[:, 1], out)
    assert torch.equal(out, order[:, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_gradient_flows(backend):
    x = torch.ones(3, 8, device=DEVICE, requires_grad=True)
    out = torch.zeros(3, 8, device=DEVICE)
    with use_backend(backend):
        copy_rows(x, out)
    assert not out.requires_grad and (out == 1).all()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_a_layout_is_checked_once_and_then_launched_by_addresses(monkeypatch):
    ready, repeated, grids = {}, [], []

    class Launches:
        get = ready.get

        def start(self, key, kernel, grid, tensors, constants):
            grids.append(grid)
            ready[key] = lambda *addresses: repeated.append(addresses)

    monkeypatch.setattr(module, "_launches", Launches())
    first, second = (draw(5, 4096, torch.float16) for _ in range(2))
    # aligned to 16 bytes, as on a GPU
    _, out = columns(5, 4096, torch.float16, spare=16)
    with use_backend("triton"):
        copy_rows(first, out)
        assert grids == [(4 * 2,)] and not repeated
        monkeypatch.setattr(module, "_check", None)
        copy_rows(second, out)
        assert repeated == [(second.data_ptr(), out.data_ptr())] and len(grids) == 1
        monkeypatch.undo()
        monkeypatch.setattr(module, "_launches", Launches())
        # another row stride, alignment, length or dtype is another launch
        copy_rows(first, torch.empty(5, 4096, dtype=torch.float16, device=DEVICE))
        copy_rows(first[:, 1:], out[:, 1:])
        copy_rows(first[:4], out[:4])
        copy_rows(first.float(), out.float())
    assert len(grids) == len(ready) == 5 and len(repeated) == 1


@pytest.mark.skipif(not CAN_RUN_TRITON, reason="needs Triton with a GPU or interpreter")
def test_launched_again_it_copies_what_is_there_now():
    out = torch.empty(9, 100, device=DEVICE)
    with use_backend("triton"):
        for seed in range(3):
            x = torch.full((9, 100), float(seed), device=DEVICE)
            copy_rows(x, out)
            assert torch.equal(out, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_fit_is_refused_by_name(backend):
    x, out = (torch.zeros(4, 8, device=DEVICE) for _ in range(2))
    for changes, message in (
        ({"x": x.long()}, "x cannot be copied.*int64"),
        ({"x": x[0]}, "x cannot be copied"),
        ({"out": out[:3]}, r"out does not fit x.*\(3, 8\).*\(4, 8\)"),
        ({"out": out.half()}, "out does not fit x.*float16.*float32"),
        ({"out": out.double()}, "out does not fit x.*float64.*float32"),
        ({"x": x[:, ::2], "out": out[:, :4]}, "x has gaps"),
        ({"x": x[:, :4], "out": out[:, ::2]}, "out has gaps"),
    ):
        with use_backend(backend), pytest.raises(UserError, match=message):
            copy_rows(**({"x": x, "out": out} | changes))
    assert not out.any()


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_compile_cases_name_every_argument():
    for case in module.compile_cases():
        assert sorted([*case.signature, *case.constexprs]) == sorted(case.kernel.arg_names)
        assert case.constexprs["ROWS"] * case.constexprs["COLUMNS"] == 4096
