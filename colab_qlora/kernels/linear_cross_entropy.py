"""The loss of a language model's head, without ever holding all logits.

For hidden rows h with label y, a head W (vocab, width) and bias b,

    z = (h W^T + b) * logit_scale,   x = softcap * tanh(z / softcap)  or  x = z
    loss = sum over labelled rows of (logsumexp(x) - x[y]) / n

Only rows with a label meet the head. They do so in chunks that fit a memory budget, and each chunk
gives loss and gradient while its logits are there: one GEMM makes the logits, one row kernel turns
them into losses and their own gradient (`cross_entropy_rows.py`), one GEMM turns that into the
gradient of the rows. Backward has only to multiply and scatter.

Memory: one chunk of logits (`memory_budget_bytes`) during forward; labelled * width values from
forward to backward. Stock holds tokens * vocab logits in half precision and in float32, and
their log_softmax: 2.6 GB for 2,048 tokens of Llama 3, against 0.26 GB + 17 MB here. A head that
is trained adds vocab * width float32 values (2.1 GB for Llama 3 8B) from forward to backward. An
int8 head is never decoded as a whole: a quarter of the budget is for a tile of its rows, and what
the rows' gradients are added up in is paid from the budget too (`weight_products.py`).

Bytes moved: 5 * vocab values a labelled row, plus W once a chunk and GEMM.

The logits of a chunk have the dtype of `hidden`, as in stock, which rounds them to it before its
float32 loss. Float32 logits would be closer to the truth, but halve the rows of a chunk, and the
second GEMM would need them in half precision in a second buffer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from colab_qlora.errors import UserError
from colab_qlora.kernels.cross_entropy_rows import cross_entropy_rows_, gradient_scale
from colab_qlora.kernels.int8_decode import Int8Weight
from colab_qlora.kernels.linear_cross_entropy_inputs import (
    CountedLabels,
    LabelledRows,
    check_tensors,
    count_labels,
    find_labelled,
    loss_divisor,
    loss_dtype,
)
from colab_qlora.kernels.logits_chunk import (
    DEFAULT_MEMORY_BUDGET_BYTES,
    TILE_SHARE,
    aligned_vocab,
    head_chunk_rows,
)
from colab_qlora.kernels.weight_products import (
    DenseProducts,
    Int8Products,
    hide_from_products,
)

# rows of a float32 product of a trained head at least, as of a chunk of logits
_MIN_ROWS = 16


@dataclass(frozen=True)
class _Settings:
    """The numbers of one call; `needs` says which of hidden, weight and bias want a gradient."""

    softcap: float | None
    logit_scale: float
    chunk_rows: int
    memory_budget_bytes: int
    needs: tuple[bool, bool, bool]

    def __post_init__(self) -> None:
        if self.softcap is not None and not 0 < self.softcap < math.inf:
            raise UserError("softcap is not positive", got=self.softcap, allowed="None, or above 0")
        if not math.isfinite(self.logit_scale):
            raise UserError(
                "logit_scale is not finite", got=self.logit_scale, allowed="a finite number"
            )


@dataclass(frozen=True, eq=False)
class _Sums:
    """Losses, and the gradients of their sum: all before the division by n.

    The gradients lack the factor logit_scale / gradient_scale(dtype); None where not wanted.

    Attributes:
        losses: one a labelled row, float32 (float64 for float64 inputs).
        rows: gradient of the labelled rows, in hidden's dtype, shape (labelled, width).
        weight: gradient of the head, float32 or float64, since chunks are added up in it.
        bias: likewise.
    """

    losses: torch.Tensor
    rows: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def _run_head(
    hidden: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    bias: torch.Tensor | None,
    labelled: LabelledRows,
    settings: _Settings,
) -> _Sums:
    """Losses and wanted gradients, chunk by chunk, through one buffer of logits."""
    vocab, width = weight.shape
    count, step, index = labelled.targets.numel(), settings.chunk_rows, labelled.index
    sums = _empty_sums(hidden, vocab, count, settings.needs)
    all_rows = hidden.reshape(-1, width)
    head: DenseProducts | Int8Products
    if isinstance(weight, torch.Tensor):
        head = DenseProducts(weight)
    else:
        head = Int8Products(weight, hidden.dtype, settings.memory_budget_bytes // TILE_SHARE)
    whole = hidden.new_empty(min(step, count), aligned_vocab(vocab))
    buffer = whole[:, :vocab]
    hide_from_products(whole[:, vocab:])
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        rows = all_rows[part] if index is None else all_rows.index_select(0, index[part])
        logits = buffer[: rows.shape[0]]
        head.products_(rows, bias, logits)
        cross_entropy_rows_(
            logits,
            labelled.targets[part],
            sums.losses[part],
            softcap=settings.softcap,
            logit_scale=settings.logit_scale,
            writes_gradient=any(settings.needs),
        )
        if sums.rows is not None:
            head.input_gradient_(logits, sums.rows[part])
        if sums.weight is not None:
            _add_product_(sums.weight, logits, rows, settings.memory_budget_bytes)
        if sums.bias is not None:
            sums.bias.add_(logits.sum(dim=0, dtype=sums.bias.dtype))
    return sums


def _empty_sums(
    hidden: torch.Tensor, vocab: int, count: int, needs: tuple[bool, bool, bool]
) -> _Sums:
    width, dtype = hidden.shape[-1], loss_dtype(hidden.dtype)
    return _Sums(
        losses=hidden.new_empty(count, dtype=dtype),
        rows=hidden.new_empty(count, width) if needs[0] else None,
        weight=hidden.new_zeros(vocab, width, dtype=dtype) if needs[1] else None,
        bias=hidden.new_zeros(vocab, dtype=dtype) if needs[2] else None,
    )


def _add_product_(
    total: torch.Tensor, gradient: torch.Tensor, rows: torch.Tensor, memory_budget_bytes: int
) -> None:
    """total += gradient^T rows, in total's dtype.

    In half precision the product comes in slices of the vocabulary, since a whole float32 product
    would take as much memory as the total itself.
    """
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.T, rows)
        return
    vocab, width = total.shape
    step = max(_MIN_ROWS, memory_budget_bytes // (4 * max(width, rows.shape[0])))
    for start in range(0, vocab, step):
        part = slice(start, start + step)
        columns = gradient[:, part].T
        if total.is_cuda:
            total[part] += torch.mm(columns, rows, out_dtype=torch.float32)
        else:  # mm has no out_dtype there
            total[part].addmm_(columns.float(), rows.float())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor | Int8Weight,
        bias: torch.Tensor | None,
        labelled: LabelledRows,
        divisor: float | torch.Tensor,
        settings: _Settings,
    ) -> torch.Tensor:
        sums = _run_head(hidden, weight, bias, labelled, settings)
        ctx.save_for_backward(labelled.index, sums.rows, sums.weight, sums.bias)
        ctx.hidden_shape, ctx.dtype, ctx.divisor = hidden.shape, hidden.dtype, divisor
        ctx.factor = settings.logit_scale / gradient_scale(hidden.dtype)
        return sums.losses.sum() / divisor

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        index, rows, weight, bias = ctx.saved_tensors
        factor = loss_gradient * ctx.factor / ctx.divisor
        scaled = [
            None if sums is None else _scaled(sums, factor, ctx.dtype)
            for sums in (rows, weight, bias)
        ]
        if scaled[0] is not None:
            scaled[0] = _scattered(scaled[0], index, ctx.hidden_shape)
        return *scaled, None, None, None


def _scaled(sums: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    # a factor of one dimension takes part in type promotion, so the product is rounded once; one of
    # none would be rounded to half precision first, where GradScaler's 65536 is infinite
    return torch.mul(sums, factor.reshape(1), out=torch.empty_like(sums, dtype=dtype))


def _scattered(rows: torch.Tensor, index: torch.Tensor | None, shape: torch.Size) -> torch.Tensor:
    if index is None:
        return rows.reshape(shape)
    gradient = rows.new_zeros(shape)
    gradient.view(-1, shape[-1]).index_copy_(0, index, rows)
    return gradient


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor | Int8Weight,
    labels: torch.Tensor | CountedLabels,
    *,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = True,
    num_items_in_batch: int | torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget_bytes: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of a language model's head, from the hidden states, without all logits.

    If no label counts, or there are no tokens, the loss is 0.0 and every gradient is zero. The mean
    of `F.cross_entropy`, and so `ForCausalLMLoss`, is NaN there, which ends a training run.

    Waits for the GPU once, to read how many rows are labelled, unless `count_labels` asked before.

    Args:
        hidden: float16, bfloat16, float32 or float64, shape (..., tokens, width).
        weight: the head, hidden's dtype and device, shape (vocab, width); or codes and scales of
            an int8 head on that device, which get no gradient.
        labels: integers, shape (..., tokens), on any device: tokens in [0, vocab), or ignore_index;
            or what `count_labels` made of them with the same ignore_index and shift.
        bias: hidden's dtype and device, shape (vocab,).
        ignore_index: the label of positions that do not count.
        shift: position i predicts label i + 1 of its sequence (the last but one dimension of
            hidden), as `ForCausalLMLoss` has it; False if labels and positions are aligned.
        num_items_in_batch: n, a number or a tensor with one element; the labelled rows if None.
            Pass 1 for the sum. On a GPU it is not looked at, so there a 0 gives an infinite loss.
        softcap: bound the logits to (-softcap, softcap) by a tanh, as Gemma 2 does.
        logit_scale: multiplies the logits first (Cohere's logit_scale, 1 / Granite's scaling).
        memory_budget_bytes: for the chunk of logits, and the decoded tile of an int8 head; None
            for 256 MiB. At least 16 rows of logits are held, and 64 of the head.

    Returns:
        0-dim, float32, or float64 for float64 inputs.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or a label outside the vocabulary.

    Example:
        >>> hidden, head = torch.zeros(1, 3, 8), torch.zeros(100, 8)
        >>> linear_cross_entropy(hidden, head, torch.tensor([[7, 8, -100]]))
        tensor(4.6052)
    """
    given = labels.given if isinstance(labels, CountedLabels) else labels
    check_tensors(hidden, weight, given, bias)
    vocab, tracks = weight.shape[0], torch.is_grad_enabled()
    settings = _Settings(
        softcap=softcap,
        logit_scale=logit_scale,
        chunk_rows=head_chunk_rows(weight, hidden.itemsize, memory_budget_bytes),
        memory_budget_bytes=memory_budget_bytes or DEFAULT_MEMORY_BUDGET_BYTES,
        needs=(
            tracks and hidden.requires_grad,
            tracks and isinstance(weight, torch.Tensor) and weight.requires_grad,
            tracks and bias is not None and bias.requires_grad,
        ),
    )
    if not isinstance(labels, CountedLabels):
        labels = count_labels(labels, ignore_index, shift)
    elif (labels.ignore_index, labels.shift) != (ignore_index, shift):
        raise UserError(
            "labels were counted in another way",
            got=f"ignore_index={labels.ignore_index}, shift={labels.shift}",
            allowed=f"ignore_index={ignore_index}, shift={shift}",
            do="Pass both to count_labels too",
        )
    labelled = find_labelled(labels, ignore_index, vocab, hidden.device)
    divisor = loss_divisor(num_items_in_batch, labelled.targets.numel(), hidden)
    if any(settings.needs):
        return _LinearCrossEntropy.apply(hidden, weight, bias, labelled, divisor, settings)
    return _run_head(hidden, weight, bias, labelled, settings).losses.sum() / divisor
