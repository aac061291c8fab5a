"""The element-wise ops of a layer, as cases: RMSNorm, the gated linear unit, the rotation.

"torch" is what transformers computes, in its roundings; other torch ops of the same meaning stand
under their own names. Peers are called by their public functions alone. Where a peer's op does less
or more than ours (no residual, a weight gradient, work in place), a comment says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_case import Call, Case, Tensors, differentiable, gradients, randoms
from colab_qlora.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from colab_qlora.kernels.rope import rope_
from colab_qlora.kernels.swiglu import glu_backward, glu_forward

EPS = 1e-5
SIZES = ((4096, 4096), (4096, 14336), (8192, 4096))
SIZES_DRY = ((8, 32),)
# tokens, query heads, key heads, columns of a head: Llama 3 8B
ROPE_SIZES = ((4096, 32, 8, 128), (8192, 32, 8, 128))
ROPE_SIZES_DRY = ((8, 4, 2, 16),)
ROPE_BASE = 500_000.0


def cases(*, is_dry: bool) -> list[Case]:
    """All of this file."""
    found = []
    for size in SIZES_DRY if is_dry else SIZES:
        for has_residual in (False, True):
            found += [_norm_forward(size, has_residual), _norm_backward(size, has_residual)]
        found += [_glu_forward(size), _glu_backward(size, False), _glu_backward(size, True)]
    found += [_rope(*size) for size in (ROPE_SIZES_DRY if is_dry else ROPE_SIZES)]
    return found


def stock_norm(x: Tensor, weight: Tensor) -> Tensor:
    """RMSNorm as transformers' models have it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def _true_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _size_text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _norm_inputs(size: tuple[int, int], *names: str):
    shapes = dict.fromkeys(("x", *names), size) | {"weight": size[1:]}
    return lambda device, dtype: randoms(device, dtype, **shapes)


def _norm_forward(size: tuple[int, int], has_residual: bool) -> Case:
    def ours(t: Tensors) -> Call:
        def call() -> list[Tensor]:
            y, _, h = rms_norm_forward(t["x"], t["weight"], EPS, residual=t.get("residual"))
            return [y, h] if has_residual else [y]

        return call

    def composed(norm) -> Call:
        def build(t: Tensors) -> Call:
            def call() -> list[Tensor]:
                if not has_residual:
                    return [norm(t["x"], t["weight"])]
                h = t["x"] + t["residual"]
                return [norm(h, t["weight"]), h]

            return call

        return build

    def liger(t: Tensors) -> Call:
        from liger_kernel.transformers.functional import liger_fused_add_rms_norm, liger_rms_norm

        options = (t["weight"], EPS, 0.0, "llama", False)
        if has_residual:
            return lambda: liger_fused_add_rms_norm(t["x"], t["residual"], *options)
        return lambda: [liger_rms_norm(t["x"], *options)]

    def truth(t: Tensors) -> list[Tensor]:
        h = t["x"].double() + (t["residual"].double() if has_residual else 0)
        y = _true_norm(h, t["weight"].double())
        return [y, h] if has_residual else [y]

    rows, width = size
    return Case(
        op=f"rms_norm forward{' + residual' if has_residual else ''}",
        size=_size_text(size),
        make=_norm_inputs(size, *(["residual"] if has_residual else [])),
        sides={
            "ours": ours,
            "torch": composed(stock_norm),
            "F.rms_norm": composed(_torch_norm),
            "liger": liger,
            "unsloth": composed(_unsloth_norm),  # it has no norm with a residual for training
        },
        truth=truth,
        bytes_moved=rows * ((8 if has_residual else 4) * width + 4),
    )


def _torch_norm(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, EPS)


def _unsloth_norm(x: Tensor, weight: Tensor) -> Tensor:
    from unsloth.kernels import fast_rms_layernorm

    return fast_rms_layernorm(SimpleNamespace(weight=weight, variance_epsilon=EPS), x)


def _norm_backward(size: tuple[int, int], has_residual: bool) -> Case:
    def ours(t: Tensors) -> Call:
        _, rstd, h = rms_norm_forward(t["x"], t["weight"], EPS)
        grad = t.get("residual_grad")
        return lambda: rms_norm_backward(t["dy"], h, t["weight"], rstd, residual_grad=grad)[:1]

    def by_autograd(norm) -> Call:
        def build(t: Tensors) -> Call:
            (x,) = differentiable(t, "x")
            if not has_residual:
                return gradients([norm(x, t["weight"])], [x], [t["dy"]])
            # the residual stream goes on beside the norm
            return gradients([norm(x, t["weight"]), x], [x], [t["dy"], t["residual_grad"]])

        return build

    def truth(t: Tensors) -> Sequence[Tensor]:
        x = t["x"].double().requires_grad_(True)
        (dx,) = torch.autograd.grad(_true_norm(x, t["weight"].double()), x, t["dy"].double())
        return [dx + t["residual_grad"].double() if has_residual else dx]

    rows, width = size
    sides = {"ours": ours, "torch": by_autograd(stock_norm), "F.rms_norm": by_autograd(_torch_norm)}
    if not has_residual:
        sides |= {"liger": by_autograd(_liger_norm), "unsloth": by_autograd(_unsloth_norm)}
    else:
        sides["liger"] = _liger_added_norm_backward
    return Case(
        op=f"rms_norm backward{' + residual' if has_residual else ''}",
        size=_size_text(size),
        make=_norm_inputs(size, "dy", *(["residual_grad"] if has_residual else [])),
        sides=sides,
        truth=truth,
        bytes_moved=rows * ((8 if has_residual else 6) * width + 4),
    )


def _liger_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, EPS, 0.0, "llama", False)


def _liger_added_norm_backward(t: Tensors) -> Call:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    (x,) = differentiable(t, "x")
    zero = torch.zeros_like(x)
    found = liger_fused_add_rms_norm(x, zero, t["weight"], EPS, 0.0, "llama", False)
    return gradients(list(found), [x], [t["dy"], t["residual_grad"]])


def _glu_inputs(size: tuple[int, int], *names: str):
    return lambda device, dtype: randoms(device, dtype, **dict.fromkeys(names, size))


def _glu_forward(size: tuple[int, int]) -> Case:
    def liger(t: Tensors) -> Call:
        from liger_kernel.transformers.functional import liger_swiglu

        return lambda: [liger_swiglu(t["gate"], t["up"])]

    def unsloth(t: Tensors) -> Call:
        from unsloth.kernels import swiglu_fg_kernel

        return lambda: [swiglu_fg_kernel(t["gate"][None], t["up"][None])[0]]

    return Case(
        op="swiglu forward",
        size=_size_text(size),
        make=_glu_inputs(size, "gate", "up"),
        sides={
            "ours": lambda t: lambda: [glu_forward(t["gate"], t["up"])],
            "torch": lambda t: lambda: [functional.silu(t["gate"]) * t["up"]],
            "liger": liger,
            "unsloth": unsloth,
        },
        truth=lambda t: [functional.silu(t["gate"].double()) * t["up"].double()],
        bytes_moved=6 * size[0] * size[1],
    )


def _glu_backward(size: tuple[int, int], rebuilds: bool) -> Case:
    def ours(t: Tensors) -> Call:
        end = 3 if rebuilds else 2
        return lambda: glu_backward(t["dm"], t["gate"], t["up"], rebuild=rebuilds)[:end]

    def stock(t: Tensors) -> Call:
        gate, up = differentiable(t, "gate", "up")
        return gradients([functional.silu(gate) * up], [gate, up], [t["dm"]])

    def liger(t: Tensors) -> Call:
        from liger_kernel.transformers.functional import liger_swiglu

        # it writes the gradients over gate and up: only the first call computes the right ones
        gate, up = differentiable(t, "gate", "up")
        return gradients([liger_swiglu(gate, up)], [gate, up], [t["dm"]])

    def unsloth(t: Tensors) -> Call:
        from unsloth.kernels import swiglu_DWf_DW_dfg_kernel

        def call() -> list[Tensor]:
            # in place too; it gives back the product, then the gradients of up and gate
            product, d_up, d_gate = swiglu_DWf_DW_dfg_kernel(t["dm"], t["gate"], t["up"])
            return [d_gate, d_up, product]

        return call

    def truth(t: Tensors) -> list[Tensor]:
        gate, up = (t[name].double().requires_grad_(True) for name in ("gate", "up"))
        product = functional.silu(gate) * up
        found = list(torch.autograd.grad(product, [gate, up], t["dm"].double()))
        return [*found, product.detach()] if rebuilds else found

    return Case(
        op=f"swiglu backward{' + product' if rebuilds else ''}",
        size=_size_text(size),
        make=_glu_inputs(size, "dm", "gate", "up"),
        sides={"ours": ours, "unsloth": unsloth}
        if rebuilds
        else {"ours": ours, "torch": stock, "liger": liger},
        truth=truth,
        bytes_moved=(12 if rebuilds else 10) * size[0] * size[1],
    )


def _tables(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
    places = torch.arange(tokens, device=device, dtype=torch.float64)
    angles = torch.outer(places, ROPE_BASE**-exponents).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation as transformers writes it: x (..., tokens, head_dim)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def _rope(tokens: int, q_heads: int, kv_heads: int, head_dim: int) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        found = randoms(
            device, dtype, q=(tokens, q_heads, head_dim), k=(tokens, kv_heads, head_dim)
        )
        found["cos"], found["sin"] = _tables(tokens, head_dim, device)
        return found

    def ours(t: Tensors) -> Call:
        def call() -> list[Tensor]:
            rope_(t["q"], t["k"], t["cos"], t["sin"])
            return [t["q"], t["k"]]

        return call

    def by_head(rotate) -> Call:
        def build(t: Tensors) -> Call:
            # a model's tables have its dtype
            cos, sin = (t[name].to(t["q"].dtype) for name in ("cos", "sin"))
            q, k = (t[name].transpose(0, 1)[None] for name in ("q", "k"))
            return lambda: [x[0].transpose(0, 1) for x in rotate(q, k, cos, sin)]

        return build

    def liger(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        from liger_kernel.transformers.functional import liger_rope

        return liger_rope(q, k, cos[None], sin[None])

    def unsloth(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        from unsloth.kernels import fast_rope_embedding

        return fast_rope_embedding(q, k, cos, sin)

    def truth(t: Tensors) -> list[Tensor]:
        cos, sin = (t[name].double()[:, None] for name in ("cos", "sin"))
        return [_turned(t[name].double(), cos, sin) for name in ("q", "k")]

    return Case(
        op="rope",
        size=f"{tokens}x{q_heads}+{kv_heads}x{head_dim}",
        make=make,
        sides={
            "ours": ours,
            "torch": by_head(lambda q, k, c, s: [_turned(q, c, s), _turned(k, c, s)]),
            "liger": by_head(liger),
            "unsloth": by_head(unsloth),
        },
        truth=truth,
        bytes_moved=tokens * 4 * head_dim * (q_heads + kv_heads + 1),
    )
