"""From the tensors of `attention_backends.py` to those that torch's kernels take, and back.

Ours are (tokens, heads, head_dim). Some kernels want the sequences of a batch apart, the heads
before the tokens, a head of K and V for every query head, or rows at aligned addresses; results go
back into the shape and the buffer that were asked for. All are views wherever a view will do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from colab_qlora.kernels.attention_shape import AttentionShape

# vector loads of the CUDA kernels; they fail, or read wrongly, from other addresses
_ALIGNMENT_BYTES = 16

Outs = tuple[Tensor | None, Tensor | None, Tensor | None]
Grads = tuple[Tensor, Tensor, Tensor]


def by_head(x: Tensor, shape: AttentionShape) -> Tensor:
    """(tokens, heads, head_dim) as a view (batch, heads, seq_length, head_dim)."""
    token, head, column = x.stride()
    batch, length = shape.batch, shape.seq_length
    # one view, where `view` and `transpose` are two
    sizes = (batch, x.shape[1], length, x.shape[2])
    return x.as_strided(sizes, (length * token, head, token, column))


def by_token(x: Tensor, shape: AttentionShape) -> Tensor:
    """The inverse of `by_head`; a view where the kernel kept the order of the queries."""
    return x.transpose(1, 2).reshape(shape.tokens, x.shape[1], x.shape[3])


def for_flash(x: Tensor, shape: AttentionShape) -> Tensor:
    """(batch, seq_length, heads, head_dim); of packed documents as it is."""
    x = aligned(x)
    return x if shape.packed else x.view(shape.batch, shape.seq_length, *x.shape[1:])


def repeated(k: Tensor, v: Tensor, shape: AttentionShape) -> tuple[Tensor, Tensor]:
    """K and V with a head for every query head; themselves where they have one already."""
    if shape.group == 1:
        return aligned(k), aligned(v)
    sizes = (shape.tokens, shape.kv_heads, shape.group, shape.head_dim)
    heads = (shape.tokens, shape.q_heads, shape.head_dim)
    return k.unsqueeze(2).expand(sizes).reshape(heads), v.unsqueeze(2).expand(sizes).reshape(heads)


def summed(expanded: Tensor, shape: AttentionShape, out: Tensor | None) -> Tensor:
    """The gradient of a repeated K or V, summed over the query heads that shared it."""
    if shape.group == 1:
        return placed(expanded, out)
    by_group = expanded.unflatten(1, (shape.kv_heads, shape.group))
    return by_group.sum(2) if out is None else torch.sum(by_group, 2, out=out)


def aligned(x: Tensor) -> Tensor:
    """`x`, or a contiguous copy if its rows do not start at multiples of 16 bytes."""
    if x.device.type == "cpu" and x.stride(-1) == 1:
        return x
    size = x.element_size()
    offsets = [x.data_ptr(), *(stride * size for stride in x.stride()[:-1])]
    if x.stride(-1) == 1 and not any(offset % _ALIGNMENT_BYTES for offset in offsets):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def placed(result: Tensor, out: Tensor | None) -> Tensor:
    """The result, copied to where it is asked for, if anywhere."""
    return result if out is None else out.copy_(result)


def all_placed(results: list[Tensor], outs: Outs) -> Grads:
    """`placed` for the gradients of q, k and v."""
    dq, dk, dv = (placed(result, out) for result, out in zip(results, outs, strict=True))
    return dq, dk, dv
