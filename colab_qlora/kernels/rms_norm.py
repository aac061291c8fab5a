"""RMSNorm over the last dimension, of a tensor or of the sum of a tensor and a residual stream.

    h = x (+ residual, rounded to x's dtype)        rstd = 1 / sqrt(mean(h^2) + eps)
    y = h * rstd * weight
    dx = rstd * (g - n * mean(g * n)) + residual_grad     with g = weight * dy, n = h * rstd
    dweight = sum over rows of dy * n

All of it is float32 inside and rounded once, where transformers rounds h * rstd as well.

Bytes moved a row of W half values: forward 4 W + 4 (x in, y and rstd out), with a residual 8 W + 4
(x and residual in, h and y out); backward 6 W + 4 (dy, h and rstd in, dx out), with residual_grad
8 W + 4. At W = 4096 that is 16, 32, 24 and 32 KiB. The weight, read once a program, stays in
the cache. dweight adds no pass over the rows, but 8 W bytes a program: partial sums out and in.
"""

from __future__ import annotations

import itertools

import torch
from torch.autograd.function import once_differentiable

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import runs_triton, tl, triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# a program keeps its rows in registers; wider ones would not fit and run the reference
MAX_KERNEL_WIDTH = 16384

# short rows share a program until it has as much to do as one of 4096, a usual hidden size
TILE_ELEMENTS = 4096
SHORT_WIDTH = 1024

# dweight's partial sums: two programs for each multiprocessor of an H100, and at 4096 tokens still
# 1/8 of the bytes of one half tensor
WEIGHT_GRAD_PROGRAMS = 256


@triton.jit
def _row_offsets(index, heads, row_stride, head_stride):
    row = index // heads
    head = index - row * heads
    return row.to(tl.int64) * row_stride + head.to(tl.int64) * head_stride


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x, residual, weight, out, rstd, h,
    rows, heads, eps,
    x_row, x_head, residual_row, residual_head, out_row, out_head,
    HAS_RESIDUAL: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
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
        tl.store(h + index.to(tl.int64)[:, None] * WIDTH + column, rounded, mask=mask)
        value = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / WIDTH + eps)  # [ROWS]
    tl.store(rstd + index, scale, mask=index < rows)
    gain = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    y = value * scale[:, None] * gain
    offset = _row_offsets(index, heads, out_row, out_head)[:, None] + column
    tl.store(out + offset, y.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy, h, weight, rstd, residual_grad, out, partial,
    rows, heads, tiles,
    dy_row, dy_head, h_row, h_head, residual_row, residual_head, out_row, out_head,
    HAS_RESIDUAL_GRAD: tl.constexpr, NEEDS_WEIGHT_GRAD: tl.constexpr,
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
        normed = tl.load(h + offset, mask=mask, other=0.0).to(tl.float32) * scale
        offset = _row_offsets(index, heads, dy_row, dy_head)[:, None] + column
        grad = tl.load(dy + offset, mask=mask, other=0.0).to(tl.float32)
        if NEEDS_WEIGHT_GRAD:
            gain_grad += grad * normed
        grad *= tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
        shared = tl.sum(grad * normed, axis=1)[:, None] / WIDTH  # [ROWS, 1]
        dx = scale * (grad - normed * shared)
        if HAS_RESIDUAL_GRAD:
            offset = _row_offsets(index, heads, residual_row, residual_head)[:, None] + column
            dx += tl.load(residual_grad + offset, mask=mask, other=0.0).to(tl.float32)
        offset = _row_offsets(index, heads, out_row, out_head)[:, None] + column
        tl.store(out + offset, dx.to(out.dtype.element_ty), mask=mask)
    if NEEDS_WEIGHT_GRAD:
        total = tl.sum(gain_grad, axis=0)[None, :]  # [1, BLOCK]
        tl.store(partial + program.to(tl.int64) * WIDTH + column, total, mask=column < WIDTH)


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise every row of `x`, or of `x + residual`; `rms_norm` is the one with gradients.

    Args:
        x: float16, bfloat16, float32 or float64, shape (rows, width) or (rows, heads, width), where
            each head is normalised by itself; last stride 1, the others free.
        weight: any of these dtypes, shape (width,).
        eps: added to the mean square.
        residual: as x, with strides of its own.
        out: where y goes: as x, with strides of its own, overlapping no input.

    Returns:
        y, in x's dtype: `out` if given; rstd, float32 (float64 of float64), contiguous, shape
        x.shape[:-1]; and h, what was normalised: x itself, or with a residual a new contiguous
        tensor.

    Raises:
        UserError: a tensor's shape, dtype, device or strides do not fit.
    """
    _check_rows("x", x, weight)
    _check_like("x", x, residual=residual, out=out)
    if not _launches(x):
        return rms_norm_forward_reference(x, weight, eps, residual=residual, out=out)
    y = _new_like(x) if out is None else out
    h = x if residual is None else _new_like(x)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    tile_rows, block, warps = _tile(x.shape[-1])
    second = x if residual is None else residual
    _forward_kernel[(triton.cdiv(rstd.numel(), tile_rows),)](
        *(x, second, weight.contiguous(), y, rstd, h),
        *(rstd.numel(), _heads(x), float(eps)),
        *(*_strides(x), *_strides(second), *_strides(y)),
        *(residual is not None, x.shape[-1], tile_rows, block),
        num_warps=warps,
        num_stages=1,
    )
    return y, rstd, h


def rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    *,
    residual_grad: torch.Tensor | None = None,
    needs_weight_grad: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients for h, which are those for x and for the residual alike, and for the weight.

    Args:
        dy: gradient for y, as h, with strides of its own.
        h: from the forward pass; last stride 1, the others free.
        weight: as in the forward pass.
        rstd: from the forward pass.
        residual_grad: as h, with strides of its own: the gradient that reaches h past the norm,
            over the residual stream. It is added before the one rounding.
        needs_weight_grad: compute dweight too.
        out: where dx goes: as h, with strides of its own. It may be `residual_grad` or `dy` itself,
            which is then overwritten; otherwise it overlaps no input.

    Returns:
        dx, in h's dtype: `out` if given; and dweight, summed in float32 and returned in weight's
        dtype, or None.

    Raises:
        UserError: a tensor's shape, dtype, device or strides do not fit.
    """
    _check_rows("h", h, weight)
    _check_like("h", h, dy=dy, residual_grad=residual_grad, out=out)
    _check_rstd(rstd, h)
    backward = _launch_backward if _launches(h) else rms_norm_backward_reference
    return backward(
        *(dy, h, weight, rstd),
        residual_grad=residual_grad,
        needs_weight_grad=needs_weight_grad,
        out=out,
    )


def _launch_backward(dy, h, weight, rstd, *, residual_grad, needs_weight_grad, out):
    dx = _new_like(h) if out is None else out
    second = h if residual_grad is None else residual_grad
    tile_rows, block, warps = _tile(h.shape[-1])
    tiles = triton.cdiv(rstd.numel(), tile_rows)
    programs, partial = tiles, rstd
    if needs_weight_grad:
        programs = min(tiles, WEIGHT_GRAD_PROGRAMS)
        partial = torch.empty(programs, h.shape[-1], dtype=torch.float32, device=h.device)
    _backward_kernel[(programs,)](
        *(dy, h, weight.contiguous(), rstd, second, dx, partial),
        *(rstd.numel(), _heads(h), tiles),
        *(*_strides(dy), *_strides(h), *_strides(second), *_strides(dx)),
        *(residual_grad is not None, needs_weight_grad, h.shape[-1], tile_rows, block),
        num_warps=warps,
        num_stages=1,
    )
    return dx, partial.sum(0).to(weight.dtype) if needs_weight_grad else None


def _launches(x: torch.Tensor) -> bool:
    # the kernels compute in float32
    return runs_triton(x) and x.dtype != torch.float64 and x.shape[-1] <= MAX_KERNEL_WIDTH


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and columns of a program's tile, and its warps: 16 elements a thread.

    That is two 16-byte loads of halves from each tensor at once, and with dweight's sums it still
    fits into the 64 registers that a program of 32 warps leaves a thread.
    """
    block = triton.next_power_of_2(width)
    tile_rows = max(1, TILE_ELEMENTS // block) if width <= SHORT_WIDTH else 1
    return tile_rows, block, tile_rows * block // (16 * 32)


def _heads(x: torch.Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else 1


def _strides(x: torch.Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


def _new_like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _inner_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _has_dense_rows(x: torch.Tensor) -> bool:
    return x.stride(-1) == 1 or x.shape[-1] <= 1


def _check_rows(name: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    if not (x.dim() in (2, 3) and x.shape[-1] > 0 and x.dtype in _DTYPES and _has_dense_rows(x)):
        shapes = "shape (rows, width) or (rows, heads, width), last stride 1"
        raise _misfit(f"{name} has no rows to normalise", x, f"a float dtype, {shapes}")
    if weight.shape != x.shape[-1:] or weight.dtype not in _DTYPES or weight.device != x.device:
        allowed = f"a float dtype, shape {tuple(x.shape[-1:])} on {x.device}"
        raise _misfit(f"weight does not fit {name}", weight, allowed)


def _check_like(like: str, x: torch.Tensor, **others: torch.Tensor | None) -> None:
    for name, other in others.items():
        if other is None:
            continue
        same = (other.shape, other.dtype, other.device) == (x.shape, x.dtype, x.device)
        if not (same and _has_dense_rows(other)):
            allowed = f"{x.dtype}, shape {tuple(x.shape)}, last stride 1 on {x.device}"
            raise _misfit(f"{name} does not fit {like}", other, allowed)


def _check_rstd(rstd: torch.Tensor, h: torch.Tensor) -> None:
    expected = (h.shape[:-1], _inner_dtype(h), h.device)
    if (rstd.shape, rstd.dtype, rstd.device) != expected or not rstd.is_contiguous():
        allowed = f"contiguous {_inner_dtype(h)}, shape {tuple(h.shape[:-1])} on {h.device}"
        raise _misfit("rstd does not fit h", rstd, allowed)


def _misfit(problem: str, x: torch.Tensor, allowed: str) -> UserError:
    got = f"{x.dtype}, shape {tuple(x.shape)}, strides {x.stride()} on {x.device}"
    return UserError(problem, got=got, allowed=allowed)


@torch.no_grad()
def rms_norm_forward_reference(x, weight, eps, *, residual=None, out=None):
    """`rms_norm_forward` in torch."""
    y = _new_like(x) if out is None else out
    h = x if residual is None else torch.add(x, residual).contiguous()
    wide = h.to(_inner_dtype(h))
    scratch = wide.square()
    rstd = scratch.mean(-1).add_(eps).rsqrt_().contiguous()
    torch.mul(wide, rstd[..., None], out=scratch)
    torch.mul(scratch, weight.to(wide.dtype), out=y)
    return y, rstd, h


@torch.no_grad()
def rms_norm_backward_reference(
    dy, h, weight, rstd, *, residual_grad=None, needs_weight_grad=False, out=None
):
    """`rms_norm_backward` in torch."""
    dx = _new_like(h) if out is None else out
    dtype, scale = _inner_dtype(h), rstd[..., None]
    normed = h.to(dtype) * scale
    grad = dy.to(dtype) * weight.to(dtype)
    shared = (grad * normed).mean(-1, keepdim=True)
    grad.addcmul_(normed, shared, value=-1)
    weight_grad = None
    if needs_weight_grad:
        weight_grad = normed.mul_(dy).flatten(0, -2).sum(0).to(weight.dtype)
    if residual_grad is None:
        torch.mul(grad, scale, out=dx)
    else:
        torch.addcmul(residual_grad.to(dtype), grad, scale, out=dx)
    return dx, weight_grad


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd, h = rms_norm_forward(_as_rows(x), weight, eps)
        ctx.save_for_backward(h, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, weight, rstd = ctx.saved_tensors
        needs_weight_grad = ctx.needs_input_grad[1]
        dx, weight_grad = rms_norm_backward(
            _as_rows(dy), h, weight, rstd, needs_weight_grad=needs_weight_grad
        )
        return dx.view(dy.shape), weight_grad, None


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` of any shape as (rows, width) or (rows, heads, width), copied only where it must be."""
    rows = x[None] if x.dim() == 1 else x.flatten(0, -3) if x.dim() > 3 else x
    return rows if _has_dense_rows(rows) else rows.contiguous()


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm over the last dimension, with gradients for `x` and `weight`, once differentiable.

    Args:
        x: float16, bfloat16, float32 or float64, shape (..., width).
        weight: any of these dtypes, shape (width,).
        eps: added to the mean square.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        UserError: a tensor's shape, dtype or device does not fit.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
        tensor([[0.8485, 1.1314]])
    """
    if x.dim() == 0:
        raise _misfit("x has no rows to normalise", x, "shape (..., width)")
    return _RMSNorm.apply(x, weight, eps)


def compile_cases() -> list[CompileCase]:
    """32 heads of 128, and hidden sizes of 4096 and 14336, with and without each extra."""
    cases = []
    for width, extra in itertools.product((128, 4096, 14336), (False, True)):
        name = f"{width}{' residual' if extra else ''}"
        cases.append(_case(_forward_kernel, f"rms_norm_forward {name}", width, HAS_RESIDUAL=extra))
        for needs in (False, True):
            flags = {"HAS_RESIDUAL_GRAD": extra, "NEEDS_WEIGHT_GRAD": needs}
            full_name = f"rms_norm_backward {name}{' dweight' if needs else ''}"
            cases.append(_case(_backward_kernel, full_name, width, **flags))
    return cases


def _case(kernel, name: str, width: int, **flags: bool) -> CompileCase:
    tile_rows, block, warps = _tile(width)
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
