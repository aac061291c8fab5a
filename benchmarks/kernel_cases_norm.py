"""RMSNorm forward and backward, with and without the residual stream, as cases.

"torch" is what transformers computes, in its roundings; `F.rms_norm` stands under its own name.
Peers are called by their public functions alone. The norms' weights are frozen, as in QLoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_case import Build, Call, Case, Tensors, differentiable, gradients, randoms
from colab_qlora.kernels.rms_norm import rms_norm_backward, rms_norm_forward

EPS = 1e-5
SIZES = ((4096, 4096), (4096, 14336), (8192, 4096))
SIZES_DRY = ((8, 32),)

Norm = Callable[[Tensor, Tensor], Tensor]


def cases(*, is_dry: bool) -> list[Case]:
    """All of this file."""
    found = []
    for size in SIZES_DRY if is_dry else SIZES:
        for has_residual in (False, True):
            found += [_forward(size, has_residual), _backward(size, has_residual)]
        found.append(_backward_and_output(size))
    return found


def _stock(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return weight * wide.to(x.dtype)


def _functional(x: Tensor, weight: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], weight, EPS)


def _liger(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(x, weight, EPS, 0.0, "llama", False)


def _liger_added(x: Tensor, residual: Tensor, weight: Tensor) -> list[Tensor]:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return list(liger_fused_add_rms_norm(x, residual, weight, EPS, 0.0, "llama", False))


def _unsloth(x: Tensor, weight: Tensor) -> Tensor:
    from unsloth.kernels import fast_rms_layernorm

    return fast_rms_layernorm(SimpleNamespace(weight=weight, variance_epsilon=EPS), x)


def _true_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def _inputs(size: tuple[int, int], *names: str):
    shapes = dict.fromkeys(("x", *names), size) | {"weight": size[1:]}
    return lambda device, dtype: randoms(device, dtype, **shapes)


def _composed(norm: Norm) -> Build:
    """The norm of x, or of x plus the residual, which is a result too."""

    def build(t: Tensors) -> Call:
        def call() -> list[Tensor]:
            if "residual" not in t:
                return [norm(t["x"], t["weight"])]
            h = t["x"] + t["residual"]
            return [norm(h, t["weight"]), h]

        return call

    return build


def _ours(t: Tensors) -> Call:
    residual = t.get("residual")

    def call() -> list[Tensor]:
        y, _, h = rms_norm_forward(t["x"], t["weight"], EPS, residual=residual)
        return [y] if residual is None else [y, h]

    return call


def _true_forward(t: Tensors) -> list[Tensor]:
    x, weight = t["x"].double(), t["weight"].double()
    if "residual" not in t:
        return [_true_norm(x, weight)]
    h = x + t["residual"].double()
    return [_true_norm(h, weight), h]


def _forward(size: tuple[int, int], has_residual: bool) -> Case:
    rows, width = size
    sides: dict[str, Build] = {
        "ours": _ours,
        "torch": _composed(_stock),
        "F.rms_norm": _composed(_functional),
        "liger": _composed(_liger),
        "unsloth": _composed(_unsloth),  # it has no norm with a residual for training
    }
    if has_residual:
        sides["liger"] = lambda t: lambda: _liger_added(t["x"], t["residual"], t["weight"])
    return Case(
        op=f"rms_norm forward{' + residual' if has_residual else ''}",
        size=f"{rows}x{width}",
        make=_inputs(size, *(["residual"] if has_residual else [])),
        sides=sides,
        truth=_true_forward,
        bytes_moved=rows * ((8 if has_residual else 4) * width + 4),
    )


def _by_autograd(norm: Norm) -> Build:
    def build(t: Tensors) -> Call:
        (x,) = differentiable(t, "x")
        if "residual_grad" not in t:
            return gradients([norm(x, t["weight"])], [x], [t["dy"]])
        # the residual stream goes on beside the norm
        return gradients([norm(x, t["weight"]), x], [x], [t["dy"], t["residual_grad"]])

    return build


def _liger_added_backward(t: Tensors) -> Call:
    (x,) = differentiable(t, "x")
    found = _liger_added(x, torch.zeros_like(x), t["weight"])
    return gradients(found, [x], [t["dy"], t["residual_grad"]])


def _ours_backward(t: Tensors) -> Call:
    _, rstd, h = rms_norm_forward(t["x"], t["weight"], EPS)
    grad = t.get("residual_grad")
    return lambda: rms_norm_backward(t["dy"], h, t["weight"], rstd, residual_grad=grad)[:1]


def _true_backward(t: Tensors) -> Sequence[Tensor]:
    x = t["x"].double().requires_grad_(True)
    (dx,) = torch.autograd.grad(_true_norm(x, t["weight"].double()), x, t["dy"].double())
    return [dx + t["residual_grad"].double() if "residual_grad" in t else dx]


def _backward(size: tuple[int, int], has_residual: bool) -> Case:
    rows, width = size
    sides: dict[str, Build] = {
        "ours": _ours_backward,
        "torch": _by_autograd(_stock),
        "F.rms_norm": _by_autograd(_functional),
        "liger": _liger_added_backward if has_residual else _by_autograd(_liger),
        "unsloth": _by_autograd(_unsloth),
    }
    return Case(
        op=f"rms_norm backward{' + residual' if has_residual else ''}",
        size=f"{rows}x{width}",
        make=_inputs(size, "dy", *(["residual_grad"] if has_residual else [])),
        sides=sides,
        truth=_true_backward,
        bytes_moved=rows * ((8 if has_residual else 6) * width + 4),
    )


def _ours_with_output(t: Tensors) -> Call:
    _, rstd, h = rms_norm_forward(t["x"], t["weight"], EPS)
    normed = torch.empty_like(h)

    def call() -> list[Tensor]:
        given = (t["dy"], h, t["weight"], rstd)
        dx, _ = rms_norm_backward(*given, residual_grad=t["residual_grad"], normed=normed)
        return [dx, normed]

    return call


def _then_forward(backward: Build, norm: Norm) -> Build:
    """The norm once more, in a pass of its own."""

    def build(t: Tensors) -> Call:
        call = backward(t)
        # one of them may have asked for gradients
        x = t["x"].detach()
        return lambda: [*call(), norm(x, t["weight"])]

    return build


def _backward_and_output(size: tuple[int, int]) -> Case:
    rows, width = size

    def ours_forward(x: Tensor, weight: Tensor) -> Tensor:
        return rms_norm_forward(x, weight, EPS)[0]

    def truth(t: Tensors) -> list[Tensor]:
        return [*_true_backward(t), _true_norm(t["x"].double(), t["weight"].double())]

    return Case(
        op="rms_norm backward + residual + output",
        size=f"{rows}x{width}",
        make=_inputs(size, "dy", "residual_grad"),
        sides={
            "ours": _ours_with_output,
            "torch": _then_forward(_by_autograd(_stock), _stock),
            "ours one by one": _then_forward(_ours_backward, ours_forward),
        },
        truth=truth,
        bytes_moved=rows * (10 * width + 4),
    )
