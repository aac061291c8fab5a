"""Exact attention over packed documents, in Triton: nothing of size tokens x tokens in memory.

    S = scale * q k^T,  lse = log sum exp S,  o = exp(S - lse) v

With a cap (Gemma 2), S = cap * tanh(scale * q k^T / cap). A program holds a block of one query
head's rows and walks over the keys of their document, with the running maximum, sum and output of
the softmax in registers. A document attends to itself alone; a dense batch is documents of equal
length. Query heads share key heads as they are, unrepeated.

Bytes moved, of T tokens with H query and K key heads of d columns: 4 T d (H + K) + 4 T H in half
precision, if each head's K and V stay in the L2 cache while its blocks of queries run; operations:
4 d H times the sum of length^2 over the documents, half of that if causal.

Needs tensor cores that Triton can use (compute capability 8.0 up). The backward kernels are in
`flash_attention_backward.py`, the same in torch in `flash_attention_reference.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from colab_qlora.kernels.backend import tl, triton
from colab_qlora.kernels.compile_case import CompileCase
from colab_qlora.kernels.flash_attention_backward import flash_attention_backward
from colab_qlora.kernels.flash_attention_parts import (
    bent,
    block_d,
    blocks_for,
    check_attention,
    choose_blocks,
    compile_case,
    is_seen,
    key_range,
    launches,
    load_rows,
    locate,
    softmax_factors,
    store_rows,
    to_natural,
    zero_rows,
)
from colab_qlora.kernels.flash_attention_reference import (
    attention_reference,
    attention_reference_backward,
)

__all__ = [
    "attention_reference",
    "attention_reference_backward",
    "compile_cases",
    "flash_attention",
    "flash_attention_backward",
    "flash_attention_forward",
]


@triton.jit
def _attend(
    output, total, peak, q, k_base, v_base, k_token, v_token, first, low, high, length, scale_log2,
    bend, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the keys low..high to the softmax; `peak` is the largest score so far, in base 2."""
    for start in range(low, high, BLOCK_N):
        k = load_rows(k_base, k_token, start, length, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if CAPPED:
            scores, _ = bent(scores, bend)
        if MASKED:
            seen = is_seen(start, first, length, CAUSAL, BLOCK_M, BLOCK_N)
            scores = tl.where(seen, scores, float("-inf"))
        # every row sees the first key of its first block, so that no peak stays -inf
        new_peak = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, 1)
        v = load_rows(v_base, v_token, start, length, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        output = tl.dot(weights.to(v.dtype), v, output * shrink[:, None], input_precision="ieee")
        peak = new_peak
    return output, total, peak


@triton.jit
def _zero_padding(
    o_ptr, lse_ptr, o_token, begin, tokens,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    zero_rows(o_ptr, o_token, begin, tokens, BLOCK_M, HEAD_DIM, BLOCK_D)
    for start in range(begin, tokens, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        tl.store(lse_ptr + rows, tl.zeros([BLOCK_M], tl.float32), mask=rows < tokens)


@triton.jit(do_not_specialize=["tokens", "documents", "blocks"])
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, o_ptr, lse_ptr, cu_ptr,
    q_token, q_head, k_token, k_head, v_token, v_head, o_token, o_head,
    tokens, documents, blocks, scale_log2, bend,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    document, block, head, begin = locate(cu_ptr, blocks, HEADS)
    o_ptr += head * o_head
    lse_ptr += head * tokens
    if document == documents:
        _zero_padding(o_ptr, lse_ptr, o_token, begin, tokens, BLOCK_M, HEAD_DIM, BLOCK_D)
        return
    length = tl.load(cu_ptr + document + 1) - begin
    # the blocks with the most keys first, so that short ones fill the end of the grid
    first = (blocks - 1 - block) * BLOCK_M
    if first >= length:
        return
    begin = begin.to(tl.int64)
    k_ptr += head // GROUP * k_head + begin * k_token
    v_ptr += head // GROUP * v_head + begin * v_token
    q_ptr += head * q_head + begin * q_token
    q = load_rows(q_ptr, q_token, first, length, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    output = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    full, end = key_range(first, length, CAUSAL, BLOCK_M, BLOCK_N)
    output, total, peak = _attend(
        output, total, peak, q, k_ptr, v_ptr, k_token, v_token, first, 0, full, length,
        scale_log2, bend, CAUSAL, CAPPED, False, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    output, total, peak = _attend(
        output, total, peak, q, k_ptr, v_ptr, k_token, v_token, first, full, end, length,
        scale_log2, bend, CAUSAL, CAPPED, True, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    output = output / total[:, None]
    store_rows(output, o_ptr + begin * o_token, o_token, first, length, BLOCK_M, HEAD_DIM, BLOCK_D)
    rows = first + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + begin + rows, to_natural(peak + tl.log2(total)), mask=rows < length)


def flash_attention_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    causal: bool = True,
    cap: float | None = None,
    out: torch.Tensor | None = None,
    blocks: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention within documents; `flash_attention` is the one with gradients.

    Args:
        q: float16, bfloat16, float32 or float64 (by the reference), shape (tokens, q_heads,
            head_dim), last stride 1, the others free.
        k: as q, shape (tokens, kv_heads, head_dim), q_heads being a multiple of kv_heads; query
            head h reads key head h // (q_heads // kv_heads).
        v: as k, with strides of its own.
        scale: positive factor of the scores, usually head_dim ** -0.5.
        cu_seqlens: int32 (documents + 1,), rising from 0 to tokens at most: where each document
            starts, and where the last ends. Its numbers are not checked, to not wait for the GPU.
        max_seqlen: tokens of the longest document, or more; later rows would not be computed.
        causal: a token sees those before it and itself; otherwise all of its document.
        cap: scores s become cap * tanh(s / cap), as in Gemma 2; None: as they are.
        out: where o goes: as q, with strides of its own, overlapping no input.
        blocks: rows of q and rows of k that a program handles at once, for tests.

    Returns:
        o as q, contiguous unless `out` is given; and lse, float32 (q_heads, tokens), the natural
        logarithm of each row's sum of exponentials. Both are 0 for tokens after the last document.

    Raises:
        UserError: a shape, dtype, device or stride does not fit, or the scale is not positive.
    """
    options: dict[str, Any] = {"scale": scale, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    if not launches(q):
        return attention_reference(q, k, v, causal=causal, cap=cap, out=out, **options)
    check_attention(q, k, v, scale, cu_seqlens, {"out": out}, {}, cap)
    tokens, heads, width = q.shape
    o = q.new_empty(q.shape) if out is None else out
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if not tokens:
        return o, lse
    queries, keys, warps, stages = blocks_for("forward", q, blocks, is_capped=cap is not None)
    documents, count = cu_seqlens.numel() - 1, max(1, triton.cdiv(max_seqlen, queries))
    _forward_kernel[(heads * (documents * count + 1),)](
        *(q, k, v, o, lse, cu_seqlens.contiguous()),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *o.stride()[:2]),
        *(tokens, documents, count, *softmax_factors(scale, cap)),
        *(
            heads,
            heads // k.shape[1],
            causal,
            cap is not None,
            queries,
            keys,
            width,
            block_d(width),
        ),
        num_warps=warps,
        num_stages=stages,
    )
    return o, lse


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, options: dict[str, Any]) -> torch.Tensor:
        o, lse = flash_attention_forward(q, k, v, **options)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.options = options
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: torch.Tensor):
        return *flash_attention_backward(do, *ctx.saved_tensors, **ctx.options), None


def flash_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
    causal: bool = True,
    cap: float | None = None,
) -> torch.Tensor:
    """Attention within documents, with gradients for q, k and v, once differentiable.

    Args:
        q: as in `flash_attention_forward`, like the other arguments.
        k: as there.
        v: as there.
        scale: head_dim ** -0.5 if None.
        cu_seqlens: all tokens are one document if None.
        max_seqlen: read from `cu_seqlens` if None, for which a GPU has to be waited for.
        causal: as there.
        cap: as there.

    Returns:
        o, (tokens, q_heads, head_dim), contiguous.

    Raises:
        UserError: as there.

    Example:
        >>> q, k, v = (torch.randn(5, heads, 64) for heads in (4, 2, 2))
        >>> flash_attention(q, k, v, cu_seqlens=torch.tensor([0, 3, 5], dtype=torch.int32)).shape
        torch.Size([5, 4, 64])
    """
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, q.shape[0]], dtype=torch.int32, device=q.device)
        max_seqlen = q.shape[0]
    elif max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.numel() > 1 else 0
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options: dict[str, Any] = {
        "scale": scale,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "causal": causal,
        "cap": cap,
    }
    return _FlashAttention.apply(q, k, v, options)


def compile_cases(capability: tuple[int, int] = (8, 6)) -> list[CompileCase]:
    """Causal and not, heads of 64, 128 and 256, with the blocks of a GPU.

    The default are the blocks that every GPU from compute capability 8.0 could run.
    """
    cases = []
    for width in (64, 128, 256):
        blocks = choose_blocks("forward", width, torch.float16, capability)
        sizes = {"BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys}
        sizes |= {"HEAD_DIM": width, "BLOCK_D": width, "HEADS": 32, "GROUP": 4}
        for causal, capped in ((True, False), (False, False), (True, True)):
            name = f"flash_attention_forward {width}" + " causal" * causal + " capped" * capped
            forms = {"CAUSAL": causal, "CAPPED": capped}
            cases.append(compile_case(_forward_kernel, name, blocks, {**sizes, **forms}))
    return cases
