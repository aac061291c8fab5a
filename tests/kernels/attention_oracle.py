"""Attention written down as one softmax over all tokens, for tests, and the cases they share."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from colab_qlora.kernels.attention import AttentionShape

Tensors = tuple[torch.Tensor, ...]


def cancelling(tensors: Tensors, scale: float) -> dict[str, torch.Tensor]:
    """What cancels in dq and dk of a token that sees itself alone, from (q, k, v, do).

    dq = scale * (do v^T - do o^T) k, and dk likewise with q, are zero there, since o is v; yet each
    of the two products carries a rounding of up to |do| |v|.
    """
    q, k, v, do = (x.detach().double() for x in tensors)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    product = scale * (do.norm(dim=-1) * v.norm(dim=-1))[..., None]
    return {"dq": product * k, "dk": product * q}


def visible(shape: AttentionShape) -> torch.Tensor:
    """bool (1 or q_heads, tokens, tokens): True where a query token may see a key token."""
    token = torch.arange(shape.tokens)
    if shape.packed:
        sequence = torch.zeros(shape.tokens, dtype=torch.long)
        for _, end in shape.bounds():
            sequence[end:] += 1
    else:
        sequence = token // max(shape.seq_length, 1)
    seen = (sequence[:, None] == sequence)[None]
    if shape.causal:
        seen = seen & (token[:, None] >= token)
    if shape.window is not None:
        seen = seen & (token[:, None] - token < shape.window)
    if shape.mask is None:
        return seen
    blocks = torch.zeros(shape.mask.shape[1], shape.tokens, shape.tokens, dtype=torch.bool)
    allowed = shape.mask if shape.mask.dtype == torch.bool else shape.mask > -1e4
    for row in range(shape.batch):
        part = slice(row * shape.seq_length, (row + 1) * shape.seq_length)
        blocks[:, part, part] = allowed[row].cpu()
    return seen & blocks


def truth(tensors: Tensors, shape: AttentionShape) -> Tensors:
    """(o, dq, dk, dv) in float64 by plain torch and autograd, from (q, k, v, do)."""

    def softmax(q, k, v, added):
        scores = (q @ k.transpose(-1, -2)) * shape.scale
        if shape.cap is not None:
            scores = torch.tanh(scores / shape.cap) * shape.cap
        return (scores + added).softmax(-1) @ v

    return differentiate(softmax, tensors, shape, torch.float64, "cpu")


def stock(tensors: Tensors, shape: AttentionShape, device: str = "cpu") -> Tensors:
    """The same by torch's own attention with a mask over all tokens, in the tensors' dtype."""

    def attend(q, k, v, added):
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=added.to(q.dtype), scale=shape.scale
        )

    return differentiate(attend, tensors, shape, tensors[0].dtype, device)


def differentiate(attend, tensors, shape, dtype, device) -> Tensors:
    q, k, v = (x.detach().to(device, dtype).requires_grad_() for x in tensors[:3])
    seen = visible(shape)
    blind = ~seen.any(-1, keepdim=True)
    added = torch.zeros(seen.shape, dtype=torch.float64)
    if shape.mask is not None and shape.mask.is_floating_point():
        added = added + _numbers(shape)
    # a row that sees nothing looks at itself here, and its result is dropped
    seen = seen | (blind & torch.eye(shape.tokens, dtype=torch.bool))
    added = added.masked_fill(~seen, -torch.inf).to(device)[None]
    keys, values = (x.repeat_interleave(shape.group, 1).transpose(0, 1)[None] for x in (k, v))
    o = attend(q.transpose(0, 1)[None], keys, values, added.expand(1, shape.q_heads, -1, -1))
    o = o[0].masked_fill(blind.to(device), 0).transpose(0, 1)
    o.backward(tensors[3].detach().to(device, dtype))
    return o.detach(), q.grad, k.grad, v.grad


def _numbers(shape: AttentionShape) -> torch.Tensor:
    """The finite numbers of an additive mask, (1 or q_heads, tokens, tokens)."""
    found = torch.zeros(shape.mask.shape[1], shape.tokens, shape.tokens, dtype=torch.float64)
    for row in range(shape.batch):
        part = slice(row * shape.seq_length, (row + 1) * shape.seq_length)
        found[:, part, part] = shape.mask[row].double().cpu().clamp(min=-1e4)
    return found


def draw(shape: AttentionShape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensors:
    """(q, k, v, do), normal, contiguous."""
    generator = torch.Generator().manual_seed(seed)
    heads = (shape.q_heads, shape.kv_heads, shape.kv_heads, shape.q_heads)
    sizes = [(shape.tokens, count, shape.head_dim) for count in heads]
    return tuple(torch.randn(size, generator=generator).to(device, dtype) for size in sizes)


def make(
    batch: int,
    seq_length: int,
    heads: tuple[int, int, int] = (4, 2, 24),
    *,
    lengths: tuple[int, ...] = (),
    **options: object,
) -> AttentionShape:
    """A shape with a scale that is not the usual one; `lengths` are those of packed documents."""
    if lengths:
        ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
        options["documents"] = tuple(zip(ends[:-1], ends[1:], strict=True))
    return AttentionShape(batch, seq_length, *heads, scale=0.31, **options)


def on(shape: AttentionShape, device: str) -> AttentionShape:
    """The same shape with its mask on another device."""
    if shape.mask is None:
        return dataclasses.replace(shape)
    return dataclasses.replace(shape, mask=shape.mask.to(device))


def left_padding(batch: int, seq_length: int, padding: tuple[int, ...]) -> torch.Tensor:
    """bool (batch, 1, seq_length, seq_length): the first tokens of each row are padding."""
    real = torch.arange(seq_length) >= torch.tensor(padding)[:, None]
    return (real[:, None, :, None] & real[:, None, None, :]).expand(batch, 1, -1, -1)


def additive(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same mask as the numbers that are added to the scores."""
    return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def slopes(heads: int, seq_length: int) -> torch.Tensor:
    """(1, heads, seq_length, seq_length): scores fall with the distance, another way a head."""
    place = torch.arange(seq_length)
    factor = 0.3 / torch.arange(1, heads + 1)
    return factor[None, :, None, None] * -(place[:, None] - place).abs()[None, None].float()


def cases() -> dict[str, AttentionShape]:
    """Shapes of every kind, small and odd."""
    padding = left_padding(3, 21, (0, 9, 20))
    return {
        "dense": make(2, 37),
        "longer": make(1, 123, (3, 1, 16)),
        "not causal": make(2, 21, causal=False),
        "no groups": make(2, 21, (3, 3, 40)),
        "one token": make(3, 1),
        "packed": make(1, 63, lengths=(20, 20, 1, 22)),
        "packed not causal": make(1, 30, lengths=(7, 23), causal=False),
        "left padding": make(3, 21, mask=padding),
        "left padding, added": make(3, 21, mask=additive(padding, torch.float32)),
        "scores added": make(1, 21, mask=slopes(4, 21), causal=False),
        "window": make(2, 37, window=5),
        "window longer than the rows": make(2, 21, window=21),
        "window and padding": make(3, 21, window=4, mask=padding),
        "packed window": make(1, 63, lengths=(30, 3, 30), window=6),
    }
