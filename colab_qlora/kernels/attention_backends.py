"""The attention kernels behind one face: a forward and a backward over plain tensors.

    forward(q, k, v, shape, out) -> (o, lse)
    backward(do, q, k, v, o, lse, shape, outs) -> (dq, dk, dv)

q, o and do are (tokens, q_heads, head_dim), k and v (tokens, kv_heads, head_dim), with the last
stride 1. `out` and the three of `outs` are buffers to fill, or None. What a backward needs is q, k,
v, o and lse; lse is one float32 (float64 for float64) tensor whose layout is the backend's own.
K and V are never kept expanded: where a kernel knows no grouped heads they are repeated inside the
call, and their gradients are summed back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colab_qlora.kernels.attention_layout import (
    Grads,
    aligned,
    all_placed,
    by_head,
    by_token,
    for_flash,
    placed,
    repeated,
    summed,
)
from colab_qlora.kernels.attention_math import math_backward, math_forward
from colab_qlora.kernels.attention_shape import AttentionShape

_aten = torch.ops.aten

# the memory-efficient kernel keeps its logsumexp in rows of a multiple of 32, filled with inf
_EFFICIENT_LSE_ROWS = 32
_CAUSAL_FROM_TOP_LEFT = 1
# of K and V with a head for every query head: more than this is done a few heads at a time
MOST_REPEATED_BYTES = 256 * 2**20


class Backend(NamedTuple):
    """A pair of functions, see the module's docstring."""

    forward: Callable[
        [Tensor, Tensor, Tensor, AttentionShape, Tensor | None], tuple[Tensor, Tensor]
    ]
    backward: Callable[..., Grads]


def _cudnn_forward(q, k, v, shape, out):
    q, k, v = (by_head(aligned(x), shape) for x in (q, k, v))
    result = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, shape.causal, False, scale=shape.scale
    )
    return placed(by_token(result[0], shape), out), result[1]


def _cudnn_backward(do, q, k, v, o, lse, shape, outs):
    do, q, k, v, o = (by_head(aligned(x), shape) for x in (do, q, k, v, o))
    seed, length = _no_seed(lse), shape.seq_length
    grads = _aten._scaled_dot_product_cudnn_attention_backward(
        do, q, k, v, o, lse, seed, seed, None, None, None, length, length, 0.0, shape.causal,
        scale=shape.scale,
    )  # fmt: skip
    return all_placed([by_token(x, shape) for x in grads], outs)


def _flash_options(x: Tensor, shape: AttentionShape) -> tuple[Tensor | None, dict[str, Any]]:
    """`cum_seq` (None for a dense batch) and the keyword arguments of the flash operators."""
    options: dict[str, Any] = {"scale": shape.scale}
    if "window" in shape.features:
        assert shape.window is not None
        # flash counts the rows before the present one
        options |= {"window_size_left": shape.window - 1, "window_size_right": 0}
    return (shape.boundaries(x.device) if shape.packed else None), options


def _flash_forward(q, k, v, shape, out):
    starts, options = _flash_options(q, shape)
    q, k, v = (for_flash(x, shape) for x in (q, k, v))
    longest = shape.longest
    result = _aten._flash_attention_forward(
        q, k, v, starts, starts, longest, longest, 0.0, shape.causal, False, **options
    )
    return placed(result[0].reshape(-1, *result[0].shape[-2:]), out), result[1]


def _flash_backward(do, q, k, v, o, lse, shape, outs):
    starts, options = _flash_options(q, shape)
    do, q, k, v, o = (for_flash(x, shape) for x in (do, q, k, v, o))
    seed, longest = _no_seed(lse), shape.longest
    grads = _aten._flash_attention_backward(
        do, q, k, v, o, lse, starts, starts, longest, longest, 0.0, shape.causal, seed, seed,
        **options,
    )  # fmt: skip
    return all_placed([x.reshape(-1, *x.shape[-2:]) for x in grads], outs)


def _triton_forward(q, k, v, shape, out):
    from colab_qlora.kernels.flash_attention import flash_attention_forward

    return flash_attention_forward(q, k, v, out=out, **_triton_options(q, shape))


def _triton_backward(do, q, k, v, o, lse, shape, outs):
    from colab_qlora.kernels.flash_attention_backward import flash_attention_backward

    buffers = dict(zip(("dq", "dk", "dv"), outs, strict=True))
    return flash_attention_backward(do, q, k, v, o, lse, **buffers, **_triton_options(q, shape))


def _triton_options(q: Tensor, shape: AttentionShape) -> dict[str, Any]:
    return {
        "scale": shape.scale,
        "cu_seqlens": shape.boundaries(q.device),
        "max_seqlen": shape.longest,
        "causal": shape.causal,
        "cap": shape.cap,
    }


def _efficient_forward(q, k, v, shape, out):
    q, k, v = (by_head(x, shape) for x in (aligned(q), *repeated(k, v, shape)))
    result = _aten._scaled_dot_product_efficient_attention(
        q, k, v, _efficient_bias(q, shape), True, 0.0, shape.causal, scale=shape.scale
    )
    return placed(by_token(result[0], shape), out), result[1]


def _efficient_backward(do, q, k, v, o, lse, shape, outs):
    # the kernel takes the strides of o for granted
    do, q, o = aligned(do), aligned(q), o.contiguous()
    do, q, k, v, o = (by_head(x, shape) for x in (do, q, *repeated(k, v, shape), o))
    if lse.shape[-1] % _EFFICIENT_LSE_ROWS:
        lse = torch.nn.functional.pad(
            lse, (0, -lse.shape[-1] % _EFFICIENT_LSE_ROWS), value=torch.inf
        )
    seed = _no_seed(lse)
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        do, q, k, v, _efficient_bias(q, shape), o, lse, seed, seed, 0.0,
        [True, True, True, False], shape.causal, scale=shape.scale,
    )  # fmt: skip
    dq, dk, dv = (by_token(x, shape) for x in (dq, dk, dv))
    return placed(dq, outs[0]), summed(dk, shape, outs[1]), summed(dv, shape, outs[2])


def _efficient_bias(q: Tensor, shape: AttentionShape) -> Tensor | None:
    bias = shape.bias(q.dtype, q.device)
    length = shape.seq_length
    return None if bias is None else bias.expand(shape.batch, shape.q_heads, length, length)


def _efficient_varlen_forward(q, k, v, shape, out):
    starts, longest = shape.boundaries(q.device), shape.longest
    q, k, v = (x.unsqueeze(0) for x in (aligned(q), *repeated(k, v, shape)))
    kind = _CAUSAL_FROM_TOP_LEFT if shape.causal else 0
    result = _aten._efficient_attention_forward(
        q, k, v, None, starts, starts, longest, longest, 0.0, kind, True, scale=shape.scale
    )
    # the kernel's own layout has a row of the longest document's length for every document
    number, place = shape.places(q.device)
    return placed(result[0].squeeze(0), out), result[1][number, :, place].t().contiguous()


def _efficient_varlen_backward(do, q, k, v, o, lse, shape, outs):
    starts, longest = shape.boundaries(q.device), shape.longest
    rows = -(-longest // _EFFICIENT_LSE_ROWS) * _EFFICIENT_LSE_ROWS
    padded = lse.new_full((starts.numel() - 1, shape.q_heads, rows), torch.inf)
    number, place = shape.places(q.device)
    padded[number, :, place] = lse.t()
    do, q, o = aligned(do), aligned(q), o.contiguous()
    do, q, k, v, o = (x.unsqueeze(0) for x in (do, q, *repeated(k, v, shape), o))
    seed, kind = _no_seed(lse), _CAUSAL_FROM_TOP_LEFT if shape.causal else 0
    grads = _aten._efficient_attention_backward(
        do, q, k, v, None, o, starts, starts, longest, longest, padded, 0.0, seed, seed, kind,
        False, scale=shape.scale,
    )  # fmt: skip
    dq, dk, dv = (x.squeeze(0) for x in grads[:3])
    return placed(dq, outs[0]), summed(dk, shape, outs[1]), summed(dv, shape, outs[2])


def _cpu_flash_forward(q, k, v, shape, out):
    q, k, v = (by_head(x, shape) for x in (q, *repeated(k, v, shape)))
    o, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, shape.causal, attn_mask=shape.bias(q.dtype, q.device), scale=shape.scale
    )
    return placed(by_token(o, shape), out), lse


def _cpu_flash_backward(do, q, k, v, o, lse, shape, outs):
    do, q, k, v, o = (by_head(x, shape) for x in (do, q, *repeated(k, v, shape), o))
    grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        do, q, k, v, o, lse, 0.0, shape.causal,
        attn_mask=shape.bias(q.dtype, q.device), scale=shape.scale,
    )  # fmt: skip
    dq, dk, dv = (by_token(x, shape) for x in grads)
    return placed(dq, outs[0]), summed(dk, shape, outs[1]), summed(dv, shape, outs[2])


def _by_document(dense: Backend) -> Backend:
    """The same backend for packed documents too: one call a run of documents of equal length."""

    def forward(q, k, v, shape, out):
        if not shape.packed:
            return dense.forward(q, k, v, shape, out)
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        o = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        lse = q.new_empty((shape.q_heads, shape.tokens), dtype=wide)
        for start, count, length in shape.runs():
            part = slice(start, start + count * length)
            run = shape.of_run(count, length)
            _, rows = dense.forward(q[part], k[part], v[part], run, o[part])
            lse[:, part].unflatten(1, (count, length)).copy_(rows[..., :length].transpose(0, 1))
        return o, lse

    def backward(do, q, k, v, o, lse, shape, outs):
        if not shape.packed:
            return dense.backward(do, q, k, v, o, lse, shape, outs)
        grads = tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format) if given is None else given
            for given, x in zip(outs, (q, k, v), strict=True)
        )
        for start, count, length in shape.runs():
            part = slice(start, start + count * length)
            rows = lse[:, part].unflatten(1, (count, length)).transpose(0, 1).contiguous()
            dense.backward(
                *(x[part] for x in (do, q, k, v, o)), rows, shape.of_run(count, length),
                tuple(x[part] for x in grads),
            )  # fmt: skip
        return grads

    return Backend(forward, backward)


def _by_head_group(dense: Backend) -> Backend:
    """The same backend, a few key/value heads at a time where repeating them all takes too much.

    Every head is computed alone in any case, so the results are the same bits.
    """

    def forward(q, k, v, shape, out):
        parts = head_parts(shape, q.element_size())
        if len(parts) == 1:
            return dense.forward(q, k, v, shape, out)
        o = torch.empty_like(q, memory_format=torch.contiguous_format) if out is None else out
        rows = []
        for few, queries, keys in parts:
            found = dense.forward(q[:, queries], k[:, keys], v[:, keys], few, o[:, queries])
            rows.append(found[1])
        return o, torch.cat(rows, dim=1)

    def backward(do, q, k, v, o, lse, shape, outs):
        parts = head_parts(shape, q.element_size())
        if len(parts) == 1:
            return dense.backward(do, q, k, v, o, lse, shape, outs)
        grads = tuple(
            torch.empty_like(x, memory_format=torch.contiguous_format) if given is None else given
            for given, x in zip(outs, (q, k, v), strict=True)
        )
        for few, queries, keys in parts:
            dense.backward(
                do[:, queries], q[:, queries], k[:, keys], v[:, keys], o[:, queries],
                lse[:, queries].contiguous(), few,
                (grads[0][:, queries], grads[1][:, keys], grads[2][:, keys]),
            )  # fmt: skip
        return grads

    return Backend(forward, backward)


def head_parts(shape: AttentionShape, itemsize: int) -> list[tuple[AttentionShape, slice, slice]]:
    """(shape, query heads, key/value heads) of each call; one if K and V need no division."""
    a_head = 2 * shape.tokens * shape.group * shape.head_dim * itemsize
    count = max(1, MOST_REPEATED_BYTES // max(a_head, 1))
    if shape.group == 1 or count >= shape.kv_heads:
        return [(shape, slice(None), slice(None))]
    parts = []
    for first in range(0, shape.kv_heads, count):
        last = min(first + count, shape.kv_heads)
        queries = slice(first * shape.group, last * shape.group)
        mask = shape.mask
        if mask is not None and mask.shape[1] > 1:
            mask = mask[:, queries]
        count_q = (last - first) * shape.group
        few = replace(shape, mask=mask, q_heads=count_q, kv_heads=last - first)
        parts.append((few, queries, slice(first, last)))
    return parts


def _no_seed(like: Tensor) -> Tensor:
    """What stands for the state of the random numbers where nothing is dropped."""
    return like.new_empty(0, dtype=torch.int64)


BACKENDS = {
    "cudnn": Backend(_cudnn_forward, _cudnn_backward),
    "flash": Backend(_flash_forward, _flash_backward),
    "flash_varlen": Backend(_flash_forward, _flash_backward),
    "triton": Backend(_triton_forward, _triton_backward),
    "efficient_varlen": Backend(_efficient_varlen_forward, _efficient_varlen_backward),
    "efficient": _by_document(_by_head_group(Backend(_efficient_forward, _efficient_backward))),
    "cpu_flash": _by_document(_by_head_group(Backend(_cpu_flash_forward, _cpu_flash_backward))),
    "math": _by_document(Backend(math_forward, math_backward)),
}
