"""What the forward and the backward kernels of flash attention share: tiles, blocks and checks.

A program of theirs works on one block of rows of one head of one document. The grid is one number:
document slowest, then the block, then the head, so that programs that run at the same time read the
same keys. After the last document come as many programs as there are heads, for the padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import (
    compute_capability,
    has_tensor_core_dot,
    runs_triton,
    tl,
    triton,
)
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase

# exp(x) = exp2(x * LOG2E), and exp2 is one instruction
LOG2E = 1.4426950408889634

# tl.dot's shortest side, and the widest head that fits the registers
MIN_BLOCK_D = 16
MAX_HEAD_DIM = 256

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Blocks(NamedTuple):
    """How a kernel is launched: rows of q and rows of k that meet at once, warps, stages."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


# [kernel][head_dim padded to a power of 2]. Chosen from what the compiler reports, not by timing:
# the largest tiles that keep 8 warps on a multiprocessor without register spills. The 99 KB of
# shared memory of sm_86, sm_89 and sm_120 hold all of _SMALL, even compiled for sm_90.
_SMALL = {
    "forward": {64: Blocks(128, 32, 4, 3), 128: Blocks(128, 64, 8, 2), 256: Blocks(64, 32, 8, 2)},
    "key_value": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 8, 2), 256: Blocks(32, 32, 8, 2)},
    "query": {64: Blocks(64, 64, 4, 3), 128: Blocks(128, 32, 8, 2), 256: Blocks(64, 16, 8, 2)},
}
# 163 KB: a third stage, or two programs of 4 warps instead of one of 8; key_value at 128 may spill
# about 100 bytes a thread, hardly any of them in its main loop
_SM_80 = {
    "forward": {64: Blocks(128, 32, 4, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 64, 8, 2)},
    "key_value": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 64, 8, 2)},
    "query": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(64, 32, 8, 2)},
}
# 227 KB: a warp group has 64 rows of its own, the height of a wgmma. key_value at 256 spills up to
# 160 bytes a thread; with half the keys it would not, but would read q and do twice as often
_SM_90 = {
    "forward": {
        64: Blocks(128, 128, 8, 2),
        128: Blocks(128, 128, 8, 2),
        256: Blocks(128, 32, 8, 2),
    },
    "key_value": {64: Blocks(64, 128, 8, 2), 128: Blocks(32, 128, 8, 2), 256: Blocks(32, 64, 8, 2)},
    "query": {64: Blocks(128, 64, 8, 3), 128: Blocks(128, 64, 8, 2), 256: Blocks(64, 32, 8, 2)},
}
# float32 has no tensor cores here and is not trained in: small enough to compile quickly
_FLOAT32 = {64: Blocks(32, 32, 4, 1), 128: Blocks(16, 16, 4, 1), 256: Blocks(16, 16, 4, 1)}


def choose_blocks(
    kernel: str,
    head_dim: int,
    dtype: torch.dtype,
    capability: tuple[int, int],
    *,
    is_capped: bool = False,
) -> Blocks:
    """The launch of "forward", "key_value" or "query" for a head size on a GPU."""
    row = max(64, block_d(head_dim))
    if dtype == torch.float32:
        return _FLOAT32[row]
    if capability[0] in (9, 10):
        return _SM_90[kernel][row]
    # the slopes of bounded scores are one more tile in registers: with 4 warps, up to 420 bytes a
    # thread would be spilled at 128
    has_room = capability in ((8, 0), (8, 7)) and (kernel == "forward" or not is_capped)
    return (_SM_80 if has_room else _SMALL)[kernel][row]


def blocks_for(
    kernel: str, q: torch.Tensor, blocks: tuple[int, int] | None, *, is_capped: bool
) -> Blocks:
    """`choose_blocks` for the GPU of `q`, with (queries, keys) replaced by `blocks`, for tests."""
    index = q.device.index or 0
    capability = compute_capability(index) if q.is_cuda else (8, 6)
    chosen = choose_blocks(kernel, q.shape[-1], q.dtype, capability, is_capped=is_capped)
    return chosen if blocks is None else chosen._replace(queries=blocks[0], keys=blocks[1])


def block_d(head_dim: int) -> int:
    """Columns of a tile: head_dim padded to a power of 2."""
    return max(MIN_BLOCK_D, triton.next_power_of_2(head_dim))


def softmax_factors(scale: float, cap: float | None) -> tuple[float, float]:
    """What turns q k^T, bent if there is a cap, into scores in base 2; and what bends it."""
    return (scale * LOG2E, 1.0) if cap is None else (cap * LOG2E, scale / cap)


def launches(q: torch.Tensor) -> bool:
    """True if the kernels run for `q`, False if the reference does."""
    fits = q.dtype != torch.float64 and q.shape[-1] <= MAX_HEAD_DIM
    return fits and runs_triton(q) and has_tensor_core_dot(q)


@triton.jit
def locate(cu_ptr, blocks, HEADS: tl.constexpr):
    """This program's document, block, head (int64), and the document's first token."""
    program = tl.program_id(0)
    document = program // (blocks * HEADS)
    rest = program - document * (blocks * HEADS)
    return document, rest // HEADS, (rest % HEADS).to(tl.int64), tl.load(cu_ptr + document)


@triton.jit
def key_range(first, length, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """For a block of queries: the end of the keys that all of them see, and of those that any does.

    Only between the two, on the diagonal or at the document's end, does a causal block mask. One
    that is not causal masks throughout: with a second loop of one pass at most, sm_90's wgmma would
    be serialised.
    """
    all_end = first // BLOCK_N * BLOCK_N if CAUSAL else 0
    return all_end, tl.minimum(first + BLOCK_M, length) if CAUSAL else length


@triton.jit
def is_seen(
    start, first, length, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Of the queries first.. and the keys start.., who sees whom: [BLOCK_M or 1, BLOCK_N]."""
    keys = (start + tl.arange(0, BLOCK_N))[None, :]
    return keys <= (first + tl.arange(0, BLOCK_M))[:, None] if CAUSAL else keys < length


@triton.jit
def bent(scores, bend):
    """t = tanh(bend * scores), 6e-8 from exact, and its slope 1 - t^2.

    cap * LOG2E times t are bounded scores in base 2. The slope comes from the exponential: where t
    is nearly 1, 1 - t^2 would be left with few of its digits.
    """
    # -2 log2(e): exp(-2 |x|) by exp2
    shrunk = tl.exp2(tl.abs(scores) * (bend * -2.8853900817779268))
    share = 1.0 / (1.0 + shrunk)
    size = (1.0 - shrunk) * share
    return tl.where(scores < 0.0, -size, size), 4.0 * shrunk * share * share


@triton.jit
def to_base_2(x):
    """A natural logarithm as one to base 2."""
    return x * 1.4426950408889634


@triton.jit
def to_natural(x):
    """A logarithm to base 2 as a natural one."""
    return x * 0.6931471805599453


@triton.jit
def load_rows(
    base, stride, first, length,
    MASKED: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows first.. of a head of a document as [ROWS, BLOCK_D], zero beyond HEAD_DIM columns and,
    if MASKED, beyond `length` rows; without MASKED all rows have to exist."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    start = base + tl.cast(first, tl.int64) * stride
    pointers = start + (rows[:, None] * stride + columns[None, :])
    inside = (first + rows < length)[:, None]
    if HEAD_DIM < BLOCK_D:
        in_head = (columns < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=inside & in_head if MASKED else in_head, other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=inside, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def load_column(base, rows, length, MASKED: tl.constexpr):
    """A float32 a row, as [ROWS]; zero beyond `length` if MASKED."""
    return tl.load(base + rows, mask=rows < length, other=0.0) if MASKED else tl.load(base + rows)


@triton.jit
def store_rows(
    tile, base, stride, first, length,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write what of `tile` [ROWS, BLOCK_D] lies in the document and in the head."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    start = base + tl.cast(first, tl.int64) * stride
    pointers = start + (rows[:, None] * stride + columns[None, :])
    inside = (first + rows < length)[:, None]
    if HEAD_DIM < BLOCK_D:
        inside = inside & (columns < HEAD_DIM)[None, :]
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def zero_rows(
    base, stride, first, length,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write zeros to the rows first..length of a head: the padding after the last document."""
    zeros = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for start in range(first, length, ROWS):
        store_rows(zeros, base, stride, start, length, ROWS, HEAD_DIM, BLOCK_D)


def check_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    cu_seqlens: torch.Tensor,
    like_q: Mapping[str, torch.Tensor | None],
    like_k: Mapping[str, torch.Tensor | None],
    cap: float | None = None,
) -> None:
    """Raise UserError unless q, k, v and the further tensors, by name, fit each other."""
    if q.dim() != 3 or q.dtype not in _DTYPES or not q.shape[1] or not q.shape[2]:
        raise _misfit("q", q, "(tokens, q_heads, head_dim), a float dtype")
    tokens, heads, width = q.shape
    if k.dim() != 3 or not k.shape[1] or heads % k.shape[1]:
        raise _misfit("k", k, f"({tokens}, kv_heads, {width}), kv_heads a divisor of {heads}")
    shapes = dict.fromkeys(("q", *like_q), (tokens, heads, width))
    shapes |= dict.fromkeys(("k", "v", *like_k), (tokens, k.shape[1], width))
    tensors = {"q": q, "k": k, "v": v, **like_q, **like_k}
    for name, x in tensors.items():
        if x is not None:
            _check_tensor(name, x, q, shapes[name])
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or not cu_seqlens.numel():
        raise _misfit("cu_seqlens", cu_seqlens, "(documents + 1,), torch.int32")
    if cu_seqlens.device != q.device:
        raise _misfit("cu_seqlens", cu_seqlens, f"on {q.device}")
    if not scale > 0:
        raise UserError("scale is not positive", got=scale, allowed="such as head_dim ** -0.5")
    if cap is not None and not 0 < cap < math.inf:
        raise UserError("cap is not a positive, finite number", got=cap, allowed="None, or above 0")


def _check_tensor(name: str, x: torch.Tensor, q: torch.Tensor, shape: tuple[int, ...]) -> None:
    if x.shape != shape or (x.dtype, x.device) != (q.dtype, q.device):
        raise _misfit(name, x, f"{shape}, {q.dtype} on {q.device}")
    # autograd may hand over any strides in do, which is the one that is copied if need be
    if name != "do" and x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel():
        raise _misfit(name, x, "last stride 1")


def _misfit(name: str, x: torch.Tensor, allowed: str) -> UserError:
    got = f"{tuple(x.shape)}, {x.dtype}, strides {x.stride()} on {x.device}"
    return UserError(f"{name} does not fit this attention", got=got, allowed=allowed)


def compile_case(kernel: Any, name: str, blocks: Blocks, constexprs: dict[str, Any]) -> CompileCase:
    """A kernel of these modules as a model of 32 and 8 heads launches it."""
    types = {"cu_ptr": "*i32", "lse_ptr": FLOAT, "delta_ptr": FLOAT}
    signature = {}
    for argument in kernel.arg_names:
        if argument not in constexprs:
            kind = HALF if argument.endswith("_ptr") else "i32"
            kind = "fp32" if argument.startswith(("scale", "bend")) else kind
            signature[argument] = types.get(argument, kind)
    divisible = tuple(name for name in signature if name.endswith(("_ptr", "_token", "_head")))
    warps, stages = blocks.num_warps, blocks.num_stages
    return CompileCase(name, kernel, signature, constexprs, warps, stages, divisible, uses_dot=True)
