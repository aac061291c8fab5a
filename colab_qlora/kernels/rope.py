"""Rotary position embedding of queries and keys, in place and in one launch.

Each head is two halves, x1 and x2, and pair i of them turns by the angle of its token:

    y1 = x1 * cos - x2 * sin        y2 = x2 * cos + x1 * sin

The backward pass is the rotation by the negative angle. The arithmetic is float32 and rounded once,
where transformers rounds the tables and each product to the model's dtype.

Bytes moved a token, each way: every half value of q and k in and out, 4 * head_dim * (q_heads +
kv_heads), and half a row of both float32 tables, 4 * head_dim, which the token's other programs
find in the cache. With 32 and 8 heads of 128 that is 20,480 + 512.
"""

from __future__ import annotations

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import runs_triton, tl, triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase
from colab_qlora.kernels.launch import ReadyLaunches, layout
from colab_qlora.kernels.misfit import check_rotation_table, misfit

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# pairs in a program's tile: 16 heads of 128, so that a row of the tables serves 16 heads
TILE_PAIRS = 1024

# 8 pairs a thread are a 16-byte load of halves from each half of a head
PAIRS_PER_WARP = 8 * 32

_launches = ReadyLaunches()


@triton.jit
def _rotate_heads(
    x, cosine, sine, token, first_head, heads, token_stride, head_stride,
    HALF_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head = first_head + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
    pair = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    mask = (head < heads) & (pair < HALF_DIM)  # [HEADS, BLOCK]
    start = x + token * token_stride + head.to(tl.int64) * head_stride + pair
    first = tl.load(start, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(start + HALF_DIM, mask=mask, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    tl.store(start, (first * cosine - second * sine).to(dtype), mask=mask)
    tl.store(start + HALF_DIM, (second * cosine + first * sine).to(dtype), mask=mask)


@triton.jit(do_not_specialize=["table_tokens"])
def _rope_kernel(
    q, k, cos, sin,
    q_heads, kv_heads, table_tokens,
    q_token, q_head, k_token, k_head, cos_token, sin_token,
    INVERSE: tl.constexpr, HALF_DIM: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    q_tiles = tl.cdiv(q_heads, HEADS)
    tiles = q_tiles + tl.cdiv(kv_heads, HEADS)
    program = tl.program_id(0)
    tile = program % tiles
    token = program // tiles
    row = (token % table_tokens).to(tl.int64)
    token = token.to(tl.int64)
    pair = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    cosine = tl.load(cos + row * cos_token + pair, mask=pair < HALF_DIM, other=0.0).to(tl.float32)
    sine = tl.load(sin + row * sin_token + pair, mask=pair < HALF_DIM, other=0.0).to(tl.float32)
    if INVERSE:
        sine = -sine
    if tile < q_tiles:
        head = tile * HEADS
        _rotate_heads(
            q, cosine, sine, token, head, q_heads, q_token, q_head, HALF_DIM, HEADS, BLOCK
        )
    else:
        head = (tile - q_tiles) * HEADS
        _rotate_heads(
            k, cosine, sine, token, head, kv_heads, k_token, k_head, HALF_DIM, HEADS, BLOCK
        )


def rope_(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inverse: bool = False,
) -> None:
    """Rotate queries and keys in place. No gradient flows: `rope` is the one that has it.

    Args:
        q: float16, bfloat16, float32 or float64, shape (tokens, q_heads, head_dim), head_dim even;
            last stride 1, the others free.
        k: as q, shape (tokens, kv_heads, head_dim), with strides of its own; overlapping q in no
            element. None rotates only q.
        cos: any of these dtypes, shape (table_tokens, head_dim), last stride 1. Both halves of a
            row are equal and only the first is read. Token t has row t % table_tokens, so that the
            sequences of a batch share their positions; table_tokens divides tokens.
        sin: as cos.
        inverse: rotate by the negative angle, which takes a gradient back through the rotation.

    Raises:
        UserError: a tensor's shape, dtype, device or strides do not fit, or autograd would have to
            record the change.
    """
    key = ready = None
    if runs_triton(q):
        key = (inverse, layout(q), layout(k), layout(cos), layout(sin))
        # what autograd would have to record is seen in no layout
        ready = None if _is_recorded(q) or _is_recorded(k) else _launches.get(key)
    if ready is None:
        _check(q, k, cos, sin)
        if key is None:
            return rope_reference_(q, k, cos, sin, inverse=inverse)
        _start(key, q, k, cos, sin, inverse)
    else:
        second = q if k is None else k
        ready(q.data_ptr(), second.data_ptr(), cos.data_ptr(), sin.data_ptr())


def _start(key, q, k, cos, sin, inverse):
    tokens, q_heads, head_dim = q.shape
    kv_heads = 0 if k is None else k.shape[1]
    second = q if k is None else k
    heads, block, warps = _tile(max(q_heads, kv_heads), head_dim)
    tiles = triton.cdiv(q_heads, heads) + triton.cdiv(kv_heads, heads)
    strides = (*q.stride()[:2], *second.stride()[:2], cos.stride(0), sin.stride(0))
    _launches.start(
        *(key, _rope_kernel, (tokens * tiles,)),
        (q, second, cos, sin),
        (q_heads, kv_heads, cos.shape[0], *strides, inverse, head_dim // 2, heads, block),
        num_warps=warps,
        num_stages=1,
    )


def _tile(heads: int, head_dim: int) -> tuple[int, int, int]:
    """Heads and pairs of a program's tile, and its warps."""
    block = triton.next_power_of_2(head_dim // 2)
    tile_heads = max(1, min(triton.next_power_of_2(heads), TILE_PAIRS // block))
    return tile_heads, block, max(1, tile_heads * block // PAIRS_PER_WARP)


def _is_recorded(x: torch.Tensor | None) -> bool:
    return x is not None and x.requires_grad and torch.is_grad_enabled()


def _check(q: torch.Tensor, k: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor) -> None:
    _check_heads("q", q, q)
    if k is not None:
        _check_heads("k", k, q)
    check_rotation_table("cos", cos, q, "q", cos)
    check_rotation_table("sin", sin, q, "q", cos)


def _check_heads(name: str, x: torch.Tensor, q: torch.Tensor) -> None:
    fits = x.dim() == 3 and x.shape[-1] % 2 == 0 and x.shape[-1] > 0 and x.stride(-1) == 1
    if not fits or x.dtype not in _DTYPES:
        shape = "shape (tokens, heads, head_dim) with an even head_dim, last stride 1"
        raise misfit(f"{name} cannot be rotated", x, f"a float dtype, {shape}")
    if _is_recorded(x):
        problem = f"{name} needs a gradient, which a change in place would lose"
        raise UserError(problem, do="Call rope, or rope_ under torch.no_grad()")
    if (x.shape[0], x.shape[2], x.dtype, x.device) != (q.shape[0], q.shape[2], q.dtype, q.device):
        allowed = f"{q.dtype}, shape ({q.shape[0]}, kv_heads, {q.shape[2]}) on {q.device}"
        raise misfit(f"{name} does not fit q", x, allowed)


@torch.no_grad()
def rope_reference_(
    q: torch.Tensor,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    inverse: bool = False,
) -> None:
    """`rope_` in torch. It allocates half of q, then of k, and float32 copies of 16-bit values."""
    if not q.shape[0]:
        return
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    half_dim = q.shape[-1] // 2
    cosine, sine = (table[:, None, :half_dim].to(dtype) for table in (cos, sin))
    if inverse:
        sine = -sine
    for x in (q,) if k is None else (q, k):
        # the sequences of a batch share the tables' rows
        halves = x.unflatten(0, (-1, len(cos)))
        first, second = halves[..., :half_dim], halves[..., half_dim:]
        wide_first, wide_second = first.to(dtype), second.to(dtype)
        turned = (wide_second * cosine).addcmul_(wide_first, sine)
        # in float32 and float64 this is first itself, and the copy below does nothing
        wide_first.mul_(cosine).addcmul_(wide_second, sine, value=-1)
        first.copy_(wide_first)
        second.copy_(turned)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        q, k = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))
        rope_(q, k, cos, sin, inverse=inverse)
        return q, k

    @staticmethod
    def backward(ctx, dq, dk):
        dq, dk = _Rope.apply(dq, dk, *ctx.saved_tensors, not ctx.inverse)
        return dq, dk, None, None, None


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated copies of queries and keys, with gradients for both (none for the tables).

    Args:
        q: float16, bfloat16, float32 or float64, shape (tokens, q_heads, head_dim), head_dim even.
        k: as q, shape (tokens, kv_heads, head_dim).
        cos: shape (table_tokens, head_dim), as in `rope_`.
        sin: as cos.

    Returns:
        The rotated q and k, contiguous.

    Raises:
        UserError: a tensor's shape, dtype, device or strides do not fit.

    Example:
        >>> x = torch.tensor([[[1.0, 0.0]]])
        >>> rope(x, x, torch.zeros(1, 2), torch.ones(1, 2))[0]
        tensor([[[0., 1.]]])
    """
    return _Rope.apply(q, k, cos, sin, False)


def compile_cases() -> list[CompileCase]:
    """Heads of 64, 80, 96, 128 and 256, as (head_dim, q_heads, kv_heads), and the way back."""
    shapes = ((64, 9, 3), (80, 32, 32), (96, 32, 32), (128, 32, 8), (256, 8, 4))
    return [_case(*shape, inverse=False) for shape in shapes] + [_case(128, 32, 8, inverse=True)]


def _case(head_dim: int, q_heads: int, kv_heads: int, *, inverse: bool) -> CompileCase:
    heads, block, warps = _tile(max(q_heads, kv_heads), head_dim)
    constexprs = {"INVERSE": inverse, "HALF_DIM": head_dim // 2, "HEADS": heads, "BLOCK": block}
    pointers = {"q": HALF, "k": HALF, "cos": FLOAT, "sin": FLOAT}
    strides = dict.fromkeys(
        ("q_token", "q_head", "k_token", "k_head", "cos_token", "sin_token"), "i32"
    )
    counts = dict.fromkeys(("q_heads", "kv_heads", "table_tokens"), "i32")
    divisible = (*pointers, *strides)
    if q_heads % 16 == 0:
        divisible += ("q_heads",)
    if kv_heads % 16 == 0:
        divisible += ("kv_heads",)
    name = f"rope {head_dim}{' inverse' if inverse else ''}"
    signature = pointers | counts | strides
    return CompileCase(name, _rope_kernel, signature, constexprs, warps, 1, divisible)
