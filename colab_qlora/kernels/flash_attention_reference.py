"""Exact attention over packed documents in plain torch, forward and backward.

    S = scale * q k^T,  lse = log sum exp S,  P = exp(S - lse),  o = P v
    dv = P^T do,  dS = P * (do v^T - rowsum(do * o)),  dq = scale * dS k,  dk = scale * dS^T q

With a cap, S = cap * t where t = tanh(scale * q k^T / cap), and dS gets the factor 1 - t^2. Scores
are computed in float32 (float64 for float64) a few rows of a document at a time, of a causal one
only the columns up to the last of these rows. K and V are not repeated for grouped queries: the
query heads that share a key head are the rows of one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from colab_qlora.kernels.flash_attention_parts import check_attention

# rows of q at a time: 9 heads' scores against 512 keys are 1.2 MB of float32, which stays in a
# cache, and 7/16 of the scores of a causal document of 512 tokens are never computed
_ROWS = 64


@torch.no_grad()
def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    causal: bool = True,
    cap: float | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`flash_attention_forward` in torch; lse is float64 for float64, `max_seqlen` is not read."""
    check_attention(q, k, v, scale, cu_seqlens, {"out": out}, {}, cap)
    wide = _wide(q)
    o = q.new_empty(q.shape) if out is None else out
    lse = q.new_zeros((q.shape[1], q.shape[0]), dtype=wide)
    ends = cu_seqlens.tolist()
    o[ends[-1] :] = 0
    for begin, end in zip(ends, ends[1:], strict=False):
        keys, values = (_by_head(x[begin:end], wide) for x in (k, v))
        for rows, seen in _row_chunks(begin, end, causal):
            queries = _by_key_head(q[rows], keys.shape[0], wide)
            scores, factor, _ = _bounded(queries @ keys[:, :seen].mT, scale, cap)
            _hide_later_(scores, rows, begin, causal)
            # not exp(S - lse): the rounding of a large lse would be an error of every weight
            peak = scores.amax(-1, keepdim=True).mul_(factor)
            weights = _exponentials(scores, factor, peak)
            total = weights.sum(-1, keepdim=True)
            _write(o[rows], (weights @ values[:, :seen]).div_(total))
            lse[:, rows] = total.log_().add_(peak).view(lse.shape[0], -1)
    return o, lse


@torch.no_grad()
def attention_reference_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    scale: float,
    cu_seqlens: Tensor,
    max_seqlen: int | None = None,
    causal: bool = True,
    cap: float | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`flash_attention_backward` in torch."""
    check_attention(
        q, k, v, scale, cu_seqlens, {"do": do, "o": o, "dq": dq}, {"dk": dk, "dv": dv}, cap
    )
    dq, dk, dv = (
        x.new_empty(x.shape) if buffer is None else buffer
        for x, buffer in ((q, dq), (k, dk), (v, dv))
    )
    ends = cu_seqlens.tolist()
    for gradient in (dq, dk, dv):
        gradient[ends[-1] :] = 0
    for begin, end in zip(ends, ends[1:], strict=False):
        dk[begin:end], dv[begin:end] = _document_backward(
            (do, q, k, v, o, lse), dq, begin, end, scale=scale, causal=causal, cap=cap
        )
    return dq, dk, dv


def _document_backward(
    tensors: tuple[Tensor, ...],
    dq: Tensor,
    begin: int,
    end: int,
    *,
    scale: float,
    causal: bool,
    cap: float | None,
) -> tuple[Tensor, Tensor]:
    """Write dq of one document, tokens `begin` to `end`; return its dk and dv, not yet rounded."""
    do, q, k, v, o, lse = tensors
    wide = _wide(q)
    keys, values = (_by_head(x[begin:end], wide) for x in (k, v))
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    for rows, seen in _row_chunks(begin, end, causal):
        slopes, queries, outputs = (_by_key_head(x[rows], keys.shape[0], wide) for x in (do, q, o))
        scores, factor, steepness = _bounded(queries @ keys[:, :seen].mT, scale, cap)
        _hide_later_(scores, rows, begin, causal)
        total = lse[:, rows].reshape(*queries.shape[:2], 1)
        weights = _exponentials(scores, factor, total)
        dv[:, :seen].baddbmm_(weights.mT, slopes)
        d_weights = slopes @ values[:, :seen].mT
        delta = outputs.mul_(slopes).sum(-1, keepdim=True)
        d_scores = d_weights.sub_(delta).mul_(weights)
        if steepness is not None:
            d_scores.mul_(steepness)
        dk[:, :seen].baddbmm_(d_scores.mT, queries, alpha=scale)
        _write(dq[rows], (d_scores @ keys[:, :seen]).mul_(scale))
    return dk.transpose(0, 1), dv.transpose(0, 1)


def _wide(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _row_chunks(begin: int, end: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Rows of a document, as tokens, and how many of its keys they see."""
    for first in range(begin, end, _ROWS):
        last = min(first + _ROWS, end)
        yield slice(first, last), (last if causal else end) - begin


def _by_head(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(rows, heads, head_dim) as (heads, rows, head_dim)."""
    return x.to(dtype).transpose(0, 1)


def _by_key_head(x: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """(rows, q_heads, head_dim) as a new (kv_heads, group * rows, head_dim)."""
    rows, _, width = x.shape
    grouped = x.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)
    return grouped.to(dtype, memory_format=torch.contiguous_format, copy=True).view(
        kv_heads, -1, width
    )


def _write(out: Tensor, x: Tensor) -> None:
    """Copy (kv_heads, group * rows, head_dim) to `out` (rows, q_heads, head_dim)."""
    rows, _, width = out.shape
    out.copy_(x.view(-1, rows, width).transpose(0, 1))


def _bounded(
    products: Tensor, scale: float, cap: float | None
) -> tuple[Tensor, float, Tensor | None]:
    """What times a factor are the scores, that factor, and how steep a cap leaves each of them."""
    if cap is None:
        return products, scale, None
    bent = products.mul_(scale / cap).tanh_()
    return bent, cap, 1 - bent * bent


def _hide_later_(scores: Tensor, rows: slice, begin: int, causal: bool) -> None:
    """-inf where a key comes after the query."""
    if causal:
        count, first = rows.stop - rows.start, rows.start - begin
        square = scores.view(scores.shape[0], -1, count, scores.shape[2])[..., first:]
        later = torch.ones(count, count, dtype=torch.bool, device=scores.device).triu_(1)
        square.masked_fill_(later, -torch.inf)


def _exponentials(scores: Tensor, scale: float, shift: Tensor) -> Tensor:
    """exp(scale * scores - shift), in place; add's alpha is a fused multiplication, unrounded."""
    return torch.add(-shift, scores, alpha=scale, out=scores).exp_()
