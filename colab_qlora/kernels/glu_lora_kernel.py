"""The kernel of `glu_lora.py`, whose formulas these are: tile after tile, with its three products.

A rank of 0 leaves its product out when the kernel is compiled; the others are padded to what
`tl.dot` takes.
"""

from __future__ import annotations

from colab_qlora.kernels.backend import tl, triton
from colab_qlora.kernels.swiglu_kernels import share_and_slope


@triton.jit
def _load_factor(
    factor, token, end, row_stride, rank, RANK: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    value = tl.zeros([TOKENS, 1], tl.float32)
    if RANK:
        r = tl.arange(0, RANK)[None, :]
        mask = (token < end) & (r < rank)  # [TOKENS, RANK]
        value = tl.load(factor + token.to(tl.int64) * row_stride + r, mask=mask, other=0.0)
    return value


@triton.jit
def _zeros(RANK: tl.constexpr, COLUMNS: tl.constexpr):
    return tl.zeros([RANK if RANK else 1, COLUMNS], tl.float32)


@triton.jit
def _add_product(total, factor, values, RANK: tl.constexpr):
    if RANK:
        total = tl.dot(tl.trans(factor), values, total, input_precision="ieee")
    return total


@triton.jit
def _store_sum(sums, total, column, width, rank, r_stride, column_stride, RANK: tl.constexpr):
    if RANK:
        r = tl.arange(0, RANK)[:, None]
        mask = (r < rank) & (column < width)  # [RANK, COLUMNS]
        tl.store(sums + r * r_stride + column * column_stride, total, mask=mask)


@triton.jit(do_not_specialize=["tokens", "share"])
def backward_kernel(
    gate, up, dm, d_gate, d_up, ds, xg, xu, sums,
    tokens, width, share, gate_row, up_row, dm_row, d_gate_row, d_up_row, ds_row, xg_row, xu_row,
    d_rank, g_rank, u_rank,
    ACTIVATION: tl.constexpr, D_RANK: tl.constexpr, G_RANK: tl.constexpr, U_RANK: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """A padded rank of 0 leaves its product out."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]  # [1, COLUMNS]
    first = tl.program_id(1) * share
    end = tl.minimum(first + share, tokens)
    d_a, d_bg, d_bu = _zeros(D_RANK, COLUMNS), _zeros(G_RANK, COLUMNS), _zeros(U_RANK, COLUMNS)
    for start in range(first, end, TOKENS):
        token = start + tl.arange(0, TOKENS)[:, None]  # [TOKENS, 1]
        row = token.to(tl.int64)
        mask = (token < end) & (column < width)  # [TOKENS, COLUMNS]
        d = tl.load(dm + row * dm_row + column, mask=mask, other=0.0).to(tl.float32)
        g = tl.load(gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_row + column, mask=mask, other=0.0).to(tl.float32)
        d_factor = _load_factor(ds, token, end, ds_row, d_rank, D_RANK, TOKENS)
        g_factor = _load_factor(xg, token, end, xg_row, g_rank, G_RANK, TOKENS)
        u_factor = _load_factor(xu, token, end, xu_row, u_rank, U_RANK, TOKENS)
        # it changes no value, but if all of them came from loads alone, Triton would compute
        # everything twice, once in the layout of the products and once in that of the stores
        g = tl.where(mask, g, 0.0)
        s, slope = share_and_slope(g, ACTIVATION)
        act = g * s
        grad_gate = (d * u * (s + g * slope)).to(d_gate.dtype.element_ty)
        grad_up = (d * act).to(d_up.dtype.element_ty)
        d_bg = _add_product(d_bg, g_factor, grad_gate, G_RANK)
        d_bu = _add_product(d_bu, u_factor, grad_up, U_RANK)
        d_a = _add_product(d_a, d_factor, (act * u).to(gate.dtype.element_ty), D_RANK)
        # the outputs may be the inputs, and another thread may load what this one stores: the way
        # of a product's values through shared memory was a barrier between the two
        tl.store(d_gate + row * d_gate_row + column, grad_gate, mask=mask)
        tl.store(d_up + row * d_up_row + column, grad_up, mask=mask)
    sums += tl.program_id(1).to(tl.int64) * width * (d_rank + g_rank + u_rank)
    _store_sum(sums, d_a, column, width, d_rank, width, 1, D_RANK)
    sums += d_rank * width
    _store_sum(sums, d_bg, column, width, g_rank, 1, g_rank, G_RANK)
    sums += g_rank * width
    _store_sum(sums, d_bu, column, width, u_rank, 1, u_rank, U_RANK)
