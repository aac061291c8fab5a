"""Gradients of queries, keys and values, turned back by RoPE and put where a GEMM wants them.

The GEMM behind the q, k and v projections takes their three gradients as one matrix, side by side.
One launch writes dq and dk, rotated by the negative angle (`rope.py` says how a head is halved),
and dv as it is, into columns of that matrix:

    out1 = d1 * cos + d2 * sin        out2 = d2 * cos - d1 * sin

The arithmetic is float32 and rounded once.

Bytes moved a token: every half value of dq, dk and dv in and out, 4 * head_dim * (q_heads + 2 *
kv_heads), and half a row of both float32 tables, 4 * head_dim. With 32 and 8 heads of 128 that is
24,576 + 512. A rotation in place and three copies move 45,056 + 512.
"""

from __future__ import annotations

import torch

from colab_qlora.errors import UserError
from colab_qlora.kernels.backend import runs_triton, tl, triton
from colab_qlora.kernels.compile_case import FLOAT, HALF, CompileCase
from colab_qlora.kernels.launch import ReadyLaunches, address, layout
from colab_qlora.kernels.misfit import check_rotation_table, misfit
from colab_qlora.kernels.rope import rope_reference_

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# a program takes a token, so that its row of the tables is loaded once, in tiles of so many pairs:
# 16 heads of 128. Larger ones would leave most of a tile empty where there are 8 key heads
TILE_PAIRS = 1024

# two heads of 128 a thread; 8 pairs are a 16-byte load of halves from each half of a head
PAIRS_PER_WARP = 2 * 8 * 32

_launches = ReadyLaunches()


@triton.jit
def _place_heads(
    x, out, cosine, sine, heads, x_head, out_head,
    ROTATES: tl.constexpr, HALF_DIM: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """All heads of one token, from x to out; cosine and sine are [1, BLOCK]."""
    pair = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    for tile in tl.static_range(TILES):
        head = tile * HEADS + tl.arange(0, HEADS)[:, None]  # [HEADS, 1]
        mask = (head < heads) & (pair < HALF_DIM)  # [HEADS, BLOCK]
        source = x + head.to(tl.int64) * x_head + pair
        first = tl.load(source, mask=mask, other=0.0)
        second = tl.load(source + HALF_DIM, mask=mask, other=0.0)
        # the output may be the input, and another thread may load what this one stores
        tl.debug_barrier()
        if ROTATES:
            wide_first = first.to(tl.float32)
            wide_second = second.to(tl.float32)
            first = wide_first * cosine - wide_second * sine
            second = wide_second * cosine + wide_first * sine
        dtype = out.dtype.element_ty
        target = out + head.to(tl.int64) * out_head + pair
        tl.store(target, first.to(dtype), mask=mask)
        tl.store(target + HALF_DIM, second.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["table_tokens"])
def _place_kernel(
    dq, dk, dv, cos, sin, out_q, out_k, out_v,
    q_heads, kv_heads, table_tokens,
    dq_token, dq_head, dk_token, dk_head, dv_token, dv_head, cos_token, sin_token,
    out_q_token, out_q_head, out_k_token, out_k_head, out_v_token, out_v_head,
    ROTATES: tl.constexpr, PLACES_V: tl.constexpr, HALF_DIM: tl.constexpr, BLOCK: tl.constexpr,
    Q_HEADS: tl.constexpr, Q_TILES: tl.constexpr, KV_HEADS: tl.constexpr, KV_TILES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0)
    pair = tl.arange(0, BLOCK)[None, :]  # [1, BLOCK]
    cosine = 1.0
    sine = 0.0
    if ROTATES:
        row = (token % table_tokens).to(tl.int64)
        known = pair < HALF_DIM
        cosine = tl.load(cos + row * cos_token + pair, mask=known, other=0.0).to(tl.float32)
        # backwards
        sine = -tl.load(sin + row * sin_token + pair, mask=known, other=0.0).to(tl.float32)
    token = token.to(tl.int64)
    _place_heads(
        dq + token * dq_token, out_q + token * out_q_token, cosine, sine,
        q_heads, dq_head, out_q_head, ROTATES, HALF_DIM, Q_HEADS, Q_TILES, BLOCK,
    )  # fmt: skip
    _place_heads(
        dk + token * dk_token, out_k + token * out_k_token, cosine, sine,
        kv_heads, dk_head, out_k_head, ROTATES, HALF_DIM, KV_HEADS, KV_TILES, BLOCK,
    )  # fmt: skip
    if PLACES_V:
        _place_heads(
            dv + token * dv_token, out_v + token * out_v_token, cosine, sine,
            kv_heads, dv_head, out_v_head, False, HALF_DIM, KV_HEADS, KV_TILES, BLOCK,
        )  # fmt: skip


def place_qkv_gradients(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    out_q: torch.Tensor,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
) -> None:
    """Write dq and dk, rotated by the negative angle, and dv into given buffers.

    Outside autograd. It can work in place: an output may be its own input, the very same view, and
    then dv's part is nothing. Else no output overlaps an input or another output.

    Args:
        dq: float16, bfloat16, float32 or float64, shape (tokens, q_heads, head_dim), head_dim even;
            last stride 1, the others free.
        dk: as dq, shape (tokens, kv_heads, head_dim), with strides of its own.
        dv: as dk.
        cos: any of these dtypes, shape (table_tokens, head_dim), last stride 1, as in `rope_`:
            token t has row t % table_tokens, of which the first half is read. None, together with
            sin, copies dq and dk as they are.
        sin: as cos.
        out_q: dq's shape, dtype and device; last stride 1, such as columns of one wide buffer.
        out_k: likewise for dk.
        out_v: likewise for dv.

    Raises:
        UserError: a tensor's shape, dtype, device or strides do not fit, or only one table is
            given.
    """
    tensors = (dq, dk, dv, cos, sin, out_q, out_k, out_v)
    if not runs_triton(dq):
        _check(*tensors)
        return place_qkv_gradients_reference(*tensors)
    places_v = not _is_same_view(dv, out_v)
    key = (*(layout(x) for x in tensors), places_v)
    ready = _launches.get(key)
    if ready is not None:
        return ready(*(address(x) for x in tensors))
    _check(*tensors)
    tokens, q_heads, head_dim = dq.shape
    if not tokens:
        return None
    kv_heads = dk.shape[1]
    constexprs, warps = _tiles(q_heads, kv_heads, head_dim)
    tables = (0, 0, 0) if cos is None or sin is None else (len(cos), cos.stride(0), sin.stride(0))
    constants = (
        *(q_heads, kv_heads, tables[0]),
        *(*dq.stride()[:2], *dk.stride()[:2], *dv.stride()[:2], *tables[1:]),
        *(*out_q.stride()[:2], *out_k.stride()[:2], *out_v.stride()[:2]),
        *(cos is not None, places_v, *constexprs.values()),
    )
    options = {"num_warps": warps, "num_stages": 1}
    return _launches.start(key, _place_kernel, (tokens,), tensors, constants, **options)


def _is_same_view(x: torch.Tensor, out: torch.Tensor) -> bool:
    return x.data_ptr() == out.data_ptr() and x.stride() == out.stride()


def _tiles(q_heads: int, kv_heads: int, head_dim: int) -> tuple[dict[str, int], int]:
    """The kernel's last constexprs, in their order, and its warps."""
    half_dim = head_dim // 2
    block = triton.next_power_of_2(half_dim)
    most = max(1, TILE_PAIRS // block)
    q_tile, kv_tile = (min(triton.next_power_of_2(heads), most) for heads in (q_heads, kv_heads))
    constexprs = {
        "HALF_DIM": half_dim,
        "BLOCK": block,
        "Q_HEADS": q_tile,
        "Q_TILES": triton.cdiv(q_heads, q_tile),
        "KV_HEADS": kv_tile,
        "KV_TILES": triton.cdiv(kv_heads, kv_tile),
    }
    return constexprs, max(1, q_tile * block // PAIRS_PER_WARP)


def _check(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    out_q: torch.Tensor,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
) -> None:
    for name, x in (("dq", dq), ("dk", dk), ("dv", dv)):
        fits = x.dim() == 3 and x.shape[1] > 0 and x.shape[2] > 0 and x.shape[2] % 2 == 0
        if not fits or x.dtype not in _DTYPES:
            shape = "shape (tokens, heads, head_dim) with an even head_dim"
            raise misfit(f"{name} cannot be rotated", x, f"a float dtype, {shape}")
    _check_like("dk", dk, "dq", dq, (len(dq), dk.shape[1], dq.shape[2]))
    _check_like("dv", dv, "dk", dk, tuple(dk.shape))
    _check_like("out_q", out_q, "dq", dq, tuple(dq.shape))
    _check_like("out_k", out_k, "dk", dk, tuple(dk.shape))
    _check_like("out_v", out_v, "dv", dv, tuple(dv.shape))
    for name, x in (("dq", dq), ("out_q", out_q)):
        if x.stride(-1) != 1:
            raise misfit(f"{name} has gaps inside its heads", x, "a last stride of 1")
    if cos is None or sin is None:
        if cos is not sin:
            given, missing = ("cos", "sin") if sin is None else ("sin", "cos")
            raise UserError(f"{given} is given without {missing}", allowed="both, or None twice")
        return
    check_rotation_table("cos", cos, dq, "dq", cos)
    check_rotation_table("sin", sin, dq, "dq", cos)


def _check_like(
    name: str, x: torch.Tensor, like_name: str, like: torch.Tensor, shape: tuple[int, ...]
) -> None:
    if (tuple(x.shape), x.dtype, x.device) != (shape, like.dtype, like.device):
        allowed = f"{like.dtype}, shape {shape} on {like.device}"
        raise misfit(f"{name} does not fit {like_name}", x, allowed)
    if x.stride(-1) != 1:
        raise misfit(f"{name} has gaps inside its heads", x, "a last stride of 1")


@torch.no_grad()
def place_qkv_gradients_reference(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    out_q: torch.Tensor,
    out_k: torch.Tensor,
    out_v: torch.Tensor,
) -> None:
    """`place_qkv_gradients` in torch: three copies and a rotation in place."""
    for x, out in ((dq, out_q), (dk, out_k), (dv, out_v)):
        if not _is_same_view(x, out):
            out.copy_(x)
    if cos is not None and sin is not None:
        rope_reference_(out_q, out_k, cos, sin, inverse=True)


def compile_cases() -> list[CompileCase]:
    """Heads of 64, 80, 128 and 256, as (head_dim, q_heads, kv_heads); in place; without tables."""
    shapes = ((64, 9, 3), (80, 32, 32), (128, 32, 8), (256, 8, 4))
    return [
        *(_case(*shape) for shape in shapes),
        _case(128, 32, 8, places_v=False),
        _case(128, 32, 8, rotates=False),
    ]


def _case(
    head_dim: int, q_heads: int, kv_heads: int, *, rotates: bool = True, places_v: bool = True
) -> CompileCase:
    tiles, warps = _tiles(q_heads, kv_heads, head_dim)
    tables = {"cos": FLOAT, "sin": FLOAT} if rotates else {}
    absent = {} if rotates else {"cos": None, "sin": None}
    outputs = ("out_q", "out_k", "out_v")
    heads = ("dq", "dk", "dv", *outputs)
    pointers = dict.fromkeys(heads, HALF) | tables
    strides = [f"{name}_{step}" for name in heads for step in ("token", "head")]
    strides += ["cos_token", "sin_token"]
    counts = {"q_heads": q_heads, "kv_heads": kv_heads}
    how = "" if rotates and places_v else " in place" if rotates else " copied"
    return CompileCase(
        name=f"qkv_gradients {head_dim}{how}",
        kernel=_place_kernel,
        signature=pointers | dict.fromkeys((*counts, "table_tokens", *strides), "i32"),
        constexprs={"ROTATES": rotates, "PLACES_V": places_v, **tiles, **absent},
        num_warps=warps,
        num_stages=1,
        divisible_by_16=(
            *(*pointers, *strides),
            *(name for name, count in counts.items() if count % 16 == 0),
        ),
    )
