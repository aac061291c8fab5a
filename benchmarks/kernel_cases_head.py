"""The loss of the head with its gradient for the hidden states, as cases."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.kernel_case import Build, Call, Case, Tensors, differentiable, gradients, randoms
from colab_qlora.kernels.linear_cross_entropy import linear_cross_entropy

# tokens, vocabulary, width: Llama 3 8B
SIZE = (4096, 128_256, 4096)
SIZE_DRY = (12, 200, 32)
IGNORED = (0.0, 0.5)  # shares of the rows without a label
TRUTH_ROWS = 512

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def cases(*, is_dry: bool) -> list[Case]:
    """All of this file."""
    return [_case(SIZE_DRY if is_dry else SIZE, ignored) for ignored in IGNORED]


def _ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return linear_cross_entropy(hidden, weight, labels, shift=False)


def _stock(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    # all logits, then all of them in float32, as transformers does it
    return torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels)


def _liger(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(hidden, weight, labels)


def _by_autograd(loss_of: Loss) -> Build:
    def build(t: Tensors) -> Call:
        (hidden,) = differentiable(t, "hidden")

        def call() -> list[Tensor]:
            loss = loss_of(hidden, t["weight"], t["labels"])
            return [loss, *torch.autograd.grad(loss, hidden)]

        return call

    return build


def _case(size: tuple[int, int, int], ignored: float) -> Case:
    tokens, vocab, width = size
    skipped = int(tokens * ignored)

    def make(device: torch.device, dtype: torch.dtype) -> Tensors:
        found = randoms(device, dtype, hidden=(tokens, width), weight=(vocab, width))
        found["weight"] *= 0.02
        generator = torch.Generator(device).manual_seed(1)
        labels = torch.randint(vocab, (tokens,), generator=generator, device=device)
        labels[:skipped] = -100
        return found | {"labels": labels}

    return Case(
        op=f"linear_cross_entropy{f', {ignored:.0%} ignored' if ignored else ''}",
        size=f"{tokens}x{vocab}x{width}",
        make=make,
        sides={
            "ours": _by_autograd(_ours),
            "torch": _by_autograd(_stock),
            "liger": _by_autograd(_liger),
        },
        truth=_true_loss,
        operations=4 * (tokens - skipped) * vocab * width,
    )


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
