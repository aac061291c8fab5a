"""The kernels of `swiglu.py`, whose formulas these are, and the activations in them.

A program computes one tile of values. Outputs may be inputs: whatever is read is read before the
first store.
"""

from __future__ import annotations

from colab_qlora.kernels.backend import tl, triton


@triton.jit
def share_and_slope(gate, ACTIVATION: tl.constexpr):
    """s(gate), between 0 and 1, and its derivative s'(gate)."""
    if ACTIVATION == "gelu":
        share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
        slope = tl.exp(-0.5 * gate * gate) * 0.3989422804014327
    else:
        z, z_slope = gate, 1.0
        if ACTIVATION == "gelu_tanh":
            # 2 sqrt(2 / pi), times 0.044715, times 3
            z = gate * (1.5957691216057308 + 0.07135481627159977 * gate * gate)
            z_slope = 1.5957691216057308 + 0.21406444881479932 * gate * gate
        # s and 1 - s by exp(-|z|): the difference from 1 would lose the digits of the smaller
        power = tl.exp(-tl.abs(z))
        larger = 1.0 / (1.0 + power)
        smaller = power * larger
        share = tl.where(z >= 0.0, larger, smaller)
        slope = larger * smaller * z_slope
    return share, slope


@triton.jit(do_not_specialize=["tokens"])
def forward_kernel(
    gate,
    up,
    out,
    tokens,
    width,
    gate_row,
    up_row,
    out_row,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (row < tokens) & (column < width)  # [ROWS, BLOCK]
    g = tl.load(gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=mask, other=0.0).to(tl.float32)
    # the output may be an input, and another thread may load what this one stores
    tl.debug_barrier()
    share, _ = share_and_slope(g, ACTIVATION)
    m = g * share * u
    tl.store(out + row * out_row + column, m.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    gate,
    up,
    dm,
    d_gate,
    d_up,
    m,
    tokens,
    width,
    gate_row,
    up_row,
    dm_row,
    d_gate_row,
    d_up_row,
    m_row,
    ACTIVATION: tl.constexpr,
    REBUILD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]  # [ROWS, 1]
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (row < tokens) & (column < width)  # [ROWS, BLOCK]
    d = tl.load(dm + row * dm_row + column, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + row * gate_row + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_row + column, mask=mask, other=0.0).to(tl.float32)
    # the outputs may be the inputs, and another thread may load what this one stores
    tl.debug_barrier()
    share, slope = share_and_slope(g, ACTIVATION)
    act = g * share
    grad = d * u * (share + g * slope)
    tl.store(d_gate + row * d_gate_row + column, grad.to(d_gate.dtype.element_ty), mask=mask)
    grad = d * act
    tl.store(d_up + row * d_up_row + column, grad.to(d_up.dtype.element_ty), mask=mask)
    if REBUILD:
        value = act * u
        tl.store(m + row * m_row + column, value.to(m.dtype.element_ty), mask=mask)
