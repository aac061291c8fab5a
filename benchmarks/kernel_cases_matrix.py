"""Decoding a 4-bit weight, and the loss of the head, as cases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernel_case import Call, Case, Tensors, differentiable, gradients, randoms
from colab_qlora.kernels.linear_cross_entropy import linear_cross_entropy
from colab_qlora.kernels.nf4 import nf4_dequantize, nf4_state

# gate and up of a Llama 3 8B layer, one above the other
NF4_SIZE = (28672, 4096)
NF4_SIZE_DRY = (96, 64)
# tokens, vocabulary, width: Llama 3 8B
HEAD_SIZE = (4096, 128_256, 4096)
HEAD_SIZE_DRY = (12, 200, 32)
TRUTH_ROWS = 512


def cases(*, is_dry: bool) -> list[Case]:
    """All of this file."""
    head = HEAD_SIZE_DRY if is_dry else HEAD_SIZE
    return [_nf4(NF4_SIZE_DRY if is_dry else NF4_SIZE), _head(head, 0.0), _head(head, 0.5)]


def _nf4(size: tuple[int, int]) -> Case:
    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        import bitsandbytes

        dense = randoms(device, dtype, weight=size)["weight"]
        weight = bitsandbytes.nn.Params4bit(
            dense, requires_grad=False, quant_type="nf4", compress_statistics=True
        )
        return {"weight": weight.to(device), "out": torch.empty_like(dense)}

    def theirs(t: Tensors) -> Call:
        import bitsandbytes

        weight = t["weight"]
        decode = bitsandbytes.functional.dequantize_4bit
        return lambda: [decode(weight.data, weight.quant_state)]

    def unsloth(t: Tensors) -> Call:
        from unsloth.kernels import fast_dequantize

        weight = t["weight"]
        return lambda: [fast_dequantize(weight.data, weight.quant_state)]

    return Case(
        op="nf4 decode, nested",
        size=f"{size[0]}x{size[1]}",
        make=make,
        sides={
            "ours": lambda t: lambda: [nf4_dequantize(t["weight"], out=t["out"])],
            "bitsandbytes": theirs,
            "unsloth": unsloth,
        },
        truth=lambda t: [_true_weight(t["weight"])],
        # half a byte of code, a byte of absmax a block of 64, two bytes out
        bytes_moved=int(size[0] * size[1] * (0.5 + 1 / 64 + 2)),
    )


def _true_weight(weight: Any) -> Tensor:
    state = nf4_state(weight)
    assert state.nested_absmax is not None and state.nested_code is not None
    assert state.offset is not None
    nested = state.nested_absmax.double().repeat_interleave(state.nested_blocksize)
    levels = state.nested_code.double()[state.absmax.int()]
    absmax = levels * nested[: levels.numel()] + state.offset.double()
    codes = torch.stack((state.packed >> 4, state.packed & 15), dim=1).reshape(-1).int()
    values = state.code.double()[codes].view(-1, state.blocksize) * absmax[:, None]
    return values.reshape(state.shape)


def _head(size: tuple[int, int, int], ignored: float) -> Case:
    """Loss and gradient of the hidden states; `ignored` is the share of rows without a label."""
    tokens, vocab, width = size

    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        found = randoms(device, dtype, hidden=(tokens, width), weight=(vocab, width))
        found["weight"] *= 0.02
        generator = torch.Generator(device).manual_seed(1)
        labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
        labels[: int(tokens * ignored)] = -100
        return found | {"labels": labels}

    def by_autograd(loss_of) -> Call:
        def build(t: Tensors) -> Call:
            (hidden,) = differentiable(t, "hidden")

            def call() -> list[Tensor]:
                loss = loss_of(hidden, t["weight"], t["labels"])
                return [loss, *torch.autograd.grad(loss, hidden)]

            return call

        return build

    def liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        return liger_fused_linear_cross_entropy(hidden, weight, labels)

    some = f", {ignored:.0%} ignored" if ignored else ""
    rows = tokens - int(tokens * ignored)
    return Case(
        op=f"linear_cross_entropy forward + backward{some}",
        size=f"{tokens}x{vocab}x{width}",
        make=make,
        sides={
            "ours": by_autograd(lambda h, w, y: linear_cross_entropy(h, w, y, shift=False)),
            "torch": by_autograd(_stock_loss),
            "liger": by_autograd(liger),
        },
        truth=_true_loss,
        operations=4 * rows * vocab * width,
    )


def _stock_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # all logits, then all of them in float32, as transformers does it
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels)


def _true_loss(t: Tensors) -> Sequence[Tensor]:
    hidden, weight, labels = t["hidden"].double(), t["weight"].double(), t["labels"]
    counted = int((labels != -100).sum())
    loss, grads = hidden.new_zeros(()), []
    for rows, targets in zip(hidden.split(TRUTH_ROWS), labels.split(TRUTH_ROWS), strict=True):
        rows = rows.detach().requires_grad_(True)
        part = torch.nn.functional.cross_entropy(rows @ weight.T, targets, reduction="sum")
        grads += gradients([part / counted], [rows], [hidden.new_ones(())])()
        loss += part.detach() / counted
    return [loss, torch.cat(grads)]
