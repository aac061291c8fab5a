"""Softmax attention, o = softmax(scale * q k^T + mask) v, by the fastest exact kernel at hand.

A forward reads q, k, v and writes o and lse: T tokens, H query heads and K key heads of d columns
are 2 T d (2 H + 2 K) bytes in half precision, for 4 T^2 H d operations (half of that if causal).
Forward and backward are called by hand (a decoder layer is one `autograd.Function`); what a
backward needs is q, k, v, o and lse, with K and V as they came, never expanded to the query heads.

`attention_choice.py` says which kernel a call takes and why, `attention_backends.py` calls it, and
`attention_shape.py` says who may see whom.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from colab_qlora.errors import UserError
from colab_qlora.kernels.attention_backends import BACKENDS, Backend
from colab_qlora.kernels.attention_choice import (
    FEATURES,
    Choice,
    choose_attention,
    explain_attention,
    rank_backends,
)
from colab_qlora.kernels.attention_shape import AttentionShape
from colab_qlora.kernels.launch import layout

__all__ = [
    "AttentionShape",
    "Choice",
    "attention",
    "attention_backward",
    "attention_forward",
    "choose_attention",
    "explain_attention",
    "rank_backends",
]


@torch.no_grad()
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shape: AttentionShape,
    *,
    out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention without a graph.

    Args:
        q: (tokens, q_heads, head_dim), last stride 1, such as columns of a wider buffer.
        k: (tokens, kv_heads, head_dim), likewise.
        v: (tokens, kv_heads, head_dim), likewise.
        shape: lengths, heads and who sees whom.
        out: where o goes, (tokens, q_heads, head_dim); a new contiguous tensor if None.
        backend: name of the kernel; None takes `choose_attention(q, shape).name`, which the shape
            then keeps, so that layers and passes that share it cannot differ.

    Returns:
        o, in the dtype of q, and lse: one float32 tensor (float64 for float64) in a layout that is
        the backend's own, for `attention_backward` to be given as it is.

    Raises:
        UserError: a tensor does not fit the shape, or the backend cannot compute it.
    """
    name = _kept_choice(q, shape) if backend is None else backend
    pair = _checked(name, shape, {"q": q, "k": k, "v": v, "out": out})
    if not shape.tokens:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        o = q.new_empty(q.shape) if out is None else out
        return o, q.new_empty((shape.q_heads, 0), dtype=wide)
    o, lse = pair.forward(q, k, v, shape, out)
    blind = _blind_rows(q, shape)
    return (o if blind is None else o.masked_fill_(blind, 0)), lse


@torch.no_grad()
def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    shape: AttentionShape,
    *,
    backend: str | None = None,
    dq: Tensor | None = None,
    dk: Tensor | None = None,
    dv: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `attention_forward`.

    Args:
        do: gradient of o, (tokens, q_heads, head_dim).
        q, k, v, shape, backend: as given to the forward.
        o, lse: what that forward returned.
        dq, dk, dv: where the gradients go, last stride 1; new tensors if None.

    Returns:
        dq, dk, dv in the shapes and dtype of q, k, v.

    Raises:
        UserError: a tensor does not fit the shape.
    """
    named = {"q": q, "k": k, "v": v, "do": do, "o": o, "dq": dq, "dk": dk, "dv": dv}
    name = _kept_choice(q, shape) if backend is None else backend
    pair = _checked(name, shape, named)
    if not shape.tokens:
        given = zip((dq, dk, dv), (q, k, v), strict=True)
        empty = [x.new_empty(x.shape) if out is None else out for out, x in given]
        return empty[0], empty[1], empty[2]
    blind = _blind_rows(q, shape)
    if blind is not None:
        do = do.masked_fill(blind, 0)
    return pair.backward(do, q, k, v, o, lse, shape, (dq, dk, dv))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, shape: Any, backend: str) -> Tensor:
        o, lse = attention_forward(q, k, v, shape, backend=backend)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.shape, ctx.backend = shape, backend
        return o

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, o, lse = ctx.saved_tensors
        grads = attention_backward(do, q, k, v, o, lse, ctx.shape, backend=ctx.backend)
        return *grads, None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape, *, backend: str | None = None
) -> Tensor:
    """Attention with a graph: o (tokens, q_heads, head_dim) from q, k and v.

    Arguments and errors are those of `attention_forward`. Kept for the backward: q, k, v, o, lse.

    Example:
        >>> shape = AttentionShape(1, 5, q_heads=4, kv_heads=2, head_dim=8, scale=8**-0.5)
        >>> attention(torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8), shape).shape
        torch.Size([5, 4, 8])
    """
    name = _kept_choice(q, shape) if backend is None else backend
    return _Attention.apply(q, k, v, shape, name)


def _kept_choice(q: Tensor, shape: AttentionShape) -> str:
    """The choice for this shape, made once: torch's switches may change before the backward."""
    return shape.kept(("backend", q.dtype, q.device), lambda: choose_attention(q, shape).name)


def _checked(name: str, shape: AttentionShape, tensors: dict[str, Tensor | None]) -> Backend:
    """The backend of that name, after everything has been looked at that it would not look at."""
    # what was looked at once is not looked at again: the layers of a model share a shape
    return shape.kept(
        ("checked", name, *tensors, *map(layout, tensors.values())),
        lambda: _check_all(name, shape, tensors),
    )


def _check_all(name: str, shape: AttentionShape, tensors: dict[str, Tensor | None]) -> Backend:
    if name not in BACKENDS:
        raise UserError("backend is not known", got=repr(name), allowed=", ".join(BACKENDS))
    missing = shape.features - FEATURES[name]
    if missing:
        raise UserError(
            f"backend {name!r} cannot compute this attention exactly",
            got=", ".join(sorted(missing)),
            allowed=", ".join(sorted(FEATURES[name])) or "dense attention",
            do="Leave backend at None",
        )
    q = tensors["q"]
    assert q is not None
    for label, tensor in tensors.items():
        if tensor is not None:
            _check_tensor(label, tensor, q, shape)
    return BACKENDS[name]


def _check_tensor(label: str, tensor: Tensor, q: Tensor, shape: AttentionShape) -> None:
    heads = shape.kv_heads if label in ("k", "v", "dk", "dv") else shape.q_heads
    wanted = (shape.tokens, heads, shape.head_dim)
    if tuple(tensor.shape) != wanted:
        raise UserError(
            f"{label} does not fit the attention's shape",
            got=tuple(tensor.shape),
            allowed=f"(tokens, heads, head_dim) = {wanted}",
        )
    if tensor.dtype != q.dtype or tensor.device != q.device:
        raise UserError(
            f"{label} is not of the dtype and device of q",
            got=f"{tensor.dtype} on {tensor.device}",
            allowed=f"{q.dtype} on {q.device}",
        )
    # autograd may hand over any strides in do, which is the one that is copied if need be
    if label != "do" and tensor.stride(-1) != 1 and shape.head_dim > 1 and tensor.numel():
        raise UserError(
            f"the last stride of {label} is not 1", got=tensor.stride(), allowed="(..., 1)"
        )


def _blind_rows(q: Tensor, shape: AttentionShape) -> Tensor | None:
    """bool (tokens, 1 or q_heads, 1): the rows that see nothing; None if there is no mask."""
    blind = shape.blind_rows(q.device)
    return None if blind is None else blind.transpose(1, 2).flatten(0, 1).unsqueeze(-1)
