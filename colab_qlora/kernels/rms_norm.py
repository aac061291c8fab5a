"""RMSNorm over the last dimension, of a tensor or of the sum of a tensor and a residual stream.

    h = x (+ residual, rounded to x's dtype)        rstd = 1 / sqrt(mean(h^2) + eps)
    y = h * rstd * weight (+ added)
    dx = rstd * (g - n * mean(g * n)) + residual_grad     with g = weight * dy, n = h * rstd
    dweight = sum over rows of dy * n

Gemma's norms have 1 + weight for weight, and those behind its attention and its MLP are `added` to
the residual stream. All of it is float32 inside and rounded once, where transformers rounds h *
rstd as well (of Gemma's, what is added).

Bytes moved a row of W half values: forward 4 W + 4 (x in, y and rstd out), with a residual 8 W + 4
(x and residual in, h and y out), with something added 6 W + 4; backward 6 W + 4 (dy, h and rstd in,
dx out), with residual_grad 8 W + 4. At W = 4096 that is 16, 32, 24, 24 and 32 KiB. The weight, read
once a program, stays in the cache. dweight adds no pass over the rows, but 8 W bytes a program:
partial sums out and in. The backward pass can write y anew, since the LoRA gradient of the
projection behind it needs y: 2 W more, where a pass of its own would move 4 W.
"""

from __future__ import annotations

import itertools

import torch
from torch.autograd.function import once_differentiable

from colab_qlora.kernels.backend import runs_triton, triton
from colab_qlora.kernels.compile_case import CompileCase
from colab_qlora.kernels.launch import ReadyLaunches, layout
from colab_qlora.kernels.misfit import misfit
from colab_qlora.kernels.rms_norm_kernels import (
    backward_kernel,
    compile_case,
    forward_kernel,
    tile_of,
)
from colab_qlora.kernels.rms_norm_reference import (
    check_backward,
    check_forward,
    has_dense_rows,
    new_like,
    rms_norm_backward_reference,
    rms_norm_forward_reference,
)

# a program keeps its rows in registers; wider ones would not fit and run the reference
MAX_KERNEL_WIDTH = 16384

# dweight's partial sums: two programs for each multiprocessor of an H100, and at 4096 tokens still
# 1/8 of the bytes of one half tensor
WEIGHT_GRAD_PROGRAMS = 256

_forward_launches = ReadyLaunches()
_backward_launches = ReadyLaunches()


def rms_norm_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    residual: torch.Tensor | None = None,
    added: torch.Tensor | None = None,
    adds_one: bool = False,
    out: torch.Tensor | None = None,
    h_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalise every row of `x`, or of `x + residual`; `rms_norm` is the one with gradients.

    Args:
        x: float16, bfloat16, float32 or float64, shape (rows, width) or (rows, heads, width), where
            each head is normalised by itself; last stride 1, the others free.
        weight: any of these dtypes, shape (width,).
        eps: added to the mean square.
        residual: as x, with strides of its own.
        added: as x, with strides of its own: added to y before the one rounding. Not together with
            a residual, which is added before the norm.
        adds_one: 1 + weight takes the place of weight.
        out: where y goes: as x, with strides of its own, overlapping no input.
        h_out: where x + residual goes: as x, with strides of its own. It may be `x` or `residual`
            itself, the very same view, which is then overwritten; otherwise it overlaps nothing.

    Returns:
        y, in x's dtype: `out` if given; rstd, float32 (float64 of float64), contiguous, shape
        x.shape[:-1]; and h, what was normalised: x itself, or with a residual `h_out` or a new
        contiguous tensor.

    Raises:
        UserError: a tensor's shape, dtype, device or strides do not fit; `h_out` is given although
            there is no residual, or `added` although there is one.
    """
    key = ready = None
    if runs_triton(x):
        weight, eps = weight.contiguous(), float(eps)
        given = (x, weight, residual, out, h_out, added)
        key = (eps, adds_one, *map(layout, given))
        ready = _forward_launches.get(key)
    if ready is None:
        check_forward(x, weight, residual, added, out, h_out)
        if key is None or x.shape[-1] > MAX_KERNEL_WIDTH:
            options = {"added": added, "adds_one": adds_one, "out": out, "h_out": h_out}
            return rms_norm_forward_reference(x, weight, eps, residual=residual, **options)
    y = new_like(x) if out is None else out
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    second, h = x if added is None else added, x
    if residual is not None:
        second, h = residual, new_like(x) if h_out is None else h_out
    tensors = (x, second, weight, y, rstd, h)
    if ready is None:
        _start_forward(key, tensors, eps, (residual is not None, added is not None, adds_one))
    else:
        ready(*map(torch.Tensor.data_ptr, tensors))
    return y, rstd, h


def _start_forward(key, tensors, eps, flags):
    x, second, _, y, rstd, h = tensors
    tile_rows, block, warps = tile_of(x.shape[-1])
    numbers = (rstd.numel(), _heads(x), eps)
    strides = (*_strides(x), *_strides(second), *_strides(y), *_strides(h))
    constexprs = (*flags, x.shape[-1], tile_rows, block)
    _forward_launches.start(
        *(key, forward_kernel, (triton.cdiv(rstd.numel(), tile_rows),)),
        tensors,
        numbers + strides + constexprs,
        num_warps=warps,
        num_stages=1,
    )


def rms_norm_backward(
    dy: torch.Tensor,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    *,
    residual_grad: torch.Tensor | None = None,
    needs_weight_grad: bool = False,
    adds_one: bool = False,
    out: torch.Tensor | None = None,
    normed: torch.Tensor | None = None,
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
        adds_one: as in the forward pass.
        out: where dx goes: as h, with strides of its own. It may be `residual_grad` or `dy` itself,
            which is then overwritten; otherwise it overlaps no input.
        normed: written to if given: as h, with strides of its own, overlapping nothing. It gets y
            once more, with the bits of the forward pass (and nothing added).

    Returns:
        dx, in h's dtype: `out` if given; and dweight, summed in float32 and returned in weight's
        dtype, or None.

    Raises:
        UserError: a tensor's shape, dtype, device or strides do not fit.
    """
    key = ready = None
    if runs_triton(h):
        weight = weight.contiguous()
        given = (dy, h, weight, rstd, residual_grad, out, normed)
        key = (needs_weight_grad, adds_one, *map(layout, given))
        ready = _backward_launches.get(key)
    if ready is None:
        check_backward(dy, h, weight, rstd, residual_grad, out, normed)
        if key is None or h.shape[-1] > MAX_KERNEL_WIDTH:
            return rms_norm_backward_reference(
                *(dy, h, weight, rstd),
                residual_grad=residual_grad,
                needs_weight_grad=needs_weight_grad,
                adds_one=adds_one,
                out=out,
                normed=normed,
            )
    dx = new_like(h) if out is None else out
    partial = rstd
    if needs_weight_grad:
        programs = _weight_grad_programs(h) if ready is None else ready.grid[0]
        partial = torch.empty(programs, h.shape[-1], dtype=torch.float32, device=h.device)
    second = h if residual_grad is None else residual_grad
    tensors = (dy, h, weight, rstd, second, dx, partial, h if normed is None else normed)
    if ready is None:
        flags = (residual_grad is not None, needs_weight_grad, normed is not None, adds_one)
        _start_backward(key, tensors, flags)
    else:
        ready(*map(torch.Tensor.data_ptr, tensors))
    return dx, partial.sum(0).to(weight.dtype) if needs_weight_grad else None


def _start_backward(key, tensors, flags):
    dy, h, _, rstd, second, dx, partial, normed = tensors
    tile_rows, block, warps = tile_of(h.shape[-1])
    tiles = triton.cdiv(rstd.numel(), tile_rows)
    numbers = (rstd.numel(), _heads(h), tiles)
    strides = itertools.chain.from_iterable(map(_strides, (dy, h, second, dx, normed)))
    _backward_launches.start(
        *(key, backward_kernel, (tiles if partial is rstd else len(partial),)),
        tensors,
        (*numbers, *strides, *flags, h.shape[-1], tile_rows, block),
        num_warps=warps,
        num_stages=1,
    )


def _weight_grad_programs(h: torch.Tensor) -> int:
    tiles = triton.cdiv(h.shape[:-1].numel(), tile_of(h.shape[-1])[0])
    return min(tiles, WEIGHT_GRAD_PROGRAMS)


def _heads(x: torch.Tensor) -> int:
    return x.shape[1] if x.dim() == 3 else 1


def _strides(x: torch.Tensor) -> tuple[int, int]:
    return x.stride(0), x.stride(1) if x.dim() == 3 else 0


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, adds_one):
        y, rstd, h = rms_norm_forward(_as_rows(x), weight, eps, adds_one=adds_one)
        ctx.save_for_backward(h, weight, rstd)
        ctx.adds_one = adds_one
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        h, weight, rstd = ctx.saved_tensors
        options = {"needs_weight_grad": ctx.needs_input_grad[1], "adds_one": ctx.adds_one}
        dx, weight_grad = rms_norm_backward(_as_rows(dy), h, weight, rstd, **options)
        return dx.view(dy.shape), weight_grad, None, None


def _as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` of any shape as (rows, width) or (rows, heads, width), copied only where it must be."""
    rows = x[None] if x.dim() == 1 else x.flatten(0, -3) if x.dim() > 3 else x
    return rows if has_dense_rows(rows) else rows.contiguous()


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, adds_one: bool = False
) -> torch.Tensor:
    """RMSNorm over the last dimension, with gradients for `x` and `weight`, once differentiable.

    Args:
        x: float16, bfloat16, float32 or float64, shape (..., width).
        weight: any of these dtypes, shape (width,).
        eps: added to the mean square.
        adds_one: 1 + weight takes the place of weight.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        UserError: a tensor's shape, dtype or device does not fit.

    Example:
        >>> rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)
        tensor([[0.8485, 1.1314]])
    """
    if x.dim() == 0:
        raise misfit("x has no rows to normalise", x, "shape (..., width)")
    return _RMSNorm.apply(x, weight, eps, adds_one)


def compile_cases() -> list[CompileCase]:
    """32 heads of 128, and hidden sizes of 4096 and 14336, with and without each extra."""
    cases = []
    for width, extra in itertools.product((128, 4096, 14336), (False, True)):
        name = f"{width}{' residual' if extra else ''}"
        flags = {"HAS_RESIDUAL": extra, "IS_ADDED_AFTER": False, "ADDS_ONE": False}
        cases.append(compile_case(forward_kernel, f"rms_norm_forward {name}", width, **flags))
        for needs, writes in itertools.product((False, True), repeat=2):
            flags = {"HAS_RESIDUAL_GRAD": extra, "NEEDS_WEIGHT_GRAD": needs, "ADDS_ONE": False}
            outputs = f"{' dweight' if needs else ''}{' normed' if writes else ''}"
            full_name = f"rms_norm_backward {name}{outputs}"
            cases.append(
                compile_case(backward_kernel, full_name, width, **flags, WRITES_NORMED=writes)
            )
    return cases + _gemma_cases()


def _gemma_cases() -> list[CompileCase]:
    """1 + weight at the width of Gemma 3 4B, with and without each extra that its layers use."""
    name, cases = "2560 one more", []
    for extra in (False, True):
        flags = {"HAS_RESIDUAL": False, "IS_ADDED_AFTER": extra}
        full_name = f"rms_norm_forward {name}{' added' if extra else ''}"
        cases.append(compile_case(forward_kernel, full_name, 2560, **flags, ADDS_ONE=True))
        flags = dict.fromkeys(("HAS_RESIDUAL_GRAD", "NEEDS_WEIGHT_GRAD", "WRITES_NORMED"), extra)
        full_name = f"rms_norm_backward {name}{' residual dweight normed' if extra else ''}"
        cases.append(compile_case(backward_kernel, full_name, 2560, **flags, ADDS_ONE=True))
    return cases
