"""The gated linear unit and the rotation, there and back, as cases.

"torch" is what transformers computes, in its roundings. Peers are called by their public functions
alone. Where a peer's op does less or more than ours (work in place, say), a comment says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_case import Build, Call, Case, Tensors, differentiable, gradients, randoms
from colab_qlora.kernels.qkv_gradients import place_qkv_gradients
from colab_qlora.kernels.rope import rope_
from colab_qlora.kernels.swiglu import glu_backward, glu_forward

SIZES = ((4096, 4096), (4096, 14336), (8192, 4096))
SIZES_DRY = ((8, 32),)
# tokens, query heads, key heads, columns of a head: Llama 3 8B
ROPE_SIZES = ((4096, 32, 8, 128), (8192, 32, 8, 128))
ROPE_SIZES_DRY = ((8, 4, 2, 16),)
ROPE_BASE = 500_000.0
# columns beside the gradients of q, k and v, for products with LoRA's B
SPARE = 64


def cases(*, is_dry: bool) -> list[Case]:
    """All of this file."""
    found = []
    for size in SIZES_DRY if is_dry else SIZES:
        found += [_glu_forward(size), _glu_backward(size), _glu_backward_and_product(size)]
    for heads in ROPE_SIZES_DRY if is_dry else ROPE_SIZES:
        found += [_rope(*heads), _qkv_gradients(*heads)]
    return found


def _glu_inputs(size: tuple[int, int], *names: str):
    return lambda device, dtype: randoms(device, dtype, **dict.fromkeys(names, size))


def _liger_glu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return liger_swiglu(gate, up)


def _unsloth_glu(t: Tensors) -> Call:
    from unsloth.kernels import swiglu_fg_kernel

    return lambda: [swiglu_fg_kernel(t["gate"][None], t["up"][None])[0]]


def _glu_forward(size: tuple[int, int]) -> Case:
    return Case(
        op="swiglu forward",
        size=f"{size[0]}x{size[1]}",
        make=_glu_inputs(size, "gate", "up"),
        sides={
            "ours": lambda t: lambda: [glu_forward(t["gate"], t["up"])],
            "torch": lambda t: lambda: [functional.silu(t["gate"]) * t["up"]],
            "liger": lambda t: lambda: [_liger_glu(t["gate"], t["up"])],
            "unsloth": _unsloth_glu,
        },
        truth=lambda t: [functional.silu(t["gate"].double()) * t["up"].double()],
        bytes_moved=6 * size[0] * size[1],
    )


def _glu_by_autograd(glu: Callable[[Tensor, Tensor], Tensor]) -> Build:
    def build(t: Tensors) -> Call:
        gate, up = differentiable(t, "gate", "up")
        return gradients([glu(gate, up)], [gate, up], [t["dm"]])

    return build


def _true_glu_backward(t: Tensors) -> list[Tensor]:
    """The gradients of gate and up, and the product."""
    gate, up = (t[name].double().requires_grad_(True) for name in ("gate", "up"))
    product = functional.silu(gate) * up
    return [*torch.autograd.grad(product, [gate, up], t["dm"].double()), product.detach()]


def _glu_backward(size: tuple[int, int]) -> Case:
    def ours(t: Tensors) -> Call:
        return lambda: glu_backward(t["dm"], t["gate"], t["up"], rebuild=False)[:2]

    return Case(
        op="swiglu backward",
        size=f"{size[0]}x{size[1]}",
        make=_glu_inputs(size, "dm", "gate", "up"),
        sides={
            "ours": ours,
            "torch": _glu_by_autograd(lambda gate, up: functional.silu(gate) * up),
            # it writes the gradients over gate and up: only its first call computes the right ones
            "liger": _glu_by_autograd(_liger_glu),
        },
        truth=lambda t: _true_glu_backward(t)[:2],
        bytes_moved=10 * size[0] * size[1],
    )


def _glu_backward_and_product(size: tuple[int, int]) -> Case:
    def ours(t: Tensors) -> Call:
        return lambda: [x for x in glu_backward(t["dm"], t["gate"], t["up"]) if x is not None]

    def unsloth(t: Tensors) -> Call:
        from unsloth.kernels import swiglu_DWf_DW_dfg_kernel

        def call() -> list[Tensor]:
            # in place; it gives back the product, then the gradients of up and gate
            product, d_up, d_gate = swiglu_DWf_DW_dfg_kernel(t["dm"], t["gate"], t["up"])
            return [d_gate, d_up, product]

        return call

    return Case(
        op="swiglu backward + product",
        size=f"{size[0]}x{size[1]}",
        make=_glu_inputs(size, "dm", "gate", "up"),
        sides={"ours": ours, "unsloth": unsloth},
        truth=_true_glu_backward,
        bytes_moved=12 * size[0] * size[1],
    )


Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]


def _tables(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    places = torch.arange(tokens, device=device, dtype=torch.float64)
    angles = torch.outer(places, ROPE_BASE**-exponents).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation as transformers writes it: x (..., tokens, head_dim)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
    from liger_kernel.transformers.functional import liger_rope

    return liger_rope(q, k, cos[None], sin[None])


def _unsloth_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
    from unsloth.kernels import fast_rope_embedding

    return fast_rope_embedding(q, k, cos, sin)


def _by_head(rotate: Rotate) -> Build:
    """For functions that take (batch, heads, tokens, head_dim), and tables in the model's dtype."""

    def build(t: Tensors) -> Call:
        cos, sin = (t[name].to(t["q"].dtype) for name in ("cos", "sin"))
        q, k = (t[name].transpose(0, 1)[None] for name in ("q", "k"))
        return lambda: [x[0].transpose(0, 1) for x in rotate(q, k, cos, sin)]

    return build


def _ours_rope(t: Tensors) -> Call:
    def call() -> list[Tensor]:
        rope_(t["q"], t["k"], t["cos"], t["sin"])
        return [t["q"], t["k"]]

    return call


def _true_rope(t: Tensors) -> list[Tensor]:
    cos, sin = (t[name].double()[:, None] for name in ("cos", "sin"))
    return [_turned(t[name].double(), cos, sin) for name in ("q", "k")]


def _rope(tokens: int, q_heads: int, kv_heads: int, head_dim: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        shapes = {"q": (tokens, q_heads, head_dim), "k": (tokens, kv_heads, head_dim)}
        cos, sin = _tables(tokens, head_dim, device)
        return randoms(device, dtype, **shapes) | {"cos": cos, "sin": sin}

    return Case(
        op="rope",
        size=f"{tokens}x{q_heads}+{kv_heads}x{head_dim}",
        make=make,
        sides={
            "ours": _ours_rope,
            "torch": _by_head(lambda q, k, c, s: [_turned(q, c, s), _turned(k, c, s)]),
            "liger": _by_head(_liger_rope),
            "unsloth": _by_head(_unsloth_rope),
        },
        truth=_true_rope,
        bytes_moved=tokens * 4 * head_dim * (q_heads + kv_heads + 1),
    )


Place = Callable[[Tensors, list[Tensor]], object]


def _ours_place(t: Tensors, outs: list[Tensor]) -> None:
    place_qkv_gradients(t["dq"], t["dk"], t["dv"], t["cos"], t["sin"], *outs)


def _place_one_by_one(t: Tensors, outs: list[Tensor]) -> None:
    for name, out in zip(("dq", "dk", "dv"), outs, strict=True):
        out.copy_(t[name])
    rope_(outs[0], outs[1], t["cos"], t["sin"], inverse=True)


def _stock_place(t: Tensors, outs: list[Tensor]) -> None:
    cos, sin = (t[name].to(t["dq"].dtype)[:, None] for name in ("cos", "sin"))
    outs[0].copy_(_turned(t["dq"], cos, -sin))
    outs[1].copy_(_turned(t["dk"], cos, -sin))
    outs[2].copy_(t["dv"])


def _true_qkv_gradients(t: Tensors) -> list[Tensor]:
    cos, sin = (t[name].double()[:, None] for name in ("cos", "sin"))
    turned = [_turned(t[name].double(), cos, -sin) for name in ("dq", "dk")]
    return [*turned, t["dv"].double()]


def _qkv_gradients(tokens: int, q_heads: int, kv_heads: int, head_dim: int) -> Case:
    heads = (q_heads, kv_heads, kv_heads)
    widths = [count * head_dim for count in heads]

    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        shapes = {
            name: (tokens, count, head_dim)
            for name, count in zip(("dq", "dk", "dv"), heads, strict=True)
        }
        cos, sin = _tables(tokens, head_dim, device)
        wide = torch.zeros(tokens, sum(widths) + SPARE, dtype=dtype, device=device)
        return randoms(device, dtype, **shapes) | {"cos": cos, "sin": sin, "wide": wide}

    def places(place: Place) -> Build:
        def build(t: Tensors) -> Call:
            parts = t["wide"][:, : sum(widths)].split(widths, dim=1)
            outs = [part.unflatten(1, (-1, head_dim)) for part in parts]

            def call() -> list[Tensor]:
                place(t, outs)
                return outs

            return call

        return build

    return Case(
        op="qkv gradients",
        size=f"{tokens}x{q_heads}+{kv_heads}+{kv_heads}x{head_dim}",
        make=make,
        sides={
            "ours": places(_ours_place),
            "torch": places(_stock_place),
            "ours one by one": places(_place_one_by_one),
        },
        truth=_true_qkv_gradients,
        bytes_moved=tokens * 4 * head_dim * (sum(heads) + 1),
    )
