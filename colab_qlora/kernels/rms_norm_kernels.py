"""The kernels of `rms_norm.py`, whose formulas these are, and the tile that a program works on.

A program of the forward pass normalises one tile of whole rows. One of the backward pass walks over
as many tiles as there are for each program, so that the sums for dweight are few.
"""

from __future__ import annotations

from typing import Any

from colab_qlora.kernels.backend import tl, triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase

# short rows share a program until it has as much to do as one of 4096, a usual hidden size
TILE_ELEMENTS = 4096
SHORT_WIDTH = 1024


def tile_of(width: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: 16 elements a thread.

    That is two 16-byte loads of halves from each tensor at once, and with dweight's sums it still
    fits into the 64 registers that a program of 32 warps leaves a thread.
    """
    block = triton.next_power_of_2(width)
    tile_rows = max(1, TILE_ELEMENTS // block) if width <= SHORT_WIDTH else 1
    return tile_rows, block, tile_rows * block // (16 * 32)


@triton.jit
def _row_offsets(index, heads, row_stride, head_stride):
    row = index // heads
    head = index - row * heads
    return row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x, residual, weight, out, rstd, h,
    rows, heads, eps,
    x_row, x_head, residual_row, residual_head, out_row, out_head, h_row, h_head,
    HAS_RESIDUAL: tl.constexpr, IS_ADDED_AFTER: tl.constexpr, ADDS_ONE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # [ROWS]
    column = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (index < rows)[:, None] & (column < WIDTH)  # [ROWS, BLOCK]
    offset = _row_offsets(index, heads, x_row, x_head)[:, None] + column
    value = tl.load(x + offset, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        offset = _row_offsets(index, heads, residual_row, residual_head)[:, None] + column
        value += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
        rounded = value.to(h.dtype.element_ty)
        # h may be x or the residual, and another thread may load what this one stores
        tl.debug_barrier()
        offset = _row_offsets(index, heads, h_row, h_head)[:, None] + column
        tl.store(h + offset, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)  # [ROWS]
    tl.store(rstd + index, scale, mask=index < rows)
    gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if ADDS_ONE:
        gain += 1.0
    y = value * scale[:, None] * gain
    if IS_ADDED_AFTER:
        offset = _row_offsets(index, heads, residual_row, residual_head)[:, None] + column
        y += tl.load(residual + offset, mask=mask, other=0.0).to(tl.float32)
    offset = _row_offsets(index, heads, out_row, out_head)[:, None] + column
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    dy, h, weight, rstd, residual_grad, out, partial, normed,
    rows, heads, tiles,
    dy_row, dy_head, h_row, h_head, residual_row, residual_head, out_row, out_head,
    normed_row, normed_head,
    HAS_RESIDUAL_GRAD: tl.constexpr, NEEDS_WEIGHT_GRAD: tl.constexpr, WRITES_NORMED: tl.constexpr,
    ADDS_ONE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    if NEEDS_WEIGHT_GRAD:
        gain_grad = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for tile in range(program, tiles, tl.num_programs(0)):
        index = tile * ROWS + tl.arange(0, ROWS)  # [ROWS]
        mask = (index < rows)[:, None] & (column < WIDTH)  # [ROWS, BLOCK]
        scale = tl.load(rstd + index, mask=index < rows, other=0.0)[:, None]  # [ROWS, 1]
        offset = _row_offsets(index, heads, h_row, h_head)[:, None] + column
        scaled = tl.load(h + offset, mask=mask, other=0.0).to(tl.float32) * scale
        offset = _row_offsets(index, heads, dy_row, dy_head)[:, None] + column
        grad = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
        if NEEDS_WEIGHT_GRAD:
            gain_grad += grad * scaled
        gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        if ADDS_ONE:
            gain += 1.0
        grad *= gain
        shared = tl.sum(grad * scaled, axis=1)[:, None] / WIDTH  # [ROWS, 1]
        dx = scale * (grad - scaled * shared)
        if HAS_RESIDUAL_GRAD:
            offset = _row_offsets(index, heads, residual_row, residual_head)[:, None] + column
            dx += tl.load(residual_grad + offset, mask=mask, other=0.0).to(tl.float32)
        offset = _row_offsets(index, heads, out_row, out_head)[:, None] + column
        tl.store(out + offset, dx.to(out.dtype.element_ty), mask=mask)
        if WRITES_NORMED:
            # the weight once more, from the cache: the registers to keep it are dweight's
            gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            if ADDS_ONE:
                gain += 1.0
            y = scaled * gain
            offset = _row_offsets(index, heads, normed_row, normed_head)[:, None] + column
            tl.store(normed + offset, y.to(normed.dtype.element_ty), mask=mask)
    if NEEDS_WEIGHT_GRAD:
        total = tl.sum(gain_grad, axis=0)[None, :]  # [1, BLOCK]
        tl.store(partial + program.to(tl.int64) * WIDTH + column, total, mask=column < WIDTH)


def compile_case(kernel: Any, name: str, width: int, **flags: bool) -> CompileCase:
    """Half values of a width, as they are launched with these flags."""
    tile_rows, block, warps = tile_of(width)
    constexprs = {**flags, "WIDTH": width, "ROWS": tile_rows, "BLOCK": block}
    if width != 128:
        constexprs["heads"] = 1  # an argument of 1 is compiled in
    types = {"rows": "i32", "heads": "i32", "tiles": "i32", "eps": "fp32"}
    types |= {"rstd": FLOAT, "partial": FLOAT}
    signature = {}
    for argument in kernel.arg_names:
        if argument not in constexprs:
            is_stride = argument.endswith(("_row", "_head"))
            signature[argument] = types.get(argument, "i32" if is_stride else HALF)
    divisible = tuple(
        argument for argument in signature if argument not in ("rows", "tiles", "eps")
    )
    return CompileCase(name, kernel, signature, constexprs, warps, 1, divisible)
