"""Attention forward and backward, dense and over packed documents, as cases.

"ours" is the kernel that the dispatcher takes; every other one that could take the call stands
under its own name, and so does our Triton kernel. "torch" is `F.scaled_dot_product_attention` as
transformers calls it: causal where rows are dense, with a mask where documents are packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_case import Build, Call, Case, Tensors, gradients, randoms
from colab_qlora.kernels.attention import (
    AttentionShape,
    attention_backward,
    attention_forward,
    choose_attention,
    rank_backends,
)
from colab_qlora.kernels.attention_choice import enabled_backends
from colab_qlora.kernels.backend import HAS_TRITON, compute_capability, has_tensor_core_dot

# query heads, key heads and head size of Llama 3 8B, Llama 3.2 1B and Gemma 2 9B
LLAMA, SMALL, GEMMA = (32, 8, 128), (32, 8, 64), (16, 8, 256)
# the third is a length that cuDNN does not take
DENSE = (
    *((2, 2048, LLAMA), (1, 8192, LLAMA), (2, 2080, LLAMA)),
    *((2, 2048, SMALL), (2, 2048, GEMMA)),
)
CAP = 50.0  # Gemma 2's
DOCUMENTS = (2601, 1733, 1201, 977, 701, 499, 307, 173)  # 8192 tokens
HEADS_DRY = (4, 2, 16)
DENSE_DRY = ((2, 16, HEADS_DRY),)
DOCUMENTS_DRY = (20, 14, 10, 8, 5, 4, 2, 1)

Attend = Callable[[Tensor, Tensor, Tensor, AttentionShape], Tensor]


def cases(device: torch.device, dtype: torch.dtype, *, is_dry: bool) -> list[Case]:
    """All of this file; which kernels there are depends on device and dtype."""
    heads = HEADS_DRY if is_dry else LLAMA
    shapes = [
        AttentionShape(rows, length, *dense, scale=dense[2] ** -0.5)
        for rows, length, dense in (DENSE_DRY if is_dry else DENSE)
    ]
    # the last is Gemma's, which bounds its scores
    shapes.append(replace(shapes[-1], cap=CAP))
    lengths = DOCUMENTS_DRY if is_dry else DOCUMENTS
    shapes.append(_packed(lengths, heads, device))
    found = []
    for shape in shapes:
        names = _backends(shape, device, dtype, is_dry=is_dry)
        found += [_forward(shape, names), _backward(shape, names)]
    return found


def _packed(
    lengths: Sequence[int], heads: tuple[int, int, int], device: torch.device
) -> AttentionShape:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    bounds = ends.tolist()
    return AttentionShape(
        1,
        bounds[-1],
        *heads,
        scale=heads[2] ** -0.5,
        cu_seqlens=ends.to(device, torch.int32),
        documents=tuple(zip(bounds[:-1], bounds[1:], strict=True)),
    )


def _backends(
    shape: AttentionShape, device: torch.device, dtype: torch.dtype, *, is_dry: bool
) -> list[str]:
    capability = compute_capability(device.index or 0) if device.type == "cuda" else None
    ranked = rank_backends(shape, dtype, device.type, capability, enabled_backends())
    names = [choice.name for choice in ranked]
    has_dot = HAS_TRITON and has_tensor_core_dot(torch.empty(0, device=device))
    # where others come first, it is timed all the same
    if has_dot and not is_dry and "triton" not in names:
        names.append("triton")
    return names


def _sizes(shape: AttentionShape) -> tuple[str, int]:
    """The size as text, and the query-key pairs that are seen."""
    lengths = [end - start for start, end in _documents(shape)]
    kind = f"{len(lengths)} packed" if shape.packed else "dense"
    kind += "" if shape.cap is None else ", capped"
    heads = f"{shape.q_heads}/{shape.kv_heads}x{shape.head_dim}"
    return f"{shape.batch}x{shape.seq_length} {heads} {kind}", sum(n * n for n in lengths) // 2


def _documents(shape: AttentionShape) -> Iterator[tuple[int, int]]:
    """(start, end) of every sequence that attends to itself."""
    if shape.packed:
        yield from shape.bounds()
        return
    for row in range(shape.batch):
        yield row * shape.seq_length, (row + 1) * shape.seq_length


def _inputs(shape: AttentionShape, *, with_gradient: bool):
    queries = (shape.tokens, shape.q_heads, shape.head_dim)
    keys = (shape.tokens, shape.kv_heads, shape.head_dim)
    shapes = {"q": queries, "k": keys, "v": keys} | ({"do": queries} if with_gradient else {})
    return lambda device, dtype: randoms(device, dtype, **shapes)


def _chosen(shape: AttentionShape) -> Callable[[Tensors], str]:
    return lambda t: f"ours is {choose_attention(t['q'], shape).name}"


def _forward(shape: AttentionShape, names: Sequence[str]) -> Case:
    def ours(name: str | None) -> Build:
        def build(t: Tensors) -> Call:
            return lambda: attention_forward(t["q"], t["k"], t["v"], shape, backend=name)[:1]

        return build

    text, pairs = _sizes(shape)
    sides: dict[str, Build] = {"ours": ours(None)}
    sides["torch"] = lambda t: lambda: [_torch(t["q"], t["k"], t["v"], shape)]
    if shape.packed:
        sides["F.sdpa by document"] = lambda t: (
            lambda: [_torch_by_document(t["q"], t["k"], t["v"], shape)]
        )
    return Case(
        op="attention forward",
        size=text,
        make=_inputs(shape, with_gradient=False),
        sides=sides | {name: ours(name) for name in names},
        truth=lambda t: [_true_attention(t["q"], t["k"], t["v"], None, shape)[0]],
        operations=4 * pairs * shape.q_heads * shape.head_dim,
        notes=_chosen(shape),
    )


def _backward(shape: AttentionShape, names: Sequence[str]) -> Case:
    def ours(name: str | None) -> Build:
        def build(t: Tensors) -> Call:
            inputs = (t["q"], t["k"], t["v"])
            o, lse = attention_forward(*inputs, shape, backend=name)
            return lambda: attention_backward(t["do"], *inputs, o, lse, shape, backend=name)

        return build

    def by_autograd(attend: Attend) -> Build:
        def build(t: Tensors) -> Call:
            inputs = [t[name].requires_grad_(True) for name in ("q", "k", "v")]
            return gradients([attend(*inputs, shape)], inputs, [t["do"]])

        return build

    text, pairs = _sizes(shape)
    sides = {"ours": ours(None), "torch": by_autograd(_torch)}
    if shape.packed:
        sides["F.sdpa by document"] = by_autograd(_torch_by_document)
    return Case(
        op="attention backward",
        size=text,
        make=_inputs(shape, with_gradient=True),
        sides=sides | {name: ours(name) for name in names},
        truth=lambda t: _true_attention(t["q"], t["k"], t["v"], t["do"], shape)[1:],
        operations=10 * pairs * shape.q_heads * shape.head_dim,
        notes=_chosen(shape),
    )


def _torch(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    lead = (shape.batch, shape.seq_length)
    q, k, v = (x.unflatten(0, lead).transpose(1, 2) for x in (q, k, v))
    if shape.cap is not None:
        return _eager(q, k, v, shape).transpose(1, 2).flatten(0, 1)
    mask = None
    if shape.packed:
        # transformers repeats keys and values where it passes a mask
        k, v = (x.repeat_interleave(shape.group, dim=1) for x in (k, v))
        mask = shape.kept("benchmark mask", lambda: _block_mask(shape, q.device))
    o = functional.scaled_dot_product_attention(
        q, k, v, mask, is_causal=mask is None, scale=shape.scale, enable_gqa=mask is None
    )
    return o.transpose(1, 2).flatten(0, 1)


def _eager(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    """As transformers computes Gemma 2: no kernel of torch's bounds scores."""
    assert shape.cap is not None
    k, v = (x.repeat_interleave(shape.group, dim=1) for x in (k, v))
    scores = torch.tanh(q @ k.transpose(-1, -2) * (shape.scale / shape.cap)) * shape.cap
    hidden = shape.kept("benchmark triangle", lambda: _later(scores))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
    return weights.to(q.dtype) @ v


def _later(scores: Tensor) -> Tensor:
    """True where a key comes after the query."""
    return torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu_(1)


def _torch_by_document(q: Tensor, k: Tensor, v: Tensor, shape: AttentionShape) -> Tensor:
    found = []
    for start, end in _documents(shape):
        parts = [x[start:end].transpose(0, 1)[None] for x in (q, k, v)]
        o = functional.scaled_dot_product_attention(
            parts[0], parts[1], parts[2], is_causal=True, scale=shape.scale, enable_gqa=True
        )
        found.append(o[0].transpose(0, 1))
    return torch.cat(found)


def _block_mask(shape: AttentionShape, device: torch.device) -> Tensor:
    number, _ = shape.places(device)
    return (number[:, None] == number).tril_()[None, None]


def _true_attention(
    q: Tensor, k: Tensor, v: Tensor, do: Tensor | None, shape: AttentionShape
) -> list[Tensor]:
    """o, and with `do` the gradients of q, k and v, in float64, a document and key head a time."""
    found = [torch.empty_like(x, dtype=torch.float64) for x in (q, q, k, v)]
    for start, end in _documents(shape):
        hidden = _later(torch.empty(end - start, end - start, device=q.device))
        for head in range(shape.kv_heads):
            queries = slice(head * shape.group, (head + 1) * shape.group)
            places = [(slice(start, end), heads) for heads in (queries, head, head)]
            parts = [x[at].double() for x, at in zip((q, k, v), places, strict=True)]
            parts = [part.requires_grad_(do is not None) for part in parts]
            scores = torch.einsum("igd,jd->gij", parts[0], parts[1]) * shape.scale
            if shape.cap is not None:
                scores = torch.tanh(scores / shape.cap) * shape.cap
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            o = torch.einsum("gij,jd->igd", weights, parts[2])
            found[0][places[0]] = o.detach()
            if do is not None:
                grads = torch.autograd.grad(o, parts, do[places[0]].double())
                for total, at, grad in zip(found[1:], places, grads, strict=True):
                    total[at] = grad
    return found
