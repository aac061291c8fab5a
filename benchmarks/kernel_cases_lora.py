"""What LoRA adds to a layer's passes, as cases: room beside a tensor, and gradients on the way.

"torch" has none of our kernels in it; "ours in parts" is what the fused kernel stands for. No peer
has a public function that does the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_case import Call, Case, Tensors, differentiable, randoms
from colab_qlora.kernels.copy_rows import copy_rows
from colab_qlora.kernels.glu_lora import (
    can_fuse_glu_lora,
    form_for,
    glu_lora_backward,
    padded_rank,
    share_of_tokens,
)
from colab_qlora.kernels.swiglu import glu_backward

SIZES = ((4096, 4096), (4096, 14336), (8192, 4096))
SIZES_DRY = ((8, 32),)
RANK, RANK_DRY = 16, 4
SPARE = 64


def cases(device: torch.device, *, is_dry: bool) -> list[Case]:
    """All of this file; how many sums a kernel leaves depends on the device."""
    rank = RANK_DRY if is_dry else RANK
    return [
        case
        for size in (SIZES_DRY if is_dry else SIZES)
        for case in (_copy(size), _glu_lora(size, rank, device))
    ]


def _copy(size: tuple[int, int]) -> Case:
    rows, width = size

    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        wide = torch.zeros(rows, width + SPARE, dtype=dtype, device=device)
        return randoms(device, dtype, x=size) | {"wide": wide}

    def ours(t: Tensors) -> Call:
        out = t["wide"][:, :width]

        def call() -> list[Tensor]:
            copy_rows(t["x"], out)
            return [out]

        return call

    def stock(t: Tensors) -> Call:
        out = t["wide"][:, :width]
        return lambda: [out.copy_(t["x"])]

    return Case(
        op="copy rows",
        size=f"{rows}x{width} of {width + SPARE}",
        make=make,
        sides={"ours": ours, "torch": stock},
        truth=lambda t: [t["x"].double()],
        bytes_moved=4 * rows * width,
    )


def _ours(t: Tensors) -> Call:
    # over gate and up, as a layer does it, only the first call would be right
    d_gate, d_up = torch.empty_like(t["gate"]), torch.empty_like(t["up"])
    inputs = [t[name] for name in ("dm", "gate", "up", "ds", "xg", "xu")]

    def call() -> list[Tensor]:
        sums = glu_lora_backward(*inputs, d_gate=d_gate, d_up=d_up)
        return [d_gate, d_up, *(x for x in sums if x is not None)]

    return call


def _in_parts(t: Tensors) -> Call:
    d_gate, d_up, m = (torch.empty_like(t["gate"]) for _ in range(3))

    def call() -> list[Tensor]:
        glu_backward(t["dm"], t["gate"], t["up"], d_gate=d_gate, d_up=d_up, m=m)
        return [d_gate, d_up, *_products(t, d_gate, d_up, m)]

    return call


def _stock(t: Tensors) -> Call:
    gate, up = differentiable(t, "gate", "up")
    m = functional.silu(gate) * up

    def call() -> list[Tensor]:
        d_gate, d_up = torch.autograd.grad(m, [gate, up], t["dm"], retain_graph=True)
        return [d_gate, d_up, *_products(t, d_gate, d_up, m.detach())]

    return call


def _products(t: Tensors, d_gate: Tensor, d_up: Tensor, m: Tensor) -> list[Tensor]:
    """The gradients of down_proj's A, gate_proj's B and up_proj's B in float32."""
    pairs = ((t["ds"], m), (d_gate, t["xg"]), (d_up, t["xu"]))
    return [_float_product(left, right) for left, right in pairs]


def _float_product(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, summed and left in float32."""
    if left.is_cuda:
        return torch.mm(left.t(), right, out_dtype=torch.float32)
    return left.float().t() @ right.float()  # mm has no out_dtype there


def _true_gradients(t: Tensors) -> Sequence[Tensor]:
    gate, up = (t[name].double().requires_grad_(True) for name in ("gate", "up"))
    m = functional.silu(gate) * up
    d_gate, d_up = torch.autograd.grad(m, [gate, up], t["dm"].double())
    ds, xg, xu = (t[name].double() for name in ("ds", "xg", "xu"))
    return [d_gate, d_up, ds.t() @ m.detach(), d_gate.t() @ xg, d_up.t() @ xu]


def _note(t: Tensors) -> str:
    is_fused = can_fuse_glu_lora(t["gate"], t["ds"], t["xg"], t["xu"])
    return "" if is_fused else "ours is in parts"


def _glu_lora(size: tuple[int, int], rank: int, device: torch.device) -> Case:
    tokens, width = size
    shapes = dict.fromkeys(("dm", "gate", "up"), size)
    shapes |= dict.fromkeys(("ds", "xg", "xu"), (tokens, rank))
    shares = _shares(tokens, width, rank, device)
    sum_bytes = 4 if shares == 1 else 8 * shares
    return Case(
        op="swiglu backward + lora",
        size=f"{tokens}x{width} rank {rank}",
        make=lambda device, dtype: randoms(device, dtype, **shapes),
        sides={"ours": _ours, "torch": _stock, "ours in parts": _in_parts},
        truth=_true_gradients,
        bytes_moved=10 * tokens * width + sum_bytes * 3 * rank * width,
        notes=_note,
    )


def _shares(tokens: int, width: int, rank: int, device: torch.device) -> int:
    """Among how many programs the kernel divides the tokens."""
    if device.type != "cuda":
        processors = 1
    else:
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    form = form_for([padded_rank(rank)] * 3)
    return -(-tokens // share_of_tokens(tokens, width, processors, form))
