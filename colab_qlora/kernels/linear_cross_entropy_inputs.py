"""What `linear_cross_entropy` is given: the checks, the labelled rows, and the divisor n.

Everything here looks at labels and shapes only; no logit is computed. The host reads from the
device once: the count of labelled rows and the range of their labels, together.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from colab_qlora.errors import UserError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass(frozen=True, eq=False)
class LabelledRows:
    """The rows that meet the head.

    Attributes:
        index: their places among all rows, int64, shape (labelled,); None if every row is labelled.
        targets: the token that each has to predict, int64, shape (labelled,).
    """

    index: torch.Tensor | None
    targets: torch.Tensor


def check_tensors(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Raise a ValueError that names the first tensor whose shape, dtype or device does not fit."""
    if hidden.ndim < 2 or hidden.dtype not in _FLOATS:
        raise UserError(
            "hidden is not a float tensor of rows",
            got=f"{hidden.dtype}, shape {tuple(hidden.shape)}",
            allowed="float16, bfloat16, float32 or float64, shape (..., tokens, width)",
        )
    width = hidden.shape[-1]
    if weight.ndim != 2 or weight.shape[1] != width or not weight.shape[0]:
        raise UserError(
            "weight does not fit hidden",
            got=f"shape {tuple(weight.shape)}",
            allowed=f"(vocab, {width}), vocab 1 or more",
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise UserError(
            "bias does not fit weight",
            got=f"shape {tuple(bias.shape)}",
            allowed=f"({weight.shape[0]},)",
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype, tensor.device) != (hidden.dtype, hidden.device):
            raise UserError(
                f"{name} and hidden differ in dtype or device",
                got=f"{name} {tensor.dtype} on {tensor.device}",
                allowed=f"{hidden.dtype} on {hidden.device}",
                do=f"Cast one of them, e.g. hidden.to({name}.dtype)",
            )
    if labels.dtype not in _INTEGERS or labels.shape != hidden.shape[:-1]:
        raise UserError(
            "labels are not one token a row of hidden",
            got=f"{labels.dtype}, shape {tuple(labels.shape)}",
            allowed=f"an integer dtype, shape {tuple(hidden.shape[:-1])}",
        )


def find_labelled(
    labels: torch.Tensor, ignore_index: int, shift: bool, vocab: int, device: torch.device
) -> LabelledRows:
    """The labelled rows, in order, by one read from the device.

    The count, which the shapes need, and the extremes of the labels, which the check needs, come to
    the host together: one synchronisation a step, or none if the labels are on the CPU.

    Args:
        labels: an integer dtype, shape (..., tokens).
        ignore_index: the label of rows that have none.
        shift: position i has the label of position i + 1 of its sequence; the last has none.
        vocab: every other label lies in [0, vocab).
        device: where the result is needed.

    Raises:
        ValueError: a label outside the vocabulary.
    """
    labels = labels.detach().long()
    if not labels.numel():
        return LabelledRows(None, labels.reshape(-1).to(device))
    if shift:
        labels = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)
    labels = labels.reshape(-1)
    ignored = labels == ignore_index
    limits = torch.iinfo(torch.int64)
    lowest = labels.masked_fill(ignored, limits.max).amin()
    highest = labels.masked_fill(ignored, limits.min).amax()
    ignored_rows, low, high = torch.stack([ignored.sum(), lowest, highest]).tolist()
    count = labels.numel() - ignored_rows
    if count and not 0 <= low <= high < vocab:
        raise UserError(
            "labels hold a token that the head does not have",
            got=f"labels from {low} to {high}",
            allowed=f"0 to {vocab - 1}, and {ignore_index} for no label",
            do="Tokenise with the model's own tokenizer",
        )
    if not ignored_rows:
        return LabelledRows(None, labels.to(device))
    # nonzero would read the count from the device once more
    index = torch.nonzero_static(~ignored, size=count).squeeze(1)
    return LabelledRows(index.to(device), labels.index_select(0, index).to(device))


def loss_divisor(
    num_items_in_batch: int | torch.Tensor | None, labelled: int, like: torch.Tensor
) -> float | torch.Tensor:
    """n as a number or, if it comes from a GPU, as a 0-dim tensor that nobody waits for."""
    if not labelled:
        return 1.0
    if num_items_in_batch is None:
        return float(labelled)
    if isinstance(num_items_in_batch, torch.Tensor):
        if num_items_in_batch.numel() != 1:
            raise UserError(
                "num_items_in_batch is not one number",
                got=f"shape {tuple(num_items_in_batch.shape)}",
                allowed="an int, or a tensor with one element",
            )
        if num_items_in_batch.is_cuda:
            return num_items_in_batch.detach().reshape(()).to(like.device, loss_dtype(like.dtype))
    items = float(num_items_in_batch)
    if items <= 0:
        raise UserError(
            "num_items_in_batch is not positive, yet some labels are not ignored",
            got=items,
            allowed="1 or more",
        )
    return items


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """What losses and sums of gradients are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
