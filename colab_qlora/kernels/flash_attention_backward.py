"""The gradients of `flash_attention.py`, from q, k, v, o and lse, with the scores computed again.

    P = exp(S - lse),  dP = do v^T,  dS = P * (dP - delta),  delta = rowsum(do * o)
    dv = P^T do,  dk = scale * dS^T q,  dq = scale * dS k

With a cap, dS gets the factor 1 - tanh(scale * q k^T / cap)^2. Three kernels: delta; dk and dv,
where a program holds a block of keys and walks over the queries of every head that shares them; dq,
where it holds a block of queries and walks over the keys. All sums stay in registers, in float32
and in a fixed order: no atomics, so a result is the same every time.

Bytes moved, of T tokens with H query and K key heads of d columns in half precision, if what is
read again comes from the L2 cache: 4 T d H for delta, 2 T d (2 H + 4 K) and 2 T d (3 H + 2 K) for
the others, and 8 T H of lse and delta each. Operations: 14 d H times the sum of length^2 over the
documents (3.5 forwards), half of that if causal.
"""

from __future__ import annotations

from typing import Any

import torch

from colab_qlora.kernels.backend import tl, triton
from colab_qlora.kernels.compile_case import CompileCase
from colab_qlora.kernels.flash_attention_key_value import key_value_kernel
from colab_qlora.kernels.flash_attention_parts import (
    Blocks,
    bent,
    block_d,
    blocks_for,
    check_attention,
    choose_blocks,
    compile_case,
    is_seen,
    key_range,
    launches,
    load_column,
    load_rows,
    locate,
    softmax_factors,
    store_rows,
    to_base_2,
    zero_rows,
)
from colab_qlora.kernels.flash_attention_reference import attention_reference_backward

# a program of delta reads 8 KB of halves from o and from do: 4 loads of 16 bytes a thread each
_DELTA_ELEMENTS = 4096


@triton.jit(do_not_specialize=["tokens"])
def _delta_kernel(
    do_ptr, o_ptr, delta_ptr, do_token, do_head, o_token, o_head, tokens,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * ROWS
    head = tl.program_id(1).to(tl.int64)
    do_base, o_base = do_ptr + head * do_head, o_ptr + head * o_head
    do = load_rows(do_base, do_token, first, tokens, True, ROWS, HEAD_DIM, BLOCK_D)
    o = load_rows(o_base, o_token, first, tokens, True, ROWS, HEAD_DIM, BLOCK_D)
    rows = first + tl.arange(0, ROWS)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(delta_ptr + head * tokens + rows, delta, mask=rows < tokens)


@triton.jit
def _add_keys(
    dq, q, do, lse, delta, k_base, v_base, k_token, v_token, first, low, high, length, scale_log2,
    bend, CAUSAL: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the keys low..high to dq; `lse` is in base 2."""
    for start in range(low, high, BLOCK_N):
        k = load_rows(k_base, k_token, start, length, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        v = load_rows(v_base, v_token, start, length, MASKED, BLOCK_N, HEAD_DIM, BLOCK_D)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if CAPPED:
            scores, slope = bent(scores, bend)
        d_weights = tl.dot(do, tl.trans(v), input_precision="ieee")
        weights = tl.exp2(scores * scale_log2 - lse[:, None])
        if MASKED:
            seen = is_seen(start, first, length, CAUSAL, BLOCK_M, BLOCK_N)
            weights = tl.where(seen, weights, 0.0)
        d_scores = weights * (d_weights - delta[:, None])
        if CAPPED:
            d_scores *= slope
        dq = tl.dot(d_scores.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["tokens", "documents", "blocks"])
def _query_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dq_ptr, cu_ptr,
    do_token, do_head, q_token, q_head, k_token, k_head, v_token, v_head, dq_token, dq_head,
    tokens, documents, blocks, scale, scale_log2, bend,
    HEADS: tl.constexpr, GROUP: tl.constexpr, CAUSAL: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    document, block, head, begin = locate(cu_ptr, blocks, HEADS)
    dq_ptr += head * dq_head
    if document == documents:
        zero_rows(dq_ptr, dq_token, begin, tokens, BLOCK_M, HEAD_DIM, BLOCK_D)
        return
    length = tl.load(cu_ptr + document + 1) - begin
    first = (blocks - 1 - block) * BLOCK_M
    if first >= length:
        return
    begin = begin.to(tl.int64)
    q_ptr += head * q_head + begin * q_token
    do_ptr += head * do_head + begin * do_token
    k_ptr += head // GROUP * k_head + begin * k_token
    v_ptr += head // GROUP * v_head + begin * v_token
    q = load_rows(q_ptr, q_token, first, length, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    do = load_rows(do_ptr, do_token, first, length, True, BLOCK_M, HEAD_DIM, BLOCK_D)
    rows = first + tl.arange(0, BLOCK_M)
    lse = to_base_2(load_column(lse_ptr + head * tokens + begin, rows, length, True))
    delta = load_column(delta_ptr + head * tokens + begin, rows, length, True)
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    full, end = key_range(first, length, CAUSAL, BLOCK_M, BLOCK_N)
    dq = _add_keys(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_token, v_token, first, 0, full, length,
        scale_log2, bend, CAUSAL, CAPPED, False, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    dq = _add_keys(
        dq, q, do, lse, delta, k_ptr, v_ptr, k_token, v_token, first, full, end, length,
        scale_log2, bend, CAUSAL, CAPPED, True, BLOCK_M, BLOCK_N, HEAD_DIM, BLOCK_D,
    )  # fmt: skip
    dq_ptr += begin * dq_token
    store_rows(dq * scale, dq_ptr, dq_token, first, length, BLOCK_M, HEAD_DIM, BLOCK_D)


def flash_attention_backward(
    do: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    o: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    causal: bool = True,
    cap: float | None = None,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    blocks: tuple[int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients for q, k and v.

    Args:
        do: gradient for o, as q, with strides of its own; copied if its last stride is not 1.
        q: as given to `flash_attention_forward`, like k, v and the keyword arguments.
        k: likewise.
        v: likewise.
        o: from the forward pass.
        lse: from the forward pass.
        scale: as there.
        cu_seqlens: as there.
        max_seqlen: as there.
        causal: as there.
        cap: as there.
        dq: where the gradient for q goes: as q, with strides of its own, overlapping no input.
        dk: likewise for k.
        dv: likewise for v.
        blocks: rows of q and rows of k that a program handles at once, for tests.

    Returns:
        dq, dk, dv in the shapes and dtype of q, k and v, zero for tokens after the last document.

    Raises:
        UserError: a shape, dtype, device or stride does not fit, or the scale is not positive.
    """
    options: dict[str, Any] = {
        "scale": scale,
        "cu_seqlens": cu_seqlens,
        "max_seqlen": max_seqlen,
        "causal": causal,
        "cap": cap,
    }
    if not launches(q):
        return attention_reference_backward(do, q, k, v, o, lse, dq=dq, dk=dk, dv=dv, **options)
    check_attention(
        q, k, v, scale, cu_seqlens, {"do": do, "o": o, "dq": dq}, {"dk": dk, "dv": dv}, cap
    )
    dq = q.new_empty(q.shape) if dq is None else dq
    dk = k.new_empty(k.shape) if dk is None else dk
    dv = v.new_empty(v.shape) if dv is None else dv
    if q.shape[0]:
        do = do if do.stride(-1) == 1 else do.contiguous()
        lse = lse.contiguous()
        delta = _delta(do, o)
        inputs = (do, q, k, v, lse, delta)
        options["cu_seqlens"] = cu_seqlens.contiguous()
        _launch(key_value_kernel, "key_value", inputs, (dk, dv), blocks, **options)
        _launch(_query_kernel, "query", inputs, (dq,), blocks, **options)
    return dq, dk, dv


def _delta(do: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
    """rowsum(do * o) as float32 (q_heads, tokens)."""
    tokens, heads, width = o.shape
    delta = torch.empty((heads, tokens), dtype=torch.float32, device=o.device)
    rows = _DELTA_ELEMENTS // block_d(width)
    _delta_kernel[(triton.cdiv(tokens, rows), heads)](
        *(do, o, delta, *do.stride()[:2], *o.stride()[:2], tokens),
        *(rows, width, block_d(width)),
        num_warps=4,
        num_stages=1,
    )
    return delta


def _launch(
    kernel: Any,
    name: str,
    inputs: tuple[torch.Tensor, ...],
    outputs: tuple[torch.Tensor, ...],
    blocks: tuple[int, int] | None,
    *,
    scale: float,
    cu_seqlens: torch.Tensor,
    max_seqlen: int,
    causal: bool,
    cap: float | None,
) -> None:
    do, q, k, v, _, _ = inputs
    heads, width = outputs[0].shape[1:]
    queries, keys, warps, stages = blocks_for(name, q, blocks, is_capped=cap is not None)
    documents = cu_seqlens.numel() - 1
    count = max(1, triton.cdiv(max_seqlen, queries if name == "query" else keys))
    strides = [stride for x in (do, q, k, v, *outputs) for stride in x.stride()[:2]]
    kernel[(heads * (documents * count + 1),)](
        *(*inputs, *outputs, cu_seqlens, *strides),
        *(q.shape[0], documents, count, scale, *softmax_factors(scale, cap)),
        *(
            heads,
            q.shape[1] // k.shape[1],
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


def compile_cases(capability: tuple[int, int] = (8, 6)) -> list[CompileCase]:
    """Heads of 64, 128 and 256, causal and not, with the blocks of a GPU, as in the forward."""
    cases = []
    for width in (64, 128, 256):
        head = {"HEAD_DIM": width, "BLOCK_D": width}
        rows = _DELTA_ELEMENTS // width
        case = compile_case(
            _delta_kernel,
            f"flash_attention_delta {width}",
            Blocks(rows, 0, 4, 1),
            {**head, "ROWS": rows},
        )
        cases.append(case)
        for name, kernel in (("key_value", key_value_kernel), ("query", _query_kernel)):
            for causal, capped in ((True, False), (False, False), (True, True)):
                blocks = choose_blocks(name, width, torch.float16, capability, is_capped=capped)
                sizes = {**head, "BLOCK_M": blocks.queries, "BLOCK_N": blocks.keys}
                sizes |= {"HEADS": 8 if name == "key_value" else 32, "GROUP": 4}
                title = f"flash_attention_{name} {width}"
                title += " causal" * causal + " capped" * capped
                forms = {"CAUSAL": causal, "CAPPED": capped}
                cases.append(compile_case(kernel, title, blocks, {**sizes, **forms}))
    return cases
