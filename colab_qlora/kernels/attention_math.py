"""Attention in plain torch, for what no kernel takes: any dtype, any mask, any head size.

    P = exp(S - lse),  S = scale * q k^T + bias,  o = P v
    dv = P^T do,  dS = P * (do v^T - rowsum(P * do v^T)),  dq = scale * dS k,  dk = scale * dS^T q

With a cap, S = cap * t + bias where t = tanh(scale * q k^T / cap), and dS gets the factor 1 - t^2.
No kernel of torch's knows that: Gemma 2's attention is computed here wherever Triton's does not fit
(`attention_choice.py`), below sm_80, in float32, with a mask or a window.

Scores are computed in float32 (float64 for float64), a chunk of query rows at a time against the
keys that these rows see, and once more in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from colab_qlora.kernels.attention_shape import AttentionShape

# scores of one chunk: 64 MiB in float32, and about three tensors of that size live at once
_SCORES = 2**24


class _Chunk(NamedTuple):
    batch: slice
    rows: slice
    seen: slice  # the keys that the rows see


def math_forward(
    q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, out: Tensor | None
) -> tuple[Tensor, Tensor]:
    """o (tokens, q_heads, head_dim) and lse (batch, q_heads, seq_length), float32 or float64."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
    lse = q.new_empty((shape.batch, shape.kv_heads, shape.group, shape.seq_length), dtype=wide)
    queries, keys, values, outputs = (_by_key_head(x, shape) for x in (q, k, v, o))
    for chunk in _chunks(shape):
        scores = _scores(queries, keys, shape, chunk, wide)
        total = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(total).exp_()
        part = outputs[chunk.batch, :, :, chunk.rows]
        part.copy_((weights @ _keys(values, chunk, wide)).unflatten(2, part.shape[2:4]))
        lse[chunk.batch, :, :, chunk.rows] = total.unflatten(2, part.shape[2:4]).squeeze(-1)
    return o, lse.flatten(1, 2)


def math_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, shape: AttentionShape,
    outs: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv in the shapes of q, k and v; o is not read."""
    wide = lse.dtype
    empty = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    dq, dk, dv = (new if given is None else given for new, given in zip(empty, outs, strict=True))
    sums = [x.new_zeros(x.shape, dtype=wide) for x in (k, v)]
    dk_sum, dv_sum = (_by_key_head(x, shape).squeeze(2) for x in sums)
    slopes, queries, keys, values, d_queries = (_by_key_head(x, shape) for x in (do, q, k, v, dq))
    totals = lse.unflatten(1, (shape.kv_heads, shape.group))
    for chunk in _chunks(shape):
        total = _queries(totals.unsqueeze(-1), chunk, wide)
        scores, steepness = _scores_and_steepness(queries, keys, shape, chunk, wide)
        weights = scores.sub_(total).exp_()
        slope = _queries(slopes, chunk, wide)
        dv_sum[chunk.batch, :, chunk.seen] += weights.transpose(-1, -2) @ slope
        d_weights = slope @ _keys(values, chunk, wide).transpose(-1, -2)
        # from the unrounded weights, where a kernel takes sum(do * o) with the rounded o
        d_weights -= (weights * d_weights).sum(-1, keepdim=True)
        d_scores = weights.mul_(d_weights).mul_(shape.scale)
        if steepness is not None:
            d_scores.mul_(steepness)
        part = d_queries[chunk.batch, :, :, chunk.rows]
        part.copy_((d_scores @ _keys(keys, chunk, wide)).unflatten(2, part.shape[2:4]))
        query = _queries(queries, chunk, wide)
        dk_sum[chunk.batch, :, chunk.seen] += d_scores.transpose(-1, -2) @ query
    return dq, dk.copy_(sums[0]), dv.copy_(sums[1])


def _by_key_head(x: Tensor, shape: AttentionShape) -> Tensor:
    """(tokens, heads, d) as a view (batch, kv_heads, query heads of each or 1, seq_length, d)."""
    rows = x.view(shape.batch, shape.seq_length, shape.kv_heads, -1, x.shape[-1])
    return rows.permute(0, 2, 3, 1, 4)


def _chunks(shape: AttentionShape) -> Iterator[_Chunk]:
    length, heads = shape.seq_length, shape.q_heads
    batches = max(1, _SCORES // (heads * length * length))
    step = max(1, min(length, _SCORES // (heads * length)))
    for first in range(0, shape.batch, batches):
        for start in range(0, length, step):
            end = min(start + step, length)
            seen = slice(0, end if shape.causal else length)
            yield _Chunk(slice(first, first + batches), slice(start, end), seen)


def _queries(x: Tensor, chunk: _Chunk, wide: torch.dtype) -> Tensor:
    """The chunk's rows as (batch, kv_heads, group * rows, d)."""
    return x[chunk.batch, :, :, chunk.rows].to(wide).flatten(2, 3)


def _keys(x: Tensor, chunk: _Chunk, wide: torch.dtype) -> Tensor:
    """The keys (or values) that the chunk sees, as (batch, kv_heads, keys, d)."""
    return x[chunk.batch, :, 0, chunk.seen].to(wide)


def _scores(
    queries: Tensor, keys: Tensor, shape: AttentionShape, chunk: _Chunk, wide: torch.dtype
) -> Tensor:
    """Scores (batch, kv_heads, group * rows, keys) of a chunk, what is hidden at the bottom."""
    seen = _keys(keys, chunk, wide).transpose(-1, -2)
    scores = (_queries(queries, chunk, wide) @ seen).mul_(shape.scale)
    if shape.cap is not None:
        scores.div_(shape.cap).tanh_().mul_(shape.cap)
    return _hidden_(scores, queries, shape, chunk, wide)


def _scores_and_steepness(
    queries: Tensor, keys: Tensor, shape: AttentionShape, chunk: _Chunk, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """The same, and how much a capped score moves with the product it comes from."""
    if shape.cap is None:
        return _scores(queries, keys, shape, chunk, wide), None
    seen = _keys(keys, chunk, wide).transpose(-1, -2)
    bent = (_queries(queries, chunk, wide) @ seen).mul_(shape.scale).div_(shape.cap).tanh_()
    steepness = 1 - bent.square()
    return _hidden_(bent.mul_(shape.cap), queries, shape, chunk, wide), steepness


def _hidden_(
    scores: Tensor, queries: Tensor, shape: AttentionShape, chunk: _Chunk, wide: torch.dtype
) -> Tensor:
    """`scores`, with those that a row does not see at the bottom."""
    by_row = scores.unflatten(2, (shape.group, -1))
    bias = shape.bias(wide, queries.device)
    if bias is not None:
        bias = bias.expand(shape.batch, -1, -1, -1)[chunk.batch, :, chunk.rows, chunk.seen]
        heads = (shape.kv_heads, shape.group) if bias.shape[1] > 1 else (1, 1)
        by_row.add_(bias.unflatten(1, heads))
    elif shape.causal:
        after = torch.ones(by_row.shape[-2:], dtype=torch.bool, device=queries.device)
        by_row.masked_fill_(after.triu_(1 + chunk.rows.start), -torch.inf)
    return scores
