"""dk and dv of `flash_attention_backward.py`, in one kernel.

    P = exp(S - lse),  dS = P * (do v^T - delta),  dv = sum of P^T do,  dk = scale * sum of dS^T q

A program holds a block of one key head's keys and values and walks over the queries that see them,
of every query head that shares the key head, so that the sum over those heads is a sum in float32
registers like that over the queries. Scores are computed as k q^T, [BLOCK_N, BLOCK_M]: P^T and dS^T
are then operands of the next products as they are.
"""

from __future__ import annotations

from colab_qlora.kernels.backend import tl, triton
from colab_qlora.kernels.flash_attention_parts import (
    bent,
    load_column,
    load_rows,
    locate,
    store_rows,
    to_base_2,
    zero_rows,
)


@triton.jit
def _add_queries(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_token, do_token, start, first, length,
    scale_log2, bend, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add a block of one head's queries to dk and dv; rows beyond the document add zeros."""
    q = load_rows(q_base, q_token, start, length, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
    queries = start + tl.arange(0, BLOCK_M)
    lse = to_base_2(load_column(lse_base, queries, length, MASKED))
    scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
    if CAPPED:
        scores, slope = bent(scores, bend)
    weights = tl.exp2(scores * scale_log2 - lse[None, :])
    if MASKED and CAUSAL:
        keys = first + tl.arange(0, BLOCK_N)
        weights = tl.where(keys[:, None] <= queries[None, :], weights, 0.0)
    do = load_rows(do_base, do_token, start, length, MASKED, BLOCK_M, HEAD_DIM, BLOCK_D)
    dv = tl.dot(weights.to(do.dtype), do, dv, input_precision="ieee")
    delta = load_column(delta_base, queries, length, MASKED)
    d_weights = tl.dot(v, tl.trans(do), input_precision="ieee")
    d_scores = weights * (d_weights - delta[None, :])
    if CAPPED:
        d_scores *= slope
    dk = tl.dot(d_scores.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _add_heads(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_token, q_head, do_token, do_head,
    tokens, low, high, tail, count, first, length, scale_log2, bend,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add `count` blocks of queries of each head of the group: low..high, and one at `tail`.

    One loop over all of them, not one a head: the pipeline of loads never drains.
    """
    head = tl.cast(0, tl.int64)
    index = 0
    for _ in range(GROUP * count):
        start = tl.where(low + index * BLOCK_M < high, low + index * BLOCK_M, tail)
        dk, dv = _add_queries(
            dk, dv, k, v, q_base + head * q_head, do_base + head * do_head,
            lse_base + head * tokens, delta_base + head * tokens, q_token, do_token,
            start, first, length, scale_log2, bend, CAUSAL, CAPPED, MASKED,
            BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
        is_last = index + 1 == count
        index = tl.where(is_last, 0, index + 1)
        head = tl.where(is_last, head + 1, head)
    return dk, dv


@triton.jit
def _add_all(
    dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_token, q_head, do_token, do_head,
    tokens, first, length, scale_log2, bend,
    GROUP: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add all queries: with masks those on the diagonal and in the last block, if it is not whole,
    then the others. Without causality all blocks are loaded with masks; nothing else has them."""
    diagonal = first // BLOCK_M * BLOCK_M if CAUSAL else 0
    below = tl.cdiv(tl.minimum(first + BLOCK_N, length) if CAUSAL else length, BLOCK_M) * BLOCK_M
    whole_end = length // BLOCK_M * BLOCK_M
    count = (below - diagonal) // BLOCK_M + tl.where(
        (whole_end < length) & (below <= whole_end), 1, 0
    )
    dk, dv = _add_heads(
        dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_token, q_head, do_token, do_head,
        tokens, diagonal, below, whole_end, count, first, length, scale_log2, bend,
        GROUP, CAUSAL, CAPPED, True, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    if CAUSAL:
        count = tl.maximum(whole_end - below, 0) // BLOCK_M
        dk, dv = _add_heads(
            dk, dv, k, v, q_base, do_base, lse_base, delta_base, q_token, q_head, do_token, do_head,
            tokens, below, whole_end, whole_end, count, first, length, scale_log2, bend,
            GROUP, CAUSAL, CAPPED, False, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "documents", "blocks"])
def key_value_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_ptr,
    do_token, do_head, q_token, q_head, k_token, k_head, v_token, v_head,
    dk_token, dk_head, dv_token, dv_head, tokens, documents, blocks, scale, scale_log2, bend,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys; HEADS counts the key heads."""
    # the first blocks of keys are seen by the most queries, and come first
    document, block, kv_head, begin = locate(cu_ptr, blocks, HEADS)
    dk_ptr += kv_head * dk_head
    dv_ptr += kv_head * dv_head
    if document == documents:
        zero_rows(dk_ptr, dk_token, begin, tokens, BLOCK_N, HEAD_DIM, BLOCK_D)
        zero_rows(dv_ptr, dv_token, begin, tokens, BLOCK_N, HEAD_DIM, BLOCK_D)
        return
    length = tl.load(cu_ptr + document + 1) - begin
    first = block * BLOCK_N
    if first >= length:
        return
    begin = begin.to(tl.int64)
    head = kv_head * GROUP
    k_ptr += kv_head * k_head + begin * k_token
    v_ptr += kv_head * v_head + begin * v_token
    k = load_rows(k_ptr, k_token, first, length, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr, v_token, first, length, True, BLOCK_N, HEAD_DIM, BLOCK_D)
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dk, dv = _add_all(
        dk, dv, k, v, q_ptr + head * q_head + begin * q_token,
        do_ptr + head * do_head + begin * do_token, lse_ptr + head * tokens + begin,
        delta_ptr + head * tokens + begin, q_token, q_head, do_token, do_head,
        tokens, first, length, scale_log2, bend,
        GROUP, CAUSAL, CAPPED, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    dk_ptr += begin * dk_token
    dv_ptr += begin * dv_token
    store_rows(dk * scale, dk_ptr, dk_token, first, length, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv, dv_ptr, dv_token, first, length, BLOCK_N, HEAD_DIM, BLOCK_D)
